"""The vLLM engine against bare vLLM (see `tests.bench.vllm`); left out where vLLM is not installed."""

from __future__ import annotations

import importlib.util
import sys

from .. import vllm
from ..harness import Report
from ..workbench import Workbench


def run(bench: Workbench, report: Report) -> None:
    """vllm_*"""
    if importlib.util.find_spec("vllm") is None:
        print("vllm: left out, vLLM is not installed (make vllm installs it)", file=sys.stderr, flush=True)
        return
    bench.run(vllm.measure(report, pairs=bench.asked_repeats or vllm.PAIRS, long=bench.long))
