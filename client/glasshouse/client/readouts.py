"""What to read while generating: plain frozen values, made by one function each.

A readout is read after the edits at its hook point, and found under its `name`. `builders` holds the table from
these classes to messages, and `parsers` the one back; a new readout is a class here and a row in each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, SupportsIndex, TypeAlias

from glasshouse.client.conditions import ProbeOutput
from glasshouse.client.dictionaries.names import DictionaryLike, as_features, dictionary_name, short_name
from glasshouse.client.names import ProbeLike, probe_name
from glasshouse.client.names import short_name as probe_short_name
from glasshouse.client.positions import Positions, PositionsLike, as_positions

ActivationDType: TypeAlias = Literal["float32", "bfloat16", "float16"]
"""Element type on the wire."""


@dataclass(frozen=True, kw_only=True)
class Readout(ABC):
    """One thing to read."""

    positions: Positions | None = None

    @property
    @abstractmethod
    def name(self) -> str:
        """What its values are found under."""


@dataclass(frozen=True, kw_only=True)
class _HookPointReadout(Readout):
    """A readout of one hook point, found under the name it was asked by."""

    hook_point: str

    @property
    def name(self) -> str:
        return self.hook_point


@dataclass(frozen=True, kw_only=True)
class ReadActivations(_HookPointReadout):
    """The activation itself."""

    dtype: ActivationDType = "float32"


@dataclass(frozen=True, kw_only=True)
class ReadLogitLens(_HookPointReadout):
    """unembed(final_norm(s)): the residual stream read as a next-token distribution."""

    top_k: int = 5


@dataclass(frozen=True, kw_only=True)
class ReadFeatures(Readout):
    """Features of a dictionary: the strongest, or those named, found under the dictionary's short name."""

    dictionary: str
    top_k: int | None = None
    features: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return short_name(self.dictionary)


@dataclass(frozen=True, kw_only=True)
class ReadProbe(Readout):
    """Scores of a probe, found under its short name or the one given to this readout."""

    probe: str
    output: ProbeOutput = "score"
    alias: str = ""

    @property
    def name(self) -> str:
        return self.alias or probe_short_name(self.probe)


def read_activations(
    hook_point: str, positions: PositionsLike | None = None, *, dtype: ActivationDType = "float32"
) -> ReadActivations:
    """Reads a readable hook point: `token.activations[hook_point]` and
    `stream.prompt_readouts[hook_point]`."""
    return ReadActivations(hook_point=hook_point, positions=as_positions(positions), dtype=dtype)


def read_logit_lens(hook_point: str, top_k: int = 5, positions: PositionsLike | None = None) -> ReadLogitLens:
    """Reads the top tokens at a residual-stream hook point, through the model's final norm and
    unembedding."""
    return ReadLogitLens(hook_point=hook_point, top_k=top_k, positions=as_positions(positions))


def read_features(
    dictionary: DictionaryLike,
    top_k: int | None = None,
    features: SupportsIndex | Sequence[SupportsIndex] = (),
    positions: PositionsLike | None = None,
) -> ReadFeatures:
    """Reads a dictionary's features: `token.features[name]` and `stream.prompt_readouts.features[name]`.

    `top_k` strongest a position (default 8), or those `features` everywhere, zeros included; not both. `name` is
    the dictionary's short name, `dictionary.name` of a handle.
    """
    return ReadFeatures(
        dictionary=dictionary_name(dictionary),
        top_k=top_k,
        features=as_features(features),
        positions=as_positions(positions),
    )


def read_probe(
    probe: ProbeLike,
    positions: PositionsLike | None = None,
    *,
    output: ProbeOutput = "score",
    name: str = "",
) -> ReadProbe:
    """Reads a probe: `token.probes[name]` and `stream.prompt_readouts.probes[name]`.

    `output`: the "score", a probability, or the "margin", log-odds before calibration. A probe that pools over positions
    is scored at each on what it pools of `positions` so far. `name` is the probe's short name, `probe.name` of a handle,
    unless another is given.
    """
    return ReadProbe(probe=probe_name(probe), output=output, alias=name, positions=as_positions(positions))
