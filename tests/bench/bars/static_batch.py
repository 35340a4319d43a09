"""Streams that join and leave against Hugging Face's `generate` on a static batch, in one process.

Ours: 32 places. In each, requests of 32 to 96 tokens (64 on average) follow one another; the first ones begin
one after another. The time runs from the first token asked for to the last one had, so the batch is not full at
its beginning and its end. The baseline: 32 rows of 64 tokens each, none of them wasted.
"""

from __future__ import annotations

import asyncio
import time

import torch

from ..harness import Report, in_turns, rate
from ..streams import Stream, in_process
from ..workbench import Workbench
from ..workload import N_STREAMS, N_TOKENS, texts

BAR = 1.0
ROUNDS = 3
STAGGER_S = 0.004


def run(bench: Workbench, report: Report) -> None:
    """static_batch"""
    engine = bench.engine
    prompts = [bench.loaded.tokenizer.encode(text) for text in texts(N_STREAMS * ROUNDS)]
    lengths = [32 + 64 * (place * 7 % N_STREAMS) // (N_STREAMS - 1) for place in range(N_STREAMS)]
    # The same tokens in every round, dealt to other places.
    rounds = [
        [lengths[(place + 11 * turn) % N_STREAMS] for place in range(N_STREAMS)] for turn in range(ROUNDS)
    ]

    async def place(index: int) -> int:
        await asyncio.sleep(STAGGER_S * index)
        n_tokens = 0
        for turn in range(ROUNDS):
            stream = Stream(prompts[turn * N_STREAMS + index], rounds[turn][index])
            n_tokens += await in_process(engine, stream)
        return n_tokens

    async def joining() -> list[int]:
        return await asyncio.gather(*(place(index) for index in range(N_STREAMS)))

    static = _static_batch(bench, prompts[:N_STREAMS])
    found = in_turns(lambda: bench.run(rate(joining())), static, bench.repeats)
    report(
        "static_batch",
        found.ratio,
        "x",
        f"model.generate {found.baseline:.0f} tokens/s, joining and leaving {found.ours:.0f}",
        f">= {BAR:g}",
        found.ratio >= BAR,
    )


def _static_batch(bench: Workbench, prompts: list[list[int]]):  # type: ignore[no-untyped-def]
    model = bench.plain_model
    width = max(map(len, prompts))
    ids = torch.tensor([[2] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    @torch.inference_mode()
    def tokens_per_second() -> float:
        begun = time.perf_counter()
        made = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=N_TOKENS,
            max_new_tokens=N_TOKENS,
            pad_token_id=2,
        )
        seconds = time.perf_counter() - begun
        assert made.shape == (len(prompts), width + N_TOKENS)
        return len(prompts) * N_TOKENS / seconds

    return tokens_per_second
