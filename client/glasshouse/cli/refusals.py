"""Failures as a person reads them on a terminal, and the exit status of each."""

from __future__ import annotations

import typer

from glasshouse.client import GlasshouseError, NotFoundError


def exit_status(error: Exception) -> int | None:
    """Writes a failure to standard error; its exit status, or None for a defect that deserves its traceback.

    1 for what the server (or the way to it) refused, 2 for what the client refused to send: bad usage.
    """
    if isinstance(error, GlasshouseError):
        typer.echo(describe(error), err=True)
        return 1 if error.request_id or not isinstance(error, ValueError) else 2
    return None


def describe(error: GlasshouseError) -> str:
    """The failure in a few lines: what, where, what else there is, what to do."""
    lines = [f"error: {error.message or error.code}"]
    rows = {
        "field": error.field,
        "closest": ", ".join(error.closest) if isinstance(error, NotFoundError) else "",
        "remedy": error.remedy,
        "retry after": "" if error.retry_after_s is None else f"{error.retry_after_s:g} s",
        "code": ", ".join(filter(None, (error.code, error.reason))),
        "request": error.request_id,
    }
    lines += [f"  {name}: {value}" for name, value in rows.items() if value]
    return "\n".join(lines)
