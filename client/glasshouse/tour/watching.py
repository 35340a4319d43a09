"""From twenty labelled sentences to a monitor that stops a live stream.

1. A probe: twenty sentences, ten of them sad; trained on every layer's stream, the best layer kept, and published.
2. The probe read on a story as it is written, token by token.
3. A monitor: the probe scored on every request of the model. Stories that it was not made from are told to their end,
   by a client that asks for nothing; those that turn sad are ended, and its events say when and why.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from rich.text import Text

from glasshouse import fable
from glasshouse.client import GenerationResult, Monitor, Probe, generated, read_probe
from glasshouse.tour.guide import Guide, expect
from glasshouse.tour.mood import MAX_TOKENS, coloured, stories, tail
from glasshouse.tour.mood_words import mood_of

N_EACH = 10
ABOVE = 0.8
N_SHOWN = 2
NAME = "tour-sad"


def train_probe(guide: Guide) -> Probe:
    """Step 1."""
    screen, model = guide.screen, guide.model
    screen.stage("A probe: from twenty labelled sentences")
    screen.code(
        "probe = model.train_probe({'sad': sad_sentences, 'happy': happy_sentences}, positive='sad',",
        f"                          hook_points=layers, best=True, name={NAME!r}).result()",
    )
    examples = {mood: _sentences(mood) for mood in ("sad", "happy")}
    layers = [f"blocks.{layer}.hook_resid_post" for layer in range(model.info.n_layers)]
    begun = time.perf_counter()
    probe = model.train_probe(
        examples, positive="sad", hook_points=layers, best=True, name=NAME, next_version=True
    ).result()
    seconds = time.perf_counter() - begun
    held_out = [r for r in fable.labelled("mood") if (r["split"], r["kind"]) == ("test", "sentence")]
    scores = [float(scored) for scored in probe.score([record["text"] for record in held_out])]
    right = sum((score > 0.5) == (r["label"] == "sad") for score, r in zip(scores, held_out, strict=True))
    screen.note(
        f"{sum(map(len, examples.values()))} sentences, trained in {seconds:.1f} s; the best layer is "
        f"{probe.info.hook_points[0]}. Of {len(held_out)} sentences that it has not seen it tells "
        f"{right / len(held_out):.0%} right."
    )
    expect(right > 0.9 * len(held_out), "nine in ten sentences told right")
    return probe


def watch_and_stop(guide: Guide, probe: Probe) -> None:
    """Steps 2 and 3."""
    screen, model = guide.screen, guide.model
    told = stories()
    prompts = [story for _, story in told]
    screen.code("model.generate(story, ..., readouts=[read_probe(probe)])")
    for prompt in (prompts[0], prompts[-1]):
        with model.generate(
            prompt,
            max_tokens=MAX_TOKENS,
            temperature=0.0,
            stop=["\n"],
            readouts=[read_probe(probe, generated())],
        ) as stream:
            line = Text("  ")
            for token in stream:
                line.append(token.text)
                for reading in token.probes.values():
                    line.append(f" {float(reading):.2f}", style="red" if float(reading) > ABOVE else "dim")
            screen.put(line)
    screen.stage("A monitor: it watches every request, and ends what turns sad")
    screen.code(
        f"monitor = model.create_monitor({NAME!r}, probe=probe, above={ABOVE:g}, positions=generated(), action='abort')",
        "model.generate(story, ...)    # asks for nothing",
    )
    monitor = model.create_monitor(NAME, probe=probe, above=ABOVE, positions=generated(), action="abort")
    try:
        with monitor.watch() as watch:
            results = _told(guide, prompts)
            n_stopped = sum(result.finish_reason == "aborted" for result in results)
            events = [next(watch) for _ in range(n_stopped)]
        _report(guide, told, results, monitor)
        first = events[0]
        screen.note(
            f"{len(events)} events were streamed meanwhile; the first: position {first.position}, score "
            f"{first.score:.2f} above {first.threshold:g}, action {first.action!r}."
        )
    finally:
        monitor.delete()


def _report(
    guide: Guide, told: list[tuple[str, str]], results: list[GenerationResult], monitor: Monitor
) -> None:
    """What was stopped, of either mood."""
    screen = guide.screen
    n_each = len(told) // 2
    stopped = [result.finish_reason == "aborted" for result in results]
    shown = [*range(N_SHOWN), *range(n_each, n_each + N_SHOWN)]
    screen.table(
        ["the story so far", "what came of it", "finish_reason"],
        [(tail(told[i][1]), _written(results[i]), results[i].finish_reason) for i in shown],
        lines=True,
        shares=(5, 4, 2),
    )
    early = sum(stop and mood_of(r.text) is None for stop, r in zip(stopped, results, strict=True))
    sad, happy = sum(stopped[:n_each]), sum(stopped[n_each:])
    screen.note(
        f"{sad} of {n_each} sad stories were ended, {early} of them before their sad word was out; of the {n_each} happy "
        f"ones {happy}."
    )
    expect(sad > 0.9 * n_each and early > 0.9 * sad, "sad endings stopped before their word")
    expect(happy <= 1, "happy endings left alone")


def _written(result: GenerationResult) -> Text:
    return Text(result.text.strip() + " |") if result.finish_reason == "aborted" else coloured(result.text)


def _told(guide: Guide, prompts: list[str]) -> list[GenerationResult]:
    """Every story's ending, all at once."""

    def ending(prompt: str) -> GenerationResult:
        return guide.model.generate(prompt, max_tokens=MAX_TOKENS, temperature=0.0, stop=["\n"]).result()

    with ThreadPoolExecutor(max_workers=len(prompts)) as pool:
        return list(pool.map(ending, prompts))


def _sentences(mood: str) -> list[str]:
    records = [
        r
        for r in fable.labelled("mood")
        if (r["split"], r["kind"], r["label"]) == ("train", "sentence", mood)
    ]
    return [record["text"] for record in records[:N_EACH]]
