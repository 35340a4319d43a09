"""What the commands of directions and probes share: the options of a publication, and how figures are shown."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

if TYPE_CHECKING:
    from glasshouse.client import Discrimination, Interval

Name: TypeAlias = Annotated[
    str | None, typer.Option("--name", metavar="NAME", help="Publish the result under this name.")
]
NextVersion: TypeAlias = Annotated[
    bool, typer.Option("--next-version", help="Publish over a name that is taken, as its next version.")
]
Description: TypeAlias = Annotated[
    str, typer.Option("--description", metavar="TEXT", help="What it is, for people.")
]
Prefix: TypeAlias = Annotated[
    str, typer.Option("--prefix", metavar="TEXT", help="Only names that begin with it.")
]
EveryVersion: TypeAlias = Annotated[
    bool, typer.Option("--every-version", help="Every version rather than the latest of each name.")
]
HookPoints: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--hook-point", metavar="HOOK", help="Where to read; may be repeated."),
]
Pooled: TypeAlias = Annotated[
    str,
    typer.Option("--pooling", metavar="HOW", help="What positions are made into: last, mean, max, token."),
]
Positive: TypeAlias = Annotated[
    str | None, typer.Option("--positive", metavar="LABEL", help="Which of two labels is the concept.")
]
HeldOutShare: TypeAlias = Annotated[
    float,
    typer.Option("--held-out", metavar="SHARE", help="Examples to judge by, where the file does not say."),
]
Seed: TypeAlias = Annotated[int, typer.Option("--seed", metavar="N", help="Of the split.")]

FIGURES = ["AUROC", "interval", "accuracy", "effect size"]


def figures(held_out: Discrimination | None) -> tuple[str, ...]:
    """Held-out figures as the cells of `FIGURES`."""
    if held_out is None:
        return ("", "", "", "")
    return (
        f"{held_out.auroc.value:.3f}",
        between(held_out.auroc),
        f"{held_out.accuracy.value:.3f}",
        f"{held_out.effect_size:.2f}",
    )


def between(interval: Interval) -> str:
    """The ends of an interval."""
    return f"{interval.low:.3f} to {interval.high:.3f}"


def plain(info: Any) -> dict[str, Any]:
    """A value of the SDK as JSON has it: times as text, and its resource name."""
    body = dataclasses.asdict(info)
    if body.get("created") is not None:
        body["created"] = body["created"].isoformat()
    return {"resource_name": info.resource_name, **body}


def versioned(name: str, version: int) -> str:
    """`name@version`; empty for what has none."""
    return f"{name}@{version}" if name else ""
