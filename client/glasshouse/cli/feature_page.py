"""A page that shows features on a text: one file, no network, light or dark as the reader's system is.

The page is `feature_page.html` with the data put in as JSON; its script draws everything from that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from glasshouse.client import DictionaryInfo, EncodedFeatures, FeatureInfo, LogitEffects

N_FEATURES = 400
"""The strongest features a page offers to colour by; beside each token are all of its own up to N_PER_TOKEN."""
N_PER_TOKEN = 12
_PLACE = "/*DATA*/"


def feature_page(
    info: DictionaryInfo,
    encoded: EncodedFeatures,
    known: Mapping[int, FeatureInfo],
    chosen: Sequence[int] = (),
) -> str:
    """The page's HTML. `known` are the features whose tokens are told; `chosen` come first, and the first of them
    colours the text."""
    template = resources.files("glasshouse.cli").joinpath("feature_page.html").read_text(encoding="utf-8")
    # "<" would end the script element early, were it in a token.
    data = json.dumps(page_data(info, encoded, known, chosen), ensure_ascii=False).replace("<", "\\u003c")
    return template.replace(_PLACE, data)


def page_data(
    info: DictionaryInfo,
    encoded: EncodedFeatures,
    known: Mapping[int, FeatureInfo],
    chosen: Sequence[int] = (),
) -> dict[str, Any]:
    """What the page's script draws. `columns[feature]` are [row, activation] pairs; `rows` follow `positions`."""
    offered = list(dict.fromkeys([*chosen, *(index for index, _ in encoded.strongest(N_FEATURES))]))
    columns = {index: encoded.column(index) for index in offered}
    return {
        "dictionary": info.name,
        "model": info.model,
        "about": f"{info.kind}, {info.architecture}, {info.d_sae:,} features",
        "reads": info.hook_points_in,
        "tokens": encoded.tokens,
        "positions": encoded.positions.tolist(),
        "rows": [[[i, _short(v)] for i, v in row.features] for row in encoded.top(N_PER_TOKEN)],
        "active": [len(features) for _, features in encoded],
        "features": [{"index": index, **_told(known.get(index))} for index in offered],
        "columns": {
            str(index): [[row, _short(v)] for row, v in enumerate(column.tolist()) if v]
            for index, column in columns.items()
        },
        "chosen": list(chosen),
    }


def _told(info: FeatureInfo | None) -> dict[str, Any]:
    if info is None:
        return {}
    return {
        "label": info.label,
        "norm": _short(info.decoder_norm),
        "density": info.density,
        "promoted": _effects(info.promoted),
        "suppressed": _effects(info.suppressed),
        "nearest": [[near.index, round(near.cosine, 3)] for near in info.nearest],
    }


def _effects(effects: LogitEffects | None) -> list[list[Any]]:
    if effects is None:
        return []
    return [[token, round(logit, 3)] for token, logit in zip(effects.tokens, effects.logits)]


def _short(value: float) -> float:
    return float(f"{value:.4g}")
