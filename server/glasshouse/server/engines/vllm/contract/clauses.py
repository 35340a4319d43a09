"""Positions as a worker takes them: ranges, and tokens to leave out."""

from __future__ import annotations

from dataclasses import dataclass

from glasshouse.server.types.selectors import ResolvedPositions


@dataclass(frozen=True, kw_only=True)
class Clause:
    """Positions as ascending disjoint half-open ranges; excluded prompt positions are already taken out. From
    `n_prompt` on a token of `excluded_token_ids` is left out wherever it is fed.
    """

    ranges: tuple[tuple[int, int], ...]
    excluded_token_ids: tuple[int, ...] = ()
    n_prompt: int = 0


def clause_of(positions: ResolvedPositions) -> Clause:
    """Resolved positions as ranges alone."""
    ranges: list[tuple[int, int]] = []
    for low, high in positions.ranges:
        start = low
        for gap in sorted(p for p in positions.excluded if low <= p < high):
            if gap > start:
                ranges.append((start, gap))
            start = gap + 1
        if high > start:
            ranges.append((start, high))
    return Clause(
        ranges=tuple(ranges),
        excluded_token_ids=tuple(sorted(positions.excluded_token_ids)),
        n_prompt=positions.n_prompt,
    )
