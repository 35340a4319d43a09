"""Positions, chosen once for everything: the one selector type, and what it resolves to on a sequence.

A position is the absolute index of the token fed in. A request with `n_prompt` tokens and `max_tokens` feeds at most
`n_prompt + max_tokens - 1` positions: the last new token is never fed back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from glasshouse.wire import reasons

from .errors import InvalidArgument


class NamedPositions(Enum):
    """Sets of positions that need no numbers."""

    ALL = "all"
    PROMPT = "prompt"
    GENERATED = "generated"
    LAST = "last"


@dataclass(frozen=True, kw_only=True)
class Selector:
    """Which positions: exactly one of `named`, `at` and `span` (start, stop or None for the end)."""

    named: NamedPositions | None = None
    at: tuple[int, ...] | None = None
    span: tuple[int, int | None] | None = None
    exclude_bos: bool = False
    exclude_special: bool = False


EVERYWHERE = Selector(named=NamedPositions.ALL)


@dataclass(frozen=True, kw_only=True)
class ResolvedPositions:
    """A selector resolved on one sequence: ascending half-open ranges, less excluded prompt positions.

    `excluded_token_ids` are left out among generated positions, whose tokens are not known beforehand.
    """

    ranges: tuple[tuple[int, int], ...]
    excluded: frozenset[int] = frozenset()
    excluded_token_ids: frozenset[int] = frozenset()
    n_prompt: int = field(default=0)

    def covers(self, position: int, token_id: int) -> bool:
        """Whether the token fed at `position` is selected."""
        if position in self.excluded:
            return False
        if position >= self.n_prompt and token_id in self.excluded_token_ids:
            return False
        return any(low <= position < high for low, high in self.ranges)

    def within(self, start: int, token_ids: Sequence[int]) -> list[int]:
        """The selected positions among those of `token_ids`, fed at `start`, `start` + 1, ...; ascending."""
        stop = start + len(token_ids)
        plain = not self.excluded and not self.excluded_token_ids
        found: list[int] = []
        for low, high in self.ranges:
            low, high = max(low, start), min(high, stop)
            if plain:
                found.extend(range(low, high))
            else:
                found.extend(p for p in range(low, high) if self.covers(p, token_ids[p - start]))
        return found

    def limited(self, start: int, stop: int | None = None) -> ResolvedPositions:
        """Those of them from `start` on, below `stop`."""
        ranges = tuple(
            (max(low, start), high if stop is None else min(high, stop))
            for low, high in self.ranges
            if high > start and (stop is None or low < stop)
        )
        return replace(self, ranges=tuple(bounds for bounds in ranges if bounds[0] < bounds[1]))

    @property
    def empty(self) -> bool:
        """Whether it covers no position, whatever the tokens."""
        return all(
            all(position in self.excluded for position in range(low, min(high, self.n_prompt)))
            and high <= max(low, self.n_prompt)
            for low, high in self.ranges
        )

    def next_change(self, position: int) -> int | None:
        """The first position after `position` where membership by range may change; None when it never does.

        A plan made for a batch of decoding rows stays valid until then. Exclusion by token id is not a range: rows
        with `excluded_token_ids` are planned anew each step.
        """
        edges = [edge for bounds in self.ranges for edge in bounds if edge > position]
        edges += [p + d for p in self.excluded for d in (0, 1) if p + d > position]
        return min(edges, default=None)


def resolve(
    selector: Selector,
    *,
    prompt: Sequence[int],
    n_fed: int,
    bos_token_id: int | None,
    special_token_ids: frozenset[int],
    field: str,
) -> ResolvedPositions:
    """Resolves `selector` for a request that feeds at most `n_fed` positions, the first of them `prompt`.

    Raises:
        InvalidArgument: positions that can never be fed, or a selector that covers none at all though it names some.
    """
    n_prompt = len(prompt)
    excluded: set[int] = set()
    if selector.exclude_bos and bos_token_id is not None:
        excluded.update(p for p, token in enumerate(prompt) if token == bos_token_id)
    if selector.exclude_special:
        excluded.update(p for p, token in enumerate(prompt) if token in special_token_ids)
    return ResolvedPositions(
        ranges=_ranges(selector, n_prompt, n_fed, field),
        excluded=frozenset(excluded),
        excluded_token_ids=special_token_ids if selector.exclude_special else frozenset(),
        n_prompt=n_prompt,
    )


def _ranges(selector: Selector, n_prompt: int, n_fed: int, field: str) -> tuple[tuple[int, int], ...]:
    if selector.named is not None:
        named = {
            NamedPositions.ALL: (0, n_fed),
            NamedPositions.PROMPT: (0, n_prompt),
            NamedPositions.GENERATED: (n_prompt, n_fed),
            NamedPositions.LAST: (n_prompt - 1, n_prompt),
        }
        return (named[selector.named],)
    if selector.at is not None:
        return _listed(selector.at, n_fed, field)
    assert selector.span is not None, "a selector holds exactly one of named, at and span"
    start, stop = selector.span
    if start < 0 or (stop is not None and stop <= start):
        raise InvalidArgument(
            f"span [{start}, {stop}) is not a range of positions",
            reason=reasons.VALUE_OUT_OF_RANGE,
            field=f"{field}.span",
            value=f"[{start}, {stop})",
            remedy="give 0 <= start < stop",
        )
    if start >= n_fed or (stop is not None and stop > n_fed):
        raise _unreachable(start if start >= n_fed else (stop or 0) - 1, n_fed, f"{field}.span")
    return ((start, n_fed if stop is None else stop),)


def _listed(at: tuple[int, ...], n_fed: int, field: str) -> tuple[tuple[int, int], ...]:
    if not at:
        raise InvalidArgument(
            "the list of positions is empty",
            reason=reasons.FIELD_REQUIRED,
            field=f"{field}.at.positions",
            remedy="list at least one position, or leave the selector out for all",
        )
    ordered = sorted(at)
    for index, position in enumerate(ordered):
        if position < 0:
            raise InvalidArgument(
                f"position {position} is negative",
                reason=reasons.VALUE_OUT_OF_RANGE,
                field=f"{field}.at.positions",
                value=position,
                remedy="positions count from 0; `last` selects the prompt's last position",
            )
        if position >= n_fed:
            raise _unreachable(position, n_fed, f"{field}.at.positions")
        if index and ordered[index - 1] == position:
            raise InvalidArgument(
                f"position {position} is listed twice",
                reason=reasons.FIELD_CONFLICT,
                field=f"{field}.at.positions",
                value=position,
                remedy="list each position once",
            )
    ranges: list[tuple[int, int]] = []
    for position in ordered:
        if ranges and ranges[-1][1] == position:
            ranges[-1] = (ranges[-1][0], position + 1)
        else:
            ranges.append((position, position + 1))
    return tuple(ranges)


def _unreachable(position: int, n_fed: int, field: str) -> InvalidArgument:
    return InvalidArgument(
        f"position {position} is never fed: this request feeds positions 0 to {n_fed - 1}",
        reason=reasons.POSITION_UNREACHABLE,
        field=field,
        value=position,
        remedy="choose positions below prompt + max_tokens - 1; the last new token is never fed back",
    )
