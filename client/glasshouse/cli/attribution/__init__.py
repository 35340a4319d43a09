"""`glasshouse attribute ...`: why did the model say that."""

from __future__ import annotations

from collections.abc import Callable

import typer

from glasshouse.cli.attribution import circuits, pairs, paths, prompts
from glasshouse.cli.connected import connecting

app = typer.Typer(
    help="Why did the model say that? Attribution to tokens, parts of the model, and features; patching; circuits.",
    no_args_is_help=True,
)

_COMMANDS: dict[str, Callable[..., None]] = {
    "tokens": prompts.tokens,
    "direct": prompts.direct,
    "features": prompts.features,
    "patch": pairs.patch,
    "heads": pairs.heads,
    "mediate": pairs.mediate,
    "nodes": pairs.nodes,
    "edges": pairs.edges,
    "paths": paths.paths,
    "circuit": circuits.circuit,
    "connections": circuits.connections,
    "intervene": circuits.intervene,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(connecting(_command))
