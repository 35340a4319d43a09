"""32 streams at once against the same requests one after another, both through the server and the client."""

from __future__ import annotations

from ..harness import Report, in_turns, rate
from ..streams import Stream, one_after_another, together
from ..workbench import Workbench
from ..workload import N_STREAMS, N_TOKENS, texts

BAR = 6.0


def run(bench: Workbench, report: Report) -> None:
    """concurrent_32"""
    model = bench.served_model
    streams = [Stream(bench.loaded.tokenizer.encode(text)) for text in texts(N_STREAMS)]
    bench.run(together(model, streams))
    found = in_turns(
        lambda: bench.run(rate(together(model, streams))),
        lambda: bench.run(rate(one_after_another(model, streams))),
        min(bench.repeats, 3),
        warm_up=False,
    )
    report(
        "concurrent_32",
        found.ratio,
        "x",
        f"one after another {found.baseline:.0f} tokens/s, at once {found.ours:.0f}; {N_STREAMS} x {N_TOKENS}",
        f">= {BAR:g}",
        found.ratio >= BAR,
    )
