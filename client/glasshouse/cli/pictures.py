"""What `-o FILE` writes: a page, an image or JSON, by the suffix; and the same on a terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from glasshouse.cli.output import plain

if TYPE_CHECKING:
    from glasshouse.client.pictures import Part

Output: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="FILE", help="Write a picture: .html, .png, .svg or .pdf; or .json."
    ),
]
IMAGES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")
SUFFIXES = (".html", ".json", *IMAGES)


def check_output(path: Path | None, suffixes: Sequence[str] = SUFFIXES) -> None:
    """Before anything is asked of a server: raises typer.BadParameter (status 2) for what could not be written."""
    if path is None:
        return
    if path.suffix.lower() not in suffixes:
        raise typer.BadParameter(f"{path} must end in one of {', '.join(suffixes)}", param_hint="--output")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"cannot write {path}: no folder {path.parent}", param_hint="--output")


def write_output(
    path: Path,
    title: str,
    parts: Sequence[Part],
    fields: Mapping[str, Any],
    *,
    about: str = "",
    facts: Mapping[str, str] | None = None,
) -> None:
    """Writes `parts` as a page or an image, or `fields` as JSON. Raises typer.BadParameter where it cannot."""
    from glasshouse.client.pictures import report_page, save_figure

    suffix = path.suffix.lower()
    if suffix == ".json":
        write_text(path, lambda: json.dumps(plain(fields), ensure_ascii=False, allow_nan=False) + "\n")
    elif suffix == ".html":
        write_text(path, lambda: report_page(title, parts, about=about, facts=facts))
    else:
        try:
            save_figure(path, title, parts, about=about)
        except ImportError as error:
            raise typer.BadParameter(str(error), param_hint="--output") from None
        except OSError as error:
            raise _unwritable(path, error) from None


def write_text(path: Path, text: Callable[[], str]) -> None:
    """Writes a file of text. Raises typer.BadParameter (status 2) where it cannot."""
    try:
        path.write_text(text(), encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error) from None


def print_parts(parts: Sequence[Part]) -> None:
    """The parts on a terminal, in colour."""
    from rich.console import Console

    from glasshouse.client.pictures import render

    Console().print(*map(render, parts), sep="\n")


def _unwritable(path: Path, error: OSError) -> typer.BadParameter:
    return typer.BadParameter(f"cannot write {path}: {error.strerror}", param_hint="--output")
