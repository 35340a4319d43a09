"""An attribution graph in one file: numpy's npz, its arrays and beside them one JSON text. Nothing is unpickled."""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from glasshouse.client.attribution.graph import (
    AttributionGraph,
    GraphInfo,
    GraphLogit,
    Supernode,
    edges_of,
    features_of,
)
from glasshouse.client.attribution.pruning import GraphScores

VERSION = 1


def write(graph: AttributionGraph, path: Path) -> None:
    """Writes a graph."""
    info = asdict(graph.annotated())
    for key in ("created", "expires"):
        info[key] = None if info[key] is None else info[key].isoformat()
    facts = {"version": VERSION, "info": info, "thresholds": graph.thresholds}
    features, edges = graph.features, graph.edges
    with path.open("wb") as file:
        np.savez_compressed(
            file,
            facts=np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8),
            feature_layers=features.layers,
            feature_indices=features.indices,
            feature_positions=features.positions,
            feature_values=features.activations,
            edge_targets=edges.targets,
            edge_sources=edges.sources,
            edge_weights=edges.weights,
            nodes_kept=graph.kept,
            cumulative_influence=graph.cumulative_influence,
        )


def read(path: Path) -> AttributionGraph:
    """Reads what `write` wrote. Raises ValueError for a file of another kind."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        facts = json.loads(arrays.pop("facts").tobytes())
        if facts["version"] != VERSION:
            raise ValueError(f"{path} is of version {facts['version']}, this is {VERSION}")
        info = _info(facts["info"])
        thresholds = facts["thresholds"]
        return AttributionGraph(
            info,
            features_of(arrays),
            edges_of(arrays),
            kept=arrays["nodes_kept"],
            cumulative=arrays["cumulative_influence"],
            thresholds=None if thresholds is None else (thresholds[0], thresholds[1]),
        )
    except (KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no saved attribution graph: {error}") from error


def _info(facts: dict[str, Any]) -> GraphInfo:
    made = dict(facts)
    made["logits"] = [GraphLogit(**logit) for logit in facts["logits"]]
    made["scores"] = GraphScores(**facts["scores"])
    made["supernodes"] = [
        Supernode(group["label"], tuple(group["node_ids"])) for group in facts["supernodes"]
    ]
    for key in ("created", "expires"):
        made[key] = None if facts[key] is None else datetime.fromisoformat(facts[key])
    return GraphInfo(**made)
