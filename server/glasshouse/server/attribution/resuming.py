"""Passes that start where a patch makes a difference, on what an unpatched pass left.

A patch at layer l and position p changes nothing in earlier layers and, attention being causal, nothing at earlier
positions. So:

1. One pass over the base keeps every layer's stream, keys and values (`BaseRun`).
2. A patched pass runs positions p.. only, attending to the base's keys and values before p (`SuffixMemory`, handed
   to the model's own attention), and from the stream entering layer l where the family's stack can be entered there.
3. Where only the last position is read, the last layer needs the others' keys and values alone: the block is left as
   soon as it has made them (`narrow`), and runs again on the last position.

Positions of such a pass are counted from p: an index from the end means the same in both.

Shapes: B rows, T positions of the base, S = T - p of a suffix, K key-value heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from glasshouse.server.models.loaded import LoadedModel


@dataclass(frozen=True, kw_only=True, eq=False)
class BaseRun:
    """keys, values: layer -> (B, K, T, D). streams: layer -> (B, T, d_model), what enters it. B is 1, for a base that
    every row of a later pass shares, or that pass' number of rows.
    """

    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    streams: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Resume:
    """Start at `layer` and `position` of a base.

    narrow: only the last position of the last layer is wanted, nothing of that layer is read, and nothing edited but
    the stream that enters it.
    """

    base: BaseRun
    layer: int
    position: int
    narrow: bool = False


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


class _Made(Exception):
    """The keys and values are made; the rest of the block is not wanted."""


class _Capture:
    """Takes a block's keys and values and ends it there."""

    def __init__(self, before: SuffixMemory) -> None:
        self._before = before
        self.keys, self.values = torch.empty(0), torch.empty(0)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self._before.append(layer, key, value)
        raise _Made

    def mask(self, sliding_window: int | None) -> Tensor | None:
        raise AssertionError("ended before its mask is asked for")


@dataclass(frozen=True, kw_only=True, eq=False)
class _LastQuery:
    """All keys and values, for a block that runs on the last position alone."""

    keys: Tensor
    values: Tensor

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self.keys, self.values

    def mask(self, sliding_window: int | None) -> Tensor | None:
        n_keys = self.keys.shape[2]
        if sliding_window is None or sliding_window >= n_keys:
            return torch.ones(1, 1, 1, n_keys, dtype=torch.bool, device=self.keys.device)
        distance = torch.arange(n_keys - 1, -1, -1, device=self.keys.device)
        return (distance < sliding_window)[None, None, None]


def run_suffix(loaded: LoadedModel, tokens_BT: Tensor, resume: Resume, detach: Callable[[], None]) -> Tensor:
    """(B, S, d_model) after the final norm, for rows that differ from the base from `resume` on only; (B, 1, d_model)
    where it is narrow and the family's stack can be entered. `detach` takes all taps off: they have done their work
    when the last block runs again.
    """
    n_rows, n_positions = tokens_BT.shape
    family, switch, start = loaded.family, loaded.attention, resume.position
    positions = torch.arange(start, n_positions, device=tokens_BT.device).expand(n_rows, -1)
    switch.memory = memory = SuffixMemory(resume.base, start, n_positions, tokens_BT.device)
    try:
        if not family.direct:  # the base module prepares what its blocks take: it runs whole
            return family.forward_hidden(loaded.model, tokens_BT[:, start:], positions)
        base: Any = loaded.model.get_submodule(family.base)
        stream = resume.base.streams[resume.layer][:, start:]
        stream = stream.repeat(n_rows // len(stream), 1, 1)
        rotary = base.rotary_emb(stream, position_ids=positions)

        def run(block: Any, stream: Tensor, rotary: Any, positions: Tensor) -> Tensor:
            out: Tensor = block(
                stream, attention_mask=None, position_embeddings=rotary, position_ids=positions
            )
            return out

        for block in base.layers[resume.layer : -1]:
            stream = run(block, stream, rotary, positions)
        if resume.narrow:
            switch.memory = capture = _Capture(memory)
            try:
                run(base.layers[-1], stream, rotary, positions)
            except _Made:
                switch.memory = _LastQuery(keys=capture.keys, values=capture.values)
            detach()
            stream, positions = stream[:, -1:], positions[:, -1:]
            rotary = base.rotary_emb(stream, position_ids=positions)
        hidden: Tensor = base.norm(run(base.layers[-1], stream, rotary, positions))
        return hidden
    finally:
        switch.memory = None
