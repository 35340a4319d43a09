"""A circuit as an operation: estimated, searched, stored.

How many passes a search takes depends on what it finds. The estimate rehearses it (`circuit_rehearsal`) and multiplies
with seconds measured here: what is to be expected. The bound beside it is what a search takes that keeps every edge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from glasshouse.server.attribution.circuit_rehearsal import Passes, guess_effects, rehearse
from glasshouse.server.attribution.circuits import (
    ROWS_AT_ONCE,
    Circuit,
    EdgeExperiment,
    discover_circuit,
    discover_circuit_of_size,
    search_for_size,
    whole_effect,
)
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.metrics import Metric
from glasshouse.server.attribution.progress import Progress
from glasshouse.server.attribution.wiring import Wiring

from .budget import Estimate, timed

HELD_FIXED = (
    "Nothing is frozen: every component reads its own copy of the stream, in which the contributions of dropped edges "
    "are those of the corrupt input; patterns, norms and MLPs respond to what is left."
)

# Thresholds that a search for a size tries.
_SEARCHES = 10

# Passes before a search (clean, corrupt, and what later passes start from), and those that measure what it found.
_SETUP_PASSES, _MEASURING_PASSES = 3, 4

MakeMetric = Callable[[GradientModel], Metric]


@dataclass(frozen=True, kw_only=True, eq=False)
class CircuitRequest:
    """What is searched. `metric` None: the KL divergence from the clean run. Exactly one of threshold and target_edges."""

    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    metric: MakeMetric | None = None
    threshold: float | None = None
    target_edges: int | None = None


def estimate_circuit(model: GradientModel, asked: CircuitRequest) -> Estimate:
    """Rehearses the search, and times a few passes of the kinds that it makes."""
    wiring = Wiring(model)
    clean, corrupt = torch.tensor(asked.clean), torch.tensor(asked.corrupt)
    experiment = EdgeExperiment(wiring, clean, corrupt, None if asked.metric is None else asked.metric(model))
    passes, most_searches = _rehearsed(experiment, asked, clean, corrupt)
    cost = _PassCost.measured(experiment)
    n_edges = int(wiring.valid.sum())
    # Each pass settles an edge or more. Between two that are wrong their rows at most double: three an edge in all.
    alone = cost.seconds(1, 0)
    most = most_searches * n_edges * (alone + 3 * max(cost.seconds(2, 0) - alone, 0.0))
    beside = (_SETUP_PASSES + _MEASURING_PASSES) * alone
    stream = 4 * len(asked.clean) * model.loaded.d_model
    expected = sum(n * cost.seconds(rows, layer) for (rows, layer), n in passes.items())
    return Estimate(
        memory_bytes=ROWS_AT_ONCE * stream * (3 * len(wiring.sources) + 2 * len(wiring.destinations)),
        seconds=expected + beside,
        passes=passes.total() + _MEASURING_PASSES,
        size=n_edges,
        seconds_upper_bound=max(most, expected) + beside,
        passes_upper_bound=most_searches * (n_edges + 1) + _MEASURING_PASSES,
    )


def _rehearsed(
    experiment: EdgeExperiment, asked: CircuitRequest, clean: Tensor, corrupt: Tensor
) -> tuple[Passes, int]:
    """The passes of all the searches that are likely, and how many searches there are at most."""
    effects = guess_effects(experiment, clean, corrupt)
    start = Passes({(1, 0): 1})  # every search begins with the value of the whole
    if asked.threshold is not None:
        return start + rehearse(experiment, effects, asked.threshold).passes, 1
    assert asked.target_edges is not None, "one of the two is asked for"
    passes = Passes({(1, 0): 2})  # the whole effect

    def size_at(threshold: float) -> int:
        found = rehearse(experiment, effects, threshold)
        passes.update(start + found.passes)
        return found.n_kept

    whole = whole_effect(experiment)
    search_for_size(size_at, whole, n_edges=asked.target_edges, n_searches=_SEARCHES)
    return passes, _SEARCHES


@dataclass(frozen=True, kw_only=True)
class _PassCost:
    """Seconds of a pass of one row and of `ROWS_AT_ONCE`, from the first layer and from the last; between them a line."""

    whole: tuple[float, float]
    last: tuple[float, float]
    n_layers: int

    @classmethod
    def measured(cls, experiment: EdgeExperiment) -> _PassCost:
        """Passes on the very inputs, with half of the edges corrupt that may be."""
        n_layers = experiment.wiring.model.n_layers
        first, last = (
            tuple(_timed_pass(experiment, rows, layer) for rows in (1, ROWS_AT_ONCE))
            for layer in (0, n_layers - 1)
        )
        return cls(whole=(first[0], first[1]), last=(last[0], last[1]), n_layers=n_layers)

    def seconds(self, rows: int, first_layer: int) -> float:
        """Of one pass."""
        more = (rows - 1) / (ROWS_AT_ONCE - 1)
        whole, last = (low + more * (high - low) for low, high in (self.whole, self.last))
        return whole + (last - whole) * first_layer / max(self.n_layers - 1, 1)


def _timed_pass(experiment: EdgeExperiment, n_rows: int, first_layer: int) -> float:
    wiring = experiment.wiring
    kept = wiring.valid.clone()
    late = [column for column, end in enumerate(wiring.destinations) if end.layer >= first_layer]
    kept[::2, late] = False
    rows = kept.expand(n_rows, -1, -1)
    return timed(lambda: experiment.values(rows))


def search(model: GradientModel, asked: CircuitRequest, progress: Progress) -> tuple[Circuit, float]:
    """The circuit, and the seconds it took."""
    started = perf_counter()
    clean, corrupt = torch.tensor(asked.clean), torch.tensor(asked.corrupt)
    metric = None if asked.metric is None else asked.metric(model)
    if asked.threshold is not None:
        circuit = discover_circuit(
            model, clean, corrupt, threshold=asked.threshold, metric=metric, progress=progress
        )
    else:
        assert asked.target_edges is not None, "one of the two is asked for"
        circuit = discover_circuit_of_size(
            model,
            clean,
            corrupt,
            n_edges=asked.target_edges,
            metric=metric,
            n_searches=_SEARCHES,
            progress=progress,
        )
    return circuit, perf_counter() - started


def circuit_facts(
    circuit: Circuit, asked: CircuitRequest, *, model: str, strings: Callable[..., Any], seconds: float
) -> dict[str, Any]:
    """What is stored of a circuit; JSON values. Edges, latest destination first, are indices into sources and
    destinations.
    """
    rows = {source: row for row, source in enumerate(circuit.wiring.sources)}
    return {
        "model": model,
        "clean_token_ids": list(asked.clean),
        "clean_tokens": strings(asked.clean),
        "corrupt_token_ids": list(asked.corrupt),
        "corrupt_tokens": strings(asked.corrupt),
        "sources": [str(source) for source in circuit.wiring.sources],
        "destinations": [str(destination) for destination in circuit.wiring.destinations],
        "edge_sources": [rows[source] for source, _ in circuit.edges],
        "edge_destinations": [circuit.wiring.columns[end] for _, end in circuit.edges],
        "n_edges_total": int(circuit.wiring.valid.sum()),
        "threshold": circuit.threshold,
        "value": circuit.value,
        "clean_value": circuit.clean_value,
        "corrupt_value": circuit.corrupt_value,
        "complement_value": circuit.complement_value,
        "faithfulness": circuit.faithfulness,
        "completeness": circuit.completeness,
        "n_passes": circuit.n_passes,
        "seconds": seconds,
    }
