"""Conditions: a score passed a threshold. What an edit applies under, and what ends a generation."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex, TypeAlias

from glasshouse.client.dictionaries.names import DictionaryLike, dictionary_name
from glasshouse.client.names import ProbeLike, probe_name
from glasshouse.client.positions import Positions, PositionsLike, as_positions

Scope: TypeAlias = Literal["position", "prompt", "latched"]
"""Each position by itself; the prompt as one; from the first position that passes on."""

Aggregate: TypeAlias = Literal["max", "mean", "last"]
"""How the scores at a prompt's positions become one."""

ProbeOutput: TypeAlias = Literal["score", "margin"]
"""The probability that a probe states, or its log-odds before calibration."""

Source: TypeAlias = "ProbeLike | tuple[DictionaryLike, SupportsIndex]"
"""A probe's handle or name, or a feature: (dictionary, index)."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Exactly one of `probe` and `dictionary` is set, and one of `above` and `below`. Made by `when`."""

    probe: str = ""
    label: str = ""
    output: ProbeOutput = "score"
    dictionary: str = ""
    feature: int = 0
    above: float | None = None
    below: float | None = None
    over: Scope = "position"
    aggregate: Aggregate | None = None
    positions: Positions | None = None


def when(
    source: Source,
    *,
    above: float | None = None,
    below: float | None = None,
    over: Scope = "position",
    label: str = "",
    output: ProbeOutput = "score",
    aggregate: Aggregate | None = None,
    positions: PositionsLike | None = None,
) -> Condition:
    """Where the score of a probe, or the activation of a feature `(dictionary, index)`, passes a threshold.

    `over`: each "position" by itself; the "prompt" as one number, which is known from its last position on; "latched":
    from the first position that passes, and ever after. `label`: whose column, of a probe with several. `aggregate`: how
    a prompt's scores become one, by default the largest (of a probe that pools, the last). `positions`: those looked at.

    Raises TypeError for none or both of above and below.
    """
    if (above is None) == (below is None):
        raise TypeError("give exactly one of above and below")
    common: dict[str, Any] = {
        "above": None if above is None else float(above),
        "below": None if below is None else float(below),
        "over": over,
        "aggregate": aggregate,
        "positions": as_positions(positions),
    }
    if isinstance(source, tuple):
        dictionary, feature = source
        return Condition(dictionary=dictionary_name(dictionary), feature=operator.index(feature), **common)
    return Condition(probe=probe_name(source), label=label, output=output, **common)
