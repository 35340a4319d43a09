"""What a request wants to see of the forward pass, and what was seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .selectors import Selector

WireDType = Literal["float32", "bfloat16", "float16"]

# bfloat16 arrays have ml_dtypes' dtype.
Array = np.ndarray[tuple[int, ...], np.dtype[Any]]


@dataclass(frozen=True, kw_only=True)
class ReadActivations:
    """The activation at a readable hook point, after the edits there."""

    hook_point: str
    positions: Selector = Selector.all()
    dtype: WireDType = "float32"


@dataclass(frozen=True, kw_only=True)
class ReadLogitLens:
    """unembed(final_norm(s)) of a residual-stream hook point: its `top_k` likeliest tokens."""

    hook_point: str
    top_k: int = 5
    positions: Selector = Selector.all()


Readout = ReadActivations | ReadLogitLens


@dataclass(frozen=True)
class TopTokens:
    """The likeliest tokens, descending. `token_ids` int32 (k,), `logprobs` float32 (k,), natural logarithm."""

    token_ids: Array
    logprobs: Array


# Of one position: (width,) or (n_heads, n_keys) arrays, or top tokens.
ReadoutValue = Array | TopTokens


@dataclass(frozen=True, kw_only=True)
class PromptReadout:
    """One readout over a prompt: `positions` ascending; `values` (n_positions, width), or (n_heads, n_positions,
    n_prompt) for attention maps, or one TopTokens a position.
    """

    readout: int
    positions: tuple[int, ...]
    values: Array | tuple[TopTokens, ...]


# What was read at one position, by readout index.
ReadoutsAtPosition = Mapping[int, ReadoutValue]
