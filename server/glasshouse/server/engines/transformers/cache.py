"""Keys and values, kept by us rather than by the library's cache classes.

`BatchCache` holds the rows that decode together, packed: row b of the batch is row b of every tensor, so that attention
reads plain views and a step writes with one indexed store a layer. A row that leaves is overwritten by the last one.
`PromptCache` holds the prompts of one prefill pass, or one long prompt fed in pieces.

Shape legend: B rows, K key-value heads, T positions fed now, S positions attended to, D d_head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Capacities grow in steps of these, so that a busy batch rarely reallocates.
_ROW_STEP = 8
_LENGTH_STEP = 64


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """What a cache is made of."""

    n_layers: int
    device: torch.device


class BatchCache:
    """The packed rows of the decoding batch. An `AttentionMemory` for passes of one token a row."""

    def __init__(self, shape: CacheShape) -> None:
        self._shape = shape
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._rows_capacity = 0
        self._length_capacity = 0
        self.n_rows = 0
        # Tokens cached per row, on the host and on the device.
        self.lengths: list[int] = []
        self._lengths_B = torch.zeros(0, dtype=torch.long, device=shape.device)
        self._rows_B = torch.zeros(0, dtype=torch.long, device=shape.device)
        self._n_attended = 0
        self._masks: dict[int | None, Tensor] = {}

    @property
    def positions_B1(self) -> Tensor:
        """The position each row feeds next, int64 (B, 1)."""
        return self._lengths_B[:, None]

    def join(self, keys: list[Tensor], values: list[Tensor], row: int, length: int) -> int:
        """Takes over the first `length` positions of row `row` of a prompt's keys and values, each (B', K, S, D) a layer.
        Returns the row it got.
        """
        self._reserve(self.n_rows + 1, length + 1, keys, values)
        place = self.n_rows
        for layer in range(self._shape.n_layers):
            self._keys[layer][place, :, :length] = keys[layer][row, :, :length]
            self._values[layer][place, :, :length] = values[layer][row, :, :length]
        self.n_rows += 1
        self.lengths.append(length)
        self._refresh()
        return place

    def leave(self, rows: list[int]) -> list[tuple[int, int]]:
        """Frees `rows`; returns the (from, to) moves that fill their places, to be followed by the batch's owner."""
        moves = []
        for row in sorted(rows, reverse=True):
            last = self.n_rows - 1
            # What leaves is zeroed: stale values that are not finite would reach a later row through masked keys.
            self._zero(row)
            if row != last:
                length = self.lengths[last]
                for layer in range(self._shape.n_layers):
                    self._keys[layer][row, :, :length] = self._keys[layer][last, :, :length]
                    self._values[layer][row, :, :length] = self._values[layer][last, :, :length]
                self._zero(last)
                self.lengths[row] = length
                moves.append((last, row))
            self.lengths.pop()
            self.n_rows = last
        self._refresh()
        return moves

    def begin_step(self) -> None:
        """Makes room for one more position a row and sets what this step attends to."""
        longest = max(self.lengths) + 1
        if longest > self._length_capacity:
            self._reserve(self.n_rows, longest, self._keys, self._values)
        self._n_attended = min(-(-longest // 16) * 16, self._length_capacity)
        self._masks.clear()

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (B, K, 1, D) at each row's next position; returns views (B, K, S, D)."""
        keys, values = self._keys[layer], self._values[layer]
        keys[self._rows_B, :, self._lengths_B] = key[:, :, 0]
        values[self._rows_B, :, self._lengths_B] = value[:, :, 0]
        n_rows, attended = self.n_rows, self._n_attended
        return keys[:n_rows, :, :attended], values[:n_rows, :, :attended]

    def mask(self, sliding_window: int | None) -> Tensor:
        """Bool (B, 1, 1, S), made once a step and window."""
        mask = self._masks.get(sliding_window)
        if mask is None:
            index = torch.arange(self._n_attended, device=self._shape.device)
            lengths = self._lengths_B[:, None]
            mask = index <= lengths
            if sliding_window is not None:
                mask = mask & (index > lengths - sliding_window)
            mask = mask[:, None, None]
            self._masks[sliding_window] = mask
        return mask

    def end_step(self) -> None:
        """Books the position that every row has fed."""
        self.lengths = [length + 1 for length in self.lengths]
        self._lengths_B = self._lengths_B + 1

    def _zero(self, row: int) -> None:
        for layer in range(self._shape.n_layers):
            self._keys[layer][row].zero_()
            self._values[layer][row].zero_()

    def _refresh(self) -> None:
        self._lengths_B = torch.tensor(self.lengths, dtype=torch.long, device=self._shape.device)
        self._rows_B = torch.arange(self.n_rows, device=self._shape.device)

    def _reserve(self, rows: int, length: int, like_keys: list[Tensor], like_values: list[Tensor]) -> None:
        if rows <= self._rows_capacity and length <= self._length_capacity:
            return
        rows = max(self._rows_capacity, -(-rows // _ROW_STEP) * _ROW_STEP)
        length = max(self._length_capacity, -(-length // _LENGTH_STEP) * _LENGTH_STEP)
        for store, like in ((self._keys, like_keys), (self._values, like_values)):
            fresh = [t.new_zeros((rows, t.shape[1], length, t.shape[3])) for t in like]
            for old, new in zip(store, fresh, strict=False):
                new[: self.n_rows, :, : old.shape[2]] = old[: self.n_rows]
            store[:] = fresh
        self._rows_capacity, self._length_capacity = rows, length

    def shrink(self) -> None:
        """Gives the memory back; called when the batch is empty."""
        assert self.n_rows == 0, "rows still decode"
        self._keys, self._values = [], []
        self._rows_capacity = self._length_capacity = 0


class PromptCache:
    """Keys and values of prompts being fed: several whole ones in one pass, or one in pieces.

    An `AttentionMemory`. After the pass `keys` and `values` hold (B, K, S, D) a layer.
    """

    def __init__(self, shape: CacheShape) -> None:
        self._device = shape.device
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._past = 0
        self._fed = 0
        self._masks: dict[int | None, Tensor | None] = {}

    def begin_pass(self, n_fed: int) -> None:
        """The next pass feeds `n_fed` positions (padded) a row."""
        self._past += self._fed
        self._fed = n_fed
        self._masks.clear()

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (B, K, T, D) after what is there."""
        if layer == len(self.keys):
            self.keys.append(key)
            self.values.append(value)
        else:
            self.keys[layer] = torch.cat([self.keys[layer], key], dim=2)
            self.values[layer] = torch.cat([self.values[layer], value], dim=2)
        return self.keys[layer], self.values[layer]

    def mask(self, sliding_window: int | None) -> Tensor | None:
        """None where plain causal attention will do; else bool (1, 1, T, S)."""
        if sliding_window not in self._masks:
            total = self._past + self._fed
            windowed = sliding_window is not None and sliding_window < total
            if self._past == 0 and not windowed:
                self._masks[sliding_window] = None
            else:
                query = torch.arange(self._past, total, device=self._device)[:, None]
                key = torch.arange(total, device=self._device)[None, :]
                mask = key <= query
                if windowed:
                    mask &= key > query - sliding_window  # type: ignore[operator]
                self._masks[sliding_window] = mask[None, None]
        return self._masks[sliding_window]
