"""The edits as the design states them, written out for one activation (width,)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Formula = Callable[[Tensor], Tensor]


def _unit(v: np.ndarray) -> Tensor:
    return torch.from_numpy(v / np.linalg.norm(v)).float()


def add(v: np.ndarray, c: float) -> Formula:
    """s + c v."""
    return lambda s: s + c * torch.from_numpy(v)


def add_norm(v: np.ndarray, c: float) -> Formula:
    """s + c |s| v / |v|."""
    return lambda s: s + c * s.norm() * _unit(v)


def add_kept(v: np.ndarray, c: float) -> Formula:
    """s + c v at the norm of s."""

    def edit(s: Tensor) -> Tensor:
        t = s + c * torch.from_numpy(v)
        return t / t.norm() * s.norm()

    return edit


def ablate(v: np.ndarray) -> Formula:
    """s - (s . v^) v^."""
    return lambda s: s - (s @ _unit(v)) * _unit(v)


def cap(v: np.ndarray, low: float, high: float) -> Formula:
    """s with its projection on v^ within [low, high]."""

    def edit(s: Tensor) -> Tensor:
        p = float(s @ _unit(v))
        return s + (min(max(p, low), high) - p) * _unit(v)

    return edit


def rotate(first: np.ndarray, second: np.ndarray, angle: float) -> Formula:
    """s with its part in the plane turned to `angle`."""
    b1 = _unit(first)
    b2 = torch.from_numpy(second).float()
    b2 = b2 - (b2 @ b1) * b1
    b2 = b2 / b2.norm()

    def edit(s: Tensor) -> Tensor:
        a, b = s @ b1, s @ b2
        return s - a * b1 - b * b2 + torch.sqrt(a * a + b * b) * (math.cos(angle) * b1 + math.sin(angle) * b2)

    return edit


def constant(value: np.ndarray) -> Formula:
    """`value` in place of s."""
    return lambda s: torch.from_numpy(value).to(s.dtype)
