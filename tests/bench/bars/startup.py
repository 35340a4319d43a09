"""From the command `glasshouse serve` to SERVING, on fable."""

from __future__ import annotations

import statistics

from glasshouse.client import Client
from glasshouse.tour.server_process import ServerProcess

from ..harness import Report
from ..workbench import Workbench

BAR_S = 10.0


def run(bench: Workbench, report: Report) -> None:
    """start_to_serving"""
    seconds = []
    for _ in range(3):
        with ServerProcess("--listen", "127.0.0.1:0", "--threads", str(bench.threads)) as server:
            with Client(server.target) as client:
                client.wait_ready(timeout=1.0)
            seconds.append(server.startup_seconds)
            server.stop()
    value = statistics.median(seconds)
    report("start_to_serving", value, "s", "none", f"< {BAR_S:g}", value < BAR_S)
