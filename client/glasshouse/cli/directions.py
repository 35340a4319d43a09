"""`glasshouse directions`: compute them from labelled examples, and look after those there are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glasshouse.cli.arguments import positions_option
from glasshouse.cli.connected import connected
from glasshouse.cli.example_files import read_examples
from glasshouse.cli.output import write_json, write_table
from glasshouse.cli.progress import watched
from glasshouse.cli.publishing import (
    FIGURES,
    Description,
    EveryVersion,
    HeldOutShare,
    HookPoints,
    Name,
    NextVersion,
    Pooled,
    Positive,
    Prefix,
    Seed,
    figures,
    plain,
    versioned,
)

if TYPE_CHECKING:
    from glasshouse.client import Direction, DirectionInfo, Model

app = typer.Typer(help="Directions of concepts: compute, list, get, delete.", no_args_is_help=True)
OneName = Annotated[str, typer.Argument(metavar="NAME", help="A name, or NAME@VERSION.")]


@app.command("compute")
@connected
def compute(
    model: Model,
    json: bool,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="CSV or JSON lines with text and label, or positive and negative."
        ),
    ],
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="METHOD",
            help="difference_in_means, caa, pca, pca_centred, mass_mean, mass_mean_corrected, logistic, k_means.",
        ),
    ] = None,
    hook_points: HookPoints = None,
    positive: Positive = None,
    pooling: Pooled = "last",
    positions: Annotated[
        str | None,
        typer.Option("--positions", metavar="WHERE", help="Positions read of each example; default all."),
    ] = None,
    held_out: HeldOutShare = 0.25,
    seed: Seed = 0,
    name: Name = None,
    next_version: NextVersion = False,
    best_only: Annotated[
        bool, typer.Option("--best-only", help="Publish the best hook point's vector alone.")
    ] = False,
    description: Description = "",
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the figures by layer.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE.npz", help="Write the vectors, one a hook point."),
    ] = None,
) -> None:
    """Compute a direction at many hook points from labelled examples or pairs, and say how well each does.

    Without --hook-point: the residual stream after every layer. Interrupting cancels the work at the server.
    """
    examples, pairs = read_examples(file)
    operation = model.compute_directions(
        examples or None,
        pairs=pairs or None,
        method=method,  # type: ignore[arg-type]
        hook_points=hook_points,
        positions=positions_option(positions),
        pooling=pooling,  # type: ignore[arg-type]
        positive=positive,
        held_out_share=held_out,
        seed=seed,
        name=name,
        next_version=next_version,
        description=description,
        best_only=best_only,
    )
    found = watched(operation, "directions")
    _deliver(found, plot, output, json)


@app.command("list")
@connected
def list_(
    model: Model,
    json: bool,
    prefix: Prefix = "",
    every_version: EveryVersion = False,
) -> None:
    """List the directions there are: those that come with the model, then those published."""
    found = model.directions(prefix=prefix, every_version=every_version)
    if json:
        write_json([_json(info) for info in found])
        return
    rows = [
        (
            versioned(info.name, info.version),
            info.method,
            info.positive_label,
            info.best_hook_point,
            *figures(info.best.held_out)[:1],
            *figures(info.best.held_out)[2:3],
            "with the model" if info.built_in else info.provenance.author,
        )
        for info in found
    ]
    columns = ["name", "method", "positive", "best hook point", "AUROC", "accuracy", "from"]
    write_table(columns, rows)


@app.command("get")
@connected
def get(
    model: Model,
    json: bool,
    name: OneName,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE.npz", help="Write the vectors, one a hook point."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the figures by layer.")
    ] = None,
) -> None:
    """Show a direction: its figures by hook point, and where it came from."""
    found = model.direction(name)
    _deliver(found, plot, output, json)


@app.command("delete")
@connected
def delete(
    model: Model,
    json: bool,
    name: OneName,
) -> None:
    """Delete a version of a direction: the latest, or that of NAME@VERSION. Needs the admin role."""
    found = model.direction(name)
    found.delete()
    if json:
        write_json({"deleted": [found.resource_name]})
    else:
        typer.echo(f"deleted {found.resource_name}")


def _show(info: DirectionInfo) -> None:
    title = versioned(info.name, info.version)
    typer.echo(
        f"{title + ': ' if title else ''}{info.positive_label} against {info.negative_label}, {info.method}"
    )
    rows = [
        (
            "*" if at.hook_point == info.best_hook_point else "",
            at.hook_point,
            *figures(at.held_out),
            f"{at.norm:.3g}",
            "" if at.threshold is None else f"{at.threshold:.3g}",
        )
        for at in info.at.values()
    ]
    write_table(["", "hook point", *FIGURES, "norm", "threshold"], rows)
    if info.split is not None:
        typer.echo(f"learnt from {info.split.n_train}, judged by {info.split.n_held_out}")
    for note in info.notes:
        typer.secho(note, fg="yellow", err=True)


def _json(info: DirectionInfo) -> dict[str, object]:
    body = plain(info)
    for at in body["at"].values():
        at.pop("vector")
    return body


def _deliver(found: Direction, plot: Path | None, output: Path | None, json: bool) -> None:
    """Draws, writes and shows what was found, as far as each is asked for."""
    if plot is not None:
        try:
            found.plot(plot)
        except (ImportError, OSError, ValueError) as error:
            raise typer.BadParameter(str(error), param_hint="--plot") from None
    if output is not None:
        _write(output, found.info)
    if json:
        write_json(_json(found.info))
    else:
        _show(found.info)


def _write(path: Path, info: DirectionInfo) -> None:
    import numpy as np

    vectors = {name: at.vector for name, at in info.at.items() if at.vector is not None}
    try:
        with path.open("wb") as file:
            np.savez(file, **vectors)  # type: ignore[arg-type]
    except OSError as error:
        raise typer.BadParameter(f"cannot write {path}: {error.strerror}", param_hint="--output") from None
