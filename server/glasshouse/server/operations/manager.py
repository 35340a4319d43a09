"""Long-running operations: a bounded queue, progress, cancellation, expiry.

An operation is a coroutine that reports progress and returns a result. A few run at a time, some more wait; beyond that a
request is refused at once. What has ended is kept for a while, so that a caller who lost the connection can
come back for it.
"""

from __future__ import annotations

import asyncio
import difflib
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import structlog

from glasshouse.server.types.errors import Cancelled, Internal, NotFound, ResourceExhausted, ServingError
from glasshouse.wire import reasons

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class OperationSettings:
    """How much runs, waits, and is kept."""

    max_running: int = 2
    max_queued: int = 16
    max_kept: int = 256
    keep_s: float = 3600.0


@dataclass(eq=False, kw_only=True)
class Progress:
    """Where an operation stands. The operation itself writes it. `facts`: what its kind reports besides."""

    phase: str = "queued"
    done: int = 0
    total: int = 0
    facts: Any = None

    @property
    def fraction(self) -> float:
        """0 to 1."""
        return self.done / self.total if self.total else 0.0


Work = Callable[[Progress], Awaitable[Any]]


@dataclass(eq=False, kw_only=True)
class Operation:
    """One operation. `result` or `error` is set once it has ended."""

    name: str
    kind: str
    progress: Progress = field(default_factory=Progress)
    created_s: float = field(default_factory=time.time)
    ended_s: float | None = None
    result: Any = None
    error: ServingError | None = None
    task: asyncio.Task[None] | None = None

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self.ended_s is not None


class OperationManager:
    """The operations of a server. Lives on one event loop."""

    def __init__(self, settings: OperationSettings) -> None:
        self._settings = settings
        self._operations: dict[str, Operation] = {}
        self._places = asyncio.Semaphore(settings.max_running)

    def submit(self, kind: str, work: Work, facts: Any = None) -> Operation:
        """Queues `work`; returns its operation, named `operations/{id}`. `facts` are its progress's.

        Raises:
            ResourceExhausted: as many operations as may wait are waiting.
        """
        self._forget_old()
        pending = sum(not operation.done for operation in self._operations.values())
        most = self._settings.max_running + self._settings.max_queued
        if pending >= most:
            raise ResourceExhausted(
                f"{pending} operations run or wait already, {most} may",
                reason=reasons.QUEUE_FULL,
                value=pending,
                remedy="try again when one has ended, or cancel one",
                retry_after_s=5.0,
            )
        operation = Operation(
            name=f"operations/{uuid.uuid4().hex}", kind=kind, progress=Progress(facts=facts)
        )
        self._operations[operation.name] = operation
        operation.task = asyncio.create_task(self._run(operation, work))
        return operation

    async def _run(self, operation: Operation, work: Work) -> None:
        try:
            async with self._places:
                operation.progress.phase = "running"
                operation.result = await work(operation.progress)
            operation.progress.phase = "done"
        except ServingError as error:
            operation.error = error
        except asyncio.CancelledError:
            operation.error = Cancelled(
                "the operation was cancelled", reason=reasons.CALLER_GONE, remedy="start it again"
            )
        except Exception:
            _log.exception("operation_failed", operation=operation.name, kind=operation.kind)
            operation.error = Internal(
                "the operation failed",
                reason=reasons.DEFECT,
                remedy=f"report it with its name, {operation.name}",
            )
        finally:
            operation.ended_s = time.time()

    def get(self, name: str) -> Operation:
        """The operation called `name`. Raises `NotFound`: never there, deleted, or expired."""
        self._forget_old()
        operation = self._operations.get(name)
        if operation is None:
            raise NotFound(
                f"there is no operation {name!r}",
                reason=reasons.RESOURCE_NOT_FOUND,
                resource_type="operation",
                resource_name=name,
                closest=tuple(difflib.get_close_matches(name, list(self._operations), n=1, cutoff=0.8)),
                field="name",
                remedy=f"operations are kept for {self._settings.keep_s:.0f} s after they end",
            )
        return operation

    def all(self) -> list[Operation]:
        """Every operation known, the newest first."""
        self._forget_old()
        return sorted(self._operations.values(), key=lambda operation: -operation.created_s)

    def cancel(self, name: str) -> None:
        """Asks an operation to stop; one that has ended stays as it is."""
        operation = self.get(name)
        if operation.task is not None and not operation.done:
            operation.task.cancel()

    def delete(self, name: str) -> None:
        """Forgets an operation that has ended; cancels and forgets one that has not."""
        self.cancel(name)
        self._operations.pop(name, None)

    async def wait(self, name: str, timeout_s: float | None) -> Operation:
        """The operation once it has ended, or as it stands after `timeout_s`."""
        operation = self.get(name)
        if operation.task is not None and not operation.done:
            await asyncio.wait([operation.task], timeout=timeout_s)
        return operation

    async def stop(self) -> None:
        """Cancels what has not ended."""
        tasks = [op.task for op in self._operations.values() if op.task is not None and not op.done]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _forget_old(self) -> None:
        now = time.time()
        ended = sorted(
            (op for op in self._operations.values() if op.ended_s is not None),
            key=lambda op: op.ended_s or 0.0,
        )
        surplus = len(ended) - self._settings.max_kept
        for index, operation in enumerate(ended):
            if index < surplus or now - (operation.ended_s or now) > self._settings.keep_s:
                self._operations.pop(operation.name, None)
