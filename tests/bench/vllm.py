"""The bars of the vLLM engine against bare vLLM, alternating in one run: `python -m tests.bench.vllm`.

Both are vLLM's asynchronous engine on the same weights, compiled, with the same settings, in processes of their own; ours
has the hooks in its graph. Every pair runs 32 greedy streams of 64 tokens on each, one after the other, and gives one ratio
of rates; a figure is the median of the ratios. Streams ask for log-probabilities on both sides, for ours always report
them.

- `vllm_unused`: nothing is asked of the hooks.
- `vllm_one_layer`, `vllm_six_layers`: 32 different vectors at one layer, and at all six.
- `vllm_configurations`: 256 requests with a vector each against 256 with one vector.
- `vllm_capture`, `vllm_features`: one layer's activations, and its 8 strongest features, with each token.
- `vllm_probes`: the scores of 4 probes with each token.
- `vllm_latency`: median time between tokens of 8 streams, over bare vLLM's.
- `vllm_through_grpc`: `glasshouse serve --engine vllm` and the client, against vLLM called in process.
- `vllm_large_steering`, `vllm_large_features` (with `--long`): 32 vectors at one layer, and the 8 strongest of 2,048
  features, of a random model of 12 layers and d_model 1,024; 16 tokens a stream.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from glasshouse import fable
from glasshouse.client import AsyncClient
from glasshouse.server.dictionaries.formats.glasshouse import Recipe, save_dictionary
from glasshouse.server.engines.engine import Engine
from glasshouse.server.probes.concepts import ConceptShelf
from glasshouse.server.types.configuration import EngineSettings, VllmSettings
from glasshouse.server.types.generation import GenerationRequest, NewToken, Sampling
from glasshouse.server.types.interventions import AddVector, Intervention
from glasshouse.server.types.limits import Limits
from glasshouse.server.types.readouts import ReadActivations, ReadFeatures, Readout, ReadProbe
from glasshouse.tour.server_process import ServerProcess

from .harness import Report, Results
from .streams import Stream, served
from .workload import N_STREAMS, N_TOKENS, texts, vectors

PAIRS = 15
POINT = "blocks.3.hook_resid_post"
LAYERS = tuple(f"blocks.{layer}.hook_resid_post" for layer in range(6))
DICTIONARY = "resid-post-3"
LIMITS = Limits(max_running=64)
BAR_GRPC = 0.9
# Of the larger model, whose steps are a hundred times as long.
LARGE_PAIRS, LARGE_TOKENS = 5, 16
LARGE_POINT = "blocks.6.hook_resid_post"
N_LARGE, D_LARGE, N_FEATURES = 12, 1024, 2048


class Bare:
    """vLLM as it is."""

    def __init__(self, llm: Any, n_tokens: int = N_TOKENS) -> None:
        self._llm, self._n, self._n_tokens = llm, 0, n_tokens

    async def stream(self, prompt: Sequence[int], gaps: list[float] | None = None) -> int:
        """The tokens of one request; the time between them goes to `gaps`."""
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        self._n += 1
        params = SamplingParams(
            temperature=0.0,
            max_tokens=self._n_tokens,
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

    def __init__(self, engine: Engine, n_tokens: int = N_TOKENS) -> None:
        self.engine, self._n_tokens = engine, n_tokens

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
            max_tokens=self._n_tokens,
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


@asynccontextmanager
async def started(settings: EngineSettings, n_tokens: int = N_TOKENS) -> AsyncIterator[tuple[Ours, Bare]]:
    """Both engines of the same settings."""
    from glasshouse.server.engines.vllm.engine import create

    engine = create(settings)
    await engine.start()
    try:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from glasshouse.server.engines.vllm.gateway import arguments

        known = arguments.argument_names(AsyncEngineArgs)
        given = arguments.engine_arguments(settings, engine._outlined, known)
        plain = {
            name: value for name, value in given.items() if name not in ("worker_cls", "additional_config")
        }
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**plain))
        try:
            yield Ours(engine, n_tokens), Bare(llm, n_tokens)
        finally:
            llm.shutdown(3.0)
    finally:
        await engine.stop()


async def measure(
    report: Report, *, pairs: int = PAIRS, eager: bool = False, only: Sequence[str] = (), long: bool = False
) -> None:
    """Starts both, measures, stops both."""
    settings = EngineSettings(
        model=str(fable.model_path()),
        name="fable",
        dtype="float32",
        limits=LIMITS,
        threads=1,
        vllm=VllmSettings(enforce_eager=eager),
        dictionaries={DICTIONARY: str(fable.dictionary_path(DICTIONARY))},
    )
    async with started(settings) as (ours, bare):
        await _small(report, ours, bare, pairs, only)
        if not only or "vllm_through_grpc" in only:
            await _through_grpc(report, ours, bare, pairs, eager)
    if long:
        with tempfile.TemporaryDirectory() as folder:
            await _large(report, settings, Path(folder))


async def _small(report: Report, ours: Ours, bare: Bare, pairs: int, only: Sequence[str]) -> None:
    from .bars.probes import NAMES, random_probe

    engine = ours.engine
    shelf = ConceptShelf(engine.info.name)
    for index, name in enumerate(NAMES):
        shelf.put_probe(name, random_probe(engine.info.d_model, index))
    engine.use_concepts(shelf)
    scores = tuple(ReadProbe(probe=name) for name in NAMES)
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

    async def probes() -> float:
        return await _rate([ours.stream(p, (), scores) for p in few])

    bars: dict[str, tuple[Callable[[], Awaitable[float]], Callable[[], Awaitable[float]], float]] = {
        "vllm_unused": (unused, of_bare, 0.98),
        "vllm_one_layer": (one_layer, of_bare, 0.95),
        "vllm_six_layers": (six_layers, of_bare, 0.88),
        "vllm_configurations": (many_vectors, one_vector, 0.97),
        "vllm_capture": (capture, of_bare, 0.92),
        "vllm_features": (features, of_bare, 0.88),
        "vllm_probes": (probes, of_bare, 0.95),
    }
    for name, (mine, theirs, bar) in bars.items():
        if only and name not in only:
            continue
        n_pairs = pairs if name != "vllm_configurations" else max(3, pairs // 3)
        _report(report, name, await _ratio(mine, theirs, n_pairs), bar)
    if not only or "vllm_latency" in only:
        await _latency(report, bare, ours, few[:8], pairs)


async def _through_grpc(report: Report, ours: Ours, bare: Bare, pairs: int, eager: bool) -> None:
    prompts = [ours.engine.codec.encode(text) for text in texts(N_STREAMS)]
    given = ["--listen", "127.0.0.1:0", "--registry", "memory", "--threads", "1", "--dtype", "float32"]
    given += ["--max-running", str(LIMITS.max_running), "--engine", "vllm"]
    given += ["--vllm", "enforce_eager=true"] if eager else []
    # Its start takes a while, and streams of this process wait meanwhile; there are none.
    with ServerProcess(*given, timeout_s=300.0) as server:
        async with AsyncClient(server.target, timeout=600.0) as client:
            model = await client.model()
            found = await _ratio(
                lambda: _rate([served(model, Stream(prompt)) for prompt in prompts]),
                lambda: _rate([bare.stream(prompt) for prompt in prompts]),
                pairs,
            )
    _report(report, "vllm_through_grpc", found, BAR_GRPC)


async def _large(report: Report, settings: EngineSettings, folder: Path) -> None:
    _make_large(folder)
    large = replace(
        settings,
        model=str(folder / "model"),
        name="large",
        dictionaries={"large": str(folder / "dictionary")},
        threads=None,
    )
    async with started(large, LARGE_TOKENS) as (ours, bare):
        prompts = [ours.engine.codec.encode(text) for text in texts(N_STREAMS)]
        drawn = vectors(N_STREAMS, D_LARGE, norm=2.0)
        read = (ReadFeatures(dictionary="large", top_k=8),)

        async def of_bare() -> float:
            return await _rate([bare.stream(p) for p in prompts])

        async def steering() -> float:
            return await _rate([ours.stream(p, [(LARGE_POINT, drawn[i])]) for i, p in enumerate(prompts)])

        async def features() -> float:
            return await _rate([ours.stream(p, (), read) for p in prompts])

        _report(report, "vllm_large_steering", await _ratio(steering, of_bare, LARGE_PAIRS), 0.95)
        _report(report, "vllm_large_features", await _ratio(features, of_bare, LARGE_PAIRS), 0.92)


def _make_large(folder: Path) -> None:
    """A random Llama with fable's tokenizer, and a random SAE in its middle."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small = LlamaConfig.from_pretrained(fable.model_path())
    config = LlamaConfig(
        vocab_size=small.vocab_size,
        hidden_size=D_LARGE,
        intermediate_size=4 * D_LARGE,
        num_hidden_layers=N_LARGE,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=512,
        bos_token_id=small.bos_token_id,
        eos_token_id=small.eos_token_id,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(fable.model_path()).save_pretrained(folder / "model")
    tensors = {
        "W_enc": torch.randn(N_FEATURES, D_LARGE) / D_LARGE**0.5,
        "W_dec": torch.randn(N_FEATURES, D_LARGE) / D_LARGE**0.5,
        "b_enc": torch.zeros(N_FEATURES),
        "b_dec": torch.zeros(D_LARGE),
    }
    at = {"hook_points_in": (LARGE_POINT,), "hook_points_out": (LARGE_POINT,)}
    save_dictionary(Recipe(kind="sae", architecture="standard", tensors=tensors, **at), folder / "dictionary")


def _report(report: Report, name: str, found: tuple[float, float, float], bar: float) -> None:
    ratio, mine, theirs = found
    report(name, ratio, "x", f"bare vLLM {theirs:.0f} tokens/s, ours {mine:.0f}", f">= {bar:g}", ratio >= bar)


async def _latency(
    report: Report, bare: Bare, ours: Ours, prompts: Sequence[Sequence[int]], pairs: int
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
    report(
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
    parser.add_argument("--long", action="store_true", help="the larger model too")
    chosen = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    results = Results()
    asyncio.run(
        measure(results.report, pairs=chosen.pairs, eager=chosen.eager, only=chosen.only, long=chosen.long)
    )
    return 1 if results.missed else 0


if __name__ == "__main__":
    sys.exit(main())
