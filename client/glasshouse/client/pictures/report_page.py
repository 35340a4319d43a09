"""Heat maps, coloured text and bars on one page: no network, light or dark, values where the pointer is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from glasshouse.client.arrays import Array
from glasshouse.client.pictures.circuit import CircuitDiagram
from glasshouse.client.pictures.parts import Bars, HeatMap, Part, TokenText, scale_of


def report_page(
    title: str, parts: Sequence[Part], *, about: str = "", facts: Mapping[str, str] | None = None
) -> str:
    """The page's HTML: `facts` are short names and values shown under the title, then the parts."""
    data = {
        "title": title,
        "about": about,
        "facts": list((facts or {}).items()),
        "parts": [_told(part.strongest() if isinstance(part, HeatMap) else part) for part in parts],
    }
    # "<" would end the script element early, were it in a token.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )
    page = _asset("page.html").replace("/*STYLE*/", _asset("style.css"))
    return page.replace("/*SCRIPT*/", _asset("report.js")).replace("/*DATA*/", text)


def _asset(name: str) -> str:
    return resources.files("glasshouse.client.pictures").joinpath("report", name).read_text(encoding="utf-8")


def _told(part: Part) -> dict[str, Any]:
    told = {"title": part.title, "unit": part.unit, "scale": scale_of(part), "values": _plain(part.values)}
    if isinstance(part, HeatMap):
        return told | {"kind": "heat", "rows": list(part.rows), "columns": list(part.columns)}
    if isinstance(part, TokenText):
        return told | {"kind": "text", "tokens": list(part.tokens)}
    if isinstance(part, CircuitDiagram):
        return told | {
            "kind": "circuit",
            "levels": list(part.levels),
            "nodes": list(part.nodes),
            "places": part.places(),
            "edges": list(part.edges),
            "ports": list(part.ports),
        }
    assert isinstance(part, Bars)
    return told | {"kind": "bars", "labels": list(part.labels)}


def _plain(values: Array) -> list[Any]:
    """Nested lists of five figures; None where there is no number."""
    if np.ndim(values) > 1:
        return [_plain(row) for row in values]
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in np.asarray(values).tolist()]
