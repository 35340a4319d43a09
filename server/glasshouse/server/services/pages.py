"""Pages of a list: negative sizes are an error, large ones are coerced, an empty token means the end."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import TypeVar

from glasshouse.server.types.errors import InvalidArgument
from glasshouse.wire import reasons

from . import fields

Item = TypeVar("Item")

_PREFIX = b"page:"


def page(
    items: Sequence[Item], *, page_size: int, page_token: str, default: int, most: int
) -> tuple[Sequence[Item], str]:
    """The items of one page, and the token of the next; empty where there is none."""
    if page_size < 0:
        raise fields.out_of_range("page_size", page_size, "0 or more; 0 takes the default")
    start = _start(page_token, len(items))
    stop = start + min(page_size or default, most)
    token = base64.urlsafe_b64encode(_PREFIX + str(stop).encode()).decode() if stop < len(items) else ""
    return items[start:stop], token


def _start(token: str, n_items: int) -> int:
    if not token:
        return 0
    try:
        raw = base64.b64decode(token.encode(), altchars=b"-_", validate=True)
        start = int(raw.removeprefix(_PREFIX)) if raw.startswith(_PREFIX) and len(raw) < 32 else -1
    except (binascii.Error, ValueError):
        start = -1
    if not 0 < start < n_items:
        raise InvalidArgument(
            "page_token is not one that this list gave out",
            reason=reasons.VALUE_MALFORMED,
            field="page_token",
            value=token,
            remedy="send next_page_token of the page before, unchanged, or nothing for the first page",
        )
    return start
