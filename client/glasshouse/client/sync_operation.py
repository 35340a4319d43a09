"""`Operation`: long work at the server, with blocking calls. `aio_operation` is its twin."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from glasshouse.client import calls
from glasshouse.client.operations import OperationProgress, OperationView, Polls
from glasshouse.client.sync_transport import Transport

T = TypeVar("T")


class Operation(OperationView[T]):
    """Long work at the server. It goes on whether or not anybody waits for it."""

    _transport: Transport

    def done(self, *, timeout: float | None = None) -> bool:
        """Whether it has ended, well or not; asks the server."""
        if not self._state.done:
            self._state.feed(self._transport.unary(calls.get_operation(self.name), timeout))
        return self._state.done

    def result(
        self,
        timeout: float | None = None,
        on_progress: Callable[[OperationProgress], object] | None = None,
    ) -> T:
        """Waits for the end; `on_progress` is called with each progress heard of meanwhile.

        Raises DeadlineExceededError after `timeout` seconds (None: no limit) and leaves the work going;
        CancelledError where it was cancelled; what the work failed with.
        """
        polls = Polls(self.name, timeout, on_progress is not None)
        while not self._state.done:
            wait_s = polls.wait_s()
            call = calls.wait_operation(self.name, wait_s)
            self._state.feed(self._transport.unary(call, wait_s + self._transport.timeout_s(None)))
            if on_progress is not None:
                on_progress(self.progress)
            if not self._state.done:
                time.sleep(polls.pause_s())
        return self._state.result()

    def cancel(self, *, timeout: float | None = None) -> None:
        """Asks the server to stop it; `result()` then raises CancelledError. Does nothing after its end."""
        self._transport.unary(calls.cancel_operation(self.name), timeout)
