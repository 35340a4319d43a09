"""`glasshouse version`."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

import typer

from glasshouse.cli.options import Json
from glasshouse.cli.output import write_json


def version(json: Json = False) -> None:
    """Print the version."""
    try:
        number = installed("glasshouse")
    except PackageNotFoundError:  # Run from a checkout that is not installed.
        number = "0+uninstalled"
    if json:
        write_json({"version": number})
    else:
        typer.echo(f"glasshouse {number}")
