"""JumpReLU: f = ReLU(h) * 1[h > threshold], strictly; and BatchTopK / Matryoshka, which are one at inference.

JumpReLU: https://arxiv.org/abs/2407.14435. BatchTopK is trained with the k * N strongest of a batch and
served with one threshold estimated from training, so that a position never depends on its batch:
https://arxiv.org/abs/2412.06410. A threshold of -1 was never estimated, and then everything positive fires.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from glasshouse.server.dictionaries.architectures.activation import Activation, FeatureRange


@dataclass(frozen=True, kw_only=True)
class JumpReLU(Activation):
    """threshold: (F,) float32, in the units of the (scaled) pre-activation."""

    threshold: Tensor
    name: str = "jumprelu"
    half_exact: bool = True

    def score(self, h: Tensor, features: FeatureRange) -> Tensor:
        silent = h <= self.threshold[features]
        return h.relu_().masked_fill_(silent, 0.0)


@dataclass(frozen=True, kw_only=True)
class BatchTopK(Activation):
    """threshold: one number for the dictionary, -1 where it was never estimated."""

    threshold: float
    trained_k: int | None = None
    name: str = "batchtopk"
    half_exact: bool = True

    @property
    def k(self) -> int | None:
        return self.trained_k

    def score(self, h: Tensor, features: FeatureRange) -> Tensor:
        silent = h <= max(self.threshold, 0.0)
        return h.masked_fill_(silent, 0.0)
