"""One tap: how the callback of a hook point gets hold of the live tensor, and how its edit takes effect.

The callback edits in place. That is what makes the residual stream right without knowing how a block is
written: transformers keeps ``residual = hidden_states`` and hands the same tensor to the norm, so an edit
before the norm reaches both branches.

1. "output" and "input": the module's tensor itself. A part of a fused projection is a view of it; parts that
   alternate head by head cannot be viewed flat, so a copy is edited and written back.
2. "normalized": recomputed from the module's input; where the callback wrote, the gain is applied anew, to
   the rows that changed and no others (rounding stays what it was elsewhere).
3. Inside attention: lists on the module's `AttentionSite`. Maps are read only.

Shapes: (B, T, width) everywhere, (B, n_heads, T, S) for maps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from glasshouse.server.models.attention import AttentionTap, site_of
from glasshouse.server.models.families.norms import normalize, regain
from glasshouse.server.models.families.spec import TapSite
from glasshouse.server.types.hook_points import HookPoint


class TapCallback(Protocol):
    """Sees a live activation, may edit it in place, and says whether it did."""

    def __call__(self, point: HookPoint, tensor: Tensor, /) -> bool: ...


Remove = Callable[[], None]


def install_tap(model: nn.Module, tap: TapSite, callback: TapCallback) -> Remove:
    """Hang `callback` on the module of `tap`; the returned function takes it off again."""
    module = model.get_submodule(tap.path)
    if tap.where == "input":
        return module.register_forward_pre_hook(_input_hook(tap, callback)).remove
    if tap.where == "output":
        return module.register_forward_hook(_output_hook(tap, callback)).remove
    if tap.where == "normalized":
        return module.register_forward_hook(_normalized_hook(tap, callback)).remove
    assert tap.where != "logits", "the engine reads and edits logits around FamilySpec.unembed"
    return _install_in_attention(module, tap, callback)


def _input_hook(tap: TapSite, callback: TapCallback) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
    point = tap.point
    # What attention and the activation put out may be saved for their backward pass: with gradients on,
    # edit a copy.
    copies = not point.name.endswith(("hook_resid_pre", "hook_resid_mid"))

    def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
        x: Tensor = args[0]
        if copies and x.requires_grad:
            x = x.clone()
            callback(point, x)
            return (x, *args[1:])
        callback(point, x)
        return None

    return hook


def _output_hook(tap: TapSite, callback: TapCallback) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    point, columns, interleave = tap.point, tap.columns, tap.interleave

    def whole(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        callback(point, output[0] if isinstance(output, tuple) else output)

    def side_by_side(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        assert columns is not None
        callback(point, output[..., columns[0] : columns[1]])

    def alternating(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        assert interleave is not None
        part, n_parts = interleave
        heads = output.view(*output.shape[:-1], point.n_heads, n_parts, point.d_head)[..., part, :]
        flat = heads.flatten(-2)
        if callback(point, flat):
            heads.copy_(flat.view(heads.shape))

    if columns is not None:
        return side_by_side
    return whole if interleave is None else alternating


def _normalized_hook(
    tap: TapSite, callback: TapCallback
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
    point, kind = tap.point, tap.norm
    assert kind is not None

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        normalized = normalize(kind, module, args[0])
        edited = normalized.clone()
        if not callback(point, edited):
            return None
        if edited.requires_grad:  # an edit of size zero still has a gradient
            return regain(kind, module, edited)
        changed = (edited != normalized).any(-1, keepdim=True)
        return torch.where(changed, regain(kind, module, edited), output)

    return hook


def _install_in_attention(module: nn.Module, tap: TapSite, callback: TapCallback) -> Remove:
    site = site_of(module)
    point = tap.point

    def heads(x_BHTD: Tensor) -> None:
        by_position = x_BHTD.transpose(1, 2)
        flat = by_position.flatten(-2)
        copied = flat.data_ptr() != x_BHTD.data_ptr()
        if callback(point, flat) and copied:
            by_position.copy_(flat.view(by_position.shape))

    def maps(x_BHTS: Tensor) -> None:
        callback(point, x_BHTS)

    taps: list[AttentionTap] = getattr(site, tap.where)
    entry = maps if point.kind == "attention" else heads
    taps.append(entry)
    site.refresh()

    def remove() -> None:
        taps.remove(entry)
        site.refresh()

    return remove
