"""Which positions of a sequence: one type wherever positions are chosen.

A position is the absolute index, from 0, of the token FED IN. In a generation `generated()` are the new
tokens as they are fed back: the pass that predicts the first of them belongs to the prompt's `last()`
position.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, SupportsIndex, TypeAlias

from glasshouse.client.exceptions import InvalidArgumentError
from glasshouse.wire import reasons

NamedPositions: TypeAlias = Literal["all", "prompt", "generated", "last"]


@dataclass(frozen=True, kw_only=True)
class Positions:
    """A selection of positions. Made by `all`, `prompt`, `generated`, `last`, `at` and `span`; exactly one of
    `named`, `listed` and `start` is set. `stop` None is open-ended."""

    named: NamedPositions | None = None
    listed: tuple[int, ...] | None = None
    start: int | None = None
    stop: int | None = None
    exclude_bos: bool = False
    exclude_special: bool = False

    def excluding_bos(self) -> Positions:
        """The same positions without the beginning-of-sequence token."""
        return dataclasses.replace(self, exclude_bos=True)

    def excluding_special(self) -> Positions:
        """The same positions without any special token of the tokenizer (BOS included)."""
        return dataclasses.replace(self, exclude_special=True)


PositionsLike: TypeAlias = "Positions | int | slice | range | Sequence[int]"
"""What a `positions=` argument takes: a selector, a position, a list of them, a slice or a range."""


def all() -> Positions:
    """Every position that is fed in."""
    return Positions(named="all")


def prompt() -> Positions:
    """The prompt's positions."""
    return Positions(named="prompt")


def generated() -> Positions:
    """The positions of generated tokens, as they are fed back."""
    return Positions(named="generated")


def last() -> Positions:
    """The prompt's last position, whose pass predicts the first new token."""
    return Positions(named="last")


def at(positions: Iterable[SupportsIndex]) -> Positions:
    """The listed absolute positions, in any order, each once."""
    return Positions(listed=tuple(operator.index(position) for position in positions))


def span(start: int = 0, stop: int | None = None) -> Positions:
    """Positions start <= p < stop; to the end without `stop`."""
    return Positions(start=start, stop=stop)


def as_positions(value: PositionsLike | None) -> Positions | None:
    """The selector a `positions=` argument means; None, which the server takes as all, stays None.

    Raises InvalidArgumentError for a slice that steps without an end and TypeError for anything else.
    """
    if value is None or isinstance(value, Positions):
        return value
    if hasattr(value, "tolist"):  # numpy and torch
        value = value.tolist()
    if isinstance(value, slice):
        if value.step in (None, 1):
            return span(value.start or 0, value.stop)
        if value.stop is None:
            raise InvalidArgumentError(
                f"a slice with step {value.step} needs a stop",
                field="positions",
                reason=reasons.VALUE_MALFORMED,
                remedy="Give the slice a stop, or list the positions",
            )
        return at(range(value.start or 0, value.stop, value.step))
    if isinstance(value, range):
        return span(value.start, value.stop) if value.step == 1 and value else at(value)
    if isinstance(value, int):
        return at([value])
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(
            "positions must be a selector such as prompt() or at([0, 1]), a list of ints, a slice or a "
            f"range, not {value!r}"
        )
    return at(value)
