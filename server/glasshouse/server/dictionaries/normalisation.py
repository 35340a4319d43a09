"""What happens to activations before a dictionary reads them, and how its output is brought back.

Each object maps x (N, S, D) to normalised units and knows the affine map back, output = y * scale + shift.
A *fixed* normalisation has one such map for the whole dictionary; a *run-time* one computes it from each x.

- `Identity`        x
- `FixedScale`      x * s_in, y / s_out: one factor a hook point (a data set's average norm that was not
  folded
                    into the weights)
- `ConstantNorm`    x * sqrt(D) / ||x|| per position
- `LayerNorm`       (x - mean) / (std + 1e-5), std unbiased; back with std and mean, WITHOUT the 1e-5
- `Standardise`     (x - mean) * scale, back y / (scale + 1e-8) + mean
- `InputOnly`       wraps another: normalised on the way in, never undone (run-time normalised transcoders)

Sources: SAELens `saes/sae.py`, OpenAI's `sparse_autoencoder/model.py`, science-of-finetuning's
`dictionary.py`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LAYER_NORM_EPS = 1e-5
STANDARDISE_EPS = 1e-8


class WayBack(NamedTuple):
    """output = y * scale + shift; both broadcast to (N, M, E)."""

    scale: Tensor
    shift: Tensor


class Normalisation(ABC):
    """One normalisation; immutable."""

    name: str

    @abstractmethod
    def enter(self, x: Tensor) -> Tensor:
        """x (N, S, D) float32 in the dictionary's units."""

    @abstractmethod
    def way_back(self, x: Tensor) -> WayBack:
        """The map back for these inputs."""

    @property
    def fixed_way_back(self) -> WayBack | None:
        """The map back when it does not depend on x, else None."""
        return None


def _one(x: Tensor | None = None) -> Tensor:
    return torch.ones((), device=None if x is None else x.device)


@dataclass(frozen=True, kw_only=True)
class Identity(Normalisation):
    name: str = "none"

    def enter(self, x: Tensor) -> Tensor:
        return x

    def way_back(self, x: Tensor) -> WayBack:
        return WayBack(_one(x), torch.zeros((), device=x.device))

    @property
    def fixed_way_back(self) -> WayBack:
        return WayBack(_one(), torch.zeros(()))


@dataclass(frozen=True, kw_only=True)
class FixedScale(Normalisation):
    """scale_in (S, 1) and scale_out (M, 1): factors per hook point."""

    scale_in: Tensor
    scale_out: Tensor
    name: str = "expected_average_norm"

    def enter(self, x: Tensor) -> Tensor:
        return x * self.scale_in

    def way_back(self, x: Tensor) -> WayBack:
        return self.fixed_way_back

    @property
    def fixed_way_back(self) -> WayBack:
        return WayBack(1.0 / self.scale_out, torch.zeros((), device=self.scale_out.device))


@dataclass(frozen=True, kw_only=True)
class ConstantNorm(Normalisation):
    name: str = "constant_norm_rescale"

    def enter(self, x: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * (math.sqrt(x.shape[-1]) / norm)

    def way_back(self, x: Tensor) -> WayBack:
        return WayBack(
            x.norm(dim=-1, keepdim=True) / math.sqrt(x.shape[-1]), torch.zeros((), device=x.device)
        )


@dataclass(frozen=True, kw_only=True)
class LayerNorm(Normalisation):
    name: str = "layer_norm"

    def enter(self, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        normalised: Tensor = centred / (centred.std(dim=-1, keepdim=True) + LAYER_NORM_EPS)
        return normalised

    def way_back(self, x: Tensor) -> WayBack:
        return WayBack(x.std(dim=-1, keepdim=True), x.mean(dim=-1, keepdim=True))


@dataclass(frozen=True, kw_only=True)
class Standardise(Normalisation):
    """mean (S, D) and scale, broadcastable to it: (S, 1) for one factor a site, (S, D) for one a neuron."""

    mean: Tensor
    scale: Tensor
    name: str = "standardise"

    def enter(self, x: Tensor) -> Tensor:
        return (x - self.mean) * self.scale

    def way_back(self, x: Tensor) -> WayBack:
        return self.fixed_way_back

    @property
    def fixed_way_back(self) -> WayBack:
        return WayBack(1.0 / (self.scale + STANDARDISE_EPS), self.mean)


@dataclass(frozen=True, kw_only=True)
class InputOnly(Normalisation):
    """`inner` on the way in; the output is already in the units of the model."""

    inner: Normalisation

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.inner.name} (input only)"

    def enter(self, x: Tensor) -> Tensor:
        return self.inner.enter(x)

    def way_back(self, x: Tensor) -> WayBack:
        return WayBack(_one(x), torch.zeros((), device=x.device))

    @property
    def fixed_way_back(self) -> WayBack:
        return WayBack(_one(), torch.zeros(()))
