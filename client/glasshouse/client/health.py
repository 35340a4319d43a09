"""grpc.health.v1 as far as a client needs it, by hand: an empty request, and one enum in the response."""

from __future__ import annotations

import time
from typing import Final

from glasshouse.client.exceptions import GlasshouseError, UnavailableError
from glasshouse.wire import reasons

CHECK: Final = "/grpc.health.v1.Health/Check"
WHOLE_SERVER: Final = b""
"""HealthCheckRequest for the server as a whole."""
_FIRST_DELAY_S: Final = 0.05
_MAX_DELAY_S: Final = 1.0


class Readiness:
    """A wait for SERVING: what the next check may take, and how long to sleep after it."""

    def __init__(self, target: str, timeout_s: float) -> None:
        self._target = target
        self._deadline = time.monotonic() + timeout_s
        self._delay_s = _FIRST_DELAY_S

    def remaining_s(self) -> float:
        """Seconds the next check may take."""
        return max(self._deadline - time.monotonic(), 0.001)

    def is_serving(self, response: bytes) -> bool:
        """Whether a HealthCheckResponse says SERVING: field 1, a varint, of 1."""
        return response[:2] == b"\x08\x01"

    def delay_after(self, error: GlasshouseError | None) -> float:
        """Seconds to sleep after a check that failed, or that answered something else.

        Raises the error where waiting cannot help, and UnavailableError where the time is over.
        """
        if error is not None and not isinstance(error, UnavailableError):
            raise error
        if time.monotonic() + self._delay_s >= self._deadline:
            raise error or UnavailableError(
                f"the server at {self._target} is not serving",
                reason=reasons.SERVER_DRAINING,
                remedy="Wait until it has started, or pass a larger timeout",
            )
        delay_s, self._delay_s = self._delay_s, min(self._delay_s * 1.5, _MAX_DELAY_S)
        return delay_s
