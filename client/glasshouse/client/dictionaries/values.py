"""What is known of a dictionary and of its features: frozen values, no protobuf."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

FeatureOrder: TypeAlias = Literal["index", "decoder_norm", "density"]
"""By ascending index, or descending decoder norm or density."""


@dataclass(frozen=True, kw_only=True)
class DecoderNorms:
    """Norms of a decoder's rows."""

    min: float
    mean: float
    max: float


@dataclass(frozen=True, kw_only=True)
class DictionaryCheck:
    """Measured on built-in text when it was loaded. `warning` says what is absurd, and is empty where nothing
    is: a dictionary that reads another place than it was trained on shows here."""

    l0: float
    fvu: float
    positions: int
    warning: str = ""


@dataclass(frozen=True, kw_only=True)
class DictionaryInfo:
    """A loaded dictionary.

    `name` is what `model.dictionary(name)` takes. `kind`: "sae", "transcoder", "crosscoder" or
    "cross_layer_transcoder". `d_in` and `d_out` are the widths at one hook point. `k` is 0 where the architecture
    does not fix the number of active features. `check` is None where the model could not run it.
    """

    name: str
    model: str
    kind: str
    architecture: str
    hook_points_in: list[str]
    hook_points_out: list[str]
    d_in: int
    d_out: int
    d_sae: int
    dtype: str
    source_format: str
    normalisation: str
    k: int
    group_sizes: list[int]
    has_skip: bool
    decoder_norms: DecoderNorms
    check: DictionaryCheck | None
    size_bytes: int
    notes: list[str]

    @property
    def resource_name(self) -> str:
        """`models/{model}/dictionaries/{name}`."""
        return f"models/{self.model}/dictionaries/{self.name}"


@dataclass(frozen=True)
class LogitEffects:
    """Tokens a feature promotes or suppresses, the most affected first, and what a unit of it adds to their
    logits, the final norm's scale left out."""

    token_ids: list[int]
    tokens: list[str]
    logits: list[float]

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class NearestFeature:
    """A feature near another, by the cosine of their decoder rows."""

    index: int
    cosine: float


@dataclass(frozen=True, kw_only=True)
class FeatureSummary:
    """A feature. `label` is empty where nobody has said what it is; `density`, the share of positions it fired
    on, is None where it was not measured."""

    index: int
    decoder_norm: float
    label: str = ""
    density: float | None = None


@dataclass(frozen=True, kw_only=True)
class FeatureInfo(FeatureSummary):
    """A feature and what it does. `promoted` and `suppressed` are None where it does not write the stream."""

    promoted: LogitEffects | None
    suppressed: LogitEffects | None
    nearest: list[NearestFeature]


@dataclass(frozen=True, kw_only=True)
class DictionaryEvaluation:
    """What an evaluation measured over `tokens` tokens.

    `metrics` by SAELens' names: l0, explained_variance, fvu, ce_loss_score and so on. density: (d_sae,) float32,
    the share of the tokens each feature fired on; None where it would not fit a message.
    """

    metrics: Mapping[str, float]
    tokens: int
    density: NDArray[np.float32] | None = field(default=None, repr=False)
