"""What is held fixed while a gradient or a patch runs through the model.

- Attention patterns: `hook_pattern` carries no gradient, or is set to the patterns of another pass.
- Norm scales: y = (x - mean) * s with s = 1/std (LayerNorm) or 1/rms (RMSNorm) taken as a constant, or set to
  that of another pass. The mean is linear and stays live. Every norm of the stream counts (ln1, ln2, their
  post-norms, ln_final); norms on queries and keys act before the pattern and are not touched.

Without held values the numbers of the forward pass are unchanged: only its derivative is.

Shapes: B batch, T positions, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from glasshouse.server.hooks.taps import Remove
from glasshouse.server.models.families.norms import NormKind, regain
from glasshouse.server.models.families.spec import TapSite


@dataclass(frozen=True, kw_only=True)
class Held:
    """Values of one pass to hold another one at; B is 1 or that of the other pass.

    patterns: ``blocks.L.attn.hook_pattern`` -> (B, H, T, T). scales: ``...hook_normalized`` -> (B, T, 1).
    """

    patterns: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Freeze:
    """Which of the two are held, and at which values (their own where `held` has none)."""

    patterns: bool = False
    norms: bool = False
    held: Held | None = None


NOTHING_FROZEN = Freeze()
LINEAR = Freeze(patterns=True, norms=True)
"""Patterns and scales frozen: what is left is linear but for the MLPs."""


def norm_scale(kind: NormKind, norm: nn.Module, x: Tensor) -> Tensor:
    """(..., 1): what `norm` multiplies the (centred) stream by, before its gain."""
    eps = getattr(norm, "variance_epsilon", None)
    eps = float(cast(float, norm.eps if eps is None else eps))
    power = x.var(-1, unbiased=False, keepdim=True) if kind is NormKind.LAYER else x.square().mean(-1, True)
    return torch.rsqrt(power + eps)


def centred(kind: NormKind, x: Tensor) -> Tensor:
    """`x` as its norm scales it: less its mean for LayerNorm, itself for RMSNorm."""
    return x - x.mean(-1, keepdim=True) if kind is NormKind.LAYER else x


def stop_gradient(tensor: Tensor) -> None:
    """In place, for live activations: the value stays, nothing flows further back.

    A view cannot leave its graph, so zeros flow back from it: right, but not free.
    """
    if tensor._is_view():
        tensor.copy_(tensor.detach().clone())
    else:
        tensor.detach_()


def freeze_norm(
    model: nn.Module, tap: TapSite, held: Tensor | None, at_normalized: Callable[[Tensor], None]
) -> Remove:
    """Run the norm of a ``normalized`` tap with a constant scale; `at_normalized` may edit before the gain."""
    module, kind = model.get_submodule(tap.path), tap.norm
    assert kind is not None

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x: Tensor = args[0]
        scale = norm_scale(kind, module, x).detach() if held is None else held
        normalized = centred(kind, x) * scale
        at_normalized(normalized)
        return regain(kind, module, normalized)

    return module.register_forward_hook(hook).remove


def record_scale(model: nn.Module, tap: TapSite, scales: dict[str, Tensor]) -> Remove:
    """Note the scale of a ``normalized`` tap's norm under the point's name."""
    module, kind = model.get_submodule(tap.path), tap.norm
    assert kind is not None

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        scales[tap.point.name] = norm_scale(kind, module, args[0]).detach()

    return module.register_forward_hook(hook).remove
