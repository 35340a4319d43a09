"""Edits of a live activation that patching and attribution share. Each changes it in place.

Shapes: B batch, T positions, H heads, D width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glasshouse.server.attribution.gradient_model import Edit


def setting(values: Tensor) -> Edit:
    """Replace the whole activation by `values`, (B, T, width) or broadcast to it."""

    def edit(live: Tensor) -> None:
        live.copy_(values.expand_as(live))

    return edit


def adding(delta: Tensor) -> Edit:
    """Add `delta`, (B, T, width) or broadcast to it."""

    def edit(live: Tensor) -> None:
        live.add_(delta)

    return edit


def setting_where(mask: Tensor, values: Tensor) -> Edit:
    """Replace where `mask` (bool, broadcast to the activation) is True."""

    def edit(live: Tensor) -> None:
        live.copy_(torch.where(mask, values, live))

    return edit


def split_heads(x: Tensor, n_heads: int) -> Tensor:
    """(..., H * D) -> (..., H, D)."""
    return x.reshape(*x.shape[:-1], n_heads, x.shape[-1] // n_heads)
