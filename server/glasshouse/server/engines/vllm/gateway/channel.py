"""The socket that the workers report on, read on the event loop without a thread of its own.

ZMQ's descriptor is edge-triggered: once it is readable everything is taken, a bounded number of messages at a time so
that the loop goes on. Whoever finds a row missing may `drain` too, which costs less than waiting for the loop.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from ..contract import RowBlock, StepReport, unpack_report
from .join import Join
from .statistics import Statistics

_MESSAGES_AT_A_TIME = 64
# Messages that wait in the socket; beyond them workers queue, and then fail captures by name.
_HIGH_WATER = 1024

_log = structlog.get_logger(__name__)


class ReportChannel:
    """Reports in, each part to the request it belongs to. Used on one event loop."""

    def __init__(self, *, host: str | None, statistics: Statistics) -> None:
        """`host`: an address that workers on other machines reach; None where all are on this one."""
        import zmq

        self.statistics = statistics
        self._zmq = zmq
        self._joins: dict[int, Join] = {}
        self._next_tag = 0
        self._socket: Any = zmq.Context.instance().socket(zmq.PULL)
        self._socket.set_hwm(_HIGH_WATER)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if host is None:
            self._folder = tempfile.TemporaryDirectory(prefix="glasshouse-")
            self.endpoint = f"ipc://{Path(self._folder.name) / 'reports'}"
            self._socket.bind(self.endpoint)
        else:
            port = self._socket.bind_to_random_port(f"tcp://{host}")
            self.endpoint = f"tcp://{host}:{port}"
        self._loop = asyncio.get_running_loop()
        self._fd = self._socket.getsockopt(zmq.FD)
        self._loop.add_reader(self._fd, self.drain)

    def new_tag(self) -> int:
        """A tag that no open request has."""
        while True:
            self._next_tag = (self._next_tag + 1) & 0x7FFFFFFF
            if self._next_tag not in self._joins:
                return self._next_tag

    def open(self, join: Join) -> None:
        """Reports that concern `join` go to it from now on."""
        self._joins[join.tag] = join

    def close(self, join: Join) -> None:
        """They no longer do."""
        self._joins.pop(join.tag, None)

    def drain(self) -> None:
        """Takes what has come."""
        for _ in range(_MESSAGES_AT_A_TIME):
            try:
                frames = self._socket.recv_multipart(self._zmq.NOBLOCK, copy=False)
            except self._zmq.Again:
                return
            except self._zmq.ZMQError:
                return
            buffers = [frame.buffer for frame in frames]
            self.statistics.report_bytes += sum(buffer.nbytes for buffer in buffers)
            try:
                self._take(unpack_report(buffers))
            except Exception as error:
                # Whoever waits for what it held is told so when its time is up.
                _log.exception("report_malformed", error=str(error))
        self._loop.call_soon(self.drain)

    def stop(self) -> None:
        """Takes nothing more."""
        self._loop.remove_reader(self._fd)
        self._socket.close(linger=0)
        if self._folder is not None:
            self._folder.cleanup()

    def _take(self, report: StepReport) -> None:
        joins = self._joins
        touched: dict[int, Join] = {}
        for tag in report.armed:
            if (join := joins.get(tag)) is not None:
                join.arm(report.rank)
                touched[tag] = join
        for ran in report.ran:
            self.statistics.hooked_steps += ran.steps
            for tag, start, count, applied in zip(
                ran.tags.tolist(),
                ran.starts.tolist(),
                ran.counts.tolist(),
                ran.applied.tolist(),
                strict=True,
            ):
                if (join := joins.get(tag)) is not None:
                    join.ran(report.rank, start, count, applied, ran.steps)
                    touched[tag] = join
        for block in report.blocks:
            _share(block, joins, touched)
        for tag in report.closed:
            if (join := joins.get(tag)) is not None:
                join.closed(report.rank)
                touched[tag] = join
        for error in report.errors:
            if (join := joins.get(error.tag)) is not None:
                self.statistics.captures_failed += 1
                join.fail_step(error)
                touched[error.tag] = join
        for join in touched.values():
            join.wake()


def _share(block: RowBlock, joins: Mapping[int, Join], touched: dict[int, Join]) -> None:
    """Gives each request the rows of a block that are its own: they lie together."""
    tags, readouts = block.tags, block.readouts
    n = len(tags)
    if not n:
        return
    edges = np.flatnonzero((tags[1:] != tags[:-1]) | (readouts[1:] != readouts[:-1])) + 1
    if len(edges) == n - 1:
        # A step of generation: one row each.
        rows = zip(tags.tolist(), readouts.tolist(), block.positions.tolist(), strict=True)
        for row, (tag, readout, position) in enumerate(rows):
            join = joins.get(tag)
            if join is not None:
                join.row(block.kind, readout, position, block.values, row)
                touched[tag] = join
        return
    starts = [0, *edges.tolist()]
    stops = [*starts[1:], n]
    owners, which = tags[starts].tolist(), readouts[starts].tolist()
    for tag, readout, start, stop in zip(owners, which, starts, stops, strict=True):
        join = joins.get(tag)
        if join is not None:
            values = [array[start:stop] for array in block.values]
            join.rows(block.kind, readout, block.positions[start:stop], values)
            touched[tag] = join
