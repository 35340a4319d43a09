"""Position selectors: what can be checked without knowing the sequence. The engine resolves them on it."""

from __future__ import annotations

from glasshouse.server.types.errors import InvalidArgument
from glasshouse.server.types.limits import Limits
from glasshouse.server.types.selectors import EVERYWHERE, NamedPositions, Selector
from glasshouse.v1 import inputs_pb2 as pb
from glasshouse.wire import reasons

from . import fields

_NAMED = {
    pb.NAMED_POSITIONS_ALL: NamedPositions.ALL,
    pb.NAMED_POSITIONS_PROMPT: NamedPositions.PROMPT,
    pb.NAMED_POSITIONS_GENERATED: NamedPositions.GENERATED,
    pb.NAMED_POSITIONS_LAST: NamedPositions.LAST,
}
_CHOICES = "all, prompt, generated, last, a list or a span"


def selector(message: pb.PositionSelector, present: bool, field: str, limits: Limits) -> Selector:
    """The selector of a request; every position where the message is absent."""
    if not present:
        return EVERYWHERE
    bos, special = message.exclude_bos, message.exclude_special
    match message.WhichOneof("select"):
        case "named":
            return Selector(
                named=_named(message.named, f"{field}.named"), exclude_bos=bos, exclude_special=special
            )
        case "at":
            listed = _listed(tuple(message.at.positions), f"{field}.at.positions", limits)
            return Selector(at=listed, exclude_bos=bos, exclude_special=special)
        case "span":
            return Selector(
                span=_span(message.span, f"{field}.span"), exclude_bos=bos, exclude_special=special
            )
        case _:
            raise fields.required(field, f"a selector chooses one of {_CHOICES}", f"choose one of {_CHOICES}")


def selector_message(chosen: Selector) -> pb.PositionSelector | None:
    """A selector as a message; None for every position."""
    if chosen == EVERYWHERE:
        return None
    message = pb.PositionSelector(exclude_bos=chosen.exclude_bos, exclude_special=chosen.exclude_special)
    if chosen.named is not None:
        message.named = next(number for number, named in _NAMED.items() if named is chosen.named)
    elif chosen.at is not None:
        message.at.positions.extend(chosen.at)
    elif chosen.span is not None:
        start, stop = chosen.span
        message.span.CopyFrom(pb.PositionSpan(start=start, stop=stop))
    return message


def _named(number: int, field: str) -> NamedPositions:
    if number == pb.NAMED_POSITIONS_UNSPECIFIED:
        raise fields.required(field, "which positions", "choose one of all, prompt, generated, last")
    if number not in _NAMED:
        raise fields.out_of_range(field, number, "a known NamedPositions: all, prompt, generated or last")
    return _NAMED[pb.NamedPositions.ValueType(number)]


def _listed(positions: tuple[int, ...], field: str, limits: Limits) -> tuple[int, ...]:
    if not positions:
        raise fields.required(
            field, "at least one position", "list positions, or leave the selector out for all"
        )
    fields.count(len(positions), field, limits.max_positions, "max_positions", "positions")
    seen: set[int] = set()
    for index, position in enumerate(positions):
        if position < 0:
            raise fields.out_of_range(
                f"{field}[{index}]", position, "0 or more; `last` selects the prompt's last"
            )
        if position in seen:
            raise InvalidArgument(
                f"position {position} is listed twice",
                reason=reasons.FIELD_CONFLICT,
                field=f"{field}[{index}]",
                value=position,
                remedy="list each position once",
            )
        seen.add(position)
    return positions


def _span(message: pb.PositionSpan, field: str) -> tuple[int, int | None]:
    if message.start < 0:
        raise fields.out_of_range(f"{field}.start", message.start, "0 or more")
    if not message.HasField("stop"):
        return (message.start, None)
    if message.stop <= message.start:
        raise fields.out_of_range(f"{field}.stop", message.stop, f"greater than start, {message.start}")
    return (message.start, message.stop)
