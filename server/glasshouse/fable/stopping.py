"""SIGTERM and SIGINT as a question asked between steps: finish the step, save, leave."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """`asked` is set by SIGTERM or SIGINT while it is entered; the previous handlers come back on leaving."""

    def __init__(self) -> None:
        self.asked = False

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self.asked = True

    def __enter__(self) -> StopRequest:
        self._previous = {
            number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
