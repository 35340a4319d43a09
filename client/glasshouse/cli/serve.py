"""`glasshouse serve`: hands its arguments, untouched, to the server, which is an extra."""

from __future__ import annotations

import importlib
from typing import Annotated, Any, Final

import typer

UNTOUCHED: Final[dict[str, Any]] = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}


def serve(arguments: Annotated[list[str] | None, typer.Argument(metavar="[OPTIONS]")] = None) -> None:
    """Serve a model (needs glasshouse[server]); see `glasshouse serve --help`."""
    try:
        status = importlib.import_module("glasshouse.server.main").main(list(arguments or ()))
    except ModuleNotFoundError as error:
        typer.echo(
            f"error: the server is not installed ({error.name} is missing)\n"
            "  remedy: pip install 'glasshouse[server]'",
            err=True,
        )
        raise typer.Exit(1) from None
    raise typer.Exit(status)
