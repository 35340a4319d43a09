"""The worker's hooks under a scheduler that does everything vLLM's does, in thousands of random steps, without vLLM.

The model is a toy without attention, so that what a position computes depends on its token, its number and the edits there
alone: the oracle computes every position by itself, in float64, with each edit written as a formula. The scheduler
feeds prompts in chunks, feeds drafts that are then rejected, preempts and starts again, leaves requests out, ends
them and reuses slots.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from glasshouse.server.dictionaries.architectures.jumprelu import JumpReLU
from glasshouse.server.dictionaries.architectures.topk import TopK
from glasshouse.server.dictionaries.linear import LinearDictionary
from glasshouse.server.dictionaries.parameters import DecoderBlock, DictionaryParameters, EncoderBlock
from glasshouse.server.engines.vllm.contract import (
    Clause,
    ConditionPlan,
    EditPlan,
    Ledger,
    ReadoutPlan,
    RequestPlan,
    WorkerSettings,
)
from glasshouse.server.engines.vllm.worker import hooks as hooks_module
from glasshouse.server.engines.vllm.worker import junctions
from glasshouse.server.engines.vllm.worker.answering import AnsweringContext
from glasshouse.server.engines.vllm.worker.hooks import Hooks, StepBatch
from glasshouse.server.engines.vllm.worker.junctions import Junction

W, VOCAB, LAYERS, F = 8, 23, 2, 12
FOREVER = 1 << 30
SPECIAL = (3, 4)


class Toy:
    """embed -> two layers of (attn, mlp), by the pair convention, rows independent of one another."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        rng = np.random.default_rng(0)
        self.dtype = dtype
        self.embed = rng.normal(size=(VOCAB, W))
        self.place = rng.normal(size=(512, W)) * 0.3
        self.layers = [(rng.normal(size=(W, W)) * 0.4, rng.normal(size=(W, W)) * 0.4) for _ in range(LAYERS)]
        self.junctions: list[Junction] = []
        self._add(("blocks.0.hook_resid_pre", "x"))
        for layer in range(LAYERS):
            at = f"blocks.{layer}.hook_"
            self._add((f"{at}attn_out", "x"), (f"{at}resid_mid", "sum"))
            streams = [(f"{at}resid_post", "sum")]
            if layer + 1 < LAYERS:
                streams.append((f"blocks.{layer + 1}.hook_resid_pre", "sum"))
            self._add((f"{at}mlp_out", "x"), *streams)
        self.sites = [name for junction in self.junctions for name, _ in junction.points]
        junctions.reserve(len(self.junctions))

    def _add(self, *points: Any) -> None:
        self.junctions.append(Junction(index=len(self.junctions), points=points))

    def run(self, tokens: np.ndarray, positions: np.ndarray, padding: int) -> None:
        """A pass over flattened rows, through the ops that the real graph has."""
        padded = np.concatenate([tokens, np.zeros(padding, np.int64)])
        where = np.concatenate([positions, np.zeros(padding, np.int64)])
        hidden = torch.from_numpy(self.embed[padded] + self.place[where]).to(self.dtype)
        op = torch.ops.glasshouse
        op.junction_one(hidden, 0)
        residual = hidden
        hidden = torch.zeros_like(hidden)
        for layer, (attn, mlp) in enumerate(self.layers):
            stream = hidden + residual
            hidden, residual = torch.tanh(stream @ torch.from_numpy(attn).to(self.dtype)), stream
            op.junction_pair(hidden, residual, 1 + 2 * layer)
            stream = hidden + residual
            hidden, residual = torch.tanh(stream @ torch.from_numpy(mlp).to(self.dtype)), stream
            op.junction_pair(hidden, residual, 2 + 2 * layer)

    def position(self, token: int, position: int, at: Callable[[str, np.ndarray], np.ndarray]) -> None:
        """The same for one position, in float64; `at` sees and edits every hook point in turn."""
        s = at("blocks.0.hook_resid_pre", self.embed[token] + self.place[position])
        for layer, (attn, mlp) in enumerate(self.layers):
            name = f"blocks.{layer}.hook_"
            s = at(f"{name}resid_mid", s + at(f"{name}attn_out", np.tanh(s @ attn)))
            s = at(f"{name}resid_post", s + at(f"{name}mlp_out", np.tanh(s @ mlp)))
            if layer + 1 < LAYERS:
                s = at(f"blocks.{layer + 1}.hook_resid_pre", s)


def dictionary(name: str, activation: Any) -> LinearDictionary:
    rng = torch.Generator().manual_seed(len(name))
    at = ("blocks.0.hook_resid_post",)
    return LinearDictionary(
        name,
        DictionaryParameters(
            kind="sae",
            hook_points_in=at,
            hook_points_out=at,
            encoders=(EncoderBlock(W_enc=torch.randn(W, F, generator=rng)),),
            decoders=(DecoderBlock(W_dec=torch.randn(F, W, generator=rng)),),
            b_enc=torch.randn(F, generator=rng) * 0.1,
            activation=activation,
            source_format="test",
        ),
    )


DICTIONARIES = {
    "jump#1": dictionary("jump", JumpReLU(threshold=torch.full((F,), 0.2))),
    "top#1": dictionary("top", TopK(keep=3)),
}


class Collector:
    """Stands in for the reporter: keeps reports."""

    n_messages = n_bytes = n_overflows = 0
    has_pending = False

    def __init__(self) -> None:
        self.rows: dict[tuple[int, str, int], dict[int, tuple[Any, ...]]] = {}
        self.ran: dict[int, list[tuple[int, int, int]]] = {}
        self.armed: list[int] = []
        self.errors: dict[int, str] = {}

    def report(
        self,
        step: int,
        *,
        armed: Any = (),
        closed: Any = (),
        errors: Any = (),
        ran: Any = (),
        blocks: Any = (),
    ) -> None:
        self.armed += armed
        self.errors |= {error.tag: f"{error.reason}: {error.message}" for error in errors}
        for part in ran:
            for tag, start, count, applied in zip(
                part.tags.tolist(), part.starts.tolist(), part.counts.tolist(), part.applied.tolist()
            ):
                self.ran.setdefault(tag, []).append((start, count * part.steps, applied * part.steps))
        for block in blocks:
            for row, (tag, readout, position) in enumerate(
                zip(block.tags.tolist(), block.readouts.tolist(), block.positions.tolist())
            ):
                rows = self.rows.setdefault((tag, block.kind, readout), {})
                rows[position] = tuple(np.array(values[row]) for values in block.values)


@dataclass
class Request:
    """A request with the tokens it will come to have, and how far it has run."""

    plan: RequestPlan
    tokens: list[int]
    n_prompt: int
    computed: int = 0
    # As far as it ever ran: a request that was preempted runs all that again in pieces, as it does its prompt.
    reached: int = 0
    scheduled: bool = False
    done: bool = False

    @property
    def n_fed(self) -> int:
        return len(self.tokens) - 1


@dataclass
class Schedule:
    """A scheduler with every habit of vLLM's."""

    toy: Toy
    hooks: Hooks
    requests: list[Request]
    rng: random.Random
    drafts: bool = True
    preempts: bool = True
    finished: list[str] = field(default_factory=list)

    def run(self) -> None:
        steps = 0
        while any(not request.done for request in self.requests):
            steps += 1
            assert steps < 5000
            self.step()
        self.hooks.drain()

    def step(self) -> None:
        rng, batch = self.rng, []
        running = [r for r in self.requests if not r.done]
        if self.preempts and rng.random() < 0.06:
            rng.choice(running).computed = 0
        calm = rng.random() < 0.7
        new = []
        for request in running:
            if not request.scheduled and rng.random() < 0.5:
                continue
            if not calm and rng.random() < 0.2:
                continue
            if not request.scheduled:
                request.scheduled = True
                new.append((name(request), request.plan))
            left = request.n_fed - request.computed
            known = request.n_prompt if request.reached < request.n_prompt else request.reached + 1
            in_prompt = request.computed < request.n_prompt or request.computed + 1 < known
            n = min(left, rng.randint(1, 7), known - request.computed) if in_prompt else 1
            tokens = request.tokens[request.computed : request.computed + n]
            if self.drafts and not in_prompt and not calm:
                extra = rng.randint(0, 3)
                accepted = rng.randint(0, min(extra, left - 1)) if left > 1 else 0
                right = request.tokens[request.computed + 1 : request.computed + 1 + accepted]
                tokens = tokens + right + [rng.randrange(VOCAB) for _ in range(extra - accepted)]
                n = 1 + accepted
            batch.append((request, tokens, n))
        rng.shuffle(batch) if not calm else None
        self.hooks.update(new, self.finished)
        self.finished = []
        if not batch:
            return
        starts = np.array([request.computed for request, _, _ in batch], dtype=np.int64)
        counts = np.array([len(tokens) for _, tokens, _ in batch], dtype=np.int64)
        ids = np.concatenate([np.array(tokens, dtype=np.int64) for _, tokens, _ in batch])
        if not self.hooks.idle:
            self.hooks.prepare(
                StepBatch(
                    req_ids=[name(request) for request, _, _ in batch],
                    starts=starts,
                    counts=counts,
                    n_tokens=len(ids),
                    token_ids=lambda: ids,
                )
            )
        positions = np.concatenate([s + np.arange(n) for s, n in zip(starts, counts)])
        self.toy.run(ids, positions, padding=self.rng.choice([0, 0, 3]))
        self.hooks.finish()
        for request, _, n in batch:
            request.computed += n
            request.reached = max(request.reached, request.computed)
            if request.computed >= request.n_fed:
                request.done = True
                self.finished.append(name(request))


def name(request: Request) -> str:
    return f"request-{request.plan.tag}"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[Toy, Hooks, Collector]]]:
    # Plans are handed over as they are: packing them is tested where its library is.
    monkeypatch.setattr(hooks_module, "unpack_plan", lambda plan: plan)

    def make(dtype: torch.dtype = torch.float32, **settings: int) -> tuple[Toy, Hooks, Collector]:
        toy, collector = Toy(dtype), Collector()
        made_hooks = Hooks(
            toy.junctions,
            width=W,
            device=torch.device("cpu"),
            settings=replace(
                WorkerSettings(max_edits=64, max_vectors=96, max_resident_vectors=4), **settings
            ),
            reporter=collector,  # type: ignore[arg-type]
            reports_rows=True,
            context=AnsweringContext(lens=lambda s: s @ torch.from_numpy(toy.embed.T).to(s.dtype)),
        )
        made_hooks.dictionaries.update(DICTIONARIES)
        return toy, made_hooks, collector

    yield make
    junctions.clear()


# -- random requests and what they should do -------------------------------------------------------------------------


def clause(rng: random.Random, n_prompt: int, n_fed: int) -> Clause:
    kind = rng.randrange(5)
    if kind == 0:
        ranges: tuple[tuple[int, int], ...] = ((0, FOREVER),)
    elif kind == 1:
        ranges = ((n_prompt, n_fed),)
    elif kind == 2:
        low = rng.randrange(n_fed)
        ranges = ((low, rng.randint(low + 1, n_fed)),)
    elif kind == 3:
        ranges = tuple((p, p + 1) for p in sorted(rng.sample(range(n_fed), min(3, n_fed))))
    else:
        return Clause(ranges=((0, FOREVER),), excluded_token_ids=SPECIAL, n_prompt=n_prompt)
    return Clause(ranges=ranges, n_prompt=n_prompt)


def covers(where: Clause, position: int, token: int) -> bool:
    if position >= where.n_prompt and token in where.excluded_token_ids:
        return False
    return any(low <= position < high for low, high in where.ranges)


def unit(v: np.ndarray) -> np.ndarray:
    return v / np.linalg.norm(v)


def random_edit(rng: random.Random, index: int, sites: Sequence[str], n_prompt: int, n_fed: int) -> EditPlan:
    vector = np.random.default_rng(rng.randrange(1 << 30))
    where = clause(rng, n_prompt, n_fed)
    kind = rng.choice(["add", "add", "add", "scaled", "project", "rotate", "replace", "rows", "features"])
    common: dict[str, Any] = {
        "index": index, "clause": where, "sites_out": (rng.choice(sites),), "preserve_norm": rng.random() < 0.2
    }  # fmt: skip
    if kind == "features":
        at = ("blocks.0.hook_resid_post",)
        ids = tuple(rng.sample(range(F), 3))
        factors = tuple(rng.choice([0.0, 2.0]) for _ in ids)
        offsets = tuple(rng.choice([0.0, 1.5]) for _ in ids)
        return EditPlan(
            **(common | {"sites_out": at, "sites_in": at}), kind="features", feature_ids=ids, factors=factors,
            offsets=offsets, dictionary=rng.choice(sorted(DICTIONARIES)),
        )  # fmt: skip
    if kind in ("add", "scaled"):
        v = vector.normal(size=(1, W))
        if kind == "scaled":
            return EditPlan(**common, kind="add", n_vectors=1, vectors=f32(unit(v[0])[None]), scaled=0.3)
        return EditPlan(**common, kind="add", n_vectors=1, vectors=f32(v), plain=rng.uniform(-2, 2))
    if kind == "project":
        v = unit(vector.normal(size=W))[None]
        low, high = rng.choice([(0.0, 0.0), (None, 0.5), (-0.25, None)])
        return EditPlan(**common, kind="project", n_vectors=1, vectors=f32(v), low=low, high=high)
    if kind == "rotate":
        first = unit(vector.normal(size=W))
        across = vector.normal(size=W)
        across = unit(across - (across @ first) * first)
        target = math.cos(2.0) * first + math.sin(2.0) * across
        return EditPlan(**common, kind="rotate", n_vectors=3, vectors=f32(np.stack([first, across, target])))
    if kind == "rows":
        positions = sorted(rng.sample(range(n_fed), min(4, n_fed)))
        common["clause"] = Clause(ranges=tuple((p, p + 1) for p in positions), n_prompt=n_prompt)
        rows = vector.normal(size=(len(positions), W))
        return EditPlan(**common, kind="replace", n_vectors=len(rows), vectors=f32(rows))
    return EditPlan(**common, kind="replace", n_vectors=1, vectors=f32(vector.normal(size=(1, W))))


def f32(array: np.ndarray) -> bytes:
    return np.asarray(array).astype("<f4").tobytes()


def formula(edit: EditPlan, s: np.ndarray, position: int) -> np.ndarray:
    """What an edit does to one row, in float64."""
    vectors = np.frombuffer(edit.vectors, "<f4").astype(np.float64).reshape(-1, W)
    if edit.kind == "features":
        held = DICTIONARIES[edit.dictionary]
        ids = torch.tensor(edit.feature_ids)
        now = held.encode_features(torch.from_numpy(s).float()[None], ids)[0].double().numpy()
        change = now * (np.array(edit.factors) - 1) + np.array(edit.offsets)
        out = s + change @ held.decoder_rows(ids).double().numpy()
    elif edit.kind == "add":
        out = s + (edit.plain + edit.scaled * np.linalg.norm(s)) * vectors[0]
    elif edit.kind == "project":
        along = s @ vectors[0]
        low = -math.inf if edit.low is None else edit.low
        high = math.inf if edit.high is None else edit.high
        out = s + (min(max(along, low), high) - along) * vectors[0]
    elif edit.kind == "rotate":
        first, across, target = vectors
        a, b = s @ first, s @ across
        out = s - a * first - b * across + math.hypot(a, b) * target
    else:
        positions = [p for low, high in edit.clause.ranges for p in range(low, min(high, 600))]
        out = vectors[positions.index(position) if len(vectors) > 1 else 0]
    if edit.preserve_norm:
        out = out * np.linalg.norm(s) / max(np.linalg.norm(out), 1e-38)
    return out


@dataclass
class Expected:
    """Every hook point at every fed position, and where conditional edits were made."""

    points: list[dict[str, np.ndarray]]
    made: dict[int, dict[int, bool]]


def expect(toy: Toy, request: Request) -> Expected:
    found = Expected([], {})
    latched = [False] * len(request.plan.conditions)
    prompt_scores: list[list[float]] = [[] for _ in request.plan.conditions]
    for position in range(request.n_fed):
        token = request.tokens[position]
        points: dict[str, np.ndarray] = {}
        measured: dict[int, bool] = {}

        def at(
            site: str,
            s: np.ndarray,
            position: int = position,
            token: int = token,
            points: Any = points,
            measured: Any = measured,
        ) -> np.ndarray:
            for edit in request.plan.edits:
                index = edit.condition
                if index < 0 or index in measured or request.plan.conditions[index].sites != (site,):
                    continue
                measured[index] = ask(index, s, position, token)
            for edit in request.plan.edits:
                if edit.sites_out != (site,) or not covers(edit.clause, position, token):
                    continue
                if edit.condition >= 0:
                    made = measured[edit.condition]
                    found.made.setdefault(edit.index, {})[position] = made
                    if not made:
                        continue
                s = formula(edit, s, position)
            points[site] = s
            return s

        def ask(index: int, s: np.ndarray, position: int, token: int) -> bool:
            condition = request.plan.conditions[index]
            weights = np.frombuffer(condition.weights, "<f4").astype(np.float64)
            looks = covers(condition.clause, position, token)
            score = s @ weights + condition.bias
            passes = looks and condition.side * score > condition.side * condition.limit
            if condition.scope == "position":
                return passes
            if condition.scope == "latched":
                latched[index] = latched[index] or passes
                return latched[index]
            if looks and position < request.n_prompt:
                prompt_scores[index].append(score)
            aggregate = {"max": max, "mean": np.mean, "last": lambda x: x[-1]}[condition.aggregation]
            value = aggregate(prompt_scores[index])
            return bool(condition.side * value > condition.side * condition.limit)

        toy.position(token, position, at)
        found.points.append(points)
    return found


def check(toy: Toy, collector: Collector, requests: Sequence[Request], *, atol: float = 2e-4) -> None:
    for request in requests:
        tag = request.plan.tag
        assert tag not in collector.errors, collector.errors[tag]
        assert tag in collector.armed
        expected = expect(toy, request)
        for readout in request.plan.readouts:
            rows = collector.rows.get((tag, readout.kind, readout.index), {})
            for position in range(request.n_fed):
                wanted = covers(readout.clause, position, request.tokens[position])
                if wanted:
                    assert position in rows, f"request {tag}, readout {readout.index}: no row at {position}"
                    see(toy, readout, rows[position], expected.points[position], atol)
        ledger = Ledger(request.plan.edits)
        for run in collector.ran.get(tag, ()):
            ledger.ran(*run)
        assert ledger.complete(request.n_fed)
        assert ledger.first_mismatch(request.tokens) is None
        for index, by_position in expected.made.items():
            rows = collector.rows[tag, "steered", index]
            for position, was_made in by_position.items():
                assert bool(rows[position][0]) == was_made, f"request {tag}, edit {index} at {position}"


def see(
    toy: Toy, readout: ReadoutPlan, row: tuple[Any, ...], points: dict[str, np.ndarray], atol: float
) -> None:
    """One row of one readout against the oracle's activations."""
    s = points[readout.sites[0]]
    if readout.kind == "activations":
        joined = np.concatenate([points[site] for site in readout.sites])
        np.testing.assert_allclose(row[0], joined, atol=atol)
    elif readout.kind == "lens":
        logits = s @ toy.embed.T
        logprobs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        np.testing.assert_allclose(row[1], np.sort(logprobs)[::-1][: readout.top_k], atol=10 * atol)
    else:
        held = DICTIONARIES[readout.dictionary]
        dense = held.encode_features(torch.from_numpy(s).float()[None], torch.arange(F))[0].numpy()
        if readout.feature_ids:
            np.testing.assert_allclose(row[1], dense[list(readout.feature_ids)], atol=10 * atol)
        else:
            best = np.sort(dense[dense > 0])[::-1][: readout.top_k]
            np.testing.assert_allclose(row[1][row[0] >= 0], best, atol=10 * atol)


def random_readouts(
    rng: random.Random, sites: Sequence[str], n_prompt: int, n_fed: int
) -> tuple[ReadoutPlan, ...]:
    at = ("blocks.0.hook_resid_post",)
    made = [
        ReadoutPlan(index=0, kind="activations", clause=clause(rng, n_prompt, n_fed), sites=(rng.choice(sites),)),
        ReadoutPlan(index=1, kind="activations", clause=clause(rng, n_prompt, n_fed), sites=tuple(rng.sample(sites, 2))),
        ReadoutPlan(index=2, kind="features", clause=clause(rng, n_prompt, n_fed), sites=at, top_k=2, dictionary="jump#1"),
        ReadoutPlan(index=3, kind="features", clause=clause(rng, n_prompt, n_fed), sites=at, feature_ids=(1, 7),
        dictionary="top#1"), ReadoutPlan(index=4, kind="lens", clause=clause(rng, n_prompt, n_fed),
    sites=(rng.choice(sites),), top_k=3), ]  # fmt: skip
    return tuple(rng.sample(made, rng.randrange(4)))


def random_request(rng: random.Random, tag: int, sites: Sequence[str]) -> Request:
    n_prompt, n_new = rng.randint(1, 20), rng.randint(1, 15)
    n_fed = n_prompt + n_new - 1
    edits = tuple(random_edit(rng, index, sites, n_prompt, n_fed) for index in range(rng.randrange(4)))
    plan = RequestPlan(
        tag=tag, n_prompt=n_prompt, edits=edits, readouts=random_readouts(rng, sites, n_prompt, n_fed)
    )
    return Request(plan, [rng.randrange(VOCAB) for _ in range(n_prompt + n_new)], n_prompt)


@pytest.mark.parametrize("seed", range(25))
def test_random_requests_under_a_random_schedule(seed: int, made: Any) -> None:
    toy, hooks, collector = made()
    rng = random.Random(seed)
    requests = [random_request(rng, tag, toy.sites) for tag in range(1, 15)]
    Schedule(toy, hooks, requests, rng).run()
    check(toy, collector, requests)
    hooks.update((), [name(request) for request in requests])
    hooks.drain()
    found = hooks.statistics()
    assert found["edit_slots_used"] == found["vector_rows_used"] == found["requests_running"] == 0


def random_condition(rng: random.Random, site: str, n_prompt: int) -> ConditionPlan:
    weights = np.random.default_rng(rng.randrange(1 << 30)).normal(size=W)
    scope = rng.choice(["position", "latched", "prompt"])
    last = n_prompt if scope == "prompt" else FOREVER
    return ConditionPlan(
        kind="affine",
        clause=Clause(ranges=((0, last),), n_prompt=n_prompt),
        sites=(site,),
        limit=rng.uniform(-1, 2),
        side=rng.choice([1.0, -1.0]),
        scope=scope,
        aggregation=rng.choice(["max", "mean", "last"]),
        weights=f32(weights),
        bias=0.1,
    )


@pytest.mark.parametrize("seed", range(25))
def test_edits_under_conditions(seed: int, made: Any) -> None:
    toy, hooks, collector = made()
    rng = random.Random(1000 + seed)
    requests = []
    for tag in range(1, 12):
        request = random_request(rng, tag, toy.sites)
        if tag % 2:
            condition = random_condition(rng, "blocks.0.hook_attn_out", request.n_prompt)
            # What comes later in the pass; a prompt's answer is known from its last position on.
            first = request.n_prompt - 1 if condition.scope == "prompt" else 0
            later = [
                site for site in toy.sites if site.startswith("blocks.1") or site.endswith("0.hook_mlp_out")
            ]
            edits = tuple(
                replace(
                    random_edit(rng, index, later, request.n_prompt, request.n_fed),
                    kind="add", sites_in=(), sites_out=(rng.choice(later),), n_vectors=1, plain=1.5, scaled=0.0,
                    vectors=f32(np.random.default_rng(index).normal(size=(1, W))), condition=rng.choice([0, 0, -1]),
                    clause=Clause(ranges=((first, FOREVER),), n_prompt=request.n_prompt),
                )
                for index in range(3)
            )  # fmt: skip
            request.plan = replace(request.plan, edits=edits, conditions=(condition,))
        requests.append(request)
    Schedule(toy, hooks, requests, rng).run()
    check(toy, collector, requests)


def test_bfloat16_rounds_once(made: Any) -> None:
    toy, hooks, collector = made(torch.bfloat16)
    rng = random.Random(5)
    requests = [random_request(rng, tag, toy.sites) for tag in range(1, 6)]
    for request in requests:
        vector = np.random.default_rng(request.plan.tag).normal(size=(1, W))
        edit = EditPlan(
            index=0, kind="add", clause=Clause(ranges=((0, FOREVER),), n_prompt=request.n_prompt),
            sites_out=("blocks.0.hook_resid_post",), n_vectors=1, vectors=f32(vector), plain=1.0,
        )  # fmt: skip
        reads = ReadoutPlan(
            index=0, kind="activations", clause=edit.clause, sites=edit.sites_out, dtype="bfloat16"
        )
        request.plan = RequestPlan(
            tag=request.plan.tag, n_prompt=request.n_prompt, edits=(edit,), readouts=(reads,)
        )
    Schedule(toy, hooks, requests, rng).run()
    check(toy, collector, requests, atol=0.15)


def test_a_plan_that_cannot_be_installed_fails_alone(made: Any) -> None:
    toy, hooks, collector = made()
    rng = random.Random(2)
    requests = [random_request(rng, tag, toy.sites) for tag in range(1, 5)]
    unknown = replace(
        random_edit(rng, 0, toy.sites, 4, 8), kind="features", sites_in=("blocks.0.hook_resid_post",),
        sites_out=("blocks.0.hook_resid_post",), dictionary="gone#3",
    )  # fmt: skip
    bad = Request(RequestPlan(tag=9, n_prompt=4, edits=(unknown,)), [1] * 9, 4)
    Schedule(toy, hooks, [*requests, bad], rng).run()
    check(toy, collector, requests)
    assert "gone#3" in collector.errors[9] and collector.errors[9].startswith("plan_refused")


def test_slots_run_out_with_a_word(made: Any) -> None:
    toy, hooks, collector = made(max_edits=2)
    rng = random.Random(3)
    edits = tuple(
        EditPlan(index=i, kind="add", clause=Clause(ranges=((0, FOREVER),)), sites_out=(toy.sites[0],), n_vectors=1,
                 vectors=f32(np.ones((1, W))), plain=1.0)
        for i in range(3)
    )  # fmt: skip
    Schedule(toy, hooks, [Request(RequestPlan(tag=1, n_prompt=2, edits=edits), [1] * 6, 2)], rng).run()
    assert "2 of 2" in collector.errors[1] or "1 edits asked for" in collector.errors[1]
    assert hooks.statistics()["edit_slots_used"] == hooks.statistics()["vector_rows_used"] == 0


def test_an_op_that_fails_fails_its_request_and_no_other(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, hooks, collector = made()
    rng = random.Random(4)
    requests = [random_request(rng, tag, toy.sites) for tag in range(1, 6)]
    for request in requests:
        request.plan = replace(request.plan, edits=(), readouts=request.plan.readouts)
    broken = LinearDictionary("broken", DICTIONARIES["jump#1"].parameters)
    monkeypatch.setattr(broken, "encode_features", lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
    hooks.dictionaries["broken#1"] = broken
    at = ("blocks.0.hook_resid_post",)
    edit = EditPlan(index=0, kind="features", clause=Clause(ranges=((0, FOREVER),)), sites_in=at, sites_out=at,
                    dictionary="broken#1", feature_ids=(1,), factors=(0.0,), offsets=(0.0,))  # fmt: skip
    bad = Request(RequestPlan(tag=9, n_prompt=4, edits=(edit,)), [1] * 9, 4)
    Schedule(toy, hooks, [*requests, bad], rng).run()
    check(toy, collector, requests)
    assert collector.errors[9].startswith("not_applied: MeasureFeatures failed: RuntimeError: no")


def test_resident_vectors(made: Any) -> None:
    toy, hooks, collector = made()
    rng = random.Random(6)
    vector = np.random.default_rng(1).normal(size=(1, W))
    hooks.vectors.load("kind", f32(vector))
    requests = []
    for tag in (1, 2, 3):
        edit = EditPlan(index=0, kind="add", clause=Clause(ranges=((0, FOREVER),)), sites_out=(toy.sites[2],),
                        n_vectors=1, vector_keys=("kind",), plain=float(tag))  # fmt: skip
        reads = ReadoutPlan(index=0, kind="activations", clause=edit.clause, sites=(toy.sites[-1],))
        requests.append(
            Request(RequestPlan(tag=tag, n_prompt=3, edits=(edit,), readouts=(reads,)), [2] * 9, 3)
        )
    Schedule(toy, hooks, requests, rng).run()
    for request in requests:
        edit = replace(request.plan.edits[0], vectors=f32(vector), vector_keys=())
        request.plan = replace(request.plan, edits=(edit,))
    check(toy, collector, requests)
    hooks.vectors.unload("kind")
    hooks.update((), [name(request) for request in requests])
    assert hooks.statistics()["resident_vectors"] == hooks.vectors.residents.in_use == 0


def test_a_decoding_batch_is_planned_once(made: Any) -> None:
    toy, hooks, collector = made()
    edit = EditPlan(index=0, kind="add", clause=Clause(ranges=((0, FOREVER),)), sites_out=(toy.sites[2],),
                    n_vectors=1, vectors=f32(np.ones((1, W))), plain=1.0)  # fmt: skip
    reads = ReadoutPlan(index=0, kind="activations", clause=edit.clause, sites=(toy.sites[-1],))
    requests = [
        Request(RequestPlan(tag=tag, n_prompt=1, edits=(edit,), readouts=(reads,)), [5] * 40, 1)
        for tag in (1, 2, 3)
    ]
    hooks.update([(name(request), request.plan) for request in requests], ())
    for position in range(39):
        hooks.prepare(
            StepBatch(
                req_ids=[name(request) for request in requests],
                starts=np.full(3, position),
                counts=np.ones(3, dtype=np.int64),
                n_tokens=3,
                token_ids=lambda: np.full(3, 5),
            )
        )
        toy.run(np.full(3, 5), np.full(3, position), padding=0)
        hooks.finish()
    hooks.drain()
    assert hooks.counters["steps_planned"] == 1 and hooks.counters["steps_hooked"] == 39
    check(toy, collector, requests)
