"""Watches that steer against Hugging Face with plain hooks, which steer from the position that the rule alone says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from glasshouse import fable
from glasshouse.server.engines.vllm.gateway.watching import WatchedRequest
from glasshouse.server.engines.watching import RequestWatch, Roster, Watch
from glasshouse.server.probes.aggregation import START, Aggregation, Change, Rule, WatchState, step
from glasshouse.server.probes.pooling import Pooling, RunningPool
from glasshouse.server.probes.served import ServedProbe
from glasshouse.server.readouts.score_columns import FeatureColumnSource
from glasshouse.server.types.conditions import Condition, FeatureColumn, MonitorAction, ProbeOutput
from glasshouse.server.types.errors import FailedPrecondition
from glasshouse.server.types.interventions import AblateDirection, AddVector, Edit, Intervention, SetFeatures
from glasshouse.server.types.selectors import NamedPositions, Selector
from glasshouse.wire import reasons

from ...oracles import formulas
from ...oracles.formulas import Formula
from ...oracles.vllm_engines import BOTH
from .test_watching import EARLY, LATE, Noted, probe, source

# Speculation is refused: see below.
STEERING = ["transformers", "vllm-eager", "vllm-two-ranks", "vllm-compiled"]
MIDDLE = "blocks.2.hook_mlp_out"
D = 192
# Scores this near to a threshold would be a matter of rounding.
CLEAR = 1e-6
on_both = pytest.mark.parametrize("engine", BOTH, indirect=True)


def vector(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(D).astype(np.float32)


@dataclass
class Steer:
    """A watch, for both sides. Without edits it observes."""

    name: str
    served: ServedProbe
    rule: Rule
    edits: Sequence[tuple[str, Edit, Formula]] = ()
    on_prompt: bool = True
    on_generated: bool = True
    while_on: bool = False
    output: ProbeOutput = ProbeOutput.SCORE
    skip: frozenset[int] = frozenset()
    positions: Selector = field(default_factory=lambda: Selector(named=NamedPositions.ALL))

    def ours(self, engine: Any) -> Watch:
        return Watch(
            name=self.name,
            source=source(engine, self.served, self.output),
            rule=self.rule,
            on_prompt=self.on_prompt,
            on_generated=self.on_generated,
            skip_token_ids=self.skip,
            action=MonitorAction.STEER if self.edits else MonitorAction.OBSERVE,
            interventions=tuple(
                Intervention(hook_point=point, edit=edit, positions=self.positions)
                for point, edit, _ in self.edits
            ),
            steer_while_on=self.while_on,
        )

    def score(self, rows: torch.Tensor) -> float:
        """Of the last of the activations that count so far."""
        row = RunningPool(self.served.facts.pooling).add(rows)[-1:].double()
        margin = self.output is ProbeOutput.MARGIN
        return float((self.served.margins(row) if margin else self.served.score(row))[0, 0])


@dataclass
class Expected:
    ids: list[int]
    logprobs: list[float]
    # By watch: crossings, and positions at which its edits were made.
    crossings: dict[str, list[tuple[int, bool]]]
    edited: dict[str, set[int]]


def expected(
    oracle: Any,
    prompt: Sequence[int],
    n_tokens: int,
    watches: Sequence[Steer],
    own: Sequence[tuple[str, Callable[[int], bool], Formula]] = (),
) -> Expected:
    """The oracle's own loop: everything is computed anew for each token, one request alone."""
    fed = list(prompt)
    edited: dict[str, set[int]] = {watch.name: set() for watch in watches}
    crossings: dict[str, list[tuple[int, bool]]] = {watch.name: [] for watch in watches}
    states: dict[str, WatchState] = {watch.name: START for watch in watches}
    steers = dict.fromkeys(edited, False)
    hooks = [*own]
    for watch in watches:
        hooks += [(point, edited[watch.name].__contains__, formula) for point, _, formula in watch.edits]
    points = sorted({point for watch in watches for point in watch.served.facts.hook_points})
    logprobs: list[float] = []
    seen = 0
    for _ in range(n_tokens):
        found, captured = oracle.forward(fed, hooks, points)
        for position in range(seen, len(fed)):
            for watch in watches:
                if not (watch.on_prompt if position < len(prompt) else watch.on_generated):
                    continue
                counts = [
                    p
                    for p in range(position + 1)
                    if (watch.on_prompt if p < len(prompt) else watch.on_generated)
                    and fed[p] not in watch.skip
                ]
                if fed[position] in watch.skip:
                    continue
                x = torch.cat([captured[point] for point in watch.served.facts.hook_points], dim=1)
                state, change = step(watch.rule, states[watch.name], watch.score(x[counts]))
                for bar in (watch.rule.on_above, watch.rule.off_below):
                    assert bar is None or abs(state.value - bar) > CLEAR, f"{watch.name}: too near to tell"
                states[watch.name] = state
                if change is not Change.NONE:
                    crossings[watch.name].append((position, change is Change.RAISED))
                steers[watch.name] = state.on if watch.while_on else steers[watch.name] or state.on
        seen = len(fed)
        token = int(found[-1].argmax())
        logprobs.append(float(found[-1, token]))
        fed.append(token)
        for name, on in steers.items():
            if on:
                edited[name].add(len(fed) - 1)
    last = len(fed) - 1
    return Expected(
        ids=fed[len(prompt) :],
        logprobs=logprobs,
        crossings=crossings,
        edited={name: positions - {last} for name, positions in edited.items()},
    )


def middling(
    oracle: Any, prompt: Sequence[int], served: ServedProbe, output: ProbeOutput = ProbeOutput.SCORE
) -> float:
    """A score that is passed some way into the untreated generation."""
    _, _, captures = oracle.greedy(prompt, 12, capture=served.facts.hook_points)
    x = torch.cat([captures[point] for point in served.facts.hook_points], dim=1)
    rows = RunningPool(served.facts.pooling).add(x).double()
    scores = served.margins(rows) if output is ProbeOutput.MARGIN else served.score(rows)
    later = scores[len(prompt) :, 0]
    return float(later[2:8].max()) - 1e-4


def add(point: str, seed: int, coefficient: float) -> tuple[str, Edit, Formula]:
    v = vector(seed)
    return point, AddVector(vector=v, coefficient=coefficient), formulas.add(v, coefficient)


def ablate(point: str, seed: int) -> tuple[str, Edit, Formula]:
    v = vector(seed)
    return point, AblateDirection(vector=v), formulas.ablate(v)


@pytest.fixture
def prompts(fable_model: Any) -> list[list[int]]:
    texts = (
        "Once upon a time there was a",
        "The dog",
        "Lily was sad because her",
        "One day, a boy named Tom went to the park. It was raining, and he had no friend to play with",
    )
    return [fable_model.tokenizer.encode(text) for text in texts]


def watches_for(oracle: Any, prompt: Sequence[int]) -> list[Steer]:
    """One of every kind that matters, with thresholds that this prompt's generation passes."""
    plain, both, deep = probe(10, EARLY), probe(3, EARLY, LATE), probe(2, EARLY, hidden=8)
    mean, largest = probe(4, LATE, pooling=Pooling.MEAN), probe(5, EARLY, pooling=Pooling.MAX)

    def rule(served: ServedProbe, output: ProbeOutput = ProbeOutput.SCORE, **rest: Any) -> Rule:
        bar = middling(oracle, prompt, served, output)
        rest.setdefault("aggregation", Aggregation.EXPONENTIAL)
        return Rule(on_above=bar, weight=1.0, **rest)

    bar = middling(oracle, prompt, plain)
    return [
        Steer("lasting", plain, rule(plain), [add(LATE, 0, 3.0)], on_prompt=False),
        Steer("while on", both, rule(both), [add(MIDDLE, 1, 0.5)], on_prompt=False, while_on=True),
        Steer(
            "flutters", plain, Rule(aggregation=Aggregation.MEAN, on_above=bar - 0.05, off_below=bar - 0.1),
            [add(LATE, 2, 1.0), ablate(EARLY, 3)], while_on=True,
        ),
        Steer("pooled", mean, rule(mean, aggregation=Aggregation.MAX), [add(EARLY, 4, 1.0)], on_prompt=False),
        Steer("largest", largest, rule(largest), [add(LATE, 5, 1.0)], while_on=True),
        Steer(
            "deep", deep, rule(deep, ProbeOutput.MARGIN), [ablate(LATE, 6)], on_prompt=False, output=ProbeOutput.MARGIN
        ),
        Steer(
            "margin", plain, rule(plain, ProbeOutput.MARGIN), [add(MIDDLE, 7, 0.5)], on_prompt=False,
            output=ProbeOutput.MARGIN,
        ),
        Steer(
            "share", plain, Rule(aggregation=Aggregation.FRACTION_ABOVE, on_above=0.3001, level=bar - 0.05),
            [add(LATE, 8, 1.5)], skip=frozenset(prompt[:1]),
        ),
    ]  # fmt: skip


@pytest.mark.parametrize("engine", STEERING, indirect=True)
async def test_many_requests_are_steered_as_each_alone(
    engine: Any, answer: Any, oracle: Any, prompts: list[list[int]]
) -> None:
    n_tokens, n_steered = 50, 0
    asked: list[tuple[list[int], list[Steer], list[Any], list[Intervention]]] = []
    v = vector(20)
    by_prompt = [watches_for(oracle, prompt) for prompt in prompts]
    for place in range(16):
        prompt, kinds = prompts[place % len(prompts)], by_prompt[place % len(prompts)]
        # Two that steer, in an order of their own, and of every second request one that looks on.
        chosen = [kinds[place % 8], kinds[(place + 3) % 8]] if place < 13 else []
        if chosen and place % 2:
            chosen.append(Steer("looks", probe(8, LATE), Rule(aggregation=Aggregation.MEAN, on_above=0.5)))
        own: list[Any] = []
        ours: list[Intervention] = []
        if place % 3 == 1:
            own = [(LATE, lambda p: True, formulas.add(v, 0.5))]
            ours = [Intervention(hook_point=LATE, edit=AddVector(vector=v, coefficient=0.5))]
        asked.append((prompt, chosen, own, ours))
    noted = [Noted() for _ in asked]

    async def ask(place: int) -> Any:
        prompt, chosen, _, ours = asked[place]
        watch = None
        if chosen:
            # Some share a roster's make-up, and all of them a step.
            roster = Roster([one.ours(engine) for one in chosen], noted[place])
            watch = RequestWatch(roster, np.ones(len(chosen), dtype=bool))
        await asyncio.sleep(0.003 * place)
        return await answer(
            engine, prompt, watch=watch, max_tokens=n_tokens, ignore_eos=True, interventions=tuple(ours)
        )

    answers = await asyncio.gather(*(ask(place) for place in range(len(asked))))
    for place, (given, (prompt, chosen, own, _)) in enumerate(zip(answers, asked, strict=True)):
        wanted = expected(oracle, prompt, n_tokens, chosen, own)
        names = [one.name for one in chosen]
        assert given.ids == wanted.ids, f"request {place}: {names}"
        np.testing.assert_allclose(given.logprobs, wanted.logprobs, atol=1e-4)
        for one in chosen:
            found = [(s.position, s.raised) for s in noted[place] if s.watch.name == one.name]
            assert found == wanted.crossings[one.name][:32], f"request {place}: {one.name}"
            n_steered += bool(wanted.edited[one.name]) and bool(one.edits)
        # Nothing is reported of the watches' edits.
        assert len(given.finished.receipt) == len(own)
        plain, _, _ = oracle.greedy(prompt, n_tokens, own)
        steered = any(wanted.edited[one.name] for one in chosen if one.edits)
        assert (given.ids != plain) == (wanted.ids != plain)
        assert steered or given.ids == plain
    assert n_steered > 16


@on_both
async def test_among_conditions_and_features(
    engine: Any, answer: Any, oracle: Any, prompts: list[list[int]]
) -> None:
    """A feature is watched and another set, of requests with an edit under a condition of their own, and without."""
    (held,) = await engine.load_dictionary("steering", str(fable.dictionary_path("resid-post-3")))
    prompt, at = prompts[2], held.points_in[0].name
    _, captured = oracle.forward([*prompt, *oracle.greedy(prompt, 30)[0]], capture=(at,))
    every = torch.arange(held.dictionary.facts.d_sae)
    activations = held.dictionary.encode_features(captured[at], every)[len(prompt) :]
    feature = int((activations[3:12].amax(0) - activations[:3].amax(0)).argmax())
    other = int(activations[:3].sum(0).argmax())
    bar = float(activations[3:12, feature].max() + activations[:3, feature].max()) / 2

    def set_feature(s: torch.Tensor) -> torch.Tensor:
        now = held.dictionary.encode_features(s[None], torch.tensor([other]))[0, 0]
        return s + (12.0 - now) * held.dictionary.decoder_rows(torch.tensor([other]))[0]

    score = FeatureColumnSource(points=held.points_in, dictionary=held.dictionary, feature=feature)
    steer = Intervention(
        hook_point="",
        edit=SetFeatures(dictionary="steering", features=(other,), values=(12.0,)),
        positions=Selector(named=NamedPositions.GENERATED),
    )
    ours = Watch(
        name="m", source=score, rule=Rule(aggregation=Aggregation.MAX, on_above=bar), on_prompt=False,
        action=MonitorAction.STEER, interventions=await engine.steering((steer,), field="spec"),
    )  # fmt: skip
    v = vector(30)
    conditional = Intervention(
        hook_point=LATE,
        edit=AddVector(vector=v, coefficient=0.5),
        condition=Condition(source=FeatureColumn(dictionary="steering", feature=other), above=0.5),
    )
    noted = Noted()
    answers = await asyncio.gather(
        *(
            answer(
                engine, prompt, max_tokens=30, ignore_eos=True, interventions=(conditional,) * has,
                watch=RequestWatch(Roster([ours], noted), np.ones(1, dtype=bool)) if watched else None,
            )
            for has in (0, 1) for watched in (False, True)
        )
    )  # fmt: skip
    found: list[list[int]] = []
    for has in (0, 1):
        for watched in (False, True):
            fed, since, seen = list(prompt), 1 << 30, set[int]()

            def passes(s: torch.Tensor) -> torch.Tensor:
                return held.dictionary.encode_features(s[None], torch.tensor([other]))[0, 0]

            for _ in range(30):
                active: list[bool] = []

                def look(s: torch.Tensor, active: list[bool] = active) -> torch.Tensor:
                    active.append(bool(passes(s) > 0.5))
                    return s

                def change(s: torch.Tensor, active: list[bool] = active) -> torch.Tensor:
                    return s + 0.5 * torch.from_numpy(v) if active.pop(0) else s

                # The request's own come first: its condition sees the stream before the monitor's edit of it.
                hooks: list[Any] = [(at, lambda p: True, look), (LATE, lambda p: True, change)] * has
                hooks.append((at, lambda p, since=since: p >= since, set_feature))
                logprobs, captured = oracle.forward(fed, hooks, (at,))
                last = held.dictionary.encode_features(captured[at][-1:], torch.tensor([feature]))[0, 0]
                if watched and len(fed) > len(prompt) and since > len(fed) and float(last) > bar:
                    since = len(fed)
                fed.append(int(logprobs[-1].argmax()))
                seen.add(since)
            found.append(fed[len(prompt) :])
            assert not watched or len(seen) == 2, "it steers, from some way in"
    assert [given.ids for given in answers] == found
    assert found[0] != found[1] and found[2] != found[3]
    assert [len(given.finished.receipt) for given in answers] == [0, 0, 1, 1]


@on_both
@pytest.mark.parametrize("while_on", [False, True])
async def test_what_the_prompt_raises_steers_what_is_generated(
    engine: Any, answer: Any, oracle: Any, prompts: list[list[int]], while_on: bool
) -> None:
    prompt, served = prompts[3], probe(10, EARLY)
    _, captured = oracle.forward(prompt, capture=(EARLY,))
    bar = float(served.score(captured[EARLY].double())[2:-2, 0].median()) + 1e-4
    chosen = Rule(aggregation=Aggregation.EXPONENTIAL, on_above=bar, weight=1.0)
    watch = Steer("m", served, chosen, [add(LATE, 0, 4.0)], on_generated=False, while_on=while_on)
    noted = Noted()
    roster = Roster([watch.ours(engine)], noted)
    given = await answer(
        engine, prompt, watch=RequestWatch(roster, np.ones(1, dtype=bool)), max_tokens=20, ignore_eos=True
    )
    wanted = expected(oracle, prompt, 20, [watch])
    assert given.ids == wanted.ids
    np.testing.assert_allclose(given.logprobs, wanted.logprobs, atol=1e-4)
    assert [(s.position, s.raised) for s in noted] == wanted.crossings["m"]
    assert len(wanted.crossings["m"]) > 2 and wanted.crossings["m"][0][0] < len(prompt) - 2
    # The prompt itself is fed as it would have been.
    assert given.logprobs[0] == pytest.approx(oracle.greedy(prompt, 1)[1][0], abs=1e-4)


@on_both
async def test_beside_a_monitor_that_aborts_and_where_nothing_is_fed(
    engine: Any, answer: Any, oracle: Any, prompts: list[list[int]]
) -> None:
    prompt = prompts[0]
    always = Rule(aggregation=Aggregation.MAX, on_above=-1.0)
    steer = Steer("m", probe(10, EARLY), always, [add(LATE, 0, 4.0)], on_prompt=False)
    late = Rule(aggregation=Aggregation.MAX, on_above=-1.0, min_tokens=7)
    stop = Watch(
        name="stop",
        source=source(engine, probe(8, LATE)),
        rule=late,
        on_prompt=False,
        action=MonitorAction.ABORT,
    )
    wanted = expected(oracle, prompt, 12, [steer])
    roster = Roster([stop, steer.ours(engine)], Noted())

    async def ask(n_tokens: int) -> Any:
        watch = RequestWatch(roster, np.ones(2, dtype=bool))
        return await answer(engine, prompt, watch=watch, max_tokens=n_tokens, ignore_eos=True)

    aborted, one = await asyncio.gather(ask(12), ask(1))
    # Seven positions beyond the prompt are looked at; what the last of them predicted is not sent.
    assert aborted.ids == wanted.ids[:7] and aborted.finished.abort.monitor == "stop"
    assert {flag.monitor for flag in aborted.finished.flags} == {"m", "stop"}
    # The only token is never fed, so nothing beyond the prompt is seen.
    assert one.ids == wanted.ids[:1] and one.finished.flags == ()


@on_both
async def test_a_prompt_is_not_taken_from_what_was_steered(
    engine: Any, answer: Any, oracle: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one request generated under steering is another's prompt, which is not steered, by the same monitor."""
    served = probe(10, EARLY)
    watch = Steer(
        "m", served, Rule(aggregation=Aggregation.MAX, on_above=0.001), [add(LATE, 0, 4.0)], on_prompt=False
    )

    ours = watch.ours(engine)

    async def ask(prompt: Sequence[int], n_tokens: int) -> Any:
        roster = Roster([ours], Noted())
        one = RequestWatch(roster, np.ones(1, dtype=bool))
        return await answer(engine, prompt, watch=one, max_tokens=n_tokens, ignore_eos=True)

    first = await ask(prompts[0], 80)
    again = [*prompts[0], *first.ids[:70]]
    # As many positions in all: the edits are the same, to the last number.
    wanted = expected(oracle, again, 10, [watch])
    given = await ask(again, 10)
    assert given.ids == wanted.ids
    np.testing.assert_allclose(given.logprobs, wanted.logprobs, atol=1e-4)
    if engine.info.engine == "transformers":
        return
    # The control: without the prompt's end in the salt, cached keys and values are of steered positions.
    from glasshouse.server.engines.vllm.gateway import submission as module

    salted = module.cache_salt

    def unsalted(edits: Any, *, steering: Any, **rest: Any) -> Any:
        steering = None if steering is None else replace(steering, n_prompt=0)
        return salted(edits, steering=steering, **rest)

    monkeypatch.setattr(module, "cache_salt", unsalted)
    await ask(prompts[0], 80)
    wrong = await ask(again, 10)
    assert np.abs(np.subtract(wrong.logprobs, wanted.logprobs)).max() > 1e-3


@pytest.mark.parametrize("engine", ["vllm-eager"], indirect=True)
async def test_steering_from_elsewhere_fails_the_request_and_no_other(
    engine: Any, answer: Any, oracle: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the account: the worker's edits are not where the gateway's rules say."""
    served, prompt = probe(10, EARLY), prompts[0]
    watch = Steer(
        "m", served, Rule(aggregation=Aggregation.MAX, on_above=0.001), [add(LATE, 0, 4.0)], on_prompt=False
    )
    told = WatchedRequest.steered.fget
    assert told is not None
    monkeypatch.setattr(
        WatchedRequest,
        "steered",
        property(lambda self: {w: [(a + 1, b) for a, b in ranges] for w, ranges in told(self).items()}),
    )
    roster = Roster([watch.ours(engine)], Noted())
    one = RequestWatch(roster, np.ones(1, dtype=bool))
    failing = answer(engine, prompt, watch=one, max_tokens=8, ignore_eos=True)
    company = answer(engine, prompt, max_tokens=8, ignore_eos=True)
    failed, alone = await asyncio.gather(failing, company, return_exceptions=True)
    assert isinstance(failed, FailedPrecondition) and failed.reason == reasons.INTERVENTION_NOT_APPLIED
    assert alone.ids == oracle.greedy(prompt, 8)[0]


@pytest.mark.parametrize("engine", ["vllm-speculative"], indirect=True)
async def test_speculation_is_refused(engine: Any) -> None:
    edits = (Intervention(hook_point=LATE, edit=AddVector(vector=vector(0))),)
    with pytest.raises(FailedPrecondition) as refused:
        await engine.steering(edits, field="spec")
    error = refused.value
    assert (error.reason, error.field, error.value) == (reasons.CAPABILITY_MISSING, "spec", "steer")
    assert "speculati" in str(error) and error.remedy
    # What steers nothing is none of this.
    assert await engine.steering((), field="spec") == ()
