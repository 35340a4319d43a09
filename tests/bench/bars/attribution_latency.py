"""What generation notices of attribution: the time between tokens of 4 streams while graphs are traced, one after the
other, against the same streams alone.

A stream's tokens come in messages of several; the time between tokens is that of `WINDOW` tokens, divided.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from glasshouse.client import AsyncModel

from ..harness import Report, in_turns
from ..workbench import Workbench
from ..workload import texts

N_STREAMS, N_TOKENS, WINDOW = 4, 192, 8
N_PROMPT = 160
BAR = 1.5


def run(bench: Workbench, report: Report) -> None:
    """generation_while_tracing"""
    model = bench.served_model
    prompts = [bench.loaded.tokenizer.encode(text) for text in texts(N_STREAMS)]
    words = [token for text in texts(16) for token in bench.loaded.tokenizer.encode(text, False)]
    traced = [bench.loaded.bos_token_id or 0, *words][:N_PROMPT]

    async def alone() -> float:
        return await _median_gap(model, prompts)

    async def beside() -> float:
        async with _tracing(model, traced):
            return await _median_gap(model, prompts)

    found = in_turns(lambda: bench.run(beside()), lambda: bench.run(alone()), bench.repeats)
    report(
        "generation_while_tracing",
        found.ratio,
        "x",
        f"p50 between tokens of {N_STREAMS} streams {found.baseline * 1e3:.2f} ms alone, "
        f"{found.ours * 1e3:.2f} ms while a graph of {len(traced)} tokens is traced",
        f"<= {BAR:g}",
        found.ratio <= BAR,
    )


async def _median_gap(model: AsyncModel, prompts: Sequence[Sequence[int]]) -> float:
    """Seconds between tokens: the median over all streams."""
    gaps = await asyncio.gather(*(_gaps(model, prompt) for prompt in prompts))
    return statistics.median(gap for stream in gaps for gap in stream)


async def _gaps(model: AsyncModel, prompt: Sequence[int]) -> list[float]:
    times = []
    stream = model.generate(list(prompt), max_tokens=N_TOKENS, temperature=0.0, ignore_eos=True)
    async with stream as tokens:
        async for _ in tokens:
            times.append(time.perf_counter())
    return [(after - before) / WINDOW for before, after in zip(times, times[WINDOW:])]


@asynccontextmanager
async def _tracing(model: AsyncModel, prompt: Sequence[int]) -> AsyncIterator[None]:
    """Graphs are being traced all the while; rows of the first have come when this is entered."""
    begun = asyncio.Event()

    async def trace() -> None:
        while True:
            operation = await model.attribution_graph(list(prompt))
            try:
                while not await operation.done():
                    await asyncio.sleep(0.05)
                    if operation.progress.counts["done"]:
                        begun.set()
            finally:
                await operation.cancel()

    task = asyncio.create_task(trace())
    await begun.wait()
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
