"""How many passes a search for a circuit will take: the search, rehearsed on a guess at what every edge does.

1. Corrupting edges is taken to move the logits along one line, from the clean run's to the corrupt run's: an edge moves
   them by its share, its EAP-IG score (`edge_attribution`) for the place on that line, and shares add up. A metric of
   logits is then a curve, computed by moving the clean run's last hidden state along. (A KL divergence is flat where it
   starts: edges that alone would count are dropped unnoticed, and only a curve says so.) A metric of activations is taken
   to be linear in its own EAP-IG scores.
2. With that in place of passes ACDC is gone through: which edges stay, which are dropped, which need no pass because what
   they feed is dropped already.
3. What is decided decides the passes: how many steps each tries, and the layer it starts at (`circuits`).

Given the decisions of a search the passes are exactly those that it made; a rehearsal is as good as its guess at them.

Shapes: S sources, N destinations, T positions, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from glasshouse.server.attribution.circuits import EdgeExperiment, edges_backwards, next_guesses
from glasshouse.server.attribution.edge_attribution import attribute_edges
from glasshouse.server.attribution.gradient_model import Pass
from glasshouse.server.attribution.metrics import Metric

STEPS = 5
"""Gradients of EAP-IG."""

_NEAREST, _FARTHEST, _N_PLACES = -2.0, 5.0, 240
_AT_ONCE = 8

Passes = Counter[tuple[int, int]]
"""How many passes of (rows, first layer)."""


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """A search that was not run. kept: (S, N) bool."""

    kept: Tensor
    passes: Passes

    @property
    def n_kept(self) -> int:
        return int(self.kept.sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class Effects:
    """shares: (S, N) float32, how far along an edge moves a run. `value`: the metric at a place, 0 being the clean run."""

    shares: Tensor
    value: Callable[[float], float]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Place(Metric):
    """How far along a line of logits: logits . direction. direction: (V,)."""

    direction: Tensor

    def __call__(self, run: Pass) -> Tensor:
        return run.logits(self.position, capped=False) @ self.direction


def guess_effects(experiment: EdgeExperiment, clean_T: Tensor, corrupt_T: Tensor) -> Effects:
    """What every edge does, by `STEPS` passes with gradients."""
    wiring, metric = experiment.wiring, experiment.metric
    model = wiring.model
    if metric.reads:
        scores = attribute_edges(model, clean_T, corrupt_T, metric, steps=STEPS, wiring=wiring).scores
        return Effects(shares=scores, value=float)
    with torch.no_grad():
        clean, corrupt = (model.forward(model.tokens(tokens)) for tokens in (clean_T, corrupt_T))
        ends = [run.logits(metric.position, capped=False)[0] for run in (clean, corrupt)]
        line = ends[1] - ends[0]
        line = line - line.mean()  # the same added to every logit is nothing
        length = float(line @ line)
        value = _curve(metric, clean, corrupt)
    if not length:
        return Effects(shares=torch.zeros(wiring.valid.shape), value=value)
    place = _Place(direction=line / length, position=metric.position)
    scores = attribute_edges(model, clean_T, corrupt_T, place, steps=STEPS, wiring=wiring).scores
    return Effects(shares=scores, value=value)


def _curve(metric: Metric, clean: Pass, corrupt: Pass) -> Callable[[float], float]:
    """The metric by the place between the runs, and beyond them; places are closest together at the clean run."""
    roots = np.linspace(-((-_NEAREST) ** 0.5), _FARTHEST**0.5, _N_PLACES)
    places = np.sort(np.append(roots * np.abs(roots), 0.0))
    values = []
    for some in torch.split(torch.from_numpy(places).to(clean.hidden), _AT_ONCE):
        hidden = clean.hidden + some[:, None, None] * (corrupt.hidden - clean.hidden)
        values += metric(replace(clean, hidden=hidden)).tolist()
    return lambda place: float(np.interp(place, places, values))


def rehearse(experiment: EdgeExperiment, effects: Effects, threshold: float) -> Rehearsal:
    """ACDC at a threshold, as it would go if edges did what was guessed."""
    shares, place = effects.shares.tolist(), 0.0
    current = effects.value(place)

    def keeps(row: int, column: int) -> bool:
        nonlocal place, current
        there = place + shares[row][column]
        value = effects.value(there)
        if value - current >= threshold:
            return True
        place, current = there, value
        return False

    return rehearse_decisions(experiment, keeps)


def rehearse_decisions(experiment: EdgeExperiment, keeps: Callable[[int, int], bool]) -> Rehearsal:
    """ACDC where `keeps` says of every edge that is tried, in order, whether it stays."""
    wiring = experiment.wiring
    edges = list(edges_backwards(wiring))
    kept = torch.zeros(wiring.valid.shape, dtype=torch.bool)
    never = len(edges)
    first_read = [never] * len(wiring.sources)  # of each source: the first of its edges that stays
    tried_from, stays, layers = list[int](), list[bool](), list[int]()
    for place, (row, column) in enumerate(edges):
        destination = wiring.destinations[column]
        written = wiring.written_by(destination)
        live_from = -1 if written is None else min(first_read[source] for source in written)
        stay = live_from < place and keeps(row, column)
        if stay:
            first_read[row] = min(first_read[row], place)
            kept[row, column] = True
        tried_from.append(live_from)
        stays.append(stay)
        layers.append(destination.layer)
    passes: Passes = Counter()
    place, n_guesses = 0, 1
    while place < len(edges):
        n_tried, last, end, wrong = 0, place, place, never
        while end < len(edges) and n_tried < n_guesses:
            if tried_from[end] < place:
                n_tried, last = n_tried + 1, end
            if stays[end]:
                wrong = min(wrong, end)
            end += 1
        if n_tried:
            passes[n_tried, experiment.first_layer(layers[last])] += 1
        place = min(wrong + 1, end)
        n_guesses = next_guesses(n_guesses, wrong >= end, experiment.rows_at_once)
    return Rehearsal(kept=kept, passes=passes)
