"""The residual stream at every layer for 64 inputs of 256 tokens, as arrays in the client's hands, against a plain
Hugging Face forward with `output_hidden_states=True` in batches of 16. Server and client share the cores.
"""

from __future__ import annotations

import time
from typing import Literal

import numpy as np
import torch

from ..harness import Report, in_turns
from ..workbench import Workbench

N_INPUTS, N_POSITIONS, BATCH = 64, 256, 16
DTYPES: tuple[tuple[Literal["float32", "bfloat16"], float], ...] = (("float32", 0.5), ("bfloat16", 0.7))


def run(bench: Workbench, report: Report) -> None:
    """extract_float32, extract_bfloat16"""
    model, plain, loaded = bench.served_model, bench.plain_model, bench.loaded
    drawn = np.random.default_rng(11).integers(3, loaded.vocab_size, (N_INPUTS, N_POSITIONS))
    inputs = drawn.tolist()
    # What output_hidden_states gives: the stream before each block, and after the last one.
    points = [f"blocks.{layer}.hook_resid_pre" for layer in range(loaded.n_layers)]
    points.append(f"blocks.{loaded.n_layers - 1}.hook_resid_post")

    def served(dtype: Literal["float32", "bfloat16"]) -> float:
        begun = time.perf_counter()
        found = bench.run(model.activations(inputs, hook_points=points, dtype=dtype))
        seconds = time.perf_counter() - begun
        assert len(found) == N_INPUTS
        assert all(array.shape == (N_POSITIONS, loaded.d_model) for each in found for array in each.values())
        return N_INPUTS * N_POSITIONS / seconds

    @torch.inference_mode()
    def forward() -> float:
        begun = time.perf_counter()
        kept = []
        for start in range(0, N_INPUTS, BATCH):
            batch = torch.from_numpy(drawn[start : start + BATCH])
            kept.append(
                plain.model(input_ids=batch, use_cache=False, output_hidden_states=True).hidden_states
            )
        seconds = time.perf_counter() - begun
        assert len(kept[0]) == loaded.n_layers + 1
        return N_INPUTS * N_POSITIONS / seconds

    for dtype, bar in DTYPES:
        found = in_turns(lambda dtype=dtype: served(dtype), forward, bench.repeats)  # type: ignore[misc]
        report(
            f"extract_{dtype}",
            found.ratio,
            "x",
            f"plain forward {found.baseline:.0f} tokens/s, in the client's hands {found.ours:.0f}",
            f">= {bar:g}",
            found.ratio >= bar,
        )
