"""The forward math of section 6, written by hand in float64, without a line of the server's code."""

from __future__ import annotations

import torch
from torch import Tensor


def f64(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def relu(h: Tensor) -> Tensor:
    return torch.where(h > 0, h, torch.zeros_like(h))


def jumprelu(h: Tensor, threshold: Tensor | float) -> Tensor:
    return torch.where((h > threshold) & (h > 0), h, torch.zeros_like(h))


def gated(z: Tensor, b_gate: Tensor, b_mag: Tensor, r_mag: Tensor) -> Tensor:
    return relu(z * torch.exp(r_mag) + b_mag) * (z + b_gate > 0)


def _keep(h: Tensor, key: Tensor, k: int) -> Tensor:
    """h at the k largest keys of each row, 0 elsewhere; by sorting, one row at a time."""
    flat_h, flat_key = h.reshape(-1, h.shape[-1]), key.reshape(-1, h.shape[-1])
    kept = torch.zeros_like(flat_h, dtype=torch.bool)
    for row, keys in enumerate(flat_key.tolist()):
        kept[row, sorted(range(len(keys)), key=lambda i: -keys[i])[:k]] = True
    return torch.where(kept, flat_h, torch.zeros_like(flat_h)).reshape(h.shape)


def topk(h: Tensor, k: int, *, positive: bool = True) -> Tensor:
    kept = _keep(h, h, k)
    return relu(kept) if positive else kept


def abstopk(h: Tensor, k: int) -> Tensor:
    return _keep(h, h.abs(), k)


def groupmax(h: Tensor, groups: int) -> Tensor:
    out = torch.zeros_like(h)
    run = h.shape[-1] // groups
    for row, line in enumerate(h.tolist()):
        for g in range(groups):
            values = line[g * run : (g + 1) * run]
            best = max(range(run), key=lambda i: values[i])
            out[row, g * run + best] = max(values[best], 0.0)
    return out


def layer_norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(normalised, mean, std), std unbiased, 1e-5 added on the way in only."""
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    std = (((x - mean) ** 2).sum(-1, keepdim=True) / (x.shape[-1] - 1)) ** 0.5
    return (x - mean) / (std + 1e-5), mean, std


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Max error within `tolerance` of the largest expected magnitude."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    scale = max(float(expected.abs().max()), 1e-12)
    worst = float((found.double() - expected).abs().max()) / scale
    assert worst <= tolerance, f"relative error {worst:.2e} over {tolerance:.0e}"


def same_active(found: Tensor, expected: Tensor, margin: float = 1e-5) -> None:
    """Identical active sets, away from values within `margin` of the largest."""
    scale = max(float(expected.abs().max()), 1e-12)
    clear = (expected.abs() > margin * scale) | (found.abs() > margin * scale)
    assert bool(((found != 0) == (expected != 0))[clear].all())
