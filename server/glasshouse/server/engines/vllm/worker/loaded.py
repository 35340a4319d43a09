"""What a worker was told to load, looked up by the key that a plan names it by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def loaded(store: Mapping[str, T], key: str, what: str = "") -> T:
    """What `store` holds under `key`. Raises `KeyError`, naming `what` it is where that is given."""
    found = store.get(key)
    if found is None:
        raise KeyError(f"{what} {key!r} is not loaded in this worker".lstrip())
    return found
