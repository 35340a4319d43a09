"""What a format is: a name, a test of the listing, and a loader into parameters.

A loader returns one `Loaded` a dictionary: most folders hold one, a transcoder set one a layer.

`Overrides` are what a file cannot say and the operator may: hook points of bare weight files, k, the data
set's average norm. They come from a `glasshouse.json` beside the weights or from the caller, the caller
winning.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeVar

from glasshouse.server.dictionaries.formats.files import Source
from glasshouse.server.dictionaries.parameters import DictionaryParameters, malformed

OVERRIDES_FILE = "glasshouse.json"

N = TypeVar("N", int, float, str)


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """hook_points_in, hook_points_out: names in order. average_norm: mean ||x|| of the training data, one a
    site.
    """

    hook_points_in: tuple[str, ...] = ()
    hook_points_out: tuple[str, ...] = ()
    k: int | None = None
    average_norm: tuple[float, ...] = ()
    model_name: str = ""

    def over(self, other: Overrides) -> Overrides:
        """These, with `other` where nothing is said."""
        return replace(
            other,
            **{
                f.name: getattr(self, f.name)
                for f in fields(self)
                if getattr(self, f.name) not in ((), "", None)
            },
        )

    @staticmethod
    def of(values: dict[str, Any], path: str) -> Overrides:
        """From a JSON object or query parameters; unknown names are refused."""
        known = {f.name for f in fields(Overrides)} | {"hook_point", "hook_point_in", "hook_point_out"}
        unknown = sorted(set(values) - known)
        if unknown:
            raise malformed(
                path, f"unknown setting {unknown[0]}", f"Settings are: {', '.join(sorted(known))}."
            )
        both = values.get("hook_point")
        points_in = values.get("hook_points_in") or values.get("hook_point_in") or both
        points_out = values.get("hook_points_out") or values.get("hook_point_out") or both
        try:
            return Overrides(
                hook_points_in=_names(points_in),
                hook_points_out=_names(points_out),
                k=None if values.get("k") is None else int(values["k"]),
                average_norm=tuple(float(v) for v in _names(values.get("average_norm"))),
                model_name=str(values.get("model_name", "")),
            )
        except (TypeError, ValueError) as error:
            raise malformed(path, f"a setting has the wrong type: {error}") from None


def _names(value: Any) -> tuple[str, ...]:
    if not value:
        return ()
    if isinstance(value, (str, int, float)):
        return tuple(str(value).split(","))
    return tuple(str(v) for v in value)


class Loaded(NamedTuple):
    """One dictionary of a path; `suffix` is "" for the only one, else its name within the set."""

    suffix: str
    parameters: DictionaryParameters


class Format(NamedTuple):
    """name: as shown to users. detects looks at names, configs and tensor names only."""

    name: str
    detects: Callable[[Source], bool]
    load: Callable[[Source, Overrides], list[Loaded]]


def hook_points(
    overrides: Overrides, found_in: tuple[str, ...], found_out: tuple[str, ...] = ()
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(in, out): what the operator said, else what the files said; an SAE's output is its input."""
    points_in = overrides.hook_points_in or found_in
    points_out = overrides.hook_points_out or found_out or points_in
    return points_in, points_out


def need_hook_point(source: Source, overrides: Overrides, found: str = "") -> tuple[str, ...]:
    """The single hook point in, refused where neither file nor operator names one."""
    if overrides.hook_points_in:
        return overrides.hook_points_in
    if found:
        return (found,)
    raise malformed(
        str(source),
        "the files do not say which hook point the dictionary reads",
        f"Name it: PATH?hook_point=blocks.3.hook_resid_post, or 'hook_point' in a "
        f"{OVERRIDES_FILE} beside it.",
    )


def number(
    config: dict[str, Any], key: str, path: str, kind: Callable[[Any], N], default: N | None = None
) -> N:
    """A config value of a type, refused with its name."""
    value = config.get(key, default)
    if value is None:
        raise malformed(path, f"the config has no {key!r}")
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise malformed(path, f"config {key!r} is {value!r}, expected {kind.__name__}") from None


def layer_in(name: str, pattern: str = r"layer_?(\d+)") -> int | None:
    """The layer number in a file or folder name."""
    match = re.search(pattern, name)
    return int(match.group(1)) if match else None
