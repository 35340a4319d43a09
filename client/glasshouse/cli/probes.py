"""`glasshouse probes`: train them from labelled examples, score texts, and look after those there are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glasshouse.cli.arguments import lines_of, positions_option
from glasshouse.cli.connected import connected
from glasshouse.cli.example_files import read_examples
from glasshouse.cli.output import write_json, write_table
from glasshouse.cli.progress import watched
from glasshouse.cli.publishing import (
    FIGURES,
    Description,
    EveryVersion,
    HeldOutShare,
    Name,
    NextVersion,
    Pooled,
    Positive,
    Prefix,
    Seed,
    between,
    figures,
    plain,
    versioned,
)

if TYPE_CHECKING:
    from glasshouse.client import Model, ProbeInfo, ProbeReport

app = typer.Typer(help="Probes: train, list, get, score, delete.", no_args_is_help=True)
OneName = Annotated[str, typer.Argument(metavar="NAME", help="A name, or NAME@VERSION.")]
_TEXT_WIDTH = 60


@app.command("train")
@connected
def train(
    model: Model,
    json: bool,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="CSV or JSON lines with text and label, or labels.")
    ],
    hook_points: Annotated[
        list[str], typer.Option("--hook-point", metavar="HOOK", help="What it reads; may be repeated.")
    ],
    best: Annotated[
        bool, typer.Option("--best", help="Train one at each hook point and keep the best.")
    ] = False,
    kind: Annotated[
        str,
        typer.Option("--kind", metavar="KIND", help="logistic, mass_mean, mass_mean_corrected or mlp."),
    ] = "logistic",
    positive: Positive = None,
    pooling: Pooled = "last",
    positions: Annotated[
        str | None,
        typer.Option("--positions", metavar="WHERE", help="Positions read of each example; default all."),
    ] = None,
    calibration: Annotated[
        str, typer.Option("--calibration", metavar="HOW", help="platt, isotonic or none.")
    ] = "platt",
    rates: Annotated[
        list[float] | None,
        typer.Option("--fpr", metavar="RATE", help="Choose a threshold for this rate; may be repeated."),
    ] = None,
    held_out: HeldOutShare = 0.25,
    seed: Seed = 0,
    name: Name = None,
    next_version: NextVersion = False,
    description: Description = "",
) -> None:
    """Train a probe that tells labels apart, calibrate it, and say how good it is on held-out examples.

    Interrupting cancels the work at the server.
    """
    examples, pairs = read_examples(file)
    if pairs:
        raise typer.BadParameter("a probe is trained on labelled examples, not on pairs", param_hint="FILE")
    operation = model.train_probe(
        examples,
        hook_points=hook_points,
        best=best,
        kind=kind,  # type: ignore[arg-type]
        positive=positive,
        pooling=pooling,  # type: ignore[arg-type]
        positions=positions_option(positions),
        calibration=calibration,  # type: ignore[arg-type]
        false_positive_rates=rates or (0.01, 0.05),
        held_out_share=held_out,
        seed=seed,
        name=name,
        next_version=next_version,
        description=description,
    )
    found = watched(operation, "probe")
    if json:
        write_json(_json(found.info))
    else:
        _show(found.info)


@app.command("list")
@connected
def list_(
    model: Model,
    json: bool,
    prefix: Prefix = "",
    every_version: EveryVersion = False,
) -> None:
    """List the probes there are: those that come with the model, then those published."""
    found = model.probes(prefix=prefix, every_version=every_version)
    if json:
        write_json([_json(info) for info in found])
        return
    rows = [
        (
            versioned(info.name, info.version),
            info.kind,
            "/".join(info.labels),
            " ".join(info.hook_points),
            info.pooling,
            f"{info.report.accuracy.value:.3f}" if info.report else "",
            f"{info.report.control_accuracy.value:.3f}" if info.report else "",
            "with the model" if info.built_in else info.provenance.author,
        )
        for info in found
    ]
    write_table(["name", "kind", "labels", "reads", "pooling", "accuracy", "control", "from"], rows)


@app.command("get")
@connected
def get(
    model: Model,
    json: bool,
    name: OneName,
) -> None:
    """Show a probe: what it reads, how good it is, its thresholds."""
    found = model.probe(name)
    if json:
        write_json(_json(found.info))
    else:
        _show(found.info)


@app.command("score")
@connected
def score(
    model: Model,
    json: bool,
    name: OneName,
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT...", help="What to score.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="LINES.txt", help="Texts, one a line.")
    ] = None,
    every_position: Annotated[
        bool, typer.Option("--every-position", help="A score at every token, over what came up to it.")
    ] = False,
) -> None:
    """Score texts by a probe: the probability of each of its labels."""
    inputs = [*(texts or []), *(lines_of(file) if file is not None else [])]
    if not inputs:
        raise typer.BadParameter("give texts, or --file", param_hint="TEXT...")
    found = model.probe(name).score(inputs, every_position=every_position)
    if json:
        write_json(
            [
                {
                    "text": text,
                    "columns": each.columns,
                    "positions": each.positions,
                    "tokens": each.tokens,
                    "scores": each.scores,
                }
                for text, each in zip(inputs, found, strict=True)
            ]
        )
        return
    columns = found[0].columns
    rows: list[tuple[str, ...]] = []
    for text, each in zip(inputs, found, strict=True):
        pooled = len(each.positions) == 1 and not every_position
        for position, row in zip(each.positions, each.scores, strict=True):
            what = _short(text) if pooled else repr(each.tokens[position])
            rows.append((what, *(f"{value:.3f}" for value in row)))
    write_table(["text" if not every_position else "token", *columns], rows)


@app.command("delete")
@connected
def delete(
    model: Model,
    json: bool,
    name: OneName,
) -> None:
    """Delete a version of a probe: the latest, or that of NAME@VERSION. Needs the admin role."""
    found = model.probe(name)
    found.delete()
    if json:
        write_json({"deleted": [found.resource_name]})
    else:
        typer.echo(f"deleted {found.resource_name}")


def _show(info: ProbeInfo) -> None:
    title = versioned(info.name, info.version)
    reads = " + ".join(info.hook_points)
    typer.echo(
        f"{title + ': ' if title else ''}{info.kind}, {'/'.join(info.labels)}, {info.pooling} of {reads}"
    )
    if info.candidates:
        tried = [
            (
                "*" if [each.hook_point] == info.hook_points else "",
                each.hook_point,
                f"{each.out_of_fold_auroc:.3f}",
                f"{each.held_out_auroc:.3f}",
            )
            for each in info.candidates
        ]
        write_table(["", "hook point", "AUROC out of fold", "AUROC held out"], tried)
    if info.report is None:
        return
    _show_report(info.report)


def _show_report(report: ProbeReport) -> None:
    rows = [
        (
            column.label,
            *figures(column.held_out),
            f"{column.ece:.3f} ({column.ece_before:.3f})",
            f"{column.brier:.3f}",
            f"{column.control_auroc.value:.3f}",
        )
        for column in report.columns
    ]
    write_table(["label", *FIGURES, "ECE (before)", "Brier", "control AUROC"], rows)
    points = [
        (
            column.label,
            f"{point.wanted_false_positive_rate:g}",
            f"{point.threshold:.3f}",
            f"{point.false_positive_rate.value:.3f}",
            between(point.false_positive_rate),
            f"{point.true_positive_rate.value:.3f}",
            between(point.true_positive_rate),
            "" if point.resolved else "too few negatives for this rate",
        )
        for column in report.columns
        for point in column.operating_points
    ]
    if points:
        headings = ["label", "wanted FPR", "threshold", "FPR", "interval", "TPR", "interval", ""]
        write_table(headings, points)
    typer.echo(
        f"accuracy {report.accuracy}, control {report.control_accuracy.value:.3f}; "
        f"learnt from {report.split.n_train}, judged by {report.split.n_held_out}"
    )
    for note in report.notes:
        typer.secho(note, fg="yellow", err=True)


def _json(info: ProbeInfo) -> dict[str, object]:
    body = plain(info)
    body.pop("weights")
    return body


def _short(text: str) -> str:
    line = " ".join(text.split())
    if not sys.stdout.isatty() or len(line) <= _TEXT_WIDTH:
        return line
    return line[: _TEXT_WIDTH - 1] + "…"
