"""The bars of the vLLM engine against bare vLLM, alternating in one run: `python -m tests.bench.vllm`.

All are vLLM's asynchronous engine on the same weights, compiled, with the same settings, in processes of their own; ours
has the hooks in its graph. Bare vLLM runs twice: as it comes, which is the baseline, and with its worker inside the
engine's process as ours has it on a CPU, which is told beside it: that ratio is what the hooks alone cost. Every round runs
32 greedy streams of 64 tokens on each, one after the other, and gives one ratio of rates; a figure is the median of the
ratios. Streams ask for log-probabilities on all sides, for ours always report them.

The worker of bare vLLM polls for a second after its last step, on a processor that the next to be measured needs: so each
run of it is followed by a pause.

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
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
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
# How long a worker of bare vLLM polls after its last step: a second.
SPIN_S = 1.2
BAR_GRPC = 0.9
# Of the larger model, whose steps are a hundred times as long.
LARGE_PAIRS, LARGE_TOKENS = 5, 16
LARGE_POINT = "blocks.6.hook_resid_post"
N_LARGE, D_LARGE, N_FEATURES = 12, 1024, 2048


class Bare:
    """vLLM as it is."""

    def __init__(self, llm: Any, n_tokens: int = N_TOKENS, *, pause_s: float = 0.0) -> None:
        self._llm, self._n, self._n_tokens, self._pause_s = llm, 0, n_tokens, pause_s

    async def rate(self, prompts: Sequence[Sequence[int]]) -> float:
        """Tokens a second of all prompts at once. Then the pause, until its worker polls no more."""
        rate = await _rate([self.stream(prompt) for prompt in prompts])
        await asyncio.sleep(self._pause_s)
        return rate

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


Rate = Callable[[], Awaitable[float]]


@dataclass(frozen=True, kw_only=True)
class Found:
    """Median ratios and rates of what was measured in turns. `hooks`: ours over bare vLLM with our executor."""

    ratio: float
    ours: float
    bare: float
    hooks: float | None


async def _in_turns(ours: Rate, bare: Rate, rounds: int, same: Rate | None = None) -> Found:
    contenders = [bare, ours] if same is None else [bare, same, ours]
    for contender in contenders:
        await contender()
    found: list[dict[Rate, float]] = []
    for turn in range(rounds):
        order = contenders[::-1] if turn % 2 else contenders
        found.append({contender: await contender() for contender in order})
    return Found(
        ratio=statistics.median(rates[ours] / rates[bare] for rates in found),
        ours=statistics.median(rates[ours] for rates in found),
        bare=statistics.median(rates[bare] for rates in found),
        hooks=None if same is None else statistics.median(rates[ours] / rates[same] for rates in found),
    )


@dataclass(frozen=True)
class Engines:
    """`same`: bare vLLM with our executor; `bare` itself where that is vLLM's choice too."""

    ours: Ours
    bare: Bare
    same: Bare


@asynccontextmanager
async def started(settings: EngineSettings, n_tokens: int = N_TOKENS) -> AsyncIterator[Engines]:
    """All engines of the same settings."""
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
        executor = plain.pop("distributed_executor_backend", None)
        begun = [AsyncLLM.from_engine_args(AsyncEngineArgs(**plain))]
        try:
            bare = same = Bare(begun[0], n_tokens, pause_s=SPIN_S)
            if executor is not None:
                begun.append(
                    AsyncLLM.from_engine_args(AsyncEngineArgs(**plain, distributed_executor_backend=executor))
                )
                same = Bare(begun[1], n_tokens)
            # As a server does once it has started (`glasshouse.server.main`); else every one of them pays for all.
            gc.collect()
            gc.freeze()
            yield Engines(Ours(engine, n_tokens), bare, same)
        finally:
            for llm in begun:
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
    async with started(settings) as engines:
        await _small(report, engines, pairs, only)
        if not only or "vllm_through_grpc" in only:
            await _through_grpc(report, engines, pairs, eager)
    if long:
        with tempfile.TemporaryDirectory() as folder:
            await _large(report, settings, Path(folder))


async def _small(report: Report, engines: Engines, pairs: int, only: Sequence[str]) -> None:
    from .bars.probes import NAMES, random_probe

    ours, engine = engines.ours, engines.ours.engine
    shelf = ConceptShelf(engine.info.name)
    for index, name in enumerate(NAMES):
        shelf.put_probe(name, random_probe(engine.info.d_model, index))
    engine.use_concepts(shelf)
    scores = tuple(ReadProbe(probe=name) for name in NAMES)
    prompts = [engine.codec.encode(text) for text in texts(256)]
    few = prompts[:N_STREAMS]
    drawn = vectors(256, engine.info.d_model, norm=2.0)

    async def of_bare() -> float:
        return await engines.bare.rate(few)

    async def of_same() -> float:
        return await engines.same.rate(few)

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

    bars: dict[str, tuple[Rate, Rate, float]] = {
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
        if theirs is of_bare:
            found = await _in_turns(mine, theirs, pairs, of_same)
        else:
            found = await _in_turns(mine, theirs, max(3, pairs // 3))
        _report(report, name, found, bar)
    if not only or "vllm_latency" in only:
        await _latency(report, engines, few[:8], pairs)


async def _through_grpc(report: Report, engines: Engines, pairs: int, eager: bool) -> None:
    prompts = [engines.ours.engine.codec.encode(text) for text in texts(N_STREAMS)]
    given = ["--listen", "127.0.0.1:0", "--registry", "memory", "--threads", "1", "--dtype", "float32"]
    given += ["--max-running", str(LIMITS.max_running), "--engine", "vllm"]
    given += ["--vllm", "enforce_eager=true"] if eager else []
    # Its start takes a while, and streams of this process wait meanwhile; there are none.
    with ServerProcess(*given, timeout_s=300.0) as server:
        async with AsyncClient(server.target, timeout=600.0) as client:
            model = await client.model()
            found = await _in_turns(
                lambda: _rate([served(model, Stream(prompt)) for prompt in prompts]),
                lambda: engines.bare.rate(prompts),
                pairs,
                lambda: engines.same.rate(prompts),
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
    async with started(large, LARGE_TOKENS) as engines:
        ours = engines.ours
        prompts = [ours.engine.codec.encode(text) for text in texts(N_STREAMS)]
        drawn = vectors(N_STREAMS, D_LARGE, norm=2.0)
        read = (ReadFeatures(dictionary="large", top_k=8),)

        async def of_bare() -> float:
            return await engines.bare.rate(prompts)

        async def steering() -> float:
            return await _rate([ours.stream(p, [(LARGE_POINT, drawn[i])]) for i, p in enumerate(prompts)])

        async def features() -> float:
            return await _rate([ours.stream(p, (), read) for p in prompts])

        _report(report, "vllm_large_steering", await _in_turns(steering, of_bare, LARGE_PAIRS), 0.95)
        _report(report, "vllm_large_features", await _in_turns(features, of_bare, LARGE_PAIRS), 0.92)


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


def _report(report: Report, name: str, found: Found, bar: float) -> None:
    said = f"bare vLLM {found.bare:.0f} tokens/s, ours {found.ours:.0f}"
    if found.hooks is not None:
        said += f"; {found.hooks:.3g} of bare with our executor"
    report(name, found.ratio, "x", said, f">= {bar:g}", found.ratio >= bar)


async def _latency(report: Report, engines: Engines, prompts: Sequence[Sequence[int]], pairs: int) -> None:
    async def median_gap(stream: Callable[..., Awaitable[int]]) -> float:
        gaps: list[float] = []
        await asyncio.gather(*(stream(prompt, gaps=gaps) for prompt in prompts))
        return statistics.median(gaps)

    async def of_bare() -> float:
        try:
            return await median_gap(engines.bare.stream)
        finally:
            await asyncio.sleep(SPIN_S)

    found = await _in_turns(
        lambda: median_gap(engines.ours.stream), of_bare, pairs, lambda: median_gap(engines.same.stream)
    )
    said = f"{1000 * found.bare:.2f} ms, ours {1000 * found.ours:.2f}; {found.hooks:.3g} of bare with our executor"
    report("vllm_latency", found.ratio, "x", said, "<= 1.05", found.ratio <= 1.05)


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
