"""The normalisations of the supported families, split at the gain.

``hook_normalized`` is after the division, before the gain, so each kind is two functions: `normalize` (the
stream to unit scale) and `regain` (what the module does next). Composed they are the module's forward, except
for rounding where the module keeps float32 in between.

All tensors are (..., width) in the model's dtype.
"""

from __future__ import annotations

import enum
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NormKind(enum.Enum):
    """Which formula a norm module computes."""

    LAYER = "layer"  # (x - mean) / sqrt(var + eps) * w + b
    RMS = "rms"  # w * (x / rms) cast back first (Llama)
    RMS_WIDE = "rms_wide"  # w * (x / rms) in float32, then cast back (OLMo 2)
    RMS_PLUS_ONE = "rms_plus_one"  # (1 + w) * (x / rms) in float32, then cast back (Gemma)


def _eps(norm: nn.Module) -> float:
    eps = getattr(norm, "variance_epsilon", None)
    return float(cast(float, norm.eps if eps is None else eps))


def normalize(kind: NormKind, norm: nn.Module, x: Tensor) -> Tensor:
    """`x` scaled as `norm` scales it, without the gain and bias."""
    if kind is NormKind.LAYER:
        return F.layer_norm(x, (x.shape[-1],), eps=_eps(norm))
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + _eps(norm))).to(x.dtype)


def regain(kind: NormKind, norm: nn.Module, normalized: Tensor) -> Tensor:
    """What `norm` puts out for a stream that `normalize` made."""
    weight = cast(Tensor, norm.weight)
    if kind is NormKind.LAYER:
        bias = cast("Tensor | None", norm.bias)
        gained = normalized * weight
        return gained if bias is None else gained + bias
    if kind is NormKind.RMS:
        return weight * normalized
    gain = weight.float() if kind is NormKind.RMS_WIDE else 1.0 + weight.float()
    return (normalized.float() * gain).to(normalized.dtype)
