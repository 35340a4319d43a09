"""`glasshouse features`: a text's tokens, tinted by the features that fire on them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glasshouse.cli.arguments import positions_option
from glasshouse.cli.connected import Chosen, connecting
from glasshouse.cli.dictionaries import promotes
from glasshouse.cli.output import write_json, write_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from glasshouse.client import Dictionary, EncodedFeatures, FeatureInfo

N_EXPLAINED = 12
"""The strongest features whose tokens are asked for, beside those chosen."""


@connecting
def features(
    model: Chosen,
    json: bool,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What the model reads.")],
    dictionary: Annotated[str, typer.Option("--dictionary", metavar="NAME", help="Whose features.")],
    top_k: Annotated[int, typer.Option("--top-k", metavar="K", min=1, help="Features a token.")] = 5,
    feature: Annotated[
        list[int] | None,
        typer.Option(
            "--feature", metavar="I", help="Tint by this feature; repeatable. Default: the strongest."
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write a page to look at.")
    ] = None,
    positions: Annotated[
        str | None, typer.Option("--positions", metavar="WHERE", help="Which positions; default all.")
    ] = None,
) -> None:
    """Show which features of a dictionary fire on a text.

    On a terminal the tokens are tinted by each chosen feature's activation, or by each token's strongest, above a
    table of the strongest features of each token.
    """
    chosen = feature or []
    where = positions_option(positions)
    handle = model().dictionary(dictionary)
    known = {index: handle.feature(index) for index in chosen}  # Refuses what it does not have.
    encoded = handle.encode(text, positions=where)
    if html is not None or (sys.stdout.isatty() and not json):
        known = _explained(handle, encoded, known)
    if html is not None:
        from glasshouse.cli.feature_page import feature_page

        try:
            html.write_text(feature_page(handle.info, encoded, known, chosen), encoding="utf-8")
        except OSError as error:
            raise typer.BadParameter(f"cannot write {html}: {error.strerror}", param_hint="--html") from None
    if json:
        write_json(_fields(encoded, top_k, chosen))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(*portrait(encoded, top_k, chosen, known), sep="\n")
    else:
        write_table([], [_line(row, encoded, chosen) for row in encoded.top(top_k)])


def portrait(
    encoded: EncodedFeatures, top_k: int, chosen: Sequence[int], known: dict[int, FeatureInfo]
) -> list[RenderableType]:
    """What a terminal shows: the tinted text of each chosen feature, or of the strongest, then the table."""
    import numpy as np
    from rich.padding import Padding
    from rich.text import Text

    parts: list[RenderableType] = []
    for index in chosen:
        column = encoded.column(index)
        peak = float(np.abs(column).max(initial=0.0))
        head = Text.assemble((f"feature {index}", "bold cyan"), f"  peak {peak:.2f}  ")
        head.append(promotes(known[index]) if index in known else "", "dim")
        parts += [head, Padding(_tinted(encoded, column.tolist(), peak), (0, 2, 1, 2))]
    if not chosen:
        values = [next((value for _, value in row.features), 0.0) for row in encoded.top(1)]
        peak = max((abs(value) for value in values), default=0.0)
        head = Text.assemble(("strongest feature of each token", "bold cyan"), f"  peak {peak:.2f}")
        parts += [head, Padding(_tinted(encoded, values, peak), (0, 2, 1, 2))]
    parts.append(encoded.top(top_k))
    named = [(index, words) for index, info in known.items() if (words := promotes(info))]
    if named and not chosen:
        from rich.table import Table

        legend = Table.grid(padding=(0, 1))
        for index, words in named:
            legend.add_row(Text(str(index), "cyan", justify="right"), Text(words, "dim"))
        parts += [Text("\nwhat the strongest promote", "italic"), legend]
    return parts


def _tinted(encoded: EncodedFeatures, values: Sequence[float], peak: float) -> Any:
    """The whole text, each encoded token on a background as strong as its value; the rest dim."""
    from rich.text import Text

    from glasshouse.client.feature_tables import tint

    by_position = dict(zip(encoded.positions.tolist(), values))
    text = Text()
    for position, token in enumerate(encoded.tokens):
        style = tint(by_position[position], peak) if by_position.get(position) else ""
        text.append(token, style if position in by_position else "dim")
    return text


def _explained(
    handle: Dictionary, encoded: EncodedFeatures, known: dict[int, FeatureInfo]
) -> dict[int, FeatureInfo]:
    """The features known and the strongest of the text, with what they promote."""
    strongest = [index for index, _ in encoded.strongest(N_EXPLAINED) if index not in known]
    return {**known, **{index: handle.feature(index) for index in strongest}}


def _line(row: Any, encoded: EncodedFeatures, chosen: Sequence[int]) -> list[object]:
    """A row of a pipe: position, token, the chosen features' activations, the strongest as id:activation."""
    here = encoded.row(row.position)
    named = [f"{index}:{here.get(index):.4g}" for index in chosen]
    return [row.position, repr(row.token), *named, *(f"{index}:{value:.4g}" for index, value in row.features)]


def _fields(encoded: EncodedFeatures, top_k: int, chosen: Sequence[int]) -> dict[str, Any]:
    return {
        "dictionary": encoded.dictionary,
        "token_ids": encoded.token_ids,
        "tokens": encoded.tokens,
        "positions": encoded.positions,
        "features": [
            [{"feature": index, "activation": value} for index, value in row.features]
            for row in encoded.top(top_k)
        ],
        "chosen": {str(index): encoded.column(index) for index in chosen},
    }
