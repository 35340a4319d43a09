"""`glasshouse dictionaries`, `feature` and `evaluate-dictionary`: what is loaded, and how good it is."""

from __future__ import annotations

import dataclasses
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glasshouse.cli.arguments import lines_of
from glasshouse.cli.connected import Chosen, connecting
from glasshouse.cli.output import write_json, write_table
from glasshouse.cli.progress import watched

if TYPE_CHECKING:
    from glasshouse.client import FeatureInfo, LogitEffects


@connecting
def dictionaries(
    model: Chosen,
    json: bool,
) -> None:
    """List the dictionaries loaded for a model.

    L0 is the mean number of active features a position and FVU the fraction of variance unexplained, measured when
    the dictionary was loaded.
    """
    found = model().dictionaries()
    if json:
        write_json([dataclasses.asdict(info) for info in found])
        return
    rows = [
        (
            info.name,
            info.kind,
            info.architecture,
            " ".join(info.hook_points_in),
            "" if info.hook_points_out == info.hook_points_in else " ".join(info.hook_points_out),
            info.d_sae,
            info.dtype,
            f"{info.check.l0:.1f}" if info.check else "",
            f"{info.check.fvu:.3f}" if info.check else "",
        )
        for info in found
    ]
    write_table(["name", "kind", "architecture", "reads", "writes", "d_sae", "dtype", "L0", "FVU"], rows)
    for info in found:
        if info.check is not None and info.check.warning:
            typer.secho(f"{info.name}: {info.check.warning}", fg="yellow", err=True)


@connecting
def feature(
    model: Chosen,
    json: bool,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The dictionary.")],
    index: Annotated[int, typer.Argument(metavar="INDEX", help="The feature.")],
    n_tokens: Annotated[int, typer.Option("--tokens", metavar="N", help="Tokens on either side.")] = 10,
    n_nearest: Annotated[int, typer.Option("--nearest", metavar="N", help="Nearest features.")] = 5,
) -> None:
    """Show one feature: the tokens it promotes and suppresses, its norm, its nearest features."""
    found = model().dictionary(name).feature(index, n_tokens=n_tokens, n_nearest=n_nearest)
    if json:
        write_json(dataclasses.asdict(found))
    else:
        write_table(["", ""], _facts(found))
        columns = ["promotes", "logit", "suppresses", "logit", "nearest", "cosine"]
        write_table(columns, _relations(found))


@connecting
def evaluate_dictionary(
    model: Chosen,
    json: bool,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The dictionary.")],
    file: Annotated[
        Path | None,
        typer.Option("--file", metavar="LINES.txt", help="Texts, one a line; default the server's own."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", help="Most tokens; 0 is the server's default.")
    ] = 0,
) -> None:
    """Measure a dictionary over text, the model spliced: L0, variance explained, loss recovered and more.

    Interrupting cancels the work at the server. --timeout bounds each call, not the measurement.
    """
    inputs = lines_of(file) if file is not None else None
    found = watched(model().dictionary(name).evaluate(inputs, max_tokens=max_tokens), name)
    if json:
        write_json({"dictionary": name, "tokens": found.tokens, "metrics": dict(found.metrics)})
        return
    rows = [(metric, f"{value:.4g}") for metric, value in found.metrics.items()]
    write_table(["metric", "value"], [*rows, ("tokens", f"{found.tokens}")])


def promotes(info: FeatureInfo, n: int = 5) -> str:
    """What a feature is in a few words: its label, or else the tokens it promotes."""
    if info.label:
        return info.label
    if info.promoted is None:
        return ""
    return " ".join(token.strip() or repr(token) for token in info.promoted.tokens[:n])


def _facts(info: FeatureInfo) -> list[tuple[str, str]]:
    density = "" if info.density is None else f"{info.density:.3%}"
    rows = [
        ("feature", str(info.index)),
        ("label", info.label),
        ("decoder norm", f"{info.decoder_norm:.4g}"),
        ("density", density),
    ]
    return [row for row in rows if row[1]]


def _relations(info: FeatureInfo) -> list[tuple[str, ...]]:
    """A row for each rank: a token promoted and one suppressed, with their logits, and a near feature."""
    columns = [
        *_effects(info.promoted),
        *_effects(info.suppressed),
        [str(near.index) for near in info.nearest],
        [f"{near.cosine:.3f}" for near in info.nearest],
    ]
    return list(zip_longest(*columns, fillvalue=""))


def _effects(effects: LogitEffects | None) -> list[list[str]]:
    if effects is None:
        return [[], []]
    return [[repr(token) for token in effects.tokens], [f"{logit:+.3f}" for logit in effects.logits]]
