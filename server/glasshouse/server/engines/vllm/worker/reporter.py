"""The side channel out: a ZMQ PUSH socket that never blocks the engine, and says what it had to drop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from glasshouse.server.engines.vllm.contract.messages import (
    OVERFLOW,
    Ran,
    RowBlock,
    StepError,
    StepReport,
    pack_report,
)
from glasshouse.server.engines.vllm.contract.settings import WorkerSettings


class Reporter:
    """Sends step reports to one gateway. Without a gateway (before `connect`) reports vanish: no request comes
    without one.
    """

    def __init__(self, rank: int, settings: WorkerSettings) -> None:
        self._rank = rank
        self._settings = settings
        self._socket: Any = None
        # Armed tags, errors and runs that could not be sent yet: small, and never lost. Runs are bounded by what the
        # requests of one overflow can run before they are aborted.
        self._armed: list[int] = []
        self._closed: list[int] = []
        self._errors: list[StepError] = []
        self._ran: list[Ran] = []
        self.n_messages = 0
        self.n_bytes = 0
        self.n_overflows = 0

    def connect(self, endpoint: str) -> None:
        """Sends to `endpoint` from now on."""
        import zmq

        self.close()
        socket = zmq.Context.instance().socket(zmq.PUSH)
        socket.setsockopt(zmq.SNDHWM, self._settings.max_queued_messages)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(endpoint)
        self._socket = socket

    def close(self) -> None:
        """Closes the socket; what is queued is dropped."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    @property
    def has_pending(self) -> bool:
        """Whether something small waits to be sent."""
        return bool(self._armed or self._closed or self._errors or self._ran)

    def report(
        self,
        step: int,
        *,
        armed: Sequence[int] = (),
        closed: Sequence[int] = (),
        errors: Sequence[StepError] = (),
        ran: Sequence[Ran] = (),
        blocks: Sequence[RowBlock] = (),
    ) -> tuple[int, ...]:
        """Sends a step's report, rows split into messages. Returns the tags whose rows had to be dropped: they are failed
        already as far as the gateway will learn.
        """
        self._armed.extend(armed)
        self._closed.extend(closed)
        self._errors.extend(errors)
        self._ran.extend(ran)
        if self._socket is None:
            for waiting in (self._armed, self._closed, self._errors, self._ran):
                waiting.clear()
            return ()
        parts = [part for block in blocks for part in self._split(block)]
        dropped: set[int] = set()
        while parts and dropped == set():
            size = 0
            taken: list[RowBlock] = []
            while parts and (not taken or size + _n_bytes(parts[0]) <= self._settings.max_message_bytes):
                size += _n_bytes(parts[0])
                taken.append(parts.pop(0))
            if not self._send(step, tuple(taken)):
                for block in (*taken, *parts):
                    dropped.update(block.tags.tolist())
        if dropped:
            self.n_overflows += 1
            message = "the gateway did not take rows as fast as they came"
            self._errors.extend(
                StepError(tag=tag, reason=OVERFLOW, message=message) for tag in sorted(dropped)
            )
        if self.has_pending:
            self._send(step, ())
        return tuple(sorted(dropped))

    def _send(self, step: int, blocks: tuple[RowBlock, ...]) -> bool:
        import zmq

        report = StepReport(
            rank=self._rank,
            step=step,
            armed=tuple(self._armed),
            closed=tuple(self._closed),
            errors=tuple(self._errors),
            ran=tuple(self._ran),
            blocks=blocks,
        )
        frames = pack_report(report)
        try:
            # Frames of their own are arrays that are never written again.
            self._socket.send_multipart(frames, flags=zmq.NOBLOCK, copy=len(frames) == 1)
        except zmq.Again:
            return False
        self.n_messages += 1
        self.n_bytes += sum(_n_bytes(block) for block in blocks)
        self._armed.clear()
        self._closed.clear()
        self._errors.clear()
        self._ran.clear()
        return True

    def _split(self, block: RowBlock) -> list[RowBlock]:
        n = len(block.tags)
        row_bytes = max(1, _n_bytes(block) // max(n, 1))
        rows = max(1, self._settings.max_message_bytes // row_bytes)
        if n <= rows:
            return [block]
        return [
            RowBlock(
                kind=block.kind,
                tags=block.tags[at : at + rows],
                readouts=block.readouts[at : at + rows],
                positions=block.positions[at : at + rows],
                values=tuple(values[at : at + rows] for values in block.values),
            )
            for at in range(0, n, rows)
        ]


def _n_bytes(block: RowBlock) -> int:
    return sum(math.prod(values.shape) * values.dtype.itemsize for values in block.values)
