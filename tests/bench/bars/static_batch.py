"""Streams that join and leave against Hugging Face's `generate` on a static batch, in one process.

Ours: 32 places, each taking the next request as soon as its last one has ended; requests are 32 to 96 tokens long,
64 on average, and the first ones begin one after another. Tokens are counted while all places are taken, prompts
fed on the way included in the time. The baseline: 32 rows of 64 tokens each, none of them wasted, on as many
threads as make it fastest: one, or all that we have.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from glasshouse.server.engines.engine import Engine

from ..harness import Report, in_turns
from ..streams import Stream, in_process
from ..workbench import Workbench
from ..workload import N_STREAMS, N_TOKENS, texts

BAR = 1.0
COUNTED_TOKENS = 3 * N_STREAMS * N_TOKENS
STAGGER_S = 0.004


def run(bench: Workbench, report: Report) -> None:
    """static_batch"""
    engine = bench.engine
    prompts = [bench.loaded.tokenizer.encode(text) for text in texts(N_STREAMS)]
    static = _static_batch(bench, prompts)
    by_threads = {n: statistics.median(static(n) for _ in range(3)) for n in {1, bench.threads}}
    n_threads = max(by_threads, key=lambda n: by_threads[n])
    found = in_turns(
        lambda: bench.run(_joining_and_leaving(engine, prompts)), lambda: static(n_threads), bench.repeats
    )
    report(
        "static_batch",
        found.ratio,
        "x",
        f"model.generate on {n_threads} threads {found.baseline:.0f} tokens/s, joining and leaving {found.ours:.0f}",
        f">= {BAR:g}",
        found.ratio >= BAR,
    )


async def _joining_and_leaving(engine: Engine, prompts: Sequence[Sequence[int]]) -> float:
    """Tokens a second once every place is taken."""
    lengths = [32 + 64 * (index * 7 % N_STREAMS) // (N_STREAMS - 1) for index in range(N_STREAMS)]
    requests = (Stream(prompts[i % N_STREAMS], lengths[i * 5 % N_STREAMS]) for i in itertools.count())
    n_tokens = 0
    enough = asyncio.Event()

    def count(n: int) -> None:
        nonlocal n_tokens
        n_tokens += n
        if n_tokens >= COUNTED_TOKENS:
            enough.set()

    async def place(index: int) -> None:
        await asyncio.sleep(STAGGER_S * index)
        while True:
            await in_process(engine, next(requests), count)

    async with asyncio.TaskGroup() as group:
        places = [group.create_task(place(index)) for index in range(N_STREAMS)]
        await asyncio.sleep(STAGGER_S * N_STREAMS)
        n_tokens = 0
        begun = time.perf_counter()
        await enough.wait()
        rate = n_tokens / (time.perf_counter() - begun)
        for each in places:
            each.cancel()
    return rate


def _static_batch(bench: Workbench, prompts: Sequence[Sequence[int]]) -> Callable[[int], float]:
    """Tokens a second of one call of `generate`, padded on the left, on so many threads."""
    model = bench.plain_model
    pad = bench.loaded.special_token_ids and max(bench.loaded.special_token_ids)
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    @torch.inference_mode()
    def tokens_per_second(n_threads: int) -> float:
        torch.set_num_threads(n_threads)
        begun = time.perf_counter()
        made = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=N_TOKENS,
            max_new_tokens=N_TOKENS,
            pad_token_id=pad,
        )
        seconds = time.perf_counter() - begun
        torch.set_num_threads(bench.threads)
        assert made.shape == (len(prompts), width + N_TOKENS)
        return len(prompts) * N_TOKENS / seconds

    return tokens_per_second
