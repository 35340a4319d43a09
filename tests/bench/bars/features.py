"""Streams whose features are read as they come, against the same streams without; both through the server.

- `features_32`: 32 streams, the 8 strongest features of one dictionary at every position, prompt and generated.
- `feature_steered_32`: 32 streams, a feature each set to a value. No bar holds for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from glasshouse.client import AsyncModel, read_features, set_feature

from ..harness import Report, in_turns, rate
from ..workbench import Workbench
from ..workload import N_STREAMS, N_TOKENS, texts

DICTIONARY = "resid-post-3"
TOP_K = 8
BAR = 0.85


def run(bench: Workbench, report: Report) -> None:
    """features_32, feature_steered_32"""
    prompts = [list(bench.loaded.tokenizer.encode(text)) for text in texts(N_STREAMS)]
    model = bench.served_model

    def streams(**rest: list[dict[str, Any]]) -> float:
        each = [{name: values[i] for name, values in rest.items()} for i in range(N_STREAMS)]
        return bench.run(rate(_together(model, prompts, each)))

    read = [[read_features(DICTIONARY, top_k=TOP_K)]] * N_STREAMS
    steer = [[set_feature(DICTIONARY, 17 * i, 10.0)] for i in range(N_STREAMS)]
    for name, rest, bar in (
        ("features_32", {"readouts": read}, BAR),
        ("feature_steered_32", {"interventions": steer}, None),
    ):
        found = in_turns(lambda rest=rest: streams(**rest), streams, bench.repeats)  # type: ignore[misc]
        report(
            name,
            found.ratio,
            "x",
            f"plain {found.baseline:.0f} tokens/s, with features {found.ours:.0f}",
            "none" if bar is None else f">= {bar:g}",
            bar is None or found.ratio >= bar,
        )


async def _together(
    model: AsyncModel, prompts: Sequence[list[int]], each: Sequence[dict[str, Any]]
) -> list[int]:
    return await asyncio.gather(
        *(_stream(model, prompt, rest) for prompt, rest in zip(prompts, each, strict=True))
    )


async def _stream(model: AsyncModel, prompt: list[int], rest: dict[str, Any]) -> int:
    n_tokens = 0
    async with model.generate(
        prompt, max_tokens=N_TOKENS, temperature=0.0, ignore_eos=True, **rest
    ) as tokens:
        async for token in tokens:
            if "readouts" in rest:
                assert len(token.features[DICTIONARY].ids) == TOP_K
            n_tokens += 1
    return n_tokens
