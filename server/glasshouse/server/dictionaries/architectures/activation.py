"""What every architecture answers: which pre-activations become features, and with what score.

An encoder makes pre-activations h = x W_enc + b_enc, one tile of features at a time; a decoder-norm scale,
where the dictionary has one, multiplies them. The architecture turns a tile into *scores*:

- elementwise (ReLU, gated, JumpReLU, BatchTopK at inference): a score is the feature's value, 0 where silent,
  and depends on nothing else at the position;
- competing (TopK, absolute TopK, group-max): the score decides which features of the position survive, so a
  value is known only after the whole row was seen.

`selection` says how the survivors of a row are found; `glasshouse.server.dictionaries.encode` does it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

#: Features a tile or a gather covers: a slice of consecutive ids, or the ids themselves.
FeatureRange = slice | Tensor


@dataclass(frozen=True, kw_only=True)
class Selection:
    """How a competing architecture picks a row's survivors.

    k:            how many survive, per row (per group where `per_group`)
    floor:        survivors must score strictly above this: 0 after a ReLU, -inf without one
    by_magnitude: compare |score| and keep the sign
    per_group:    each group of features (head, source layer) is its own competition
    groups:       > 0: the row is cut into this many contiguous runs and the best of each survives
    """

    k: int
    floor: float = 0.0
    by_magnitude: bool = False
    per_group: bool = False
    groups: int = 0


class Activation(ABC):
    """One architecture's nonlinearity with its parameters (each (F,), indexed by flat feature id)."""

    name: str

    #: The survivors' rule of a competing architecture; None for an elementwise one.
    selection: Selection | None = None

    #: The score is h or 0, so a bfloat16 tile need not be widened to apply it.
    half_exact: bool = False

    @property
    def competing(self) -> bool:
        """Whether a feature's value depends on its neighbours at the position."""
        return self.selection is not None

    @property
    def k(self) -> int | None:
        """Features kept per position, where the architecture fixes it."""
        return None if self.selection is None else self.selection.k

    @abstractmethod
    def score(self, h: Tensor, features: FeatureRange) -> Tensor:
        """Scores of a tile of pre-activations h (N, T); may overwrite h."""

    def slope(self, features: Tensor) -> Tensor:
        """(len,) or (1,): how fast the score of a feature that fires moves with its pre-activation."""
        return torch.ones(1, device=features.device)
