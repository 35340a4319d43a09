"""Gated: f = 1[z + b_gate > 0] * ReLU(z * exp(r_mag) + b_mag), z = x W_enc without a bias.

The gate and the magnitude share the encoder. https://arxiv.org/abs/2404.16014
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from glasshouse.server.dictionaries.architectures.activation import Activation, FeatureRange


@dataclass(frozen=True, kw_only=True)
class Gated(Activation):
    """b_gate, b_mag, r_mag: (F,) float32. With a decoder-norm scale n, z arrives as z*n; pass biases times
    n.
    """

    b_gate: Tensor
    b_mag: Tensor
    r_mag: Tensor
    name: str = "gated"

    def score(self, h: Tensor, features: FeatureRange) -> Tensor:
        shut = h <= -self.b_gate[features].float()
        scale, shift = self.r_mag[features].float().exp(), self.b_mag[features].float()
        return h.mul_(scale).add_(shift).relu_().masked_fill_(shut, 0.0)

    def slope(self, features: Tensor) -> Tensor:
        return self.r_mag[features].float().exp()
