"""Streams whose probes are read, or that are steered under a condition, against the same streams without.

- `probes_4_32`: 32 streams, the scores of 4 probes at every position, prompt and generated; through the server.
- `conditional_32`: 32 streams, a vector each, added only where a probe passes its threshold; through the server.
- `probes_engine`, `conditional_engine`: the same of the engine in process, where nothing else hides the cost.
- `conditional_over_steered`: `conditional_engine` against the same edits without their conditions: what asking costs.

The server's probes are trained on a few sentences before; the engine's have random weights. No bar holds for any of these.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from glasshouse.client import AsyncModel, add_vector, read_probe
from glasshouse.server.engines.engine import Engine
from glasshouse.server.probes.concepts import ConceptShelf
from glasshouse.server.probes.examples import Task
from glasshouse.server.probes.pooling import Pooling
from glasshouse.server.probes.served import ProbeFacts, ServedProbe, affine
from glasshouse.server.types import interventions as types
from glasshouse.server.types.conditions import Condition, ProbeColumn
from glasshouse.server.types.generation import GenerationRequest, NewToken, Sampling
from glasshouse.server.types.readouts import ReadProbe

from ..harness import Report, Turns, in_turns, rate
from ..workbench import Workbench
from ..workload import N_STREAMS, N_TOKENS, texts, vectors

N_PROBES = 4
HOOK = "blocks.3.hook_resid_post"
NAMES = tuple(f"bench-{index}" for index in range(N_PROBES))


def run(bench: Workbench, report: Report) -> None:
    """probes_4_32, conditional_32, probes_engine, conditional_engine, conditional_over_steered"""
    prompts = [list(bench.loaded.tokenizer.encode(text)) for text in texts(N_STREAMS)]
    drawn = vectors(N_STREAMS, bench.loaded.d_model, norm=2.0)
    served = _Served(bench, prompts, drawn)
    _report(report, "probes_4_32", served.against(served.reading), "with probes")
    _report(report, "conditional_32", served.against(served.conditional), "conditional")
    engine = _InProcess(bench, prompts, drawn)
    _report(report, "probes_engine", engine.against(engine.reading), "with probes")
    _report(report, "conditional_engine", engine.against(engine.conditional), "conditional")
    _report(
        report, "conditional_over_steered", engine.against(engine.conditional, engine.steered), "conditional"
    )


def _report(report: Report, name: str, found: Turns, what: str) -> None:
    report(
        name,
        found.ratio,
        "x",
        f"without {found.baseline:.0f} tokens/s, {what} {found.ours:.0f}",
        "none",
        True,
    )


class _Served:
    """Through gRPC and the client."""

    def __init__(self, bench: Workbench, prompts: Sequence[list[int]], drawn: np.ndarray) -> None:
        self._bench, self._prompts = bench, prompts
        model = bench.served_model
        bench.run(_publish(model))
        self.reading = [{"readouts": [read_probe(name) for name in NAMES]}] * N_STREAMS
        self.conditional = [
            {"interventions": [add_vector(HOOK, vector).when(NAMES[0], above=0.5)]} for vector in drawn
        ]

    def against(self, each: Sequence[dict[str, Any]]) -> Turns:
        plain: list[dict[str, Any]] = [{}] * N_STREAMS
        return in_turns(lambda: self._rate(each), lambda: self._rate(plain), self._bench.repeats)

    def _rate(self, each: Sequence[dict[str, Any]]) -> float:
        model = self._bench.served_model

        async def stream(prompt: list[int], rest: dict[str, Any]) -> int:
            n_tokens = 0
            async with model.generate(
                prompt, max_tokens=N_TOKENS, temperature=0.0, ignore_eos=True, **rest
            ) as tokens:
                async for token in tokens:
                    if "readouts" in rest:
                        assert len(token.probes) == N_PROBES
                    n_tokens += 1
            return n_tokens

        return self._bench.run(rate(_together(stream, self._prompts, each)))


class _InProcess:
    """Of the engine, called directly."""

    def __init__(self, bench: Workbench, prompts: Sequence[list[int]], drawn: np.ndarray) -> None:
        self._bench, self._prompts, self._engine = bench, prompts, bench.engine
        shelf = ConceptShelf(self._engine.info.name)
        for index, name in enumerate(NAMES):
            shelf.put_probe(name, random_probe(bench.loaded.d_model, index))
        self._engine.use_concepts(shelf)
        condition = Condition(source=ProbeColumn(probe=NAMES[0]), above=0.5)
        self.reading = [{"readouts": tuple(ReadProbe(probe=name) for name in NAMES)}] * N_STREAMS
        edits = [types.AddVector(vector=vector) for vector in drawn]
        self.steered = [
            {"interventions": (types.Intervention(hook_point=HOOK, edit=edit),)} for edit in edits
        ]
        self.conditional = [
            {"interventions": (types.Intervention(hook_point=HOOK, edit=edit, condition=condition),)}
            for edit in edits
        ]

    def against(self, each: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]] = ()) -> Turns:
        plain: Sequence[dict[str, Any]] = other or [{}] * N_STREAMS
        return in_turns(lambda: self._rate(each), lambda: self._rate(plain), self._bench.repeats)

    def _rate(self, each: Sequence[dict[str, Any]]) -> float:
        engine: Engine = self._engine

        async def stream(prompt: list[int], rest: dict[str, Any]) -> int:
            request = GenerationRequest(
                prompt=tuple(prompt),
                max_tokens=N_TOKENS,
                sampling=Sampling(temperature=0.0),
                ignore_eos=True,
                **rest,
            )
            n_tokens = 0
            async for batch in engine.generate(request):
                n_tokens += sum(isinstance(event, NewToken) for event in batch)
            return n_tokens

        return self._bench.run(rate(_together(stream, self._prompts, each)))


async def _together(
    stream: Callable[[list[int], dict[str, Any]], Any],
    prompts: Sequence[list[int]],
    each: Sequence[dict[str, Any]],
) -> list[int]:
    return await asyncio.gather(*(stream(prompt, rest) for prompt, rest in zip(prompts, each, strict=True)))


async def _publish(model: AsyncModel) -> None:
    beginnings = texts(40)
    examples = [(text, "long" if index % 2 else "short") for index, text in enumerate(beginnings)]
    for name in NAMES:
        operation = await model.train_probe(
            examples, hook_points=[HOOK], pooling="token", name=name, next_version=True
        )
        await operation.result(timeout=120)


def random_probe(width: int, seed: int) -> ServedProbe:
    """A probe of `HOOK` with random weights."""
    rng = np.random.default_rng(seed)
    facts = ProbeFacts(
        kind="logistic",
        task=Task.BINARY,
        label_names=("no", "yes"),
        hook_points=(HOOK,),
        widths=(width,),
        pooling=Pooling.TOKEN,
    )
    return ServedProbe(facts=facts, layers=(affine(rng.normal(size=(width, 1)), np.zeros(1)),))
