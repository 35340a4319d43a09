"""A second body for a loaded model: the same weights, hooks of its own.

Hooks and attention sites hang on modules, so a pass with gradients on the served modules would run the
generation engine's taps, and the engine would run ours. The twin is a copy of the module tree alone:

1. Every module is made anew and takes over its original's attributes; containers of submodules, parameters
   and buffers are new, the tensors in them are the original's (nothing is allocated for float32 weights).
2. Its hook tables start empty and every attention module gets a site of its own on a switch of its own: the
   engine's memory, taps and masks are out of reach. Nothing of the engine's is iterated over, so the copy can
   be made while the engine runs.
3. Attribution runs in float32, half precision being too coarse to reproduce an edge: weights in another dtype
   are widened once, tied ones staying tied.

`copy.deepcopy` with the tensors in its memo would do the same and also copy what hooks and caches hang on.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from glasshouse.server.models import attention
from glasshouse.server.models.loaded import LoadedModel
from glasshouse.server.types.errors import FailedPrecondition
from glasshouse.wire import reasons

_HOOK_TABLES = (
    "_backward_pre_hooks",
    "_backward_hooks",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def twin_of(loaded: LoadedModel) -> LoadedModel:
    """The same model in float32 with hooks, attention sites and switch of its own."""
    if not loaded.family.taps:
        raise FailedPrecondition(
            f"{loaded.family.name} models are served without hook points, so nothing can be attributed.",
            reason=reasons.CAPABILITY_MISSING,
            field="model",
            remedy="Serve a model of a supported family.",
        )
    with torch.inference_mode(False):
        model = _Copy().module(loaded.model)
    switch = attention.AttentionSwitch()
    for layer, module in enumerate(loaded.family.attention_modules(model)):
        attention.install(module, switch, layer)
    return replace(loaded, model=model, attention=switch, dtype=torch.float32)


class _Copy:
    """One copy of a tree; modules and tensors that occur twice are copied once."""

    def __init__(self) -> None:
        self._modules: dict[int, nn.Module] = {}
        self._tensors: dict[int, Tensor] = {}

    def module(self, original: nn.Module) -> nn.Module:
        found = self._modules.get(id(original))
        if found is not None:
            return found
        copy: nn.Module = original.__class__.__new__(original.__class__)
        self._modules[id(original)] = copy
        attributes: dict[str, Any] = dict(original.__dict__)
        for name, value in attributes.items():
            if isinstance(value, MethodType) and value.__self__ is original:
                attributes[name] = MethodType(value.__func__, copy)
        attributes |= {name: OrderedDict() for name in _HOOK_TABLES}
        attributes["_parameters"] = {n: self._tensor(p) for n, p in original._parameters.items()}
        attributes["_buffers"] = {n: self._tensor(b) for n, b in original._buffers.items()}
        attributes["_modules"] = {
            name: None if child is None else self.module(child) for name, child in original._modules.items()
        }
        copy.__dict__.update(attributes)
        return copy

    def _tensor(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.dtype not in (torch.bfloat16, torch.float16):
            return tensor
        if id(tensor) not in self._tensors:
            wide: Tensor = tensor.detach().float()
            if isinstance(tensor, nn.Parameter):
                wide = nn.Parameter(wide, requires_grad=False)
            self._tensors[id(tensor)] = wide
        return self._tensors[id(tensor)]
