"""The best edges of an attribution, done again exactly: one pass an edge, with that edge alone corrupt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glasshouse.server.attribution.edge_attribution import EdgeScores, check_lengths
from glasshouse.server.attribution.edge_patching import forward_with_edges
from glasshouse.server.attribution.metrics import Metric
from glasshouse.server.attribution.progress import Progress, silent
from glasshouse.server.attribution.ranking import rank_correlation
from glasshouse.server.attribution.wiring import Destination, Source, Wiring


@dataclass(frozen=True, kw_only=True)
class EdgeVerification:
    """Largest approximate magnitude first. `rank_correlation` is of magnitudes, Spearman's."""

    edges: tuple[tuple[Source, Destination], ...]
    approximate: tuple[float, ...]
    exact: tuple[float, ...]
    rank_correlation: float


@torch.no_grad()
def verify_edges(
    wiring: Wiring,
    clean_T: Tensor,
    corrupt_T: Tensor,
    metric: Metric,
    scores: EdgeScores,
    *,
    top: int,
    progress: Progress = silent,
) -> EdgeVerification:
    """Path patching along each of the `top` edges: m(that edge corrupt) - m(clean)."""
    model = wiring.model
    clean, corrupt = model.tokens(clean_T), model.tokens(corrupt_T)
    check_lengths(clean, corrupt)
    theirs = wiring.contributions(model.forward(corrupt, read=wiring.written).readings)
    base = float(metric(model.forward(clean, read=metric.reads)).sum())
    rows = {source: row for row, source in enumerate(wiring.sources)}
    best = scores.top(top)
    exact: list[float] = []
    for done, (source, destination, _) in enumerate(best, start=1):
        mask = torch.zeros(wiring.valid.shape, device=clean.device)
        mask[rows[source], wiring.columns[destination]] = 1.0
        run = forward_with_edges(wiring, clean, theirs, mask, read=metric.reads)
        exact.append(float(metric(run).sum()) - base)
        progress(done, len(best))
    approximate = [score for _, _, score in best]
    return EdgeVerification(
        edges=tuple((source, destination) for source, destination, _ in best),
        approximate=tuple(approximate),
        exact=tuple(exact),
        rank_correlation=rank_correlation([abs(a) for a in approximate], [abs(e) for e in exact]),
    )
