"""The bars of the vLLM engine against bare vLLM, alternating in one run: `python -m tests.bench.vllm`.

Both are vLLM's asynchronous engine on the same weights, compiled, with the same settings, in processes of their own; ours
has the hooks in its graph. Every pair runs 32 greedy streams of 64 tokens on each, one after the other, and gives one ratio
of rates; a figure is the median of the ratios. Streams ask for log-probabilities on both sides, for ours always report
them.

- `vllm_unused`: nothing is asked of the hooks.
- `vllm_one_layer`, `vllm_six_layers`: 32 different vectors at one layer, and at all six.
- `vllm_configurations`: 256 requests with a vector each against 256 with one vector.
- `vllm_capture`, `vllm_features`: one layer's activations, and its 8 strongest features, with each token.
- `vllm_latency`: median time between tokens of 8 streams, over bare vLLM's.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from glasshouse import fable
from glasshouse.server.engines.engine import Engine
from glasshouse.server.types.configuration import EngineSettings, VllmSettings
from glasshouse.server.types.generation import GenerationRequest, NewToken, Sampling
from glasshouse.server.types.interventions import AddVector, Intervention
from glasshouse.server.types.limits import Limits
from glasshouse.server.types.readouts import ReadActivations, ReadFeatures, Readout

from .harness import Results
from .workload import N_STREAMS, N_TOKENS, texts, vectors

PAIRS = 15
POINT = "blocks.3.hook_resid_post"
LAYERS = tuple(f"blocks.{layer}.hook_resid_post" for layer in range(6))
DICTIONARY = "resid-post-3"
LIMITS = Limits(max_running=64)


class Bare:
    """vLLM as it is."""

    def __init__(self, llm: Any) -> None:
        self._llm, self._n = llm, 0

    async def stream(self, prompt: Sequence[int], gaps: list[float] | None = None) -> int:
        """The tokens of one request; the time between them goes to `gaps`."""
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        self._n += 1
        params = SamplingParams(
            temperature=0.0,
            max_tokens=N_TOKENS,
            ignore_eos=True,
            detokenize=False,
            logprobs=0,
            output_kind=RequestOutputKind.DELTA,
        )
        n_tokens, last = 0, 0.0
        async for output in self._llm.generate(tokens_input(list(prompt)), params, f"bare-{self._n}"):
            n_tokens += len(output.outputs[0].token_ids)
            last = _gap(gaps, last)
        return n_tokens


class Ours:
    """The same through our engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def stream(
        self,
        prompt: Sequence[int],
        edits: Sequence[tuple[str, np.ndarray]] = (),
        readouts: tuple[Readout, ...] = (),
        gaps: list[float] | None = None,
    ) -> int:
        """The tokens of one request."""
        request = GenerationRequest(
            prompt=tuple(prompt),
            max_tokens=N_TOKENS,
            sampling=Sampling(temperature=0.0),
            ignore_eos=True,
            interventions=tuple(
                Intervention(hook_point=name, edit=AddVector(vector=vector)) for name, vector in edits
            ),
            readouts=readouts,
        )
        n_tokens, last = 0, 0.0
        async for batch in self.engine.generate(request):
            n_tokens += sum(isinstance(event, NewToken) for event in batch)
            last = _gap(gaps, last)
        return n_tokens


def _gap(gaps: list[float] | None, last: float) -> float:
    now = time.perf_counter()
    if gaps is not None and last:
        gaps.append(now - last)
    return now


async def _rate(work: Sequence[Awaitable[int]]) -> float:
    begun = time.perf_counter()
    done = await asyncio.gather(*work)
    return sum(done) / (time.perf_counter() - begun)


async def _ratio(
    ours: Callable[[], Awaitable[float]], theirs: Callable[[], Awaitable[float]], pairs: int
) -> tuple[float, float, float]:
    await theirs(), await ours()
    found = []
    for turn in range(pairs):
        if turn % 2:
            baseline = await theirs()
            found.append((await ours(), baseline))
        else:
            mine = await ours()
            found.append((mine, await theirs()))
    return (
        statistics.median(mine / baseline for mine, baseline in found),
        statistics.median(mine for mine, _ in found),
        statistics.median(baseline for _, baseline in found),
    )


async def measure(results: Results, *, pairs: int, eager: bool, only: Sequence[str]) -> None:
    """Starts both, measures, stops both."""
    from glasshouse.server.engines.vllm.engine import create

    settings = EngineSettings(
        model=str(fable.model_path()),
        name="fable",
        dtype="float32",
        limits=LIMITS,
        threads=1,
        vllm=VllmSettings(enforce_eager=eager),
        dictionaries={DICTIONARY: str(fable.dictionary_path(DICTIONARY))},
    )
    engine = create(settings)
    await engine.start()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from glasshouse.server.engines.vllm.gateway import arguments

    known = arguments.argument_names(AsyncEngineArgs)
    given = arguments.engine_arguments(settings, engine._outlined, known)
    plain = {name: value for name, value in given.items() if name not in ("worker_cls", "additional_config")}
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**plain))
    bare, ours = Bare(llm), Ours(engine)
    prompts = [engine.codec.encode(text) for text in texts(256)]
    few = prompts[:N_STREAMS]
    drawn = vectors(256, engine.info.d_model, norm=2.0)

    async def of_bare(some: Sequence[Sequence[int]] = few) -> float:
        return await _rate([bare.stream(prompt) for prompt in some])

    async def unused() -> float:
        return await _rate([ours.stream(prompt) for prompt in few])

    async def one_layer() -> float:
        return await _rate([ours.stream(p, [(POINT, drawn[i])]) for i, p in enumerate(few)])

    async def six_layers() -> float:
        return await _rate([ours.stream(p, [(name, drawn[i]) for name in LAYERS]) for i, p in enumerate(few)])

    async def many_vectors() -> float:
        return await _rate([ours.stream(p, [(POINT, drawn[i])]) for i, p in enumerate(prompts)])

    async def one_vector() -> float:
        return await _rate([ours.stream(p, [(POINT, drawn[0])]) for p in prompts])

    async def capture() -> float:
        return await _rate([ours.stream(p, (), (ReadActivations(hook_point=POINT),)) for p in few])

    async def features() -> float:
        return await _rate([ours.stream(p, (), (ReadFeatures(dictionary=DICTIONARY, top_k=8),)) for p in few])

    bars: dict[str, tuple[Callable[[], Awaitable[float]], Callable[[], Awaitable[float]], float]] = {
        "vllm_unused": (unused, of_bare, 0.98),
        "vllm_one_layer": (one_layer, of_bare, 0.95),
        "vllm_six_layers": (six_layers, of_bare, 0.88),
        "vllm_configurations": (many_vectors, one_vector, 0.97),
        "vllm_capture": (capture, of_bare, 0.92),
        "vllm_features": (features, of_bare, 0.88),
    }
    try:
        for name, (mine, theirs, bar) in bars.items():
            if only and name not in only:
                continue
            ratio, a, b = await _ratio(
                mine, theirs, pairs if name != "vllm_configurations" else max(3, pairs // 3)
            )
            results.report(name, ratio, "x", f"{b:.0f} tokens/s, ours {a:.0f}", f">= {bar:g}", ratio >= bar)
        if not only or "vllm_latency" in only:
            await _latency(results, bare, ours, few[:8], pairs)
    finally:
        llm.shutdown(3.0)
        await engine.stop()


async def _latency(
    results: Results, bare: Bare, ours: Ours, prompts: Sequence[Sequence[int]], pairs: int
) -> None:
    ratios, mine, theirs = [], [], []
    for _ in range(pairs + 1):
        one: list[float] = []
        other: list[float] = []
        await asyncio.gather(*(bare.stream(prompt, one) for prompt in prompts))
        await asyncio.gather(*(ours.stream(prompt, gaps=other) for prompt in prompts))
        theirs.append(statistics.median(one))
        mine.append(statistics.median(other))
        ratios.append(mine[-1] / theirs[-1])
    ratio = statistics.median(ratios[1:])
    results.report(
        "vllm_latency",
        ratio,
        "x",
        f"{1000 * statistics.median(theirs):.2f} ms, ours {1000 * statistics.median(mine):.2f}",
        "<= 1.05",
        ratio <= 1.05,
    )


def main() -> int:
    """Measures, prints, writes; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.vllm", description="Measure the vLLM engine's bars."
    )
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--only", action="append", default=[])
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    results = Results()
    asyncio.run(measure(results, pairs=chosen.pairs, eager=chosen.eager, only=chosen.only))
    return 1 if results.missed else 0


if __name__ == "__main__":
    sys.exit(main())
