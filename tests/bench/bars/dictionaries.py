"""Encoding and opening large dictionaries: see `dictionaries_bench`, which also runs alone."""

from __future__ import annotations

import torch

from .. import dictionaries_bench
from ..harness import Report
from ..workbench import Workbench


def run(bench: Workbench, report: Report) -> None:
    """open_2gib, encode_*"""
    torch.set_num_threads(bench.threads)
    dictionaries_bench.run(report, repeats=3)
