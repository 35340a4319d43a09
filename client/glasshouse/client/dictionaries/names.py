"""The arguments that name a dictionary and its features, in their one canonical form."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Protocol, SupportsIndex, TypeAlias

import numpy as np


class NamedDictionary(Protocol):
    """A handle, or the info of one."""

    @property
    def resource_name(self) -> str:
        """`models/{model}/dictionaries/{dictionary}`."""


DictionaryLike: TypeAlias = "str | NamedDictionary"
"""A dictionary's handle, its info, or its name."""


def dictionary_name(dictionary: DictionaryLike) -> str:
    """The name a request carries: a name as it is given, a handle's in full."""
    if isinstance(dictionary, str):
        return dictionary
    name = getattr(dictionary, "resource_name", None)
    if not isinstance(name, str):
        raise TypeError(f"dictionary must be a handle or its name, not {dictionary!r}")
    return name


def short_name(name: str) -> str:
    """`{dictionary}` from either form; a part of a set is `{set}/{part}`."""
    return name.partition("/dictionaries/")[2] if name.startswith("models/") else name


def model_name(name: str) -> str:
    """`{model}` of a dictionary's resource name."""
    return name.partition("/dictionaries/")[0].removeprefix("models/")


def as_features(value: SupportsIndex | Sequence[SupportsIndex]) -> tuple[int, ...]:
    """One feature or several, from an int, a list, numpy or torch. Raises TypeError for anything else."""
    listed: Any = value.tolist() if hasattr(value, "tolist") else value
    try:
        return (operator.index(listed),)
    except TypeError:
        pass
    try:
        return tuple(operator.index(feature) for feature in listed)
    except TypeError:
        raise TypeError(f"features must be an int or a list of ints, not {value!r}") from None


def as_numbers(value: float | Sequence[float]) -> tuple[float, ...]:
    """One number or several, from a float, a list, numpy or torch. Raises TypeError for anything else."""
    listed: Any = value.tolist() if hasattr(value, "tolist") else value
    try:
        return tuple(map(float, listed if np.iterable(listed) and not isinstance(listed, str) else [listed]))
    except (TypeError, ValueError):
        raise TypeError(f"the value must be a number or a list of numbers, not {value!r}") from None
