"""The mathematics of the edits, over many rows at once, each with its own vector.

Legend: N rows (one edited position each), W width of the hook point. Everything is float32, whatever the model's
dtype; the caller converts. Each function returns new rows and leaves its input alone.

Sources: activation addition (Turner et al. 2023, arXiv 2308.10248); directional ablation (Arditi et al. 2024, arXiv
2406.11717); angular steering (Vu & Nguyen 2025, arXiv 2510.26243).
"""

from __future__ import annotations

import torch
from torch import Tensor


def add(s_NW: Tensor, v_NW: Tensor, plain_N1: Tensor, scaled_N1: Tensor | None) -> Tensor:
    """s + (plain + scaled |s|) v. For norm-scaled rows v is a unit vector and plain is 0; `scaled_N1` None: no such row."""
    if scaled_N1 is None:
        return torch.addcmul(s_NW, v_NW, plain_N1)
    alpha_N1 = plain_N1 + scaled_N1 * torch.linalg.vector_norm(s_NW, dim=-1, keepdim=True)
    return torch.addcmul(s_NW, v_NW, alpha_N1)


def clamp_projection(s_NW: Tensor, unit_NW: Tensor, low_N1: Tensor, high_N1: Tensor) -> Tensor:
    """s with its projection on `unit_NW` clamped to [low, high]; low = high = 0 ablates the direction."""
    projection_N1 = (s_NW * unit_NW).sum(-1, keepdim=True)
    clamped_N1 = torch.minimum(torch.maximum(projection_N1, low_N1), high_N1)
    return torch.addcmul(s_NW, unit_NW, clamped_N1 - projection_N1)


def rotate(s_NW: Tensor, first_NW: Tensor, second_NW: Tensor, target_NW: Tensor) -> Tensor:
    """s - Ps + |Ps| target, P the projection on the plane of the orthonormal `first_NW` and `second_NW`, `target_NW` the
    unit vector at the wanted angle in that plane.
    """
    along_N1 = (s_NW * first_NW).sum(-1, keepdim=True)
    across_N1 = (s_NW * second_NW).sum(-1, keepdim=True)
    outside_NW = s_NW - along_N1 * first_NW - across_N1 * second_NW
    return torch.addcmul(outside_NW, target_NW, torch.hypot(along_N1, across_N1))


def restore_norm(edited_NW: Tensor, original_NW: Tensor, keep_N1: Tensor) -> Tensor:
    """Rows where `keep_N1` is true, rescaled to the norm they had; an edited row of zeros stays zero."""
    before_N1 = torch.linalg.vector_norm(original_NW, dim=-1, keepdim=True)
    after_N1 = torch.linalg.vector_norm(edited_NW, dim=-1, keepdim=True)
    scale_N1 = before_N1 / after_N1.clamp_min(torch.finfo(torch.float32).tiny)
    return torch.where(keep_N1, edited_NW * scale_N1, edited_NW)
