"""Watches against an oracle: Hugging Face's model with plain hooks, a probe's own `score`, and the rule alone."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from glasshouse import fable
from glasshouse.server.engines.watching import RequestWatch, Roster, Sighting, Watch
from glasshouse.server.probes.aggregation import START, Aggregation, Change, Rule, step
from glasshouse.server.probes.calibration import PlattScaling
from glasshouse.server.probes.examples import Task
from glasshouse.server.probes.pooling import Pooling, RunningPool
from glasshouse.server.probes.served import ProbeFacts, ServedProbe, affine
from glasshouse.server.readouts.score_columns import FeatureColumnSource, ProbeColumnSource
from glasshouse.server.types.conditions import MonitorAction, ProbeOutput
from glasshouse.server.types.generation import FinishReason, Sampling
from glasshouse.server.types.interventions import AddVector, Intervention
from glasshouse.server.types.readouts import ReadFeatures

from ...oracles.vllm_engines import BOTH

EARLY, LATE = "blocks.1.hook_resid_post", "blocks.4.hook_resid_post"
on_both = pytest.mark.parametrize("engine", BOTH, indirect=True)

PROMPTS = ("Once upon a time there was a", "The dog", "Lily was sad because her")
ACTIONS = MonitorAction


def probe(seed: int, *points: str, pooling: Pooling = Pooling.TOKEN, hidden: int = 0) -> ServedProbe:
    rng = np.random.default_rng(seed)
    widths = [192] * len(points)
    sizes = [sum(widths), *([hidden] if hidden else []), 1]
    facts = ProbeFacts(
        kind="mlp" if hidden else "logistic", task=Task.BINARY, label_names=("no", "yes"),
        hook_points=points, widths=tuple(widths), pooling=pooling,
    )  # fmt: skip
    layers = tuple(
        affine(rng.standard_normal((a, b)) * 2 / np.sqrt(a), rng.standard_normal(b) * 0.1)
        for a, b in itertools.pairwise(sizes)
    )
    return ServedProbe(
        facts=facts,
        layers=layers,
        calibration=PlattScaling(torch.tensor([1.5]).double(), torch.tensor([0.2]).double()),
    )


def source(engine: Any, served: ServedProbe, output: ProbeOutput = ProbeOutput.SCORE) -> ProbeColumnSource:
    points = {point.name: point for point in engine.hook_points}
    return ProbeColumnSource(
        points=tuple(points[name] for name in served.facts.hook_points),
        probe=served.to("cpu"),
        column=0,
        output=output,
    )


def rule(aggregation: Aggregation = Aggregation.EXPONENTIAL, on: float = 0.5, off: float = 0.4) -> Rule:
    return Rule(aggregation=aggregation, on_above=on, off_below=off, weight=0.6)


def everyone(roster: Roster) -> RequestWatch:
    return RequestWatch(roster, np.ones(len(roster), dtype=bool))


class Noted(list[Sighting]):
    """What a roster reported; called in the engine's thread."""

    def __call__(self, sightings: Sequence[Sighting]) -> None:
        self.extend(sightings)

    def of(self, watch: RequestWatch, name: str) -> list[tuple[int, bool]]:
        return [(s.position, s.raised) for s in self if s.request is watch and s.watch.name == name]


def by_hand(chosen: Rule, scores: Sequence[float], positions: Sequence[int]) -> list[tuple[int, bool]]:
    state, found = START, []
    for position, score in zip(positions, scores, strict=True):
        state, change = step(chosen, state, score)
        if change is not Change.NONE:
            found.append((position, change is Change.RAISED))
    return found


@pytest.fixture
def ids(fable_model: Any) -> Callable[[str], tuple[int, ...]]:
    return lambda text: tuple(fable_model.tokenizer.encode(text))


@on_both
async def test_many_requests_are_watched_as_each_alone(
    engine: Any, answer: Any, oracle: Any, ids: Any
) -> None:
    plain, mlp, both = probe(1, LATE), probe(2, EARLY, hidden=8), probe(3, EARLY, LATE)
    mean, largest = probe(4, LATE, pooling=Pooling.MEAN), probe(5, EARLY, pooling=Pooling.MAX)
    watched = {
        "plain": (plain, ProbeOutput.SCORE, rule()),
        "again": (plain, ProbeOutput.SCORE, rule(Aggregation.MEAN)),
        "margin": (plain, ProbeOutput.MARGIN, rule(Aggregation.MAX, on=1.0, off=0.0)),
        "mlp": (mlp, ProbeOutput.SCORE, rule()),
        "both": (both, ProbeOutput.SCORE, rule()),
        "mean": (mean, ProbeOutput.SCORE, rule(Aggregation.EXPONENTIAL, on=0.52, off=0.5)),
        "largest": (largest, ProbeOutput.SCORE, rule()),
    }
    noted = Noted()
    roster = Roster(
        [
            Watch(name=name, source=source(engine, served, output), rule=chosen)
            for name, (served, output, chosen) in watched.items()
        ],
        noted,
    )
    watches = [everyone(roster) for _ in PROMPTS]
    answers = await asyncio.gather(
        *(
            answer(engine, ids(text), watch=watch, max_tokens=12 + 5 * i, ignore_eos=True)
            for i, (text, watch) in enumerate(zip(PROMPTS, watches, strict=True))
        ),
        # Unwatched company shares the batch.
        answer(engine, ids("A cat"), max_tokens=20, ignore_eos=True),
    )
    n_seen = 0
    for text, watch, given in zip(PROMPTS, watches, answers, strict=False):
        fed = [*ids(text), *given.ids[:-1]]
        _, captured = oracle.forward(fed, capture=(EARLY, LATE))
        for name, (served, output, chosen) in watched.items():
            x = torch.cat([captured[point] for point in served.facts.hook_points], dim=1)
            x = RunningPool(served.facts.pooling).add(x).double()
            scores = served.margins(x) if output is ProbeOutput.MARGIN else served.score(x)
            wanted = by_hand(chosen, scores[:, 0].tolist(), range(len(fed)))
            assert noted.of(watch, name) == wanted, name
            n_seen += len(wanted)
        # Observing leaves no trace in the answer.
        assert given.finished.flags == () and given.finished.reason is FinishReason.LENGTH
    assert n_seen > 20
    assert sum(int(use.sum()) for _, use in roster.log.drain()) == len(watched) * sum(
        len(ids(text)) + 12 + 5 * i - 1 for i, text in enumerate(PROMPTS)
    )
    assert roster.log.drain() == []
    del watches, watch
    noted.clear()
    assert roster.rules.n_taken == 0


@on_both
async def test_positions_and_masks(engine: Any, answer: Any, oracle: Any, ids: Any) -> None:
    served, noted = probe(7, LATE), Noted()
    text = ids(PROMPTS[0])
    roster = Roster(
        [
            Watch(name="prompt", source=source(engine, served), rule=rule(), on_generated=False),
            Watch(name="generated", source=source(engine, served), rule=rule(), on_prompt=False),
            Watch(
                name="skips", source=source(engine, served), rule=rule(), skip_token_ids=frozenset(text[:2])
            ),
            Watch(name="masked", source=source(engine, served), rule=rule()),
        ],
        noted,
    )
    watch = RequestWatch(roster, np.array([True, True, True, False]))
    given = await answer(engine, text, watch=watch, max_tokens=20, ignore_eos=True)
    fed = [*text, *given.ids[:-1]]
    _, captured = oracle.forward(fed, capture=(LATE,))
    scores = served.score(captured[LATE].double())[:, 0].tolist()
    positions = {
        "prompt": range(len(text)),
        "generated": range(len(text), len(fed)),
        "skips": [p for p, token in enumerate(fed) if token not in text[:2]],
        "masked": (),
    }
    for name, wanted in positions.items():
        assert noted.of(watch, name) == by_hand(rule(), [scores[p] for p in wanted], wanted)


@on_both
async def test_an_abort_sends_nothing_that_came_of_the_position(
    engine: Any, answer: Any, oracle: Any, ids: Any
) -> None:
    served, text = probe(8, LATE), ids(PROMPTS[0])
    free = await answer(engine, text, max_tokens=30, ignore_eos=True)
    fed = [*text, *free.ids[:-1]]
    _, captured = oracle.forward(fed, capture=(LATE,))
    scores = served.score(captured[LATE].double())[:, 0]
    # Just below the largest of the generated positions, which is above the prompt's.
    later = scores[len(text) :]
    at = int(later.argmax())
    assert at > 2 and at < len(later) - 1
    bar = (float(later[at]) + float(later[:at].max())) / 2
    chosen = Rule(aggregation=Aggregation.MAX, on_above=bar)
    noted = Noted()
    roster = Roster(
        [
            Watch(
                name="models/fable/monitors/stop@1",
                source=source(engine, served),
                rule=chosen,
                on_prompt=False,
                action=ACTIONS.ABORT,
                wants_text=True,
            )
        ],
        noted,
    )
    others = [answer(engine, text, max_tokens=30, ignore_eos=True) for _ in range(2)]
    given, *company = await asyncio.gather(
        answer(engine, text, watch=everyone(roster), max_tokens=30, ignore_eos=True), *others
    )
    assert given.ids == free.ids[: at + 1]
    end = given.finished
    assert end.reason is FinishReason.ABORTED
    assert end.abort.monitor == "models/fable/monitors/stop@1" and end.abort.condition is None
    assert end.abort.position == len(text) + at and end.abort.threshold == bar
    assert end.abort.score == pytest.approx(float(later[at]), abs=1e-5)
    assert [flag.action for flag in end.flags] == [ACTIONS.ABORT]
    assert end.usage.generated_tokens == at + 1
    assert [other.ids for other in company] == [free.ids, free.ids]
    assert noted[0].token_ids == tuple(fed[: len(text) + at + 1])


@on_both
async def test_a_prompt_can_be_refused(engine: Any, answer: Any, ids: Any) -> None:
    chosen = Rule(aggregation=Aggregation.MAX, on_above=-1.0)
    roster = Roster(
        [Watch(name="m@1", source=source(engine, probe(9, LATE)), rule=chosen, action=ACTIONS.ABORT)], Noted()
    )
    given = await answer(engine, ids(PROMPTS[0]), watch=everyone(roster), max_tokens=5)
    assert given.prefilled is not None and given.ids == []
    assert given.finished.reason is FinishReason.ABORTED and given.finished.abort.position == 0
    assert given.finished.usage.time_to_first_token_s == 0.0


@pytest.mark.parametrize("while_on", [False, True])
async def test_steering_begins_after_the_position_that_raised_it(
    engine: Any, answer: Any, oracle: Any, ids: Any, while_on: bool
) -> None:
    served, text = probe(10, EARLY), ids(PROMPTS[0])
    free = await answer(engine, text, max_tokens=25, ignore_eos=True)
    _, captured = oracle.forward([*text, *free.ids[:-1]], capture=(EARLY,))
    later = served.score(captured[EARLY].double())[len(text) :, 0]
    bar = float(later[3:12].max()) - 1e-4
    chosen = Rule(aggregation=Aggregation.EXPONENTIAL, on_above=bar, weight=1.0)
    v = np.random.default_rng(0).standard_normal(192).astype(np.float32)
    edit = Intervention(hook_point=LATE, edit=AddVector(vector=v, coefficient=4.0))
    noted = Noted()
    roster = Roster(
        [
            Watch(
                name="m@1", source=source(engine, served), rule=chosen, on_prompt=False,
                action=ACTIONS.STEER, interventions=(edit,), steer_while_on=while_on,
            )
        ],
        noted,
    )  # fmt: skip
    watch = everyone(roster)
    given = await answer(engine, text, watch=watch, max_tokens=25, ignore_eos=True)
    # The oracle's own loop: the rule decides at each position what the next is fed under.
    fed, edited, state, on, wanted = list(text), set[int](), START, False, []
    for _ in range(25):
        logprobs, captured = oracle.forward(
            fed, [(LATE, edited.__contains__, lambda s: s + 4.0 * torch.from_numpy(v))], (EARLY,)
        )
        position = len(fed) - 1
        if position >= len(text):
            score = float(served.score(captured[EARLY][-1:].double()))
            state, change = step(chosen, state, score)
            on = state.on if while_on else on or state.on
            if change is not Change.NONE:
                wanted.append((position, change is Change.RAISED))
        fed.append(int(logprobs[-1].argmax()))
        if on:
            edited.add(len(fed) - 1)
    assert given.ids == fed[len(text) :]
    assert given.ids != free.ids and edited
    assert noted.of(watch, "m@1") == wanted
    assert given.finished.flags[0].action is ACTIONS.STEER
    assert given.finished.receipt == ()


async def test_features_of_a_dictionary(engine: Any, answer: Any, ids: Any) -> None:
    (held,) = await engine.load_dictionary("resid", str(fable.dictionary_path("resid-post-3")))
    text = ids(PROMPTS[2])
    readout = ReadFeatures(dictionary="resid", top_k=4)
    free = await answer(engine, text, max_tokens=20, ignore_eos=True, readouts=(readout,))
    rows = free.prefilled.readouts[0].values
    feature = int(rows.ids[rows.indptr[3]])
    wanted_readout = ReadFeatures(dictionary="resid", features=(feature,))
    read = await answer(engine, text, max_tokens=20, ignore_eos=True, readouts=(wanted_readout,))
    values = [float(v) for v in read.prefilled.readouts[0].values.activations]
    values += [float(token.readouts[0].activations[0]) for token in read.tokens[1:]]
    chosen = Rule(aggregation=Aggregation.EXPONENTIAL, on_above=max(values) / 2, weight=1.0)
    noted = Noted()
    column = FeatureColumnSource(points=held.points_in, dictionary=held.dictionary, feature=feature)
    watch = everyone(Roster([Watch(name="f", source=column, rule=chosen)], noted))
    await answer(engine, text, watch=watch, max_tokens=20, ignore_eos=True)
    wanted = by_hand(chosen, values, range(len(values)))
    assert noted.of(watch, "f") == wanted and wanted


@on_both
async def test_a_seeded_sample_is_the_same_watched_and_unwatched(engine: Any, answer: Any, ids: Any) -> None:
    text, sampling = ids(PROMPTS[1]), Sampling(seed=5, temperature=1.0)
    roster = Roster([Watch(name="m", source=source(engine, probe(1, LATE)), rule=rule())], Noted())
    free = await answer(engine, text, max_tokens=20, sampling=sampling)
    seen = await answer(engine, text, max_tokens=20, sampling=sampling, watch=everyone(roster))
    assert seen.ids == free.ids and seen.logprobs == free.logprobs


async def test_a_watch_that_fails_takes_no_request_along(engine: Any, answer: Any, ids: Any) -> None:
    text, told = ids(PROMPTS[0]), []
    free = await answer(engine, text, max_tokens=8, ignore_eos=True)

    class Broken(ServedProbe):
        """Works on prompts, and fails afterwards."""

        def margins(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) == 1:
                raise RuntimeError("broken")
            return super().margins(x)

    hidden = probe(3, LATE, hidden=4)
    broken = Broken(facts=hidden.facts, layers=hidden.to("cpu").layers)
    point = next(point for point in engine.hook_points if point.name == LATE)
    roster = Roster(
        [Watch(name="m", source=ProbeColumnSource(points=(point,), probe=broken, column=0), rule=rule())],
        Noted(),
        on_break=lambda roster, error: told.append(str(error)),
    )
    seen = await answer(engine, text, watch=everyone(roster), max_tokens=8, ignore_eos=True)
    assert seen.ids == free.ids and seen.finished.reason is FinishReason.LENGTH
    assert told == ["broken"] and roster.broken
