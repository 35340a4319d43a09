"""ACDC: the edges a behaviour needs, found by corrupting one after the other.

https://arxiv.org/abs/2304.14997

1. Start with every edge clean. The metric is a distance from the clean run (by default the KL divergence from its
   next-token distribution): small is faithful.
2. Go through the destinations from the output backwards, and through each one's sources from the latest. Corrupt
   the edge; if the metric grows by less than the threshold, it stays corrupt for good.
3. A component whose outgoing edges are all corrupt changes nothing: its incoming edges are dropped without a pass.

What is left is the circuit. With m the metric of a set of clean edges, m(all) that of the clean run and m(none) of
the corrupt one:

- faithfulness = 1 - (m(circuit) - m(all)) / (m(none) - m(all)): 1 where the circuit alone does it all;
- completeness = (m(all but the circuit) - m(all)) / (m(none) - m(all)): 1 where nothing is left without it.

Shapes: S sources, N destinations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from glasshouse.server.attribution.edge_attribution import check_lengths
from glasshouse.server.attribution.edge_patching import forward_with_edges
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.metrics import KLDivergence, Metric
from glasshouse.server.attribution.progress import Progress, silent
from glasshouse.server.attribution.wiring import Destination, Source, Wiring
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.wire import reasons


@dataclass(frozen=True, kw_only=True, eq=False)
class Circuit:
    """The edges kept, latest destination first. kept: (S, N) bool. `n_passes` forward passes found it."""

    wiring: Wiring
    edges: tuple[tuple[Source, Destination], ...]
    kept: Tensor
    value: float
    clean_value: float
    corrupt_value: float
    complement_value: float
    n_passes: int

    @property
    def faithfulness(self) -> float:
        return 1.0 - self._share(self.value)

    @property
    def completeness(self) -> float:
        return self._share(self.complement_value)

    def _share(self, value: float) -> float:
        whole = self.corrupt_value - self.clean_value
        return (value - self.clean_value) / whole if whole else float("nan")


class EdgeExperiment:
    """One clean and one corrupt input: the metric of any set of clean edges."""

    def __init__(
        self, wiring: Wiring, clean_T: Tensor, corrupt_T: Tensor, metric: Metric | None = None
    ) -> None:
        self.wiring, model = wiring, wiring.model
        self._clean, corrupt = model.tokens(clean_T), model.tokens(corrupt_T)
        check_lengths(self._clean, corrupt)
        with torch.no_grad():
            self._corrupt_SBTD = wiring.contributions(model.forward(corrupt, read=wiring.written).readings)
            if metric is None:
                metric = KLDivergence(reference=KLDivergence.reference_of(model.forward(self._clean)))
        self._metric = metric
        self.n_passes = 0

    @torch.no_grad()
    def value(self, kept_SN: Tensor) -> float:
        """The metric with the edges of `kept_SN` (bool) clean and all others corrupt."""
        self.n_passes += 1
        mask = (~kept_SN).float()
        run = forward_with_edges(self.wiring, self._clean, self._corrupt_SBTD, mask, read=self._metric.reads)
        return float(self._metric(run).mean())


def discover_circuit(
    model: GradientModel,
    clean_T: Tensor,
    corrupt_T: Tensor,
    *,
    threshold: float,
    metric: Metric | None = None,
    progress: Progress = silent,
) -> Circuit:
    """ACDC. A metric must grow as the model departs from its clean behaviour; None is the KL divergence."""
    if threshold <= 0:
        raise InvalidArgument(
            f"threshold is {threshold}",
            reason=reasons.VALUE_OUT_OF_RANGE,
            field="threshold",
            value=threshold,
            remedy="Give how much the metric may grow by an edge, such as 0.01 nats.",
        )
    experiment = EdgeExperiment(Wiring(model), clean_T, corrupt_T, metric)
    wiring = experiment.wiring
    kept = wiring.valid.clone()
    current = experiment.value(kept)
    total = int(kept.sum())
    for done, (row, column) in enumerate(_edges_backwards(wiring), start=1):
        kept[row, column] = False
        if _has_effect(wiring, kept, wiring.destinations[column]):
            value = experiment.value(kept)
            if value - current < threshold:
                current = value
            else:
                kept[row, column] = True
        progress(done, total)
    return measure_circuit(experiment, kept)


def measure_circuit(experiment: EdgeExperiment, kept_SN: Tensor) -> Circuit:
    """A circuit of given edges, with its faithfulness and completeness."""
    wiring = experiment.wiring
    edges = tuple(
        (wiring.sources[row], wiring.destinations[column])
        for row, column in _edges_backwards(wiring)
        if kept_SN[row, column]
    )
    return Circuit(
        wiring=wiring,
        edges=edges,
        kept=kept_SN,
        value=experiment.value(kept_SN),
        clean_value=experiment.value(wiring.valid),
        corrupt_value=experiment.value(torch.zeros_like(wiring.valid)),
        complement_value=experiment.value(wiring.valid & ~kept_SN),
        n_passes=experiment.n_passes,
    )


def _edges_backwards(wiring: Wiring) -> Iterator[tuple[int, int]]:
    """(row, column) of every edge, latest destination and latest source first."""
    for column in sorted(
        range(len(wiring.destinations)), key=lambda c: wiring.destinations[c].stage, reverse=True
    ):
        for row in reversed(range(len(wiring.sources))):
            if wiring.valid[row, column]:
                yield row, column


def _has_effect(wiring: Wiring, kept: Tensor, destination: Destination) -> bool:
    """Whether anything that the destination's component writes is still read."""
    if destination.kind == "logits":
        return True
    kind = "mlp" if destination.kind == "mlp" else "head"
    heads_per_group = wiring.model.loaded.n_heads // wiring.model.loaded.n_kv_heads
    for row, source in enumerate(wiring.sources):
        if source.kind != kind or source.layer != destination.layer:
            continue
        group = source.head // heads_per_group if destination.kind in ("k", "v") else source.head
        if (kind == "mlp" or group == destination.head) and bool(kept[row].any()):
            return True
    return False
