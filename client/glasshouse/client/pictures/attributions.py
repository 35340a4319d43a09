"""What attribution calls return, as parts of a picture."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import Any

import numpy as np

from glasshouse.client.arrays import Array
from glasshouse.client.attribution.sweeps import Mediation, PatchSweepResult, SweepAxes, SweepGrid
from glasshouse.client.attribution.values import (
    AttributionPatchResult,
    Circuit,
    DictionaryAttribution,
    DirectAttribution,
    FeatureAttribution,
    FeatureConnection,
    FeatureConnections,
    FeatureIntervention,
    TokenAttribution,
)
from glasshouse.client.pictures.circuit import circuit_diagram
from glasshouse.client.pictures.parts import Bars, HeatMap, Part, TokenText, same_scale

MOST_BARS = 20
"""Features, neurons and tokens shown as bars: the strongest."""
MOST_EDGES = 60
"""Edges of edge attribution in a diagram: the strongest."""

Names = Mapping[tuple[str, int], str]
"""(dictionary, feature) -> what it is called."""


@singledispatch
def picture(result: Any, *, unit: str = "", names: Names | None = None) -> list[Part]:
    """The parts that show a result. `unit` is that of the metric; `names` are of features.

    Raises TypeError for what is no result of attribution.
    """
    raise TypeError(f"there is no picture of {type(result).__name__}")


@picture.register(TokenAttribution)
def _tokens(result: TokenAttribution, *, unit: str = "", names: Names | None = None) -> list[Part]:
    title = f"What each token adds, at {result.hook_point}"
    return [TokenText(title=title, tokens=result.input.strings, values=result.scores, unit=unit)]


@picture.register(DirectAttribution)
def _direct(result: DirectAttribution, *, unit: str = "", names: Names | None = None) -> list[Part]:
    parts = {**result.contributions, "constant": result.constant}
    found: list[Part] = [_bars("What each part writes into the logit", parts, unit)]
    n_layers, n_heads = result.heads.shape
    found.append(
        HeatMap(
            title="Heads",
            rows=[f"L{layer}" for layer in range(n_layers)],
            columns=[f"H{head}" for head in range(n_heads)],
            values=result.heads,
            unit=unit,
        )
    )
    neurons = {f"L{layer} neuron {neuron}": part for layer, neuron, part in result.top_neurons(MOST_BARS)}
    found.append(_bars("Strongest neurons", neurons, unit))
    for split in result.features:
        strongest = zip(split.features[:MOST_BARS].tolist(), split.parts[:MOST_BARS].tolist())
        named = {_feature(names, split.dictionary, feature): part for feature, part in strongest}
        rest = split.rest + float(split.parts[MOST_BARS:].sum())
        named |= {"other features": rest, "decoder bias": split.bias, "error": split.error}
        found.append(_bars(f"Features of {split.dictionary} at {split.hook_point}", named, unit))
    return found


@picture.register(PatchSweepResult)
def _sweep(result: PatchSweepResult, *, unit: str = "", names: Names | None = None) -> list[Part]:
    maps = [_grid_map(grid, grid.effects, grid.axes.component, unit) for grid in result.grids]
    return [*_on_one_scale(maps)]


@picture.register(Mediation)
def _mediation(result: Mediation, *, unit: str = "", names: Names | None = None) -> list[Part]:
    maps = []
    for grid in result.grids:
        labels = SweepGrid(
            axes=grid.axes, values=grid.direct, effects=grid.direct, tokens=result.clean.strings
        )
        for name, values in (
            ("indirect effect through", grid.indirect),
            ("direct effect around", grid.direct),
        ):
            maps.append(_grid_map(labels, values, f"{name} {grid.axes.component}", unit))
    return [*_on_one_scale(maps)]


@picture.register(AttributionPatchResult)
def _patches(result: AttributionPatchResult, *, unit: str = "", names: Names | None = None) -> list[Part]:
    if result.edge_scores is not None:
        strongest = [(edge.partition("->"), score) for edge, score in result.top(MOST_EDGES)]
        edges = [(source, target) for (source, _, target), _ in strongest]
        title = f"The {len(edges)} strongest edges, by {result.method}"
        return [circuit_diagram(title, edges, np.array([score for _, score in strongest]), unit=unit)]
    maps = []
    for component, scores in result.scores.items():
        split = scores.ndim == 3
        labels = [
            f"L{place[0]}.H{place[1]}" if split else f"L{place[0]}" for place in np.ndindex(scores.shape[:-1])
        ]
        values = scores.reshape(-1, scores.shape[-1])
        maps.append(
            HeatMap(
                title=f"{component}, by {result.method}",
                rows=labels,
                columns=result.clean.strings,
                values=values,
                unit=unit,
            )
        )
    return [*_on_one_scale(maps)]


@picture.register(FeatureAttribution)
def _features(result: FeatureAttribution, *, unit: str = "", names: Names | None = None) -> list[Part]:
    found: list[Part] = []
    for each in result.dictionaries:
        sums = dict(list(each.by_feature().items())[:MOST_BARS])
        named = {_feature(names, each.dictionary, feature): total for feature, total in sums.items()}
        named["errors"] = float(each.errors.sum())
        found.append(_bars(f"{each.dictionary}, summed over positions", named, unit))
        found.append(_feature_map(each, list(sums), result.input.strings, unit, names))
    return found


@picture.register(Circuit)
def _circuit(result: Circuit, *, unit: str = "", names: Names | None = None) -> list[Part]:
    return [circuit_diagram(f"{len(result.edges)} of {result.n_edges_total:,} edges", result.edges)]


@picture.register(FeatureIntervention)
def _intervention(result: FeatureIntervention, *, unit: str = "", names: Names | None = None) -> list[Part]:
    shown = sorted(result.logits, key=lambda change: -abs(change.measured))[:MOST_BARS]
    measured = Bars(
        title="Change of logits, measured",
        labels=[repr(change.token) for change in shown],
        values=np.array([change.measured for change in shown]),
        unit="logits",
    )
    predicted = Bars(
        title="Change of logits, as direct effects predict",
        labels=measured.labels,
        values=np.array([change.predicted for change in shown]),
        unit="logits",
    )
    return [measured, predicted] if np.isfinite(predicted.values).any() else [measured]


@picture.register(FeatureConnections)
def _connections(result: FeatureConnections, *, unit: str = "", names: Names | None = None) -> list[Part]:
    def bars(title: str, connections: Sequence[FeatureConnection]) -> Bars:
        return _bars(
            title, {f"L{each.layer} feature {each.feature}": each.weight for each in connections}, ""
        )

    return [
        bars("From features of earlier layers", result.incoming),
        bars("To features of later layers", result.outgoing),
    ]


def _bars(title: str, values: Mapping[str, float], unit: str) -> Bars:
    return Bars(
        title=title, labels=list(map(_short, values)), values=np.array(list(values.values())), unit=unit
    )


def _short(name: str) -> str:
    """ "L3 mlp" for blocks.3.hook_mlp_out; other names as they are."""
    found = re.fullmatch(r"blocks\.(\d+)\.hook_(attn|mlp)_out", name)
    return f"L{found[1]} {found[2]}" if found else name.removeprefix("hook_")


def _feature(names: Names | None, dictionary: str, feature: int) -> str:
    known = (names or {}).get((dictionary, feature), "")
    return f"{feature} {known}".strip() if feature >= 0 else "error"


def _grid_map(grid: SweepGrid, values: Array, title: str, unit: str) -> HeatMap:
    """Rows are layers with their columns, and columns positions; patched at all of them, layers and columns."""
    axes: SweepAxes = grid.axes
    if len(axes.positions) == 1 and axes.positions[0] is None and len(axes.columns) > 1:
        letter = {"head": "H", "unit": "U", "feature": "F"}.get(axes.column_kind, "")
        rows = [f"L{layer}" for layer in axes.layers]
        columns = [f"{letter}{column}" for column in axes.columns]
        return HeatMap(title=title, rows=rows, columns=columns, values=values[..., 0], unit=unit)
    table = values.reshape(-1, values.shape[-1])
    return HeatMap(title=title, rows=grid.row_labels, columns=grid.column_labels, values=table, unit=unit)


def _on_one_scale(maps: Sequence[HeatMap]) -> list[HeatMap]:
    scale = same_scale(maps)
    return [
        HeatMap(title=m.title, rows=m.rows, columns=m.columns, values=m.values, unit=m.unit, scale=scale)
        for m in maps
    ]


def _feature_map(
    each: DictionaryAttribution,
    features: Sequence[int],
    tokens: Sequence[str],
    unit: str,
    names: Names | None,
) -> HeatMap:
    values = np.zeros((len(features) + 1, len(tokens)))
    for row, feature in enumerate(features):
        mine = each.features == feature
        np.add.at(values[row], each.positions[mine], each.attributions[mine])
    values[-1] = each.errors
    rows = [*(_feature(names, each.dictionary, feature) for feature in features), "errors"]
    return HeatMap(
        title=f"{each.dictionary}, by position", rows=rows, columns=tokens, values=values, unit=unit
    )
