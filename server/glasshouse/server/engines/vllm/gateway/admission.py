"""Who may enter: how many requests are open, and the workers' edit slots, taken here before a request is sent.

A worker that runs out of slots fails the request it is at. So its tables are kept account of here: a request that does not
fit now waits its turn, one that never will is refused.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from glasshouse.server.types.errors import ResourceExhausted
from glasshouse.wire import reasons

from ..contract import RequestPlan
from .join import Join


class EditSlots:
    """The slots of the workers' edit and vector tables, given in the order of asking."""

    def __init__(self, *, max_edits: int, max_vectors: int) -> None:
        self.max_edits, self.max_vectors = max_edits, max_vectors
        self.edits_in_use = self.vectors_in_use = 0
        self._waiting: deque[tuple[int, int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def held(self, plan: RequestPlan | None) -> AsyncIterator[None]:
        """Holds what `plan` needs for as long as the context lasts.

        Raises:
            ResourceExhausted: more than the tables hold in all.
        """
        n_edits, n_vectors = (0, 0) if plan is None else (plan.n_edits, plan.n_vectors)
        if not n_edits and not n_vectors:
            yield
            return
        self._check("edits", n_edits, self.max_edits)
        self._check("vectors", n_vectors, self.max_vectors)
        if self._waiting or not self._fits(n_edits, n_vectors):
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append((n_edits, n_vectors, turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._give_back(n_edits, n_vectors)
                else:
                    self._waiting = deque(item for item in self._waiting if item[2] is not turn)
                    self._admit()
                raise
        else:
            self._take(n_edits, n_vectors)
        try:
            yield
        finally:
            self._give_back(n_edits, n_vectors)

    def _check(self, what: str, wanted: int, most: int) -> None:
        if wanted > most:
            raise ResourceExhausted(
                f"the interventions take {wanted} {what}, the engine has room for {most}",
                reason=reasons.LIMIT_EXCEEDED,
                field="interventions",
                value=wanted,
                remedy=f"use fewer; the operator sets vllm.max_{what}",
            )

    def _fits(self, n_edits: int, n_vectors: int) -> bool:
        return (
            self.edits_in_use + n_edits <= self.max_edits
            and self.vectors_in_use + n_vectors <= self.max_vectors
        )

    def _take(self, n_edits: int, n_vectors: int) -> None:
        self.edits_in_use += n_edits
        self.vectors_in_use += n_vectors

    def _give_back(self, n_edits: int, n_vectors: int) -> None:
        self._take(-n_edits, -n_vectors)
        self._admit()

    def _admit(self) -> None:
        while self._waiting:
            n_edits, n_vectors, turn = self._waiting[0]
            if turn.cancelled():
                self._waiting.popleft()
                continue
            if not self._fits(n_edits, n_vectors):
                return
            self._waiting.popleft()
            self._take(n_edits, n_vectors)
            turn.set_result(None)


class Gate:
    """Counts the requests that are open. `started`: those whose first token has come."""

    def __init__(self, *, max_running: int, max_queued: int) -> None:
        self._max_open = max_running + max_queued
        self.n_open = self.n_started = 0

    @property
    def n_queued(self) -> int:
        """Requests whose first token has not come."""
        return self.n_open - self.n_started

    def check(self) -> None:
        """Raises `ResourceExhausted` where no more may wait."""
        if self.n_open >= self._max_open:
            raise ResourceExhausted(
                f"{self.n_open} requests run and wait already, {self._max_open} may",
                reason=reasons.QUEUE_FULL,
                value=self.n_open,
                remedy="try again in a moment",
                retry_after_s=1.0,
            )


@dataclass(eq=False, kw_only=True)
class Opened:
    """A request in vLLM."""

    gate: Gate
    outputs: Any = None
    join: Join | None = None
    _started: bool = False

    def started(self) -> None:
        """Its first token has come."""
        if not self._started:
            self._started = True
            self.gate.n_started += 1

    def close(self) -> None:
        """It is over."""
        self.gate.n_open -= 1
        self.gate.n_started -= self._started
