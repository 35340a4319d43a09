"""Page tokens: where a list goes on, bound to the question it answers, so that a token never continues another list."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from typing import Any

from glasshouse.server.types.errors import InvalidArgument
from glasshouse.wire import reasons

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000


def size_of(page_size: int) -> int:
    """0 takes the default, too large is coerced. Raises `InvalidArgument` for a negative one."""
    if page_size < 0:
        raise InvalidArgument(
            f"page_size {page_size} is negative",
            reason=reasons.VALUE_OUT_OF_RANGE,
            field="page_size",
            value=page_size,
            remedy="use 0 or more; 0 takes the default",
        )
    return min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)


def token(question: tuple[Any, ...], last: tuple[str, str, int]) -> str:
    """The token of what comes after `last` (model, name, version)."""
    raw = json.dumps([_fingerprint(question), *last], separators=(",", ":"))
    return base64.urlsafe_b64encode(raw.encode()).decode()


def after(question: tuple[Any, ...], page_token: str) -> tuple[str, str, int] | None:
    """Where `page_token` goes on; None for "", the beginning. Raises `InvalidArgument` for a token of another list."""
    if not page_token:
        return None
    try:
        fingerprint, model, name, version = json.loads(
            base64.b64decode(page_token.encode(), altchars=b"-_", validate=True)
        )
        if fingerprint == _fingerprint(question) and isinstance(model, str) and isinstance(name, str):
            return model, name, int(version)
    except (binascii.Error, ValueError, TypeError):
        pass
    raise InvalidArgument(
        "page_token is not one that this list gave out",
        reason=reasons.VALUE_MALFORMED,
        field="page_token",
        value=page_token,
        remedy="send next_page_token of the page before, unchanged, or nothing for the first page",
    )


def _fingerprint(question: tuple[Any, ...]) -> str:
    return hashlib.sha256(repr(question).encode()).hexdigest()[:12]
