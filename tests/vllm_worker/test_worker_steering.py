"""Monitors that steer, in the worker's hooks under a scheduler that does everything vLLM's does but drafts.

The oracle computes every position by itself (see `test_worker_hooks`), scores it, steps the rule alone, and so knows under
which edits the next one runs. What a preempted request runs again is edited as it was, and nothing of it scored anew.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from glasshouse.server.engines.vllm.contract import (
    Clause,
    EditPlan,
    Ledger,
    ReadoutPlan,
    RequestPlan,
    WatchPlan,
)
from glasshouse.server.engines.vllm.contract.messages import NOT_APPLIED
from glasshouse.server.engines.vllm.contract.watches import FIRST_EDIT, SCORES
from glasshouse.server.engines.vllm.worker.conditional import point
from glasshouse.server.engines.watching import FOREVER, RequestWatch, Roster, Watch, WatchedPass
from glasshouse.server.probes.aggregation import START, Aggregation, Rule, step
from glasshouse.server.probes.examples import Task
from glasshouse.server.probes.pooling import Pooling, RunningPool
from glasshouse.server.probes.served import ProbeFacts, ServedProbe, affine
from glasshouse.server.readouts.score_columns import ProbeColumnSource
from glasshouse.server.types.conditions import MonitorAction
from glasshouse.server.types.spans import Span

from .test_worker_hooks import (
    SPECIAL,
    Request,
    Schedule,
    Toy,
    W,
    covers,
    formula,
    made,
    name,
    random_condition,
    random_edit,
    random_readouts,
)  # fmt: skip

__all__ = ["made"]

READ, FED = "blocks.0.hook_resid_post", ("blocks.0.hook_resid_post", "blocks.1.hook_attn_out")
# A score this near to a threshold would be a matter of rounding: such a request is made anew.
CLEAR = 1e-4


def probe(seed: int, points: Sequence[str], pooling: Pooling) -> ServedProbe:
    rng = np.random.default_rng(seed)
    width = W * len(points)
    facts = ProbeFacts(
        kind="logistic", task=Task.BINARY, label_names=("no", "yes"), hook_points=tuple(points),
        widths=(W,) * len(points), pooling=pooling,
    )  # fmt: skip
    weights = rng.normal(size=(width, 1)) / np.sqrt(width)
    return ServedProbe(facts=facts, layers=(affine(weights, rng.normal(size=1) * 0.1),), calibration=None)


PROBES = {
    "one": probe(1, [READ], Pooling.TOKEN),
    "two": probe(2, FED, Pooling.TOKEN),
    "mean": probe(3, [READ], Pooling.MEAN),
    "max": probe(4, [READ], Pooling.MAX),
}


def random_watch(rng: random.Random) -> WatchPlan:
    key = rng.choice(sorted(PROBES))
    on_prompt, on_generated = rng.choice([(True, True), (False, True), (True, False)])
    bar = rng.uniform(0.4, 0.7)
    return WatchPlan(
        kind="probe", probe=key, sites=PROBES[key].facts.hook_points,
        rule=Rule(
            aggregation=rng.choice(list(Aggregation)), on_above=bar, off_below=rng.choice([None, bar - 0.1]), weight=0.5,
            level=0.47, min_tokens=rng.choice([1, 3]),
        ),
        on_prompt=on_prompt, on_generated=on_generated, while_on=rng.random() < 0.5,
        skip_token_ids=rng.choice([(), SPECIAL]),
    )  # fmt: skip


def random_request(
    rng: random.Random, tag: int, sites: Sequence[str], watches: Sequence[WatchPlan]
) -> Request:
    n_prompt, n_new = rng.randint(1, 20), rng.randint(1, 25)
    n_fed = n_prompt + n_new - 1
    edits = [random_edit(rng, index, sites, n_prompt, n_fed) for index in range(rng.randrange(3))]
    conditions = ()
    if edits and rng.random() < 0.3:
        conditions = (replace(random_condition(rng, "blocks.0.hook_attn_out", n_prompt), scope="position"),)
        clause = Clause(ranges=((0, FOREVER),), n_prompt=n_prompt)
        edits[0] = replace(
            random_edit(rng, 0, sites, n_prompt, n_fed), kind="add", sites_in=(), sites_out=("blocks.1.hook_mlp_out",),
            n_vectors=1, plain=1.5, scaled=0.0, vectors=np.ones((1, W), "<f4").tobytes(), condition=0, clause=clause,
        )  # fmt: skip
    for watch in range(len(watches)):
        for _ in range(rng.randint(1, 2)):
            waiting = random_edit(rng, FIRST_EDIT + len(edits), sites, n_prompt, n_fed)
            edits.append(replace(waiting, watch=watch))
    read = tuple(dict.fromkeys(site for watch in watches for site in watch.sites))
    first = 0 if any(watch.on_prompt for watch in watches) else n_prompt
    where = Clause(ranges=((first, n_fed),) if n_fed > first else (), n_prompt=n_prompt)
    scores = ReadoutPlan(index=SCORES, kind="scores", clause=where, sites=read)
    others = random_readouts(rng, sites, n_prompt, n_fed)
    plan = RequestPlan(
        tag=tag, n_prompt=n_prompt, edits=tuple(edits), conditions=conditions, watches=tuple(watches),
        readouts=(*others, scores) if watches else others,
    )  # fmt: skip
    return Request(
        plan, [rng.randrange(5, 23) if rng.random() < 0.9 else 3 for _ in range(n_prompt + n_new)], n_prompt
    )


class TooNear(Exception):
    """A score that floating point may put on either side of its threshold."""


def expect(toy: Toy, request: Request) -> tuple[list[dict[str, np.ndarray]], dict[int, set[int]], int]:
    """Every hook point at every position, where each edit was made, and how many thresholds were passed."""
    plan, points_at = request.plan, list[dict[str, np.ndarray]]()
    states, on = [START] * len(plan.watches), [False] * len(plan.watches)
    pools = [RunningPool(PROBES[watch.probe].facts.pooling) for watch in plan.watches]
    made_at: dict[int, set[int]] = {edit.index: set() for edit in plan.edits}
    n_passed = 0
    in_force = list(on)
    for position in range(request.n_fed):
        token = request.tokens[position]
        if position >= plan.n_prompt:
            in_force = list(on)
        points: dict[str, np.ndarray] = {}
        measured: list[bool] = []

        def at(
            site: str, s: np.ndarray, position: int = position, token: int = token, points: Any = points,
            measured: Any = measured, in_force: Any = tuple(in_force),
        ) -> np.ndarray:  # fmt: skip
            if plan.conditions and site == plan.conditions[0].sites[0]:
                condition = plan.conditions[0]
                score = s @ np.frombuffer(condition.weights, "<f4").astype(np.float64) + condition.bias
                if abs(score - condition.limit) < CLEAR:
                    raise TooNear
                looks = covers(condition.clause, position, token)
                measured.append(looks and condition.side * score > condition.side * condition.limit)
            for edit in plan.edits:
                if edit.sites_out != (site,) or not covers(edit.clause, position, token):
                    continue
                if edit.watch >= 0 and not in_force[edit.watch]:
                    continue
                if edit.condition >= 0 and not measured[0]:
                    continue
                made_at[edit.index].add(position)
                s = formula(edit, s, position)
            points[site] = s
            return s

        toy.position(token, position, at)
        points_at.append(points)
        for index, watch in enumerate(plan.watches):
            looks = watch.on_prompt if position < plan.n_prompt else watch.on_generated
            if not looks or token in watch.skip_token_ids:
                continue
            row = np.concatenate([points[site] for site in watch.sites])
            pooled = pools[index].add(torch.from_numpy(row)[None])
            score = float(PROBES[watch.probe].score(pooled.double())[0, 0])
            states[index], _ = step(watch.rule, states[index], score)
            bars = [watch.rule.on_above, watch.rule.off_below, watch.rule.level]
            if any(
                bar is not None and min(abs(v - bar) for v in (score, states[index].value)) < CLEAR
                for bar in bars
            ):
                raise TooNear
            n_passed += states[index].on and not on[index]
            on[index] = states[index].on if watch.while_on else on[index] or states[index].on
    return points_at, made_at, n_passed


def gateway_ranges(request: Request, collector: Any) -> dict[int, Any]:
    """What the gateway makes of the scores that the worker sent: where each watch's edits were due."""
    plan = request.plan
    roster = Roster(
        [
            Watch(
                name=str(index),
                source=ProbeColumnSource(
                    points=tuple(point(site, W) for site in watch.sites), probe=PROBES[watch.probe], column=0
                ),
                rule=watch.rule, on_prompt=watch.on_prompt, on_generated=watch.on_generated,
                skip_token_ids=frozenset(watch.skip_token_ids), action=MonitorAction.STEER,
                steer_while_on=watch.while_on,
            )
            for index, watch in enumerate(plan.watches)
        ],
        lambda sightings: None,
    )  # fmt: skip
    watch = RequestWatch(roster, np.ones(len(roster), dtype=bool))
    watch.steers = dict.fromkeys(range(len(roster)), ())
    watch.begin(request.tokens[: plan.n_prompt])
    rows = collector.rows.get((plan.tag, "scores", SCORES), {})
    columns = range(len(roster))
    if any(one.on_prompt for one in plan.watches):
        whole = WatchedPass([watch], one_token=False)
        whole.begin()
        whole.give(columns, np.stack([rows[position][0] for position in range(plan.n_prompt)]))
        whole.conclude_prompts([Span(0, request.tokens[: plan.n_prompt])])
    single = WatchedPass([watch], one_token=True)
    for position in range(plan.n_prompt, request.n_fed):
        single.begin()
        single.give(columns, rows[position][0][None])
        single.conclude_step([position], [request.tokens[position]])
    assert not roster.broken
    return watch.ranges


def asked(rng: random.Random, toy: Toy) -> tuple[list[Request], int]:
    """Requests of which some share their watches, and how many thresholds they pass."""
    common = [random_watch(rng) for _ in range(2)]
    requests: list[Request] = []
    n_passed = 0
    while len(requests) < 12:
        watches = rng.choice([common, common, [random_watch(rng)], []])
        request = random_request(rng, len(requests) + 1, toy.sites, watches)
        try:
            n_passed += expect(toy, request)[2]
        except TooNear:
            continue
        requests.append(request)
    return requests, n_passed


@pytest.mark.parametrize("seed", range(25))
def test_steering_under_a_random_schedule(seed: int, made: Any) -> None:
    toy, hooks, collector = made()
    hooks.probes.update({key: one.to("cpu") for key, one in PROBES.items()})
    rng = random.Random(seed)
    requests, n_passed = asked(rng, toy)
    Schedule(toy, hooks, requests, rng, drafts=False).run()
    assert n_passed > 0
    for request in requests:
        tag = request.plan.tag
        assert tag not in collector.errors, collector.errors[tag]
        points, made_at, _ = expect(toy, request)
        for readout in request.plan.readouts:
            if readout.kind != "activations":
                continue
            for position in range(request.n_fed):
                if covers(readout.clause, position, request.tokens[position]):
                    (row,) = collector.rows[tag, "activations", readout.index][position]
                    wanted = np.concatenate([points[position][site] for site in readout.sites])
                    np.testing.assert_allclose(row, wanted, atol=2e-4)
        ranges = gateway_ranges(request, collector) if request.plan.watches else {}
        for edit in request.plan.edits:
            if edit.watch < 0:
                continue
            due = {
                position
                for low, high in ranges.get(edit.watch, ())
                for position in range(low, min(high, request.n_fed))
                if covers(edit.clause, position, request.tokens[position])
            }
            assert due == made_at[edit.index]
        ledger = Ledger(request.plan.edits)
        for run in collector.ran.get(tag, ()):
            ledger.ran(*run)
        ledger.steered(ranges, request.n_fed)
        assert ledger.complete(request.n_fed) and ledger.first_mismatch(request.tokens) is None
    hooks.update((), [name(request) for request in requests])
    found = hooks.statistics()
    assert found["edit_slots_used"] == found["vector_rows_used"] == found["requests_running"] == 0


def simple(tag: int, *, bar: float, n_prompt: int = 4, n_new: int = 12) -> Request:
    """A request that is steered from the first position scored above `bar`."""
    n_fed = n_prompt + n_new - 1
    everywhere = Clause(ranges=((0, n_fed),), n_prompt=n_prompt)
    watch = WatchPlan(
        kind="probe", probe="one", sites=(READ,), rule=Rule(aggregation=Aggregation.MAX, on_above=bar),
        on_prompt=True, on_generated=True, while_on=False,
    )  # fmt: skip
    edit = EditPlan(
        index=FIRST_EDIT, kind="add", clause=everywhere, sites_out=(READ,), n_vectors=1, plain=1.0,
        vectors=np.ones((1, W), "<f4").tobytes(), watch=0,
    )  # fmt: skip
    readouts = (
        ReadoutPlan(index=0, kind="activations", clause=everywhere, sites=(READ,)),
        ReadoutPlan(index=SCORES, kind="scores", clause=everywhere, sites=(READ,)),
    )
    plan = RequestPlan(tag=tag, n_prompt=n_prompt, edits=(edit,), readouts=readouts, watches=(watch,))
    return Request(plan, [5 + (7 * p + tag) % 18 for p in range(n_prompt + n_new)], n_prompt)


class Calm(random.Random):
    """Every request in every step, one token each."""

    def random(self) -> float:
        return 0.6


def test_a_threshold_that_is_passed_changes_the_next_step(made: Any) -> None:
    """Of a batch that decodes under one plan, and else would for long."""
    toy, hooks, collector = made()
    hooks.probes.update({key: one.to("cpu") for key, one in PROBES.items()})
    free = simple(9, bar=1.0, n_new=40)
    scores = [
        float(PROBES["one"].score(torch.from_numpy(points[READ])[None].double())[0, 0])
        for points in expect(toy, free)[0]
    ]
    best = 10 + int(np.argmax(scores[10:30]))
    bar = (scores[best] + max(scores[:best])) / 2
    requests = [simple(9, bar=bar, n_new=40), simple(2, bar=1.0, n_new=40), simple(3, bar=1.0, n_new=40)]
    Schedule(toy, hooks, requests, Calm(0), drafts=False, preempts=False).run()
    assert hooks.counters["steps_planned"] < 12 < hooks.counters["steps_hooked"]
    edited = {start: applied for start, count, applied in collector.ran[9] if count == 1}
    assert bar > max(scores[:best]) + CLEAR and scores[best] > bar + CLEAR
    assert {start for start, applied in edited.items() if applied} == set(range(best + 1, requests[0].n_fed))
    assert not any(applied for tag in (2, 3) for _, _, applied in collector.ran[tag])


def test_dormant_edits_cost_no_plan(made: Any) -> None:
    """Nothing is planned anew, and nothing edited, until a threshold is passed."""
    toy, hooks, collector = made()
    hooks.probes.update({key: one.to("cpu") for key, one in PROBES.items()})
    requests = [simple(tag, bar=1.0, n_new=40) for tag in (1, 2, 3)]
    Schedule(toy, hooks, requests, Calm(0), drafts=False, preempts=False).run()
    assert hooks.counters["steps_planned"] < 10 < hooks.counters["steps_hooked"]
    assert not any(hooks.is_edited(name(request)) for request in requests)
    assert all(applied == 0 for runs in collector.ran.values() for _, _, applied in runs)


def test_drafts_fail_the_request_with_a_word_and_no_other(made: Any) -> None:
    toy, hooks, collector = made()
    hooks.probes.update({key: one.to("cpu") for key, one in PROBES.items()})
    steered, plain, prefill = simple(1, bar=1.0), simple(2, bar=1.0), simple(3, bar=1.0, n_prompt=15, n_new=1)
    plain.plan = replace(plain.plan, edits=(), watches=(), readouts=plain.plan.readouts[:1])

    class AlwaysDrafts(random.Random):
        """Three drafts a step."""

        def random(self) -> float:
            return 0.9

        def randint(self, a: int, b: int) -> int:
            return b

    # One more under the same monitor, which drafts nothing.
    Schedule(toy, hooks, [steered, plain, prefill], AlwaysDrafts(0), preempts=False).run()
    assert collector.errors[1].startswith(NOT_APPLIED) and "before the last was scored" in collector.errors[1]
    assert collector.errors.keys() == {1}


def test_a_score_that_fails_fails_its_requests_and_no_other(made: Any) -> None:
    toy, hooks, collector = made()

    class Broken(ServedProbe):
        """Cannot be scored."""

        is_affine = False

        def margins(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("broken")

        def score(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("broken")

    one = PROBES["one"].to("cpu")
    hooks.probes["one"] = Broken(facts=one.facts, layers=one.layers, calibration=None)
    broken, plain = simple(1, bar=1.0), simple(2, bar=1.0)
    plain.plan = replace(plain.plan, edits=(), watches=(), readouts=plain.plan.readouts[:1])
    Schedule(toy, hooks, [broken, plain], random.Random(1), drafts=False).run()
    assert collector.errors[1].startswith(NOT_APPLIED) and 2 not in collector.errors
    # A roster that has failed is not handed to the next.
    hooks.probes["one"] = one
    after = simple(3, bar=1.0)
    Schedule(toy, hooks, [after], random.Random(1), drafts=False).run()
    assert 3 not in collector.errors
