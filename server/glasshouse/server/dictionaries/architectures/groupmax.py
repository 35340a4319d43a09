"""Group-max: F features in k contiguous groups, the strongest of each group survives, after a ReLU.

Source: EleutherAI's sparsify, `fused_encoder.py` (activation "groupmax").
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from glasshouse.server.dictionaries.architectures.activation import Activation, FeatureRange, Selection


@dataclass(frozen=True, kw_only=True)
class GroupMax(Activation):
    """groups: how many, dividing F; at most one feature of each fires."""

    groups: int
    name: str = "groupmax"
    half_exact: bool = True

    @property
    def selection(self) -> Selection:  # type: ignore[override]
        return Selection(k=self.groups, floor=0.0, groups=self.groups)

    def score(self, h: Tensor, features: FeatureRange) -> Tensor:
        return h
