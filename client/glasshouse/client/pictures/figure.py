"""The same parts as an image, drawn by matplotlib: `pip install glasshouse[plot]`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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

_COLOURS = ("#2563c9", "#f4f0e8", "#d4670b")
_CELL_INCHES, _LINE_INCHES, _FIGURES = 0.27, 0.3, 320
_MOST_INCHES = 60.0
_MONOSPACE = {"family": "monospace", "fontsize": 8.5}
_RULES = {
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": "white", "svg.fonttype": "path",
}  # fmt: skip


def save_figure(
    path: str | Path, title: str, parts: Sequence[Part], *, about: str = "", dpi: int = 160
) -> None:
    """Writes an image; the suffix says which kind, such as .png, .svg or .pdf.

    Raises ImportError, with what to install, where matplotlib is not there, and ValueError for another suffix.
    """
    suffix = Path(path).suffix.lower().lstrip(".")
    figure = draw(title, parts, about=about)
    known = figure.canvas.get_supported_filetypes()
    if suffix not in known:
        raise ValueError(
            f"cannot write .{suffix}: use one of {', '.join(f'.{each}' for each in sorted(known))}"
        )
    figure.savefig(path, dpi=dpi, format=suffix)


def draw(title: str, parts: Sequence[Part], *, about: str = "") -> Any:
    """The matplotlib Figure: the parts below one another. No state of pyplot's is touched."""
    try:
        matplotlib = importlib.import_module("matplotlib")
        Figure = importlib.import_module("matplotlib.figure").Figure
        importlib.import_module("matplotlib.backends.backend_agg")
    except ImportError as error:
        raise ImportError("images need matplotlib: pip install 'glasshouse[plot]'") from error
    shown = [part.strongest() if isinstance(part, HeatMap) else part for part in parts]
    heights = [_height(part) for part in shown]
    width = min(_MOST_INCHES, max([7.5, *(_width(part) for part in shown)]))
    with matplotlib.rc_context(_RULES):
        figure = Figure(figsize=(width, min(_MOST_INCHES, sum(heights) + 0.75)), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.12)
        figure.suptitle(
            _plain(title) + (f"\n{_plain(about)}" if about else ""), x=0.01, ha="left", fontsize=11
        )
        grid = figure.add_gridspec(max(1, len(shown)), 1, height_ratios=heights or [1])
        for row, part in enumerate(shown):
            axes = figure.add_subplot(grid[row])
            axes.set_title(_plain(part.title))
            if isinstance(part, HeatMap):
                _heat(figure, axes, part)
            elif isinstance(part, Bars):
                _bars(axes, part)
            elif isinstance(part, CircuitDiagram):
                _circuit(axes, part)
            else:
                _text(axes, part, width)
    return figure


def _plain(text: str) -> str:
    """Text in which a dollar sign is one, and no mathematics begins."""
    return text.replace("$", r"\$")


def _ink(share: float) -> str:
    """A text colour that can be read on the colour of this share of the scale."""
    return "white" if abs(share) > 0.6 else "#1f1b16"


def _map() -> Any:
    return importlib.import_module("matplotlib.colors").LinearSegmentedColormap.from_list("signed", _COLOURS)


def _height(part: Part) -> float:
    if isinstance(part, HeatMap):
        longest = max((len(shown_token(column)) for column in part.columns), default=0)
        return 0.55 + len(part.rows) * _CELL_INCHES + min(longest, 14) * 0.075
    if isinstance(part, Bars):
        return 0.6 + 0.2 * len(part.labels)
    if isinstance(part, CircuitDiagram):
        return 0.5 + 0.58 * len(part.levels)
    return 0.5 + _LINE_INCHES * len(_lines(part, 7.5))


def _width(part: Part) -> float:
    if isinstance(part, HeatMap):
        longest = max((len(row) for row in part.rows), default=0)
        figures = len(part.rows) * len(part.columns) <= _FIGURES and len(part.columns) <= 20
        return 1.6 + longest * 0.075 + len(part.columns) * (0.46 if figures else _CELL_INCHES)
    if isinstance(part, CircuitDiagram):
        return 1.4 + 0.78 * max(
            (sum(at == level for _, at in part.nodes) for level in range(len(part.levels))), default=0
        )
    return 7.5


def _heat(figure: Any, axes: Any, part: HeatMap) -> None:
    scale, values = scale_of(part), np.asarray(part.values, dtype=np.float64)
    image = axes.imshow(values, cmap=_map(), vmin=-scale, vmax=scale, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(part.columns)), [_plain(shown_token(column)[:14]) for column in part.columns])
    axes.set_yticks(range(len(part.rows)), [_plain(row) for row in part.rows])
    axes.tick_params(length=0, labelsize=8)
    if max((len(shown_token(column)) for column in part.columns), default=0) > 4:
        axes.tick_params(axis="x", rotation=90)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if values.size <= _FIGURES and len(part.columns) <= 20:
        for (row, column), value in np.ndenumerate(values):
            ink, text = _ink(value / scale), shown_cell(value, scale)
            axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=ink)
    figure.colorbar(image, ax=axes, label=part.unit, pad=0.01, fraction=0.03)


def _bars(axes: Any, part: Bars) -> None:
    values = np.nan_to_num(np.asarray(part.values, dtype=np.float64))
    places = np.arange(len(values))
    axes.barh(
        places, values, color=[_COLOURS[2] if value >= 0 else _COLOURS[0] for value in values], height=0.72
    )
    axes.set_yticks(places, [_plain(label) for label in part.labels])
    axes.invert_yaxis()
    axes.axvline(0, color="#9b9183", linewidth=0.8)
    axes.tick_params(length=0, labelsize=8)
    axes.set_xlabel(part.unit)
    room = scale_of(part)
    for place, value in zip(places, values):
        away, side = room * 0.012 * (1 if value >= 0 else -1), "left" if value >= 0 else "right"
        axes.text(value + away, place, shown_number(value), va="center", ha=side, fontsize=7, color="#6d6558")
    axes.margins(x=0.12, y=0.02)


def _lines(part: TokenText, width: float) -> list[list[tuple[str, float]]]:
    """Tokens with their values, broken into lines of a fixed-width font."""
    most, used = int(width * 11), 0
    found: list[list[tuple[str, float]]] = [[]]
    for token, value in zip(part.tokens, np.asarray(part.values, dtype=np.float64).tolist()):
        text = token.replace("\n", "↵").replace("\t", "⇥")
        if used + len(text) > most and found[-1]:
            found.append([])
            used = 0
        found[-1].append((text, value))
        used += len(text)
        if "\n" in token:
            found.append([])
            used = 0
    return [line for line in found if line]


def _text(axes: Any, part: TokenText, width: float) -> None:
    scale, colours, lines = scale_of(part), _map(), _lines(part, width)
    longest = max((sum(len(text) for text, _ in line) for line in lines), default=1)
    axes.set_xlim(0, max(longest, int(width * 11)))
    axes.set_ylim(len(lines), 0)
    axes.axis("off")
    Rectangle = importlib.import_module("matplotlib.patches").Rectangle
    for row, line in enumerate(lines):
        at = 0
        for text, value in line:
            share = 0.0 if not np.isfinite(value) else value / scale
            axes.add_patch(
                Rectangle((at, row + 0.1), len(text), 0.8, color=colours(0.5 + 0.5 * share), linewidth=0)
            )
            middle = at + len(text) / 2, row + 0.5
            axes.text(*middle, _plain(text), color=_ink(share), ha="center", va="center", **_MONOSPACE)
            at += len(text)


def _circuit(axes: Any, part: CircuitDiagram) -> None:
    places, scale, n_levels = part.places(), scale_of(part), len(part.levels)
    PathPatch = importlib.import_module("matplotlib.patches").PathPatch
    Path = importlib.import_module("matplotlib.path").Path
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    for (source, target), value in zip(part.edges, np.asarray(part.values, dtype=np.float64).tolist()):
        (ax, ay), (bx, by) = places[source], places[target]
        share, middle = min(1.0, abs(value) / scale) ** 0.5, (ay + by) / 2
        # Between nodes of one column the line goes around those it passes.
        around = 0.05 + 0.09 * (by - ay) if abs(ax - bx) < 0.01 and by - ay > 1.5 / n_levels else 0.0
        curve = Path([(ax, ay), (ax - around, middle), (bx - around, middle), (bx, by)], [1, 4, 4, 4])
        colour = _COLOURS[0] if value < 0 else _COLOURS[2]
        axes.add_patch(
            PathPatch(curve, fill=False, color=colour, alpha=0.2 + 0.7 * share, linewidth=0.4 + 2.2 * share)
        )
    box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": "#6d6558", "linewidth": 0.8}
    for (x, y), (label, _) in zip(places, part.nodes):
        axes.text(x, y, label, ha="center", va="center", fontsize=7.5, bbox=box)
    axes.set_yticks([(level + 0.5) / n_levels for level in range(n_levels)], list(part.levels))
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
