"""Junctions: the places in the model's graph where hooks run, and the one custom op that runs them.

Several hook points meet at one junction. A Llama-like layer hands on a pair (hidden, residual) whose sum is the
stream; at its end `hidden` is what the MLP adds and the sum is the stream after the block: two hook points, one op.
Points of a junction:

    "x"    the first tensor itself: what attention or the MLP adds, or a whole stream in models without pairs
    "sum"  x + residual: the stream. An edited row is written as residual <- s', x <- 0: the next fused add-norm sees
    exactly s'.

The op mutates its arguments and reads `_RUN`, nothing else: nothing of a request is baked into a graph, and an idle
junction costs one call (1.3 us on a CPU). Its schema says what it mutates, so Inductor neither drops nor clones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PointTarget = Literal["x", "sum"]
JunctionRun = Callable[[Tensor, Tensor | None], None]


@dataclass(frozen=True, kw_only=True)
class Junction:
    """`points`: (hook point name, target) in the order in which a forward pass meets them."""

    index: int
    points: tuple[tuple[str, PointTarget], ...]


# What each junction does in the step that runs; None: nothing. One model a process, so one table.
_RUN: list[JunctionRun | None] = []

_library = torch.library.Library("glasshouse", "DEF")  # type: ignore[no-untyped-call]
_library.define("junction_pair(Tensor(a!) x, Tensor(b!) residual, int junction) -> ()")  # type: ignore[no-untyped-call]
_library.define("junction_one(Tensor(a!) x, int junction) -> ()")  # type: ignore[no-untyped-call]


def _pair(x: Tensor, residual: Tensor, junction: int) -> None:
    run = _RUN[junction]
    if run is not None:
        run(x, residual)


def _one(x: Tensor, junction: int) -> None:
    run = _RUN[junction]
    if run is not None:
        # The Transformers backend keeps a batch dimension of one.
        run(x[0] if x.dim() == 3 else x, None)


def _nothing(*_: object) -> None:
    """Tracing: the op returns nothing."""


for _key in ("CPU", "CUDA"):
    _library.impl("junction_pair", _pair, _key)  # type: ignore[no-untyped-call]
    _library.impl("junction_one", _one, _key)  # type: ignore[no-untyped-call]
_library.impl("junction_pair", _nothing, "Meta")  # type: ignore[no-untyped-call]
_library.impl("junction_one", _nothing, "Meta")  # type: ignore[no-untyped-call]


def reserve(n_junctions: int) -> None:
    """Makes room for a model's junctions, all idle."""
    _RUN[:] = [None] * n_junctions


def set_run(junction: int, run: JunctionRun | None) -> None:
    """What `junction` does from now on."""
    _RUN[junction] = run


def clear() -> None:
    """Makes every junction idle."""
    for index in range(len(_RUN)):
        _RUN[index] = None
