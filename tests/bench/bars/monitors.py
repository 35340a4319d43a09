"""Live traffic under monitors, against the same traffic without; both through the server.

- `monitors_8_streams_32`: 32 streams, each watched by 8 monitors of a probe each, at every position of prompt and output.
  The probes read all the model's layers in turn.
- `monitors_8_one_layer`: the same with all probes at one layer. No bar of its own.

Thresholds are out of reach, as they are for nearly all traffic: what an event costs is not measured here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from glasshouse.client import AsyncModel, ProbeWeights

from ..harness import Report, in_turns, rate
from ..workbench import Workbench
from ..workload import N_STREAMS, N_TOKENS, texts

N_MONITORS = 8
BAR = 0.95


def run(bench: Workbench, report: Report) -> None:
    """monitors_8_streams_32, monitors_8_one_layer"""
    prompts = [list(bench.loaded.tokenizer.encode(text)) for text in texts(N_STREAMS)]
    model = bench.served_model
    layers = [f"blocks.{layer}.hook_resid_post" for layer in range(model.info.n_layers)]
    for name, hook_points, bar in (
        ("monitors_8_streams_32", layers, BAR),
        ("monitors_8_one_layer", layers[3:4], None),
    ):
        # Whether a stream is watched is a label's matter: nothing is published between the turns.
        labels = {"watched": name}
        bench.run(_publish(model, hook_points, labels))
        found = in_turns(
            lambda labels=labels: bench.run(rate(_together(model, prompts, labels))),  # type: ignore[misc]
            lambda: bench.run(rate(_together(model, prompts, {}))),
            bench.repeats,
        )
        watched = bench.run(_n_watched(model, labels))
        assert watched == N_MONITORS * N_STREAMS * (bench.repeats + 1), watched
        report(
            name,
            found.ratio,
            "x",
            f"unwatched {found.baseline:.0f} tokens/s, watched {found.ours:.0f}",
            "none" if bar is None else f">= {bar:g}",
            bar is None or found.ratio >= bar,
        )


async def _publish(model: AsyncModel, hook_points: Sequence[str], labels: dict[str, str]) -> None:
    rng = np.random.default_rng(0)
    for index in range(N_MONITORS):
        name = f"{labels['watched']}-{index}"
        weights = rng.standard_normal((model.info.d_model, 1)).astype(np.float32) / 200
        await model.create_probe(
            name,
            ProbeWeights(layers=[(weights, np.zeros(1, np.float32))]),
            labels=["no", "yes"],
            hook_points=[hook_points[index % len(hook_points)]],
            pooling="token",
        )
        await model.create_monitor(name, probe=name, above=0.999, action="flag", labels=labels)


async def _n_watched(model: AsyncModel, labels: dict[str, str]) -> int:
    return sum(one.counts.requests for one in await model.monitors() if one.info.labels == labels)


async def _together(model: AsyncModel, prompts: Sequence[list[int]], labels: dict[str, str]) -> list[int]:
    return await asyncio.gather(*(_stream(model, prompt, labels) for prompt in prompts))


async def _stream(model: AsyncModel, prompt: list[int], labels: dict[str, str]) -> int:
    n_tokens = 0
    async with model.generate(
        prompt, max_tokens=N_TOKENS, temperature=0.0, ignore_eos=True, labels=labels
    ) as tokens:
        async for _ in tokens:
            n_tokens += 1
    return n_tokens
