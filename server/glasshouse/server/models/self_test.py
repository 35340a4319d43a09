"""Does a model of an unlisted architecture compute the same through our attention as through its own?

1. Run a few random tokens, as a right-padded batch, with transformers' eager attention: the reference.
2. Run them again through our attention function, and through `FamilySpec.forward_hidden` and `unembed`.
3. Equal logits at the real positions, and a sliding window handed to attention wherever the configuration
   speaks of one (a window longer than the test would not show in the logits): admitted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glasshouse.server.models import attention
from glasshouse.server.models.families.spec import FamilySpec
from glasshouse.server.types.errors import ServingError

_LENGTHS = (11, 7)
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


class _WindowProbe:
    """An `AttentionMemory` without memory that notes which sliding windows the layers ask for."""

    def __init__(self, switch: attention.AttentionSwitch) -> None:
        self.windows: list[int | None] = []
        self._switch = switch
        self._n_positions = 0
        self._device = torch.device("cpu")

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self._n_positions, self._device = key.shape[2], key.device
        return key, value

    def mask(self, sliding_window: int | None) -> Tensor | None:
        self.windows.append(sliding_window)
        if sliding_window is None or sliding_window >= self._n_positions:
            return None
        return self._switch.window_mask(self._n_positions, sliding_window, self._device)


def reproduces_eager(model: nn.Module, family: FamilySpec, switch: attention.AttentionSwitch) -> bool:
    """Compare with the model's own eager logits. Leaves the model with our attention."""
    config: Any = model.config
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    n_positions = max(_LENGTHS)
    ids = torch.randint(0, int(config.vocab_size), (len(_LENGTHS), n_positions), generator=generator).to(
        device
    )
    real = torch.arange(n_positions)[None, :] < torch.tensor(_LENGTHS)[:, None]
    positions = torch.arange(n_positions, device=device).expand(len(_LENGTHS), n_positions)
    probe = _WindowProbe(switch)
    try:
        with torch.inference_mode():
            model.set_attn_implementation("eager")  # type: ignore[operator]
            reference = model(input_ids=ids, attention_mask=real.long().to(device), use_cache=False).logits[
                real
            ]
            model.set_attn_implementation(attention.IMPLEMENTATION)  # type: ignore[operator]
            switch.memory = probe
            hidden = family.forward_hidden(model, ids, positions)
            _, ours = family.unembed(model, hidden[real])
    except (ServingError, RuntimeError, ValueError, TypeError, AttributeError, KeyError):
        return False
    finally:
        switch.memory = None
    if ours.shape != reference.shape or len(probe.windows) != int(config.num_hidden_layers):
        return False
    if _slides(config) and not any(probe.windows):
        return False
    error = (ours.float() - reference.float()).abs().max()
    return bool(error <= _TOLERANCE[ours.dtype] * reference.float().abs().max().clamp(min=1.0))


def _slides(config: Any) -> bool:
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        return "sliding_attention" in layer_types
    return bool(getattr(config, "sliding_window", None)) and bool(getattr(config, "use_sliding_window", True))
