"""TopK: the k strongest pre-activations of a position survive.

Peers apply the ReLU after the selection (SAELens, OpenAI) or before it (sparsify, dictionary_learning): the
features that fire and their values are the same, only the ids of empty slots differ, and here an empty slot
has no id. Without any ReLU (circuit-tracer, Qwen-Scope) the survivors may be negative.
https://arxiv.org/abs/2406.04093
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from glasshouse.server.dictionaries.architectures.activation import Activation, FeatureRange, Selection


@dataclass(frozen=True, kw_only=True)
class TopK(Activation):
    """keep: how many survive; relu: whether survivors must be positive; per_group: one competition a
    group.
    """

    keep: int
    relu: bool = True
    per_group: bool = False
    name: str = "topk"
    half_exact: bool = True

    @property
    def selection(self) -> Selection:  # type: ignore[override]
        return Selection(k=self.keep, floor=0.0 if self.relu else -math.inf, per_group=self.per_group)

    def score(self, h: Tensor, features: FeatureRange) -> Tensor:
        return h
