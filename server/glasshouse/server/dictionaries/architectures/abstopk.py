"""Absolute TopK: the k largest |h| survive with their sign, so a feature fires in both directions.

Fires means not zero, never "greater than zero". https://arxiv.org/abs/2510.00404
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from glasshouse.server.dictionaries.architectures.activation import Activation, FeatureRange, Selection


@dataclass(frozen=True, kw_only=True)
class AbsTopK(Activation):
    """keep: how many survive."""

    keep: int
    name: str = "abstopk"
    half_exact: bool = True

    @property
    def selection(self) -> Selection:  # type: ignore[override]
        return Selection(k=self.keep, floor=0.0, by_magnitude=True)

    def score(self, h: Tensor, features: FeatureRange) -> Tensor:
        return h
