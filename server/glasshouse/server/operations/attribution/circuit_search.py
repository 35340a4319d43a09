"""A circuit as an operation: estimated, searched, stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from glasshouse.server.attribution.circuits import (
    ROWS_AT_ONCE,
    Circuit,
    EdgeExperiment,
    discover_circuit,
    discover_circuit_of_size,
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
    """Times one pass with half of the edges corrupt."""
    wiring = Wiring(model)
    clean, corrupt = torch.tensor(asked.clean), torch.tensor(asked.corrupt)
    experiment = EdgeExperiment(wiring, clean, corrupt, None if asked.metric is None else asked.metric(model))
    kept = wiring.valid.clone()
    kept[::2] = False
    seconds = timed(lambda: experiment.value(kept))
    n_edges = int(wiring.valid.sum())
    n_passes = (n_edges + 4) * (_SEARCHES if asked.threshold is None else 1)
    stream = 4 * len(asked.clean) * model.loaded.d_model
    return Estimate(
        memory_bytes=ROWS_AT_ONCE * stream * (3 * len(wiring.sources) + 2 * len(wiring.destinations)),
        seconds=seconds * n_passes,
        passes=n_passes,
        size=n_edges,
    )


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
            model, clean, corrupt, n_edges=asked.target_edges, metric=metric, progress=progress
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
