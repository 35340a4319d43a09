"""A circuit of heads and MLPs as a diagram: levels from the embedding up, an edge for each that the circuit keeps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from glasshouse.client.arrays import Array
from glasshouse.client.pictures.parts import check_shape

_PART = re.compile(r"(?:a(?P<head_layer>\d+)\.h(?P<head>\d+)(?:\.(?P<port>[qkv]))?|m(?P<mlp_layer>\d+))")


@dataclass(frozen=True, kw_only=True, eq=False)
class CircuitDiagram:
    """nodes: (label, level), edges: (source, target) places among the nodes, ports: where each arrives ("q", "k", "v" or
    ""). values: (n_edges,), signed; `levels` name the rows, the lowest first. `scale` as other parts have it.
    """

    title: str
    levels: Sequence[str]
    nodes: Sequence[tuple[str, int]]
    edges: Sequence[tuple[int, int]]
    ports: Sequence[str]
    values: Array
    unit: str = ""
    scale: float | None = None

    def __post_init__(self) -> None:
        check_shape(self.title, np.shape(self.values), (len(self.edges),))

    def places(self) -> list[tuple[float, float]]:
        """(x, y) of every node in a unit square, y upwards: the nodes of a level side by side."""
        found = []
        for number, (_, level) in enumerate(self.nodes):
            row = [other for other, (_, at) in enumerate(self.nodes) if at == level]
            found.append(((row.index(number) + 0.5) / len(row), (level + 0.5) / len(self.levels)))
        return found


def circuit_diagram(
    title: str, edges: Sequence[tuple[str, str]], values: Array | None = None, *, unit: str = ""
) -> CircuitDiagram:
    """The diagram of edges between labels such as "embed", "a3.h1", "m2" and, where they arrive, "a3.h1.q" and
    "logits". Without values every edge counts one, and is drawn lightly.
    """
    read = [(_place(source), _place(target)) for source, target in edges]
    placed = sorted({place for pair in read for place, _ in pair})
    depths = sorted({(layer, kind) for layer, kind, _ in placed})
    level = {depth: number for number, depth in enumerate(depths)}
    number = {place: at for at, place in enumerate(placed)}
    return CircuitDiagram(
        title=title,
        levels=[_level_name(layer, kind) for layer, kind in depths],
        nodes=[(_node_name(place), level[place[:2]]) for place in placed],
        edges=[(number[source], number[target]) for (source, _), (target, _) in read],
        ports=[port for _, (_, port) in read],
        values=np.ones(len(edges)) if values is None else np.asarray(values, dtype=np.float64),
        unit=unit,
        scale=4.0 if values is None else None,
    )


_Place = tuple[float, int, int]
"""Layer (of embeddings below all, of logits above), 0 for attention and 1 for an MLP, head."""


def _place(label: str) -> tuple[_Place, str]:
    """Where a label stands, and the port it names."""
    if label in ("embed", "logits"):
        return (-1.0 if label == "embed" else float("inf"), 0, 0), ""
    found = _PART.fullmatch(label)
    if found is None:
        raise ValueError(f"{label!r} names no part of a circuit: embed, a3.h1, a3.h1.q, m2 or logits")
    if found["mlp_layer"] is not None:
        return (float(found["mlp_layer"]), 1, 0), ""
    return (float(found["head_layer"]), 0, int(found["head"])), found["port"] or ""


def _node_name(place: _Place) -> str:
    layer, kind, head = place
    if layer < 0 or np.isinf(layer):
        return "embed" if layer < 0 else "logits"
    return f"m{layer:.0f}" if kind else f"a{layer:.0f}.h{head}"


def _level_name(layer: float, kind: int) -> str:
    if layer < 0 or np.isinf(layer):
        return "embed" if layer < 0 else "logits"
    return f"L{layer:.0f} {'mlp' if kind else 'attn'}"
