"""How well a dictionary fits activations, summed position by position in float64.

- L0: mean number of features that are not zero. Dead: share that was never so, over `n_positions`.
- Explained variance of a hook point: 1 - E||y - y^||^2 / (E||y||^2 - ||E y||^2); FVU is what is left of one.
- Shrinkage: E||y^||^2 / E[y . y^], below one where reconstructions are too short.

A dictionary that writes several hook points has one explained variance each; `explained_variance` is their mean,
so that the last layer, whose stream is longest, does not stand for all.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from glasshouse.server.dictionaries.dictionary import Dictionary


@dataclass(kw_only=True)
class Fit:
    """Running sums over positions. M = hook points written, E = their width, F = features."""

    dictionary: Dictionary
    n_positions: int = 0
    n_fired: int = 0
    fired_F: Tensor = field(init=False)
    sum_ME: Tensor = field(init=False)
    squares_M: Tensor = field(init=False)
    errors_M: Tensor = field(init=False)
    written_M: Tensor = field(init=False)
    agreement_M: Tensor = field(init=False)

    def __post_init__(self) -> None:
        facts = self.dictionary.facts
        n_out = len(facts.hook_points_out)
        self.fired_F = torch.zeros(facts.d_sae, dtype=torch.int64)
        self.sum_ME = torch.zeros(n_out, facts.d_out, dtype=torch.float64)
        zeros = torch.zeros(n_out, dtype=torch.float64)
        self.squares_M, self.errors_M = zeros.clone(), zeros.clone()
        self.written_M, self.agreement_M = zeros.clone(), zeros.clone()

    def add(self, x: Tensor, y: Tensor) -> None:
        """Inputs (N, D) or (N, S, D) and the outputs to explain, (N, E) or (N, M, E)."""
        features = self.dictionary.encode(x)
        made_NME = self.dictionary.decode(features, x).view(len(x), len(self.squares_M), -1).double()
        y_NME = y.view(made_NME.shape).double()
        self.n_positions += len(x)
        self.n_fired += features.ids.numel()
        self.fired_F += torch.bincount(features.ids.long(), minlength=len(self.fired_F))
        self.sum_ME += y_NME.sum(0)
        self.squares_M += y_NME.square().sum((0, 2))
        self.errors_M += (y_NME - made_NME).square().sum((0, 2))
        self.written_M += made_NME.square().sum((0, 2))
        self.agreement_M += (y_NME * made_NME).sum((0, 2))

    @property
    def l0(self) -> float:
        return self.n_fired / self.n_positions

    @property
    def l0_by_group(self) -> list[float]:
        """L0 of each group of features (source layer)."""
        parts = torch.split(self.fired_F, list(self.dictionary.facts.group_sizes))
        return [float(part.sum()) / self.n_positions for part in parts]

    @property
    def dead(self) -> float:
        return float((self.fired_F == 0).float().mean())

    @property
    def explained_by_point(self) -> list[float]:
        """Explained variance at each hook point written."""
        variance_M = self.squares_M - self.sum_ME.square().sum(1) / self.n_positions
        return [float(value) for value in 1 - self.errors_M / variance_M]

    @property
    def explained_variance(self) -> float:
        return sum(self.explained_by_point) / len(self.explained_by_point)

    @property
    def shrinkage(self) -> float:
        """Mean over hook points."""
        return float((self.written_M / self.agreement_M).mean())


def select(activations: dict[str, Tensor], hook_points: tuple[str, ...]) -> Tensor:
    """(N, D) of one hook point or (N, S, D) of several, out of (N, D) each."""
    if len(hook_points) == 1:
        return activations[hook_points[0]]
    return torch.stack([activations[point] for point in hook_points], dim=1)
