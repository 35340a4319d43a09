"""How far long work has come, beside what a command prints."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

    from glasshouse.client import Operation, OperationProgress

T = TypeVar("T")


def watched(operation: Operation[T], name: str) -> T:
    """The operation's result, its progress shown meanwhile. Interrupting cancels it at the server."""
    try:
        with progress_bar(name) as advance:
            return operation.result(on_progress=advance)
    except KeyboardInterrupt:
        operation.cancel()
        raise


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[[OperationProgress], object] | None]:
    """A bar on standard error where that is a terminal; what is yielded takes each progress of an operation."""
    if not sys.stderr.isatty():
        yield None
        return
    with _bar() as bar:
        task = bar.add_task(f"{name}: queued", total=1.0)
        yield lambda progress: bar.update(
            task, completed=progress.fraction, description=f"{name}: {progress.phase}"
        )


@contextmanager
def counting_bar(name: str) -> Iterator[Callable[[int, int], object] | None]:
    """The same for what is counted: what is yielded takes how many of how many are done."""
    if not sys.stderr.isatty():
        yield None
        return
    with _bar() as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
