"""A monitor that ends streams on their way to a sad ending, from stories to live streams; all through the client.

1. fable's stories end after a neutral "In the end,", in the mood of what was told. The model continues them greedily to
   the end of the sentence; a continuation is marked at its first word of a mood ("cried", "sad", "smiled").
2. A probe learns from continuations of stories of the generator's labelled split which of them end sadly, at every
   position before the mark (of the others at every position). The layer is chosen out of fold.
3. The threshold is such that of other continuations of that split none would have been ended.
4. Stories of the validation split, which share no combination with them, are continued unwatched, and under the monitor.

- `abort_before_mark`: of the continuations that end sadly, the share that is ended with the mark unsaid.
- `abort_false_positives`: of the others, the share that is ended.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from glasshouse.client import AsyncModel, Example, generated, read_probe
from glasshouse.fable.corpus.splits import Split
from glasshouse.fable.corpus.stories import make_story
from glasshouse.fable.mood_flip import ENDING_WORDS

from ..harness import Report
from ..workbench import Workbench

N_TRAIN, N_CALIBRATION, N_EVALUATED = 600, 600, 600
N_TOGETHER = 32
MAX_TOKENS = 40
BAR_STOPPED, BAR_FALSE = 0.95, 0.01
_WORD = re.compile(r"[A-Za-z]+")
_MARKS = {word: mood for mood, words in ENDING_WORDS.items() for word in words}


@dataclass(frozen=True)
class Continuation:
    """A story continued: `mood` of its first marked word, "" where there is none. `before`: the positions fed from the
    prompt's last on, up to the one that predicts the mark; all of them where there is none, or it is of another mood.
    """

    ids: list[int]
    text: str
    mood: str
    before: list[int]
    reason: str
    scores: np.ndarray


def run(bench: Workbench, report: Report) -> None:
    """abort_before_mark, abort_false_positives"""
    stopped, false, n_sad, n_other = bench.run(_measure(bench.served_model, bench.loaded.tokenizer.decode))
    report(
        "abort_before_mark",
        stopped,
        "of sad endings",
        f"{n_sad} sad continuations, none stopped unwatched",
        f">= {BAR_STOPPED:g}",
        stopped >= BAR_STOPPED,
    )
    report(
        "abort_false_positives",
        false,
        "of other endings",
        f"{n_other} continuations that do not end sadly",
        f"<= {BAR_FALSE:g}",
        false <= BAR_FALSE,
    )


async def _measure(model: AsyncModel, decode: Callable[[list[int]], str]) -> tuple[float, float, int, int]:
    async def told(split: Split, n: int, seed: int, **rest: Any) -> list[Continuation]:
        return await _continued(model, decode, stories(split, n, seed), **rest)

    layers = [f"blocks.{layer}.hook_resid_post" for layer in range(model.info.n_layers)]
    training = await model.train_probe(
        [
            Example(one.ids, label="sad" if one.mood == "sad" else "other", positions=one.before)
            for one in await told("labelled", N_TRAIN, 1)
        ],
        hook_points=layers,
        best=True,
        pooling="token",
        positive="sad",
        name="sad-ending",
        seed=0,
    )
    probe = await training.result(timeout=600)
    calibration = await told(
        "labelled", N_CALIBRATION, 2, readouts=[read_probe(probe, positions=generated())]
    )
    above = max(float(one.scores.max(initial=0.0)) for one in calibration if one.mood != "sad")
    labels = {"watched": "endings"}
    await model.create_monitor(
        "sad-ending",
        probe=probe,
        above=min(above, 0.9999),
        action="abort",
        positions=generated(),
        labels=labels,
    )
    free = await told("validation", N_EVALUATED, 3)
    watched = await told("validation", N_EVALUATED, 3, labels=labels)
    sad = [index for index, one in enumerate(free) if one.mood == "sad"]
    other = [index for index, one in enumerate(free) if one.mood != "sad"]
    # Ended, and what was said until then is the same story with its mark still to come.
    stopped = [i for i in sad if watched[i].reason == "aborted" and watched[i].mood != "sad"]
    assert all(free[i].text.startswith(watched[i].text) for i in stopped)
    wrongly = [i for i in other if watched[i].reason == "aborted"]
    return len(stopped) / len(sad), len(wrongly) / len(other), len(sad), len(other)


def stories(split: Split, n: int, seed: int) -> list[str]:
    """`n` stories of a split, up to their endings."""
    rng = random.Random(f"abort{split}{seed}")
    drawn = [make_story(rng, split) for _ in range(n)]
    return [f"{story.body} {story.ending_prefix}" for story in drawn]


async def _continued(
    model: AsyncModel, decode: Callable[[list[int]], str], prompts: Sequence[str], **rest: Any
) -> list[Continuation]:
    places = asyncio.Semaphore(N_TOGETHER)

    async def one(prompt: str) -> Continuation:
        async with places:
            stream = model.generate(
                prompt, max_tokens=MAX_TOKENS, temperature=0.0, stop=(".", "!", "\n"), **rest
            )
            done = await stream.result()
        marks = [word for word in _WORD.finditer(done.text) if word.group().lower() in _MARKS]
        mood = _MARKS[marks[0].group().lower()] if marks else ""
        n_prompt = len(done.prompt)
        end = n_prompt + len(done.token_ids) - 1
        if mood == "sad":
            said = [len(decode(done.token_ids[: n + 1])) for n in range(len(done.token_ids))]
            end = n_prompt + next(n for n, size in enumerate(said) if size > marks[0].start())
        scores = [token.probes["sad-ending"]["sad"] for token in done.tokens if token.probes]
        return Continuation(
            ids=[*done.prompt, *done.token_ids],
            text=done.text,
            mood=mood,
            before=list(range(n_prompt - 1, end)),
            reason=done.finish_reason,
            scores=np.array(scores),
        )

    return await asyncio.gather(*(one(prompt) for prompt in prompts))
