"""Pictures of what the server found: pages of one file that need no network, images, and text on a terminal.

Pages and text need nothing beyond the client; images need `glasshouse[plot]`.
"""

from __future__ import annotations

from glasshouse.client.pictures.attributions import picture
from glasshouse.client.pictures.circuit import CircuitDiagram, circuit_diagram
from glasshouse.client.pictures.feature_notes import feature_notes
from glasshouse.client.pictures.figure import draw, save_figure
from glasshouse.client.pictures.graph_page import FeatureNote, graph_page
from glasshouse.client.pictures.parts import Bars, HeatMap, Part, TokenText
from glasshouse.client.pictures.report_page import report_page
from glasshouse.client.pictures.terminal import render

__all__ = [
    "Bars",
    "CircuitDiagram",
    "FeatureNote",
    "HeatMap",
    "Part",
    "TokenText",
    "circuit_diagram",
    "draw",
    "feature_notes",
    "graph_page",
    "picture",
    "render",
    "report_page",
    "save_figure",
]
