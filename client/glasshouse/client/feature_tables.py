"""The strongest features of each token as a person reads them: plain text, or colour on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rich.table import Table

_BARS: Final = " ▁▂▃▄▅▆▇█"
_MAX_TOKEN: Final = 24


@dataclass(frozen=True)
class FeatureTableRow:
    """One token. `token` is empty for given activations; `features` are (id, activation), strongest first."""

    position: int
    token: str
    features: list[tuple[int, float]]


@dataclass(frozen=True, repr=False)
class FeatureTable:
    """Print it for text; `rich` prints it in colour, each activation tinted by its share of the largest."""

    dictionary: str
    k: int
    rows: list[FeatureTableRow]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[FeatureTableRow]:
        return iter(self.rows)

    def __repr__(self) -> str:
        return str(self)

    @property
    def largest(self) -> float:
        """The largest magnitude in the table; 0 where there is none."""
        return max((abs(value) for row in self.rows for _, value in row.features), default=0.0)

    def __str__(self) -> str:
        shown = [[str(row.position), _shown(row.token)] for row in self.rows]
        id_width, number_width = self._widths()
        widths = [max([len(title), *(len(cells[n]) for cells in shown)]) for n, title in enumerate(_TITLES)]
        lines = [f"{_TITLES[0]:>{widths[0]}}  {_TITLES[1]:<{widths[1]}}  {_heading(self)}"]
        for cells, row in zip(shown, self.rows):
            features = "   ".join(
                f"{i:>{id_width}} {_bar(value, self.largest)} {_number(value):>{number_width}}"
                for i, value in row.features
            )
            lines.append(f"{cells[0]:>{widths[0]}}  {cells[1]:<{widths[1]}}  {features}".rstrip())
        return "\n".join(lines)

    def _widths(self) -> tuple[int, int]:
        """Of the widest feature id, and of the widest activation."""
        entries = [entry for row in self.rows for entry in row.features]
        return (
            max((len(str(i)) for i, _ in entries), default=1),
            max((len(_number(value)) for _, value in entries), default=1),
        )

    def __rich__(self) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=_heading(self),
            title_justify="left",
            title_style="italic",
            box=box.SIMPLE_HEAD,
            header_style="dim",
            pad_edge=False,
            show_edge=False,
        )
        table.add_column(_TITLES[0], justify="right", style="dim", no_wrap=True)
        table.add_column(_TITLES[1], style="bold", no_wrap=True)
        n_columns = max((len(row.features) for row in self.rows), default=0)
        for n in range(n_columns):
            table.add_column(_ordinal(n + 1), no_wrap=True)
        id_width, number_width = self._widths()
        for row in self.rows:
            cells = [
                Text.assemble(
                    (f"{i:>{id_width}} ", "cyan"),
                    (f" {_number(value):>{number_width}} ", tint(value, self.largest)),
                )
                for i, value in row.features
            ]
            table.add_row(str(row.position), Text(_shown(row.token)), *cells)
        return table


_TITLES: Final = ("pos", "token")

TINTS: Final[list[tuple[int, int, int]]] = [
    (68, 42, 16), (104, 62, 14), (146, 86, 10), (190, 112, 10), (228, 142, 26), (250, 178, 64), (255, 212, 122),
]  # fmt: skip
"""From faint to strong, on a dark or a light terminal alike: each comes with a text colour of its own."""

_INK_ON_STRONG: Final = "rgb(20,12,0)"
_INK_ON_FAINT: Final = "rgb(255,244,226)"


def tint(value: float, largest: float) -> str:
    """A rich style whose background says how large `value` is beside `largest`; none for 0."""
    if not value or largest <= 0:
        return "dim"
    level = min(int(abs(value) / largest * len(TINTS)), len(TINTS) - 1)
    red, green, blue = TINTS[level]
    return f"{_INK_ON_STRONG if level >= 3 else _INK_ON_FAINT} on rgb({red},{green},{blue})"


def _heading(table: FeatureTable) -> str:
    of = f" of {table.dictionary}" if table.dictionary else ""
    return f"strongest features{of}"


def _ordinal(n: int) -> str:
    return str(n) + {1: "st", 2: "nd", 3: "rd"}.get(n, "th" if n < 21 else ".")


def _shown(token: str) -> str:
    text = repr(token)[1:-1] if token.strip() != token or not token.isprintable() else token
    text = text.replace(" ", "␣") if text.strip() != text else text
    return text if len(text) <= _MAX_TOKEN else text[: _MAX_TOKEN - 1] + "…"


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:.3g}"


def _bar(value: float, largest: float) -> str:
    if not value or largest <= 0:
        return _BARS[0]
    return _BARS[max(1, round(abs(value) / largest * (len(_BARS) - 1)))]
