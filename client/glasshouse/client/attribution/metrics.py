"""What is to be explained: one number read off a forward pass. Plain frozen values; the functions make them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from glasshouse.client.arrays import VectorLike, as_float32
from glasshouse.client.dictionaries.names import DictionaryLike, dictionary_name
from glasshouse.client.inputs import Input, InputLike, as_input


class NamedProbe(Protocol):
    """A handle, or the info of one."""

    @property
    def resource_name(self) -> str:
        """`models/{model}/probes/{probe}@{version}`."""


ProbeLike: TypeAlias = "str | NamedProbe"
"""A probe's handle, or its name."""


@dataclass(frozen=True)
class Likeliest:
    """The `k` likeliest next tokens of the clean input, at the metric's position."""

    k: int


TokensLike: TypeAlias = "str | int | Likeliest | Sequence[str | int | Likeliest]"
"""Tokens of the vocabulary: texts of one token each, ids, `likeliest(k)`, or several of these."""


@dataclass(frozen=True)
class TokenChoice:
    """Tokens in their one canonical form."""

    texts: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    top_k: int = 0


@dataclass(frozen=True)
class Metric:
    """One number a pass. `position`: the index of a token fed in; None is the last."""

    position: int | None


@dataclass(frozen=True)
class LogitDifference(Metric):
    """See `logit_difference`."""

    targets: TokenChoice
    foils: TokenChoice
    before_soft_cap: bool


@dataclass(frozen=True)
class LogProbability(Metric):
    """See `log_probability`."""

    targets: TokenChoice


@dataclass(frozen=True)
class Probability(Metric):
    """See `probability`."""

    targets: TokenChoice


@dataclass(frozen=True)
class KLDivergence(Metric):
    """See `kl_divergence`."""

    reference: Input | None


@dataclass(frozen=True, eq=False)
class DirectionValue(Metric):
    """See `direction_value`."""

    hook_point: str
    vector: NDArray[np.float32]
    bias: float


@dataclass(frozen=True)
class FeatureValue(Metric):
    """See `feature_value`."""

    dictionary: str
    feature: int
    pre_activation: bool


@dataclass(frozen=True)
class ProbeValue(Metric):
    """See `probe_value`."""

    probe: str
    label: str


def likeliest(k: int) -> Likeliest:
    """The `k` likeliest next tokens of the clean input, where tokens are asked for."""
    return Likeliest(k)


def logit_difference(
    targets: TokensLike,
    foils: TokensLike = (),
    *,
    position: int | None = None,
    before_soft_cap: bool = False,
) -> Metric:
    """Mean logit of `targets` minus mean logit of `foils`; without foils the plain logit."""
    return LogitDifference(position, token_choice(targets), token_choice(foils), before_soft_cap)


def log_probability(targets: TokensLike, *, position: int | None = None) -> Metric:
    """Natural log of the probability that the next token is one of `targets`."""
    return LogProbability(position, token_choice(targets))


def probability(targets: TokensLike, *, position: int | None = None) -> Metric:
    """Probability that the next token is one of `targets`."""
    return Probability(position, token_choice(targets))


def kl_divergence(reference: InputLike | None = None, *, position: int | None = None) -> Metric:
    """KL divergence in nats of the next-token distribution from that of `reference`, by default the clean input."""
    return KLDivergence(position, None if reference is None else as_input(reference, "reference"))


def direction_value(
    hook_point: str, vector: VectorLike, bias: float = 0.0, *, position: int | None = None
) -> Metric:
    """activation . vector + bias at a hook point."""
    return DirectionValue(position, hook_point, as_float32(vector, "vector"), bias)


def feature_value(
    dictionary: DictionaryLike, feature: int, *, pre_activation: bool = False, position: int | None = None
) -> Metric:
    """A dictionary feature's activation; or its pre-activation, whose gradient does not vanish where it is off."""
    return FeatureValue(position, dictionary_name(dictionary), feature, pre_activation)


def probe_value(probe: ProbeLike, label: str = "", *, position: int | None = None) -> Metric:
    """A probe's log-odds, of one of its labels where it knows several."""
    return ProbeValue(position, probe if isinstance(probe, str) else probe.resource_name, label)


def token_choice(value: TokensLike) -> TokenChoice:
    """The canonical form. Raises TypeError for anything that is no token."""
    single = isinstance(value, (str, int, np.integer, Likeliest)) and not isinstance(value, bool)
    listed = [value] if single else list(value)  # type: ignore[arg-type]
    texts, ids, top_k = [], [], 0
    for item in listed:
        if isinstance(item, str):
            texts.append(item)
        elif isinstance(item, Likeliest):
            top_k += item.k
        elif isinstance(item, (int, np.integer)) and not isinstance(item, bool):
            ids.append(int(item))
        else:
            raise TypeError(f"tokens must be texts, ids or likeliest(k), not {item!r}")
    return TokenChoice(tuple(texts), tuple(ids), top_k)
