"""Numbers, text and words that the wire can carry: checked before anything is sent."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

from glasshouse.client.exceptions import InvalidArgumentError
from glasshouse.wire import reasons


def whole(value: Any, field: str, bits: int = 32) -> int:
    """`value` as an integer that fits the field. Raises TypeError or InvalidArgumentError."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{field} must be an integer, not {value!r}") from None
    limit = 1 << (bits - 1)
    if not -limit <= number < limit:
        raise InvalidArgumentError(
            f"{number} does not fit {bits} bits",
            field=field,
            reason=reasons.VALUE_OUT_OF_RANGE,
            remedy=f"Pass a number from {-limit} to {limit - 1}",
        )
    return number


def wholes(values: Iterable[Any], field: str, bits: int = 32) -> list[int]:
    """Each of `values` as `whole` has it, by its index."""
    return [whole(value, f"{field}[{index}]", bits) for index, value in enumerate(values)]


def text(value: Any, field: str) -> str:
    """`value` if it is text that UTF-8 can carry. Raises TypeError or InvalidArgumentError."""
    if not isinstance(value, str):
        raise TypeError(f"{field} must be a string, not {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(
            f"not valid Unicode at character {error.start}",
            field=field,
            reason=reasons.VALUE_MALFORMED,
            remedy="Remove the lone surrogate, or decode the bytes with errors='replace'",
        ) from None
    return value


def word(value: str, words: Mapping[str, Any], field: str) -> Any:
    """What `value` stands for among `words`. Raises InvalidArgumentError with those there are."""
    try:
        return words[value]
    except KeyError:
        raise InvalidArgumentError(
            f"{value!r} is not known",
            field=field,
            reason=reasons.VALUE_MALFORMED,
            remedy="Use one of " + ", ".join(map(repr, words)),
        ) from None
