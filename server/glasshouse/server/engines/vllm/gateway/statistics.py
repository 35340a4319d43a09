"""What the engine counts, for the metrics page."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Statistics:
    """Counters since the start."""

    # Steps in which a worker ran edits or readouts.
    hooked_steps: int = 0
    # Bytes of reports that came from the workers.
    report_bytes: int = 0
    # Tokens that had to wait for what was read before them.
    joins_late: int = 0
    # Requests ended because reading or applying failed in a worker.
    captures_failed: int = 0
