"""The same parts on a terminal, by rich: orange raises, blue lowers, each with a text colour that can be read on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from glasshouse.client.pictures.circuit import CircuitDiagram
from glasshouse.client.pictures.parts import (
    Bars,
    HeatMap,
    Part,
    TokenText,
    scale_of,
    shown_cell,
    shown_number,
    shown_token,
)

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

MOST_ROWS = 40
"""Rows of a heat map on a terminal."""
_BAR_WIDTH = 28
_NEUTRAL, _RAISES, _LOWERS = (62, 58, 52), (236, 128, 20), (66, 132, 246)


def render(part: Part) -> RenderableType:
    """One part under its title."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    title = Text.assemble((part.title, "bold cyan"), f"  strongest {scale_of(part):.3g} {part.unit}".rstrip())
    body: RenderableType
    if isinstance(part, TokenText):
        body = _text(part)
    elif isinstance(part, Bars):
        body = _bars(part)
    elif isinstance(part, CircuitDiagram):
        body = _circuit(part)
    else:
        body = _heat(part.strongest(MOST_ROWS))
    return Group(title, Padding(body, (0, 2, 1, 2)))


def signed_tint(value: float, scale: float) -> str:
    """A rich style whose background says how large and of which sign `value` is beside `scale`; none for 0."""
    if not np.isfinite(value):
        return ""
    share = min(1.0, abs(value) / scale)
    if share < 0.02:
        return "dim"
    share **= 0.75
    end = _RAISES if value > 0 else _LOWERS
    red, green, blue = (round(low + (high - low) * share) for low, high in zip(_NEUTRAL, end))
    ink = "rgb(20,12,0)" if share > 0.55 else "rgb(255,244,226)"
    return f"{ink} on rgb({red},{green},{blue})"


def _text(part: TokenText) -> RenderableType:
    from rich.text import Text

    scale, text = scale_of(part), Text()
    for token, value in zip(part.tokens, np.asarray(part.values).tolist()):
        text.append(token, signed_tint(value, scale))
    return text


def _bars(part: Bars) -> Table:
    from rich.table import Table
    from rich.text import Text

    table, scale = Table.grid(padding=(0, 1)), scale_of(part)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for label, value in zip(part.labels, np.nan_to_num(np.asarray(part.values)).tolist()):
        length = round(_BAR_WIDTH * min(1.0, abs(value) / scale))
        colour = "rgb({},{},{})".format(*(_RAISES if value >= 0 else _LOWERS))
        table.add_row(Text(label), Text(shown_number(value), "dim"), Text("█" * length or "▏", colour))
    return table


def _heat(part: HeatMap) -> Table:
    from rich.table import Table
    from rich.text import Text

    scale = scale_of(part)
    table = Table(box=None, padding=0, pad_edge=False, header_style="dim", collapse_padding=True)
    figures = len(part.columns) <= 12
    table.add_column("", justify="right", style="dim", no_wrap=True)
    for column in part.columns:
        label = shown_token(column)
        table.add_column(Text(f" {label} " if figures else label[:3]), justify="center", no_wrap=True)
    for name, values in zip(part.rows, np.asarray(part.values, dtype=np.float64).tolist()):
        texts = [f" {shown_cell(value, scale)} " if figures else "   " for value in values]
        cells = [Text(text, signed_tint(value, scale)) for text, value in zip(texts, values)]
        table.add_row(Text(f"{name} "), *cells)
    return table


def _circuit(part: CircuitDiagram) -> Table:
    """A row for each node that hears anything, from the logits down: what it hears from, the strongest first."""
    from rich.table import Table
    from rich.text import Text

    table, scale, values = Table.grid(padding=(0, 2)), scale_of(part), np.asarray(part.values).tolist()
    table.add_column(justify="right", style="bold", no_wrap=True)
    for target in sorted(range(len(part.nodes)), key=lambda node: -part.nodes[node][1]):
        heard = [edge for edge, (_, to) in enumerate(part.edges) if to == target]
        line = Text()
        for edge in sorted(heard, key=lambda edge: -abs(values[edge])):
            port = f":{part.ports[edge]}" if part.ports[edge] else ""
            line.append(
                f" {part.nodes[part.edges[edge][0]][0]}{port} ", signed_tint(values[edge], scale)
            ).append(" ")
        if heard:
            table.add_row(Text(part.nodes[target][0]), line)
    return table
