"""What the server knows of a graph's features: their labels, and the tokens they promote and suppress."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from glasshouse.client.attribution.graph import AttributionGraph
from glasshouse.client.pictures.graph_page import FeatureNote

if TYPE_CHECKING:
    from glasshouse.client import Dictionary, FeatureInfo, Model
    from glasshouse.client.dictionaries.values import LogitEffects

MOST_NOTES = 1_000
_WORKERS = 8
_LAYER = re.compile(r"blocks\.(\d+)\.")


def feature_notes(
    model: Model,
    graph: AttributionGraph,
    *,
    most: int = MOST_NOTES,
    n_tokens: int = 8,
    on_progress: Callable[[int, int], object] | None = None,
) -> dict[tuple[int, int], FeatureNote]:
    """Notes of the `most` influential features, by (layer, index). `on_progress` takes how many of how many."""
    asked = _influential(graph, most)
    places = _places([model.dictionary(name) for name in graph.info.transcoders])
    known = [(key, *places[key[0]]) for key in asked if key[0] in places]

    def ask(entry: tuple[tuple[int, int], Dictionary, int]) -> tuple[tuple[int, int], FeatureNote]:
        (layer, index), dictionary, first = entry
        return (layer, index), note_of(
            dictionary.feature(first + index, n_tokens=n_tokens, n_nearest=0), dictionary.name
        )

    found = {}
    with ThreadPoolExecutor(_WORKERS) as pool:
        for key, note in pool.map(ask, known):
            found[key] = note
            if on_progress is not None:
                on_progress(len(found), len(known))
    return found


def note_of(info: FeatureInfo, dictionary: str) -> FeatureNote:
    """A note from what a dictionary says of a feature."""
    return FeatureNote(
        label=info.label,
        dictionary=dictionary,
        promoted=_pairs(info.promoted),
        suppressed=_pairs(info.suppressed),
    )


def _pairs(effects: LogitEffects | None) -> list[tuple[str, float]]:
    return [] if effects is None else list(zip(effects.tokens, effects.logits))


def _influential(graph: AttributionGraph, most: int) -> list[tuple[int, int]]:
    """(layer, index) of features left in the graph, the most influential first, each once."""
    numbers = np.flatnonzero(graph.kept[: graph.first_error])
    ordered = numbers[np.argsort(graph.cumulative_influence[numbers], kind="stable")]
    pairs = zip(graph.features.layers[ordered].tolist(), graph.features.indices[ordered].tolist())
    return list(dict.fromkeys(pairs))[:most]


def _places(dictionaries: Iterable[Dictionary]) -> dict[int, tuple[Dictionary, int]]:
    """Layer -> its dictionary, and the dictionary's index of the layer's first feature."""
    found: dict[int, tuple[Dictionary, int]] = {}
    for dictionary in dictionaries:
        info = dictionary.info
        sizes: Sequence[int] = info.group_sizes if len(info.hook_points_in) > 1 else [info.d_sae]
        for site, (name, size) in enumerate(zip(info.hook_points_in, sizes)):
            layer = _LAYER.match(name)
            if layer is not None and size:
                found[int(layer[1])] = dictionary, sum(sizes[:site])
    return found
