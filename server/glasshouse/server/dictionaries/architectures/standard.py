"""Standard: f = ReLU(h).

With or without the decoder bias subtracted from the input, with a tied or free encoder: those are parameters
of the dictionary, not of the nonlinearity. https://transformer-circuits.pub/2023/monosemantic-features
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from glasshouse.server.dictionaries.architectures.activation import Activation, FeatureRange


@dataclass(frozen=True, kw_only=True)
class ReLU(Activation):
    """f = max(h, 0)."""

    name: str = "standard"
    half_exact: bool = True

    def score(self, h: Tensor, features: FeatureRange) -> Tensor:
        return h.relu_()
