"""What a request wants to see of the forward pass, and what was seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .conditions import ProbeOutput
from .selectors import EVERYWHERE, Selector

WireDType = Literal["float32", "bfloat16", "float16"]

# bfloat16 arrays have ml_dtypes' dtype.
Array = np.ndarray[tuple[int, ...], np.dtype[Any]]


@dataclass(frozen=True, kw_only=True)
class ReadActivations:
    """The activation at a readable hook point, after the edits there."""

    hook_point: str
    positions: Selector = EVERYWHERE
    dtype: WireDType = "float32"


@dataclass(frozen=True, kw_only=True)
class ReadLogitLens:
    """unembed(final_norm(s)) of a residual-stream hook point: its `top_k` likeliest tokens."""

    hook_point: str
    top_k: int = 5
    positions: Selector = EVERYWHERE


@dataclass(frozen=True, kw_only=True)
class ReadFeatures:
    """Features of a dictionary: the `top_k` strongest a position, or the given `features` (zeros included)."""

    dictionary: str
    top_k: int = 0
    features: tuple[int, ...] = ()
    positions: Selector = EVERYWHERE


@dataclass(frozen=True, kw_only=True)
class ReadProbe:
    """Scores of a probe. One that pools over positions pools those of `positions` so far."""

    probe: str
    output: ProbeOutput = ProbeOutput.SCORE
    positions: Selector = EVERYWHERE


Readout = ReadActivations | ReadLogitLens | ReadFeatures | ReadProbe


@dataclass(frozen=True)
class TopTokens:
    """The likeliest tokens, descending. `token_ids` int32 (k,), `logprobs` float32 (k,), natural logarithm."""

    token_ids: Array
    logprobs: Array


@dataclass(frozen=True)
class FeatureActivations:
    """Features of one position: `ids` int32 (k,), `activations` float32 (k,)."""

    ids: Array
    activations: Array


@dataclass(frozen=True)
class FeatureRows:
    """Features of several positions as compressed sparse rows: `indptr` int64 (n + 1,), `ids` int32 (nnz,),
    `activations` float32 (nnz,).
    """

    indptr: Array
    ids: Array
    activations: Array

    def row(self, index: int) -> FeatureActivations:
        """The features of one position."""
        low, high = int(self.indptr[index]), int(self.indptr[index + 1])
        return FeatureActivations(self.ids[low:high], self.activations[low:high])


@dataclass(frozen=True)
class ProbeScores:
    """A probe's scores at one position: float32 (n_columns,)."""

    scores: Array


@dataclass(frozen=True)
class ProbeScoreRows:
    """A probe's scores at several positions: float32 (n_positions, n_columns); `labels` name the columns, `probe` is the
    resource name of the version that was read.
    """

    probe: str
    labels: tuple[str, ...]
    scores: Array


# Of one position: (width,) or (n_heads, n_keys) arrays, or top tokens, or features, or a probe's scores.
ReadoutValue = Array | TopTokens | FeatureActivations | ProbeScores


@dataclass(frozen=True, kw_only=True)
class PromptReadout:
    """One readout over a prompt: `positions` ascending; `values` (n_positions, width), or (n_heads, n_positions,
    n_prompt) for attention maps, or one TopTokens a position, or feature rows, or a probe's score rows.
    """

    readout: int
    positions: tuple[int, ...]
    values: Array | tuple[TopTokens, ...] | FeatureRows | ProbeScoreRows


# What was read at one position, by readout index.
ReadoutsAtPosition = Mapping[int, ReadoutValue]
