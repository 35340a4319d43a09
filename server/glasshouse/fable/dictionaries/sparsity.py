"""What makes features sparse, one class an architecture, all in one shape.

Each turns h (B, F) into features and says what its sparsity costs:

- `ReLUPenalty`  f = ReLU(h + b), cost = sum f (L1 of unit-norm decoder rows).
  https://transformer-circuits.pub/2023/monosemantic-features
- `GatedPenalty` f = 1[g > 0] ReLU(h e^r + b_mag) with g = h + b_gate, cost = sum ReLU(g); ReLU(g) must also
  reconstruct, through a frozen decoder. https://arxiv.org/abs/2404.16014
- `JumpPenalty`  f = h 1[h > threshold], cost = L0; both get straight-through gradients of a rectangle of width
  `BANDWIDTH` around the threshold. https://arxiv.org/abs/2407.14435
- `KeepTopK`     the k largest of ReLU(h + b) of a row. https://arxiv.org/abs/2406.04093
- `KeepBatchTopK` the k * B largest of a batch; a running mean of the smallest survivor is the threshold at
  inference. https://arxiv.org/abs/2412.06410

Costs are means over the batch. A cost of the first three is multiplied by a coefficient that `Controller` moves
until the wanted number of features fires.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from glasshouse.fable.dictionaries.recipes import DictionaryRecipe

BANDWIDTH = 0.5
_INITIAL_THRESHOLD = 0.5
_THRESHOLD_MEMORY = 0.95


class Sparse(NamedTuple):
    """f (B, F); cost, a scalar, None where the architecture fixes L0; gate (B, F) that must also reconstruct."""

    features: Tensor
    cost: Tensor | None = None
    gate: Tensor | None = None


class Sparsifier(nn.Module):
    """One architecture's nonlinearity and its own parameters, each (F,)."""

    @abstractmethod
    def forward(self, h_BF: Tensor) -> Sparse: ...

    @torch.no_grad()
    def reset(self, features: Tensor) -> None:
        """Gives `features` (N,) fresh parameters."""
        for parameter in self.parameters():
            parameter[features] = 0.0


class ReLUPenalty(Sparsifier):
    def __init__(self, d_sae: int) -> None:
        super().__init__()
        self.b_enc = nn.Parameter(torch.zeros(d_sae))

    def forward(self, h_BF: Tensor) -> Sparse:
        features = torch.relu(h_BF + self.b_enc)
        return Sparse(features, features.sum(1).mean())


class GatedPenalty(Sparsifier):
    def __init__(self, d_sae: int) -> None:
        super().__init__()
        self.b_gate = nn.Parameter(torch.zeros(d_sae))
        self.b_mag = nn.Parameter(torch.zeros(d_sae))
        self.r_mag = nn.Parameter(torch.zeros(d_sae))

    def forward(self, h_BF: Tensor) -> Sparse:
        gate = torch.relu(h_BF + self.b_gate)
        magnitude = torch.relu(h_BF * self.r_mag.exp() + self.b_mag)
        return Sparse(magnitude * (gate > 0), gate.sum(1).mean(), gate)


class _Jump(torch.autograd.Function):
    """(f, fires) of (h, threshold) with the pseudo-derivatives of section 4 of the paper."""

    @staticmethod
    def forward(ctx, h_BF: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        fires = (h_BF > threshold).to(h_BF.dtype)
        ctx.save_for_backward(h_BF, threshold, fires)
        return h_BF * fires, fires

    @staticmethod
    def backward(ctx, grad_f: Tensor, grad_fires: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        h_BF, threshold, fires = ctx.saved_tensors
        near = ((h_BF - threshold).abs() < BANDWIDTH / 2).to(h_BF.dtype)
        grad_threshold = -((grad_f * threshold + grad_fires) * near).sum(0) / BANDWIDTH
        return grad_f * fires, grad_threshold


class JumpPenalty(Sparsifier):
    def __init__(self, d_sae: int) -> None:
        super().__init__()
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.log_threshold = nn.Parameter(torch.full((d_sae,), math.log(_INITIAL_THRESHOLD)))

    def forward(self, h_BF: Tensor) -> Sparse:
        features, fires = _Jump.apply(torch.relu(h_BF + self.b_enc), self.log_threshold.exp())  # type: ignore[no-untyped-call]
        return Sparse(features, fires.sum(1).mean())

    @torch.no_grad()
    def reset(self, features: Tensor) -> None:
        super().reset(features)
        self.log_threshold[features] = math.log(_INITIAL_THRESHOLD)


class KeepTopK(Sparsifier):
    def __init__(self, d_sae: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.b_enc = nn.Parameter(torch.zeros(d_sae))

    def forward(self, h_BF: Tensor) -> Sparse:
        positive = torch.relu(h_BF + self.b_enc)
        values, ids = positive.topk(self.k, dim=1, sorted=False)
        return Sparse(torch.zeros_like(positive).scatter(1, ids, values))


class KeepBatchTopK(Sparsifier):
    threshold: Tensor

    def __init__(self, d_sae: int, k: float) -> None:
        super().__init__()
        self.k = k
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.register_buffer("threshold", torch.tensor(-1.0))

    def forward(self, h_BF: Tensor) -> Sparse:
        positive = torch.relu(h_BF + self.b_enc)
        if not self.training:
            return Sparse(positive * (positive > self.threshold))
        with torch.no_grad():
            smallest = _kth_largest(positive, round(self.k * h_BF.shape[0]), 0.7 * float(self.threshold))
            if self.threshold < 0:
                self.threshold.copy_(smallest)
            self.threshold.lerp_(smallest, 1 - _THRESHOLD_MEMORY)
        return Sparse(positive * (positive >= smallest))


def _kth_largest(values: Tensor, k: int, guess: float) -> Tensor:
    """The k-th largest entry. A guess somewhat below it spares sorting what is far below; any guess is safe."""
    candidates = values[values > guess]
    if candidates.numel() < k:
        candidates = values.flatten()
    return candidates.topk(k, sorted=False).values.min()


class Controller:
    """Moves the sparsity coefficient until `target_l0` features fire.

    log-coefficient += INTEGRAL * e, e = log(L0 / target) with a running mean of L0, at most one. It starts small, so
    sparsity warms up by itself. Within a factor e of the target, PROPORTIONAL * (change of e) is added: thresholds
    and biases follow the coefficient hundreds of steps late, and without a brake L0 falls through the target.
    """

    INTEGRAL = 0.01
    PROPORTIONAL = 2.0
    INITIAL = 1e-3

    def __init__(self, target_l0: float) -> None:
        self.target_l0 = target_l0
        self.coefficient = self.INITIAL
        self.l0 = float("nan")

    def update(self, l0: float) -> None:
        """One step's mean number of features that fired."""
        before = l0 if math.isnan(self.l0) else self.l0
        self.l0 = 0.95 * before + 0.05 * l0
        error = math.log(max(self.l0, 0.1) / self.target_l0)
        change = math.log(max(self.l0, 0.1) / max(before, 0.1))
        moved = self.INTEGRAL * max(-1.0, min(1.0, error))
        if abs(error) < 1.0:
            moved += self.PROPORTIONAL * change
        self.coefficient *= math.exp(max(-0.05, min(0.05, moved)))

    def state_dict(self) -> dict[str, float]:
        return {"coefficient": self.coefficient, "l0": self.l0}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coefficient, self.l0 = state["coefficient"], state["l0"]


def make_sparsifier(recipe: DictionaryRecipe) -> Sparsifier:
    """The sparsifier of a recipe's architecture."""
    if recipe.architecture == "standard":
        return ReLUPenalty(recipe.d_sae)
    if recipe.architecture == "gated":
        return GatedPenalty(recipe.d_sae)
    if recipe.architecture == "jumprelu":
        return JumpPenalty(recipe.d_sae)
    if recipe.architecture == "topk":
        return KeepTopK(recipe.d_sae, round(recipe.target_l0))
    return KeepBatchTopK(recipe.d_sae, recipe.target_l0)
