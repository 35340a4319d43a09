"""How well an approximation orders things: Spearman's rank correlation, ties sharing their mean rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def ranks(values: Sequence[float]) -> NDArray[np.float64]:
    """(n,): 0 for the smallest; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(
        np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True
    )
    last = np.cumsum(counts) - 1
    means: NDArray[np.float64] = (last - (counts - 1) / 2.0)[inverse]
    return means


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rho; nan where one side is constant or there are fewer than two values."""
    a, b = ranks(first), ranks(second)
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])
