"""32 streams through gRPC and the client against the engine called in process: same cores, same threads."""

from __future__ import annotations

from ..harness import Report, in_turns, rate
from ..streams import Stream, together, together_in_process
from ..workbench import Workbench
from ..workload import N_STREAMS, texts

BAR = 0.9


def run(bench: Workbench, report: Report) -> None:
    """through_grpc"""
    streams = [Stream(bench.loaded.tokenizer.encode(text)) for text in texts(N_STREAMS)]
    model, engine = bench.served_model, bench.engine
    found = in_turns(
        lambda: bench.run(rate(together(model, streams))),
        lambda: bench.run(rate(together_in_process(engine, streams))),
        bench.repeats,
    )
    report(
        "through_grpc",
        found.ratio,
        "x",
        f"engine in process {found.baseline:.0f} tokens/s, client {found.ours:.0f}",
        f">= {BAR:g}",
        found.ratio >= BAR,
    )
