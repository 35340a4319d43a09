"""How long work tells what it has done, and is stopped."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Told (done, total) as work goes on; raising from it stops the work."""


def silent(done: int, total: int) -> None:
    """No one listens."""
