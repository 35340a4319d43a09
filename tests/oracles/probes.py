"""Probes with random weights, and their scores written out in float64 numpy."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from glasshouse.server.probes.calibration import Calibration, IsotonicScaling, PlattScaling
from glasshouse.server.probes.examples import Task
from glasshouse.server.probes.pooling import Pooling
from glasshouse.server.probes.served import ProbeFacts, ServedProbe, affine

Rows = NDArray[np.float64]
# Activations of all positions so far (T, D) -> scores of the last, one a column.
Scores = Callable[[Rows], NDArray[np.float64]]


@dataclass(frozen=True)
class RandomProbe:
    """A probe, and what it says of each column as formulas: probabilities and log-odds."""

    probe: ServedProbe
    scores: Scores
    margins: Scores


def random_probe(
    points: Sequence[str],
    width: int,
    *,
    seed: int,
    task: Task = Task.BINARY,
    n_columns: int = 1,
    hidden: int = 0,
    platt: tuple[float, float] | None = None,
    isotonic: bool = False,
    pooling: Pooling = Pooling.TOKEN,
    scale: float = 0.03,
) -> RandomProbe:
    """Reads `points` of `width` each. `platt`: (slope, offset) of every column; `hidden`: a two-layer probe."""
    rng = np.random.default_rng(seed)
    d = width * len(points)
    sizes = [d, hidden, n_columns] if hidden else [d, n_columns]
    layers = [
        (rng.standard_normal((a, b)) * (scale if i == 0 else 1.0), rng.standard_normal(b) * 0.3)
        for i, (a, b) in enumerate(itertools.pairwise(sizes))
    ]
    knots = [np.sort(rng.standard_normal(7)) * 2.0 for _ in range(n_columns)]
    levels = [np.sort(rng.uniform(size=7)) for _ in range(n_columns)]
    calibration: Calibration | None = None
    if platt is not None:
        slopes, offsets = (torch.full((n_columns,), value, dtype=torch.float64) for value in platt)
        calibration = PlattScaling(slopes, offsets)
    elif isotonic:
        calibration = IsotonicScaling(
            tuple(torch.from_numpy(each) for each in knots), tuple(torch.from_numpy(each) for each in levels)
        )
    labels = tuple(f"label {i}" for i in range(n_columns)) if n_columns > 1 else ("no", "yes")
    facts = ProbeFacts(
        kind="mlp" if hidden else "logistic",
        task=task,
        label_names=labels,
        hook_points=tuple(points),
        widths=(width,) * len(points),
        pooling=pooling,
        model_name="fable",
    )
    probe = ServedProbe(
        facts=facts, layers=tuple(affine(*layer) for layer in layers), calibration=calibration
    )

    def margins(rows: Rows) -> NDArray[np.float64]:
        pooled = {
            Pooling.TOKEN: lambda: rows[-1],
            Pooling.LAST: lambda: rows[-1],
            Pooling.MEAN: lambda: rows.mean(0),
            Pooling.MAX: lambda: rows.max(0),
        }[pooling]()
        h = pooled
        for i, (weights, biases) in enumerate(layers):
            h = (np.maximum(h, 0.0) if i else h) @ weights + biases
        if task is not Task.MULTI_CLASS:
            return h
        p = np.exp(h - h.max())
        p /= p.sum()
        return np.log(p) - np.log1p(-p)

    def scores(rows: Rows) -> NDArray[np.float64]:
        m = margins(rows)
        if isotonic:
            p = np.array([np.interp(m[c], knots[c], levels[c]) for c in range(n_columns)])
        else:
            slope, offset = platt or (1.0, 0.0)
            p = 1.0 / (1.0 + np.exp(-(slope * m + offset)))
        return p / p.sum() if task is Task.MULTI_CLASS else p

    return RandomProbe(probe, scores, margins)
