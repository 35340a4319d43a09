"""When to try again: UNAVAILABLE only, with exponential backoff and jitter, inside the call's deadline."""

from __future__ import annotations

import random
import time
from typing import Final

from glasshouse.client.exceptions import DeadlineExceededError, GlasshouseError, UnavailableError
from glasshouse.wire import reasons

FIRST_DELAY_S: Final = 0.1
MAX_DELAY_S: Final = 2.0


class Attempts:
    """The attempts of one call, which share its deadline. The clock starts when this is made."""

    def __init__(self, timeout_s: float, max_attempts: int) -> None:
        self._deadline = time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._max_attempts = max_attempts
        self._n_failed = 0

    def remaining_s(self) -> float:
        """Seconds left. Raises DeadlineExceededError where there are none."""
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise DeadlineExceededError(f"not done within {self._timeout_s:g} s", reason=reasons.DEADLINE)
        return remaining

    def delay_after(self, error: GlasshouseError) -> float | None:
        """Seconds to wait before the next attempt; None where there should be none."""
        self._n_failed += 1
        if not isinstance(error, UnavailableError) or self._n_failed >= self._max_attempts:
            return None
        delay = min(FIRST_DELAY_S * 2 ** (self._n_failed - 1), MAX_DELAY_S) * random.uniform(0.5, 1.0)
        delay = max(delay, error.retry_after_s or 0.0)
        return delay if time.monotonic() + delay < self._deadline else None
