"""A direction's held-out figures by layer, as a picture: AUROC with its interval, and the effect size below it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from glasshouse.client.concepts.values import DirectionAt, DirectionInfo

_BLOCK: Final = re.compile(r"blocks\.(\d+)\.(.+)")
_INK, _QUIET, _BEST, _FILL = "#1f2933", "#7b8794", "#c2410c", "#2563a8"
_MOST_LABELS: Final = 16


def plot_direction(info: DirectionInfo, path: Path) -> None:
    """Writes the picture to `path`; the ending says the format.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no examples judged the direction.
    """
    judged = [at for at in info.at.values() if at.held_out is not None]
    if not judged:
        raise ValueError("no examples judged this direction: there is nothing to draw")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("matplotlib is not installed: pip install 'glasshouse[plot]'") from error
    figure = Figure(figsize=(max(6.4, min(0.34 * len(judged) + 2.2, 16)), 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    _draw_auroc(above, info, judged)
    _draw_effect(below, info, judged)
    figure.savefig(path)


def _draw_auroc(axes: Any, info: DirectionInfo, judged: Sequence[DirectionAt]) -> None:
    held = [at.held_out for at in judged if at.held_out is not None]
    values = [each.auroc.value for each in held]
    reach = [
        [each.auroc.value - each.auroc.low for each in held],
        [each.auroc.high - each.auroc.value for each in held],
    ]
    places = range(len(judged))
    axes.axhline(0.5, color=_QUIET, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.annotate(
        "chance", (1.0, 0.5), xycoords=("axes fraction", "data"), xytext=(-4, 4), textcoords="offset points",
        ha="right", color=_QUIET, fontsize=8,
    )  # fmt: skip
    axes.errorbar(
        places, values, yerr=reach, color=_FILL, ecolor=_FILL, elinewidth=1.2, capsize=2.5, marker="o",
        markersize=5, linewidth=1.4, label="AUROC",
    )  # fmt: skip
    accuracies = [each.accuracy.value for each in held]
    axes.plot(places, accuracies, color=_QUIET, marker="s", markersize=3.5, linewidth=1, label="accuracy")
    best = [at.hook_point for at in judged].index(info.best_hook_point)
    axes.plot([best], [values[best]], marker="o", markersize=9, color=_BEST, zorder=5)
    axes.annotate(
        f"{values[best]:.3f}", (best, values[best]), xytext=(0, 8), textcoords="offset points", ha="center",
        color=_BEST, fontsize=9, fontweight="bold",
    )  # fmt: skip
    lows = [each.auroc.low for each in held] + accuracies
    axes.set_ylim(min(0.45, min(lows) - 0.04), 1.09)
    axes.set_ylabel("AUROC, held out")
    name = info.name or f"{info.positive_label} against {info.negative_label}"
    axes.set_title(f"{name} · {info.method.replace('_', ' ')}", loc="left", fontsize=11, color=_INK)
    axes.legend(loc="upper left", frameon=False, fontsize=8, labelcolor=_QUIET)
    _clean(axes)


def _draw_effect(axes: Any, info: DirectionInfo, judged: Sequence[DirectionAt]) -> None:
    effects = [at.held_out.effect_size if at.held_out is not None else math.nan for at in judged]
    finite = [value for value in effects if math.isfinite(value)] or [1.0]
    heights = [value if math.isfinite(value) else max(finite) for value in effects]
    colours = [_BEST if at.hook_point == info.best_hook_point else _FILL for at in judged]
    axes.bar(range(len(judged)), heights, color=colours, width=0.6)
    axes.axhline(0, color=_INK, linewidth=0.8)
    axes.set_ylabel("effect size (d)")
    labels, what = _labels([at.hook_point for at in judged])
    step = math.ceil(len(labels) / _MOST_LABELS) if what else 1
    axes.set_xticks(range(0, len(labels), step), labels[::step])
    if what:
        axes.set_xlabel(f"layer · {what}")
    else:
        axes.tick_params(axis="x", labelrotation=30)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")
    _clean(axes)


def _labels(hook_points: Sequence[str]) -> tuple[list[str], str]:
    """Layer numbers and the point that all of them share; else the names, and no such point."""
    found = [_BLOCK.fullmatch(name) for name in hook_points]
    points = {match[2] for match in found if match}
    if all(found) and len(points) == 1:
        return [match[1] for match in found if match], points.pop()
    return [name.removeprefix("blocks.") for name in hook_points], ""


def _clean(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8, colors=_INK)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
