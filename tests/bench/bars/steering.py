"""Streams that are each steered differently against the same streams unsteered, through the server.

- `steered_32`: 32 streams, a vector each.
- `steered_256_loaded`: 256 requests sent at once, a vector each: 64 run, the others wait with theirs loaded.
- `steered_32_by_8`: 32 streams, 8 vectors each, 256 at work in every step over all blocks. No bar holds for it.
- `steered_engine`: as `steered_32`, of the engine in process, where nothing else hides the edits' cost.
"""

from __future__ import annotations

from dataclasses import replace

from ..harness import Report, Turns, in_turns, rate
from ..streams import Stream, together, together_in_process
from ..workbench import Workbench
from ..workload import N_STREAMS, N_VECTORS, texts, vectors

BAR = 0.9


def run(bench: Workbench, report: Report) -> None:
    """steered_32, steered_256_loaded, steered_32_by_8, steered_engine"""
    n_layers, d_model = bench.loaded.n_layers, bench.loaded.d_model
    drawn = vectors(N_VECTORS, d_model, norm=2.0)
    points = [f"blocks.{index % n_layers}.hook_resid_post" for index in range(N_VECTORS)]
    prompts = [bench.loaded.tokenizer.encode(text) for text in texts(N_VECTORS)]
    few = [Stream(prompt) for prompt in prompts[:N_STREAMS]]
    one_each = [replace(s, vectors=[(points[i], drawn[i])]) for i, s in enumerate(few)]
    eight_each = [
        replace(s, vectors=[(points[j], drawn[j]) for j in range(8 * i, 8 * i + 8)])
        for i, s in enumerate(few)
    ]
    many = [Stream(prompt) for prompt in prompts]
    many_steered = [replace(s, vectors=[(points[i], drawn[i])]) for i, s in enumerate(many)]
    repeats = bench.repeats

    def through_server(steered: list[Stream], plain: list[Stream], repeats: int) -> Turns:
        model = bench.served_model
        return in_turns(
            lambda: bench.run(rate(together(model, steered))),
            lambda: bench.run(rate(together(model, plain))),
            repeats,
        )

    _report(report, "steered_32", through_server(one_each, few, repeats))
    _report(report, "steered_256_loaded", through_server(many_steered, many, min(repeats, 3)))
    _report(report, "steered_32_by_8", through_server(eight_each, few, repeats), bar=None)
    engine = bench.engine
    found = in_turns(
        lambda: bench.run(rate(together_in_process(engine, one_each))),
        lambda: bench.run(rate(together_in_process(engine, few))),
        repeats,
    )
    _report(report, "steered_engine", found)


def _report(report: Report, name: str, found: Turns, bar: float | None = BAR) -> None:
    report(
        name,
        found.ratio,
        "x",
        f"unsteered {found.baseline:.0f} tokens/s, steered {found.ours:.0f}",
        "none" if bar is None else f">= {bar:g}",
        bar is None or found.ratio >= bar,
    )
