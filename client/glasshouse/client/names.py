"""The arguments that name a direction or a probe, in their one canonical form."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import numpy as np


class NamedDirection(Protocol):
    """A direction's handle."""

    @property
    def resource_name(self) -> str:
        """`models/{model}/directions/{direction}@{version}`; empty where it was not published."""


class NamedProbe(Protocol):
    """A probe's handle."""

    @property
    def resource_name(self) -> str:
        """`models/{model}/probes/{probe}@{version}`; empty where it was not published."""


DirectionLike: TypeAlias = "str | NamedDirection"
"""A direction's handle or its name, which may end in `@{version}`."""

ProbeLike: TypeAlias = "str | NamedProbe"
"""A probe's handle or its name, which may end in `@{version}`."""


def probe_name(probe: ProbeLike) -> str:
    """The name a request carries: a name as it is given, a handle's in full."""
    if isinstance(probe, str):
        return probe
    name = getattr(probe, "resource_name", None)
    if not isinstance(name, str):
        raise TypeError(f"probe must be a handle or its name, not {probe!r}")
    if not name:
        raise ValueError(f"{probe!r} has no name: publish it to read it while generating")
    return name


def short_name(name: str) -> str:
    """`{probe}` of a probe's name in any form, without a version."""
    return name.rpartition("/")[2].partition("@")[0]


def place_and_direction(hook_point: Any, vector: Any) -> tuple[str, Any]:
    """(hook point, an array or a direction's name) from what stands first and second in a call. "": the direction's own.

    Of a handle that is not published the vector is taken, at the hook point or else at its best.
    """
    if isinstance(vector, str) and not vector:
        hook_point, vector = "", hook_point
    hook_point = "" if hook_point is None else hook_point
    if not isinstance(hook_point, str):
        raise TypeError(f"hook_point must be a name, not {hook_point!r}")
    if isinstance(vector, str):
        return hook_point, vector
    name = getattr(vector, "resource_name", None)
    if name:
        return hook_point, name
    if isinstance(name, str):
        at = vector.at.get(hook_point) if hook_point else None
        return hook_point or vector.best_hook_point, vector.vector if at is None else at.vector
    return hook_point, vector


def is_number(value: Any) -> bool:
    """Whether `value` is one number: what a vector never is."""
    return isinstance(value, int | float | np.number)
