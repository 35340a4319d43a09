"""From the command `glasshouse serve` to SERVING, and the whole tour, on fable."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from glasshouse.client import Client
from glasshouse.tour.server_process import ServerProcess

from ..harness import Report
from ..workbench import Workbench

BAR_S, BAR_TOUR_S = 10.0, 60.0


def run(bench: Workbench, report: Report) -> None:
    """start_to_serving, tour"""
    seconds = []
    for _ in range(3):
        with ServerProcess(
            "--listen", "127.0.0.1:0", "--registry", "memory", "--threads", str(bench.threads)
        ) as server:
            with Client(server.target) as client:
                client.wait_ready(timeout=1.0)
            seconds.append(server.startup_seconds)
            server.stop()
    value = statistics.median(seconds)
    report("start_to_serving", value, "s", "none", f"< {BAR_S:g}", value < BAR_S)
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "glasshouse.tour"], stdout=subprocess.DEVNULL, check=True)
    value = time.perf_counter() - begun
    report("tour", value, "s", "none", f"< {BAR_TOUR_S:g}", value < BAR_TOUR_S)
