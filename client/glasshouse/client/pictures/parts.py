"""What a picture is made of: heat maps, coloured text and bars, the same for a page, an image and a terminal.

Values are signed: orange raises, blue lowers, and the strongest colour is the part's `scale`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from glasshouse.client.arrays import Array

if TYPE_CHECKING:
    from glasshouse.client.pictures.circuit import CircuitDiagram

MAX_ROWS = 240
"""Rows a heat map shows: of more, those with the largest values."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeatMap:
    """values: (n_rows, n_columns), NaN where there is nothing; one label a row and a column.

    `scale` is the value of the strongest colour; None: the largest magnitude there is.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Array
    unit: str = ""
    scale: float | None = None

    def __post_init__(self) -> None:
        check_shape(self.title, np.shape(self.values), (len(self.rows), len(self.columns)))

    def strongest(self, n: int = MAX_ROWS) -> HeatMap:
        """The same with at most `n` rows, those of the largest magnitudes, in their order."""
        if len(self.rows) <= n:
            return self
        peaks = np.nan_to_num(np.abs(np.asarray(self.values, dtype=np.float64))).max(axis=1)
        keep = np.sort(np.argsort(-peaks, kind="stable")[:n])
        return HeatMap(
            title=f"{self.title} (the {n:,} strongest of {len(self.rows):,} rows)",
            rows=[self.rows[row] for row in keep],
            columns=self.columns,
            values=np.asarray(self.values)[keep],
            unit=self.unit,
            scale=scale_of(self),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenText:
    """A text with a value for each token. values: (n_tokens,)."""

    title: str
    tokens: Sequence[str]
    values: Array
    unit: str = ""
    scale: float | None = None

    def __post_init__(self) -> None:
        check_shape(self.title, np.shape(self.values), (len(self.tokens),))


@dataclass(frozen=True, kw_only=True, eq=False)
class Bars:
    """Named values, drawn in their order. values: (n,)."""

    title: str
    labels: Sequence[str]
    values: Array
    unit: str = ""
    scale: float | None = None

    def __post_init__(self) -> None:
        check_shape(self.title, np.shape(self.values), (len(self.labels),))


Part: TypeAlias = "HeatMap | TokenText | Bars | CircuitDiagram"


def scale_of(part: Part) -> float:
    """The value of the strongest colour: above 0 and finite, whatever the values are."""
    if part.scale is not None:
        return max(float(part.scale), _LEAST)
    values = np.abs(np.asarray(part.values, dtype=np.float64))
    return max(float(values[np.isfinite(values)].max(initial=0.0)), _LEAST)


def same_scale(parts: Sequence[Part]) -> float:
    """One scale for several, so that their colours compare."""
    return max((scale_of(part) for part in parts), default=1.0)


def shown_token(token: str) -> str:
    """A token as a label: without spaces around it where there is anything else, control characters as signs."""
    text = token.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")
    return text.strip() or text.replace(" ", "␣") or "∅"


def shown_number(value: float) -> str:
    """A value with three figures and its sign."""
    if not np.isfinite(value):
        return ""
    return f"{value:+.3g}".replace("-", "−").replace("e+0", "e").replace("e−0", "e−")


def shown_cell(value: float, scale: float) -> str:
    """A value in a cell: as many decimals as give the scale three figures, so that a column compares."""
    if not np.isfinite(value):
        return ""
    decimals = min(6, max(0, 2 - int(np.floor(np.log10(scale)))))
    text = f"{value:+.{decimals}f}"
    return text.replace("-", "−") if float(text) else "0"


_LEAST = 1e-12


def check_shape(title: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raises ValueError where values and labels do not agree."""
    if shape != expected:
        raise ValueError(f"{title}: values have shape {shape} and the labels {expected}")
