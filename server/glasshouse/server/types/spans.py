"""What one forward pass feeds for one row of its batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens `token_ids`, fed at positions `start`, `start` + 1, ... in one row of a pass."""

    start: int
    token_ids: Sequence[int]

    @property
    def stop(self) -> int:
        """One past the last position fed."""
        return self.start + len(self.token_ids)
