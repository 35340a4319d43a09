"""`glasshouse models`, `hook-points` and `tokenize`: what is served."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from glasshouse.cli.connected import Chosen, connecting
from glasshouse.cli.options import (
    DEFAULT_TARGET,
    DEFAULT_TIMEOUT_S,
    ApiKey,
    Json,
    Target,
    Timeout,
    Tls,
    TlsCa,
    connect,
)
from glasshouse.cli.output import write_json, write_table


def models(
    target: Target = DEFAULT_TARGET,
    api_key: ApiKey = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
    json: Json = False,
) -> None:
    """List the models served."""
    with connect(target, api_key, tls, tls_ca, timeout) as client:
        found = client.models()
    if json:
        write_json([dataclasses.asdict(info) for info in found])
        return
    columns = ["name", "family", "layers", "d_model", "heads", "vocabulary", "context", "dtype", "engine"]
    rows = [
        (
            info.name,
            info.family,
            info.n_layers,
            info.d_model,
            info.n_heads,
            info.vocab_size,
            info.context_length,
            info.dtype,
            info.engine,
        )
        for info in found
    ]
    write_table(columns, rows)


@connecting
def hook_points(
    model: Chosen,
    json: bool,
    layer: Annotated[int | None, typer.Option("--layer", metavar="L", help="Only this block's.")] = None,
    grep: Annotated[
        str | None, typer.Option("--grep", metavar="TEXT", help="Only names or modules with this.")
    ] = None,
) -> None:
    """List what can be read and edited in a model."""
    found = model().hook_points()
    chosen = [
        point
        for point in found
        if (layer is None or point.layer == layer)
        and (grep is None or grep in point.name or grep in point.module_path)
    ]
    if json:
        write_json([dataclasses.asdict(point) for point in chosen])
        return
    rows = [
        (
            point.name,
            point.module_path,
            point.width or "",
            "r" * point.readable + "w" * point.writable,
            point.note,
        )
        for point in chosen
    ]
    write_table(["hook point", "module", "width", "access", "note"], rows)


@connecting
def tokenize(
    model: Chosen,
    json: bool,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What to tokenize.")],
    special: Annotated[
        bool, typer.Option("--special/--no-special", help="Add the tokenizer's special tokens.")
    ] = True,
) -> None:
    """Show the tokens of a text."""
    tokens = model().tokenize(text, add_special_tokens=special)
    if json:
        write_json(dataclasses.asdict(tokens))
        return
    rows = [(position, i, repr(s)) for position, (i, s) in enumerate(zip(tokens.ids, tokens.strings))]
    write_table(["position", "id", "token"], rows)
