"""Passes that start where a patch makes a difference, on what an unpatched pass left.

A patch at layer l and position p changes nothing in earlier layers and, attention being causal, nothing at earlier
positions. So:

1. One pass over the base keeps every layer's stream, keys and values (`BaseRun`).
2. A patched pass runs positions p.. only, attending to the base's keys and values before p (`SuffixMemory`, handed
   to the model's own attention), and from the stream entering layer l where the family's stack can be entered there.

Positions of such a pass are counted from p: an index from the end means the same in both.

Shapes: B rows, T positions of the base, S = T - p of a suffix, K key-value heads, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from glasshouse.server.models.loaded import LoadedModel


@dataclass(frozen=True, kw_only=True, eq=False)
class BaseRun:
    """keys, values: layer -> (1, K, T, D). streams: layer -> (1, T, d_model), what enters it."""

    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    streams: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Resume:
    """Start at `layer` and `position` of a base."""

    base: BaseRun
    layer: int
    position: int


class RecordingMemory:
    """Keeps keys and values as they pass, and changes nothing."""

    def __init__(self, loaded: LoadedModel, base: BaseRun, n_positions: int) -> None:
        self._loaded, self._base, self._n_positions = loaded, base, n_positions

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self._base.keys[layer], self._base.values[layer] = key.clone(), value.clone()
        return key, value

    def mask(self, sliding_window: int | None) -> Tensor | None:
        if sliding_window is None or sliding_window >= self._n_positions:
            return None
        return self._loaded.attention.window_mask(self._n_positions, sliding_window, self._loaded.device)


class SuffixMemory:
    """The base's keys and values before a position, in front of the pass's own."""

    def __init__(self, base: BaseRun, position: int, n_positions: int, device: torch.device) -> None:
        self._base, self._position = base, position
        index = torch.arange(n_positions, device=device)
        self._distance = index[position:, None] - index[None]
        self._causal = (self._distance >= 0)[None, None]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        shape = (key.shape[0], -1, -1, -1)
        before = slice(0, self._position)
        keys = self._base.keys[layer][:, :, before].expand(shape)
        values = self._base.values[layer][:, :, before].expand(shape)
        return torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)

    def mask(self, sliding_window: int | None) -> Tensor | None:
        if sliding_window is None:
            return self._causal
        return self._causal & (self._distance < sliding_window)


def run_suffix(loaded: LoadedModel, tokens_BT: Tensor, resume: Resume) -> Tensor:
    """(B, S, d_model) after the final norm, for rows that differ from the base from `resume` on only."""
    n_rows, n_positions = tokens_BT.shape
    family, switch, start = loaded.family, loaded.attention, resume.position
    positions = torch.arange(start, n_positions, device=tokens_BT.device).expand(n_rows, -1)
    switch.memory = SuffixMemory(resume.base, start, n_positions, tokens_BT.device)
    try:
        if not family.direct:  # the base module prepares what its blocks take: it runs whole
            return family.forward_hidden(loaded.model, tokens_BT[:, start:], positions)
        base: Any = loaded.model.get_submodule(family.base)
        stream = resume.base.streams[resume.layer][:, start:].repeat(n_rows, 1, 1)
        rotary = base.rotary_emb(stream, position_ids=positions)
        for block in base.layers[resume.layer :]:
            stream = block(stream, attention_mask=None, position_embeddings=rotary, position_ids=positions)
        hidden: Tensor = base.norm(stream)
        return hidden
    finally:
        switch.memory = None
