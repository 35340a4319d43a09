"""What to read while generating: plain frozen values, made by one function each.

A readout is read after the edits at its hook point. `builders` holds the table from these classes to
messages, and `parsers` the one back; a new readout is a class here and a row in each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from glasshouse.client.positions import Positions, PositionsLike, as_positions

ActivationDType: TypeAlias = Literal["float32", "bfloat16", "float16"]
"""Element type on the wire."""


@dataclass(frozen=True, kw_only=True)
class Readout:
    """One thing to read."""

    hook_point: str
    positions: Positions | None = None


@dataclass(frozen=True, kw_only=True)
class ReadActivations(Readout):
    """The activation itself."""

    dtype: ActivationDType = "float32"


@dataclass(frozen=True, kw_only=True)
class ReadLogitLens(Readout):
    """unembed(final_norm(s)): the residual stream read as a next-token distribution."""

    top_k: int = 5


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
