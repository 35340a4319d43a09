"""ACDC: the edges a behaviour needs, found by corrupting one after the other.

https://arxiv.org/abs/2304.14997

1. Start with every edge clean. The metric is a distance from the clean run (by default the KL divergence from its
   next-token distribution): small is faithful.
2. Go through the destinations from the output backwards, and through each one's sources from the latest. Corrupt
   the edge; if the metric grows by less than the threshold, it stays corrupt for good.
3. A component whose outgoing edges are all corrupt changes nothing: its incoming edges are dropped without a pass.
4. Several next steps are tried at once, as rows of one pass, each on the guess that all before it are dropped; the
   first that is not ends the guess and the rest is thrown away. What is kept is exactly what one by one would keep.
5. Until an edge into a layer is corrupt, everything before the layer is the clean run: a pass starts there.

A circuit of a given size is found by bisecting the threshold, on a logarithmic scale.

What is left is the circuit. With m the metric of a set of clean edges, m(all) that of the clean run and m(none) of
the corrupt one:

- faithfulness = 1 - (m(circuit) - m(all)) / (m(none) - m(all)): 1 where the circuit alone does it all;
- completeness = (m(all but the circuit) - m(all)) / (m(none) - m(all)): 1 where nothing is left without it.

Shapes: S sources, N destinations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glasshouse.server.attribution.edge_attribution import check_lengths
from glasshouse.server.attribution.edge_patching import PlainRun, forward_with_edges
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.metrics import KLDivergence, Metric
from glasshouse.server.attribution.progress import Progress, silent
from glasshouse.server.attribution.wiring import Destination, Source, Wiring
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.wire import reasons

ROWS_AT_ONCE = 16
"""The most steps that are tried in one pass."""

SMALLEST_SHARE = 1e-5
"""The smallest threshold that a search for a size comes to, as a share of the whole effect."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Circuit:
    """The edges kept, latest destination first. kept: (S, N) bool. `n_passes` forward passes found it, at `threshold`
    (nan where the edges were given).
    """

    wiring: Wiring
    edges: tuple[tuple[Source, Destination], ...]
    kept: Tensor
    value: float
    clean_value: float
    corrupt_value: float
    complement_value: float
    n_passes: int
    threshold: float = float("nan")

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
            clean = model.forward(self._clean, read=wiring.written)
            if metric is None:
                metric = KLDivergence(reference=KLDivergence.reference_of(clean))
        self.metric = _at_the_end(model, metric)
        contributions = wiring.contributions(clean.readings)
        self._plain = PlainRun(base=model.base_run(self._clean), contributions=contributions)
        early = [model.table.resolve(name).layer or 0 for name in metric.reads]
        self._latest_start = min([*early, model.n_layers - 1])
        self.n_passes = 0

    @property
    def rows_at_once(self) -> int:
        """How many sets of edges one pass can try: of several input pairs, one."""
        return ROWS_AT_ONCE if len(self._clean) == 1 else 1

    def first_layer(self, layer: int) -> int:
        """Where a pass starts whose earliest corrupt edge goes into `layer`."""
        return min(layer, self._latest_start) if self.wiring.model.loaded.family.direct else 0

    @torch.no_grad()
    def values(self, kept_RSN: Tensor) -> list[float]:
        """The metric of up to `rows_at_once` sets of edges by one pass; the mean over several input pairs."""
        self.n_passes += 1
        mask = (~kept_RSN & self.wiring.valid).float()
        masked = mask.flatten(0, 1).any(0).tolist()
        layers = [d.layer for d, any_ in zip(self.wiring.destinations, masked) if any_]
        single = len(self._clean) == 1
        run = forward_with_edges(
            self.wiring,
            self._clean.expand(len(kept_RSN), -1) if single else self._clean,
            self._corrupt_SBTD,
            mask if single else mask[0],
            read=self.metric.reads,
            plain=self._plain,
            first_layer=self.first_layer(min(layers, default=self.wiring.model.n_layers)),
        )
        found = self.metric(run)
        return [float(value) for value in found] if single else [float(found.mean())]

    @torch.no_grad()
    def value(self, kept_SN: Tensor) -> float:
        """The metric with the edges of `kept_SN` (bool) clean and all others corrupt."""
        self.n_passes += 1
        mask = (~kept_SN).float()
        run = forward_with_edges(self.wiring, self._clean, self._corrupt_SBTD, mask, read=self.metric.reads)
        return float(self.metric(run).mean())


def _at_the_end(model: GradientModel, metric: Metric) -> Metric:
    """The metric, where it is read behind the last edges: an activation before them would not know of those."""
    last = f"blocks.{model.n_layers - 1}.hook_resid_post"
    for asked in metric.reads:
        name = model.table.resolve(asked).name
        if name != last and not name.startswith("ln_final."):
            raise InvalidArgument(
                f"The metric reads {name}; edges are searched from the end of the model backwards, and none ends there.",
                reason=reasons.FIELD_CONFLICT,
                field="metric",
                value=name,
                remedy=f"Use a metric of the next token, or of activations at {last}.",
            )
    return metric


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
    return replace(measure_circuit(experiment, _search(experiment, threshold, progress)), threshold=threshold)


def discover_circuit_of_size(
    model: GradientModel,
    clean_T: Tensor,
    corrupt_T: Tensor,
    *,
    n_edges: int,
    metric: Metric | None = None,
    n_searches: int = 10,
    progress: Progress = silent,
) -> Circuit:
    """The largest circuit of at most `n_edges` edges that ACDC finds at any of `n_searches` thresholds.

    The empty circuit where every threshold keeps more. `Circuit.threshold` says which one it was.
    """
    if n_edges < 1:
        raise InvalidArgument(
            f"n_edges is {n_edges}",
            reason=reasons.VALUE_OUT_OF_RANGE,
            field="n_edges",
            value=n_edges,
            remedy="Ask for at least one edge.",
        )
    experiment = EdgeExperiment(Wiring(model), clean_T, corrupt_T, metric)
    found: dict[float, Tensor] = {}

    def size_at(threshold: float) -> int:
        found[threshold] = _search(experiment, threshold, silent)
        progress(len(found), n_searches)
        return int(found[threshold].sum())

    whole = whole_effect(experiment)
    best = search_for_size(size_at, whole, n_edges=n_edges, n_searches=n_searches)
    kept = found.get(best, torch.zeros_like(experiment.wiring.valid))
    return replace(measure_circuit(experiment, kept), threshold=best)


def whole_effect(experiment: EdgeExperiment) -> float:
    """How far corrupting every edge moves the metric, in its units; never 0. Two passes."""
    valid = experiment.wiring.valid
    return max(abs(experiment.value(torch.zeros_like(valid)) - experiment.value(valid)), 1e-6)


def search_for_size(size_at: Callable[[float], int], whole: float, *, n_edges: int, n_searches: int) -> float:
    """Bisects between a share of the whole effect and all of it, by at most `n_searches` calls of `size_at`.

    The threshold of the largest circuit that has edges and not more than `n_edges`; `whole` where there was none.
    """
    low, high = math.log(whole * SMALLEST_SHARE), math.log(whole)
    best, best_size = math.exp(high), 0
    for _ in range(n_searches):
        middle = (low + high) / 2
        size = size_at(math.exp(middle))
        if best_size < size <= n_edges:
            best, best_size = math.exp(middle), size
        low, high = (low, middle) if size < n_edges else (middle, high)
        if size == n_edges:
            break
    return best


def _search(experiment: EdgeExperiment, threshold: float, progress: Progress) -> Tensor:
    """(S, N) bool: the edges that ACDC keeps."""
    wiring = experiment.wiring
    kept = wiring.valid.clone()
    current = experiment.value(kept)
    edges = list(edges_backwards(wiring))
    place, n_guesses = 0, 1
    while place < len(edges):
        states = _guess(wiring, kept, edges[place:], n_guesses)
        tried = [(step, state) for step, state in enumerate(states) if state is not None]
        values = experiment.values(torch.stack([state for _, state in tried])) if tried else []
        wrong = len(states)  # the first step that keeps its edge
        for (step, _), value in zip(tried, values):
            if value - current >= threshold:
                wrong = step
                break
            current = value
        for row, column in edges[place : place + wrong]:
            kept[row, column] = False
        before, place = place, place + min(wrong + 1, len(states))
        for done in range(before + 1, place + 1):
            progress(done, len(edges))
        held = wrong == len(states)
        n_guesses = next_guesses(n_guesses, held, experiment.rows_at_once)
    return kept


def next_guesses(n_guesses: int, held: bool, most: int) -> int:
    """How many steps are tried after so many: more where all of them held."""
    return min(most, 2 * n_guesses) if held else max(1, n_guesses // 2)


def _guess(wiring: Wiring, kept: Tensor, edges: list[tuple[int, int]], n_guesses: int) -> list[Tensor | None]:
    """What the next edges leave (S, N) if each is dropped, up to `n_guesses` to try; None where no pass is needed."""
    state, states, n_tried = kept.clone(), list[Tensor | None](), 0
    for row, column in edges:
        if n_tried == n_guesses:
            break
        state[row, column] = False
        rows = wiring.written_by(wiring.destinations[column])
        tried = rows is None or bool(state[rows].any())
        states.append(state.clone() if tried else None)
        n_tried += tried
    return states


def measure_circuit(experiment: EdgeExperiment, kept_SN: Tensor) -> Circuit:
    """A circuit of given edges, with its faithfulness and completeness."""
    wiring = experiment.wiring
    edges = tuple(
        (wiring.sources[row], wiring.destinations[column])
        for row, column in edges_backwards(wiring)
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


def edges_backwards(wiring: Wiring) -> Iterator[tuple[int, int]]:
    """(row, column) of every edge, latest destination and latest source first."""
    for column in sorted(
        range(len(wiring.destinations)), key=lambda c: wiring.destinations[c].stage, reverse=True
    ):
        for row in reversed(range(len(wiring.sources))):
            if wiring.valid[row, column]:
                yield row, column
