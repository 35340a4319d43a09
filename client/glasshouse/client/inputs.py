"""What a model reads: a text, token ids, or a conversation; and telling one input from a list of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from glasshouse.client.exceptions import InvalidArgumentError
from glasshouse.wire import reasons


@dataclass(frozen=True)
class ChatMessage:
    """One turn of a conversation. role: "system", "user", "assistant", or what the model's template knows."""

    role: str
    content: str


ChatMessageLike: TypeAlias = "ChatMessage | Mapping[str, str] | tuple[str, str]"
"""A ChatMessage, ``{"role": ..., "content": ...}`` or ``(role, content)``."""

InputLike: TypeAlias = "str | Sequence[int] | Sequence[ChatMessageLike]"
"""A text, token ids (list, numpy, torch), or a conversation."""

Input: TypeAlias = "str | list[int] | list[ChatMessage]"
"""An input in its one canonical form."""


def as_input(value: Any, field: str = "input") -> Input:
    """The canonical form of one input. Raises InvalidArgumentError, naming `field`, for anything else."""
    if isinstance(value, str):
        return value
    items = _items(value, field)
    if not items or _is_token_id(items[0]):
        if all(_is_token_id(item) for item in items):
            return [int(item) for item in items]
    elif _is_message(items[0]):
        return [as_message(item, f"{field}[{index}]") for index, item in enumerate(items)]
    raise _not_an_input(value, field)


def as_inputs(value: Any) -> tuple[list[Input], bool]:
    """The inputs of an argument that takes one or a list of them, and whether it was a list.

    A list of ints or of messages is one input; a list of texts, of lists or of conversations is many, and so
    is an empty list.
    """
    if isinstance(value, str):
        return [value], False
    items = _items(value, "input")
    if items and (_is_token_id(items[0]) or _is_message(items[0])):
        return [as_input(items)], False
    return [as_input(item, f"inputs[{index}]") for index, item in enumerate(items)], True


def as_message(value: Any, field: str = "messages") -> ChatMessage:
    """The canonical form of one turn."""
    if isinstance(value, ChatMessage):
        return value
    if isinstance(value, Mapping) and value.keys() == {"role", "content"}:
        return ChatMessage(value["role"], value["content"])
    if _is_message(value) and not isinstance(value, Mapping):
        return ChatMessage(*value)
    raise InvalidArgumentError(
        f"{value!r} is not a chat message",
        field=field,
        reason=reasons.VALUE_MALFORMED,
        remedy='Pass {"role": ..., "content": ...}, (role, content) or a ChatMessage',
    )


def _items(value: Any, field: str) -> Sequence[Any]:
    if hasattr(value, "tolist"):  # numpy and torch
        value = value.tolist()
    if isinstance(value, (list, tuple, range)):
        return value
    raise _not_an_input(value, field)


def _is_token_id(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_message(value: Any) -> bool:
    if isinstance(value, tuple):
        return len(value) == 2 and all(isinstance(part, str) for part in value)
    return isinstance(value, (ChatMessage, Mapping))


def _not_an_input(value: Any, field: str) -> InvalidArgumentError:
    shown = repr(value)
    return InvalidArgumentError(
        f"{shown if len(shown) <= 80 else shown[:77] + '...'} is not an input",
        field=field,
        reason=reasons.VALUE_MALFORMED,
        remedy="Pass a text, a list of token ids, or a list of chat messages",
    )
