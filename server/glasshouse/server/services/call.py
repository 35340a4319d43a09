"""One call being served: its id, and what it has taken so far. Transport makes it, services tell it."""

from __future__ import annotations

from collections.abc import Iterable
from time import perf_counter
from typing import Protocol


class Meter(Protocol):
    """Where the counts of all calls add up."""

    def prompt_tokens(self, n: int) -> None: ...

    def generated_tokens(self, n: int) -> None: ...

    def time_to_first_token(self, seconds: float) -> None: ...

    def inter_token(self, seconds: float, n: int) -> None:
        """`n` tokens came, each `seconds` after the one before."""

    def intervention(self, edit: str) -> None: ...

    def readout_bytes(self, n: int) -> None: ...

    @property
    def open_streams(self) -> int:
        """Streams being served now."""


class Call:
    """A call. `started`: perf_counter() at its arrival. `caller`: whom its key belongs to, empty without keys."""

    __slots__ = (
        "_last_token",
        "caller",
        "generated_tokens",
        "meter",
        "prompt_tokens",
        "readout_bytes",
        "request_id",
        "started",
        "trailing",
    )

    def __init__(self, request_id: str, meter: Meter) -> None:
        self.request_id = request_id
        self.meter = meter
        self.caller = ""
        self.started = perf_counter()
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.readout_bytes = 0
        self._last_token = 0.0
        # Metadata that goes with the status.
        self.trailing: list[tuple[str, str]] = []

    def accepted(self, prompt_tokens: int, edits: Iterable[str]) -> None:
        """The engine took the request: `prompt_tokens` are fed, under `edits`."""
        self.prompt_tokens += prompt_tokens
        self.meter.prompt_tokens(prompt_tokens)
        for edit in edits:
            self.meter.intervention(edit)

    def generated(self, n: int) -> None:
        """`n` new tokens came at once."""
        now = perf_counter()
        if self.generated_tokens == 0:
            self.meter.time_to_first_token(now - self.started)
            if n > 1:
                self.meter.inter_token(0.0, n - 1)
        else:
            self.meter.inter_token((now - self._last_token) / n, n)
        self._last_token = now
        self.generated_tokens += n
        self.meter.generated_tokens(n)

    def read(self, n_bytes: int) -> None:
        """`n_bytes` of readouts are sent."""
        self.readout_bytes += n_bytes
        self.meter.readout_bytes(n_bytes)
