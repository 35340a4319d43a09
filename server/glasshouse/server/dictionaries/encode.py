"""Encoding at the speed of the matrix product, without the (positions, d_sae) matrix.

1. The features are cut into tiles of about 8M scores (`tile_width`). Each tile's product is written into one
   reused buffer, small enough to stay in the last-level cache and never faulted in twice.
2. Competing architectures and top-k requests keep a running table of each row's k best. Once it is full, a
   score matters only if it beats its row's k-th best, and after the first tiles almost none does: the maximum
   of each block of 64 scores is compared first, and only blocks that hold a survivor are looked into.
3. Survivors are merged into the tables of the rows they belong to; rows without one are not touched.
4. Elementwise architectures asked for everything need no table: the same block test against zero, then a
   compaction into CSR.

Ties. A score equal to a row's k-th best loses to the one already in the table, so between tiles the lower
feature id wins; inside one tile the choice is torch.topk's. A bfloat16 product is rounded to bfloat16 before
the comparison, so ties are common there, and which of them survives is as arbitrary as in the owner
libraries.

Top-k background: https://arxiv.org/abs/2406.04093. The peers materialise the whole matrix (section 9 of the
formats' reference); this does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from glasshouse.server.dictionaries.architectures.activation import Selection
from glasshouse.server.dictionaries.features import NO_FEATURE, SparseFeatures, TopKFeatures

TILE_SCORES = 1 << 23
NARROWEST_TILE = 512
BLOCK = 64
#: Rows encoded at a time: bounds the running tables and the tiles for very long inputs.
ROWS_AT_A_TIME = 8192


class Tile(NamedTuple):
    """Scores (N, T) of the consecutive features start..start+T-1 of one group; valid until the next tile."""

    start: int
    group: int
    scores: Tensor


def tile_width(n_rows: int, n_features: int) -> int:
    """Features a tile holds for this many rows: a multiple of `BLOCK` unless it is all of them."""
    width = max(NARROWEST_TILE, TILE_SCORES // max(n_rows, 1)) // BLOCK * BLOCK
    return min(width, n_features)


def products(
    x: Tensor, W_enc: Tensor, convert: Callable[[Tensor], Tensor] | None = None
) -> Iterator[tuple[int, Tensor]]:
    """(start, x @ W_enc[:, start:start+T]) over all tiles: x (N, D), W_enc (D, F) of any strides.

    One buffer serves all the tiles. `convert` widens a tile of the weights where their dtype differs from
    x's.
    """
    n_rows, n_features = x.shape[0], W_enc.shape[1]
    width = tile_width(n_rows, n_features)
    buffer = torch.empty(n_rows * width, dtype=x.dtype, device=x.device)
    for start in range(0, n_features, width):
        stop = min(start + width, n_features)
        weights = W_enc[:, start:stop]
        out = buffer[: n_rows * (stop - start)].view(n_rows, stop - start)
        torch.mm(x, weights if convert is None else convert(weights), out=out)
        yield start, out


def survivors(scores: Tensor, floor: Tensor, by_magnitude: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, columns, scores) of the entries of a tile (N, T) above their row's floor (N, 1), row by row.

    Memory: N * T / 64 and what survives, not another tile.
    """
    n_rows, width = scores.shape
    if width % BLOCK:
        keys = scores.abs() if by_magnitude else scores
        rows, columns = (keys > floor).nonzero(as_tuple=True)
        return rows, columns, scores[rows, columns]
    blocks = scores.view(n_rows, width // BLOCK, BLOCK)
    best = torch.maximum(blocks.amax(-1), -blocks.amin(-1)) if by_magnitude else blocks.amax(-1)
    block_rows, block_columns = (best > floor).nonzero(as_tuple=True)
    inside = blocks[block_rows, block_columns]
    keys = inside.abs() if by_magnitude else inside
    picked, offset = (keys > floor[block_rows]).nonzero(as_tuple=True)
    return block_rows[picked], block_columns[picked] * BLOCK + offset, inside[picked, offset]


class RunningTopK:
    """Each row's k best so far: ids (N, k) and scores (N, k), strongest first.

    Empty slots hold `NO_FEATURE` and the floor.
    """

    def __init__(self, k: int, floor: float, by_magnitude: bool, start: int, scores: Tensor) -> None:
        """Begins with the tile of scores (N, T) of the features from `start`."""
        self.k = k
        self.floor = floor
        self.by_magnitude = by_magnitude
        self.ids, self.scores = self._best_of(start, scores)
        missing = k - self.ids.shape[1]
        if missing:
            self.ids = torch.nn.functional.pad(self.ids, (0, missing), value=NO_FEATURE)
            self.scores = torch.nn.functional.pad(self.scores, (0, missing), value=floor)

    def _keys(self, scores: Tensor) -> Tensor:
        return scores.abs() if self.by_magnitude else scores

    def offer(self, start: int, scores: Tensor) -> None:
        """Another tile."""
        rows, columns, values = survivors(scores, self._keys(self.scores[:, -1:]), self.by_magnitude)
        if rows.numel() == 0:
            return
        counts = torch.bincount(rows, minlength=scores.shape[0])
        touched = counts.nonzero().squeeze(1)
        most = int(counts.max())
        if touched.numel() * most > scores.numel() // 8:
            self._take_whole(start, scores)
            return
        slot = torch.arange(rows.numel(), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        place = torch.cumsum(counts > 0, 0)[rows] - 1
        ids = torch.full((touched.numel(), most), NO_FEATURE, dtype=torch.int32, device=rows.device)
        fresh = torch.full((touched.numel(), most), self.floor, dtype=scores.dtype, device=rows.device)
        ids[place, slot] = (columns + start).to(torch.int32)
        fresh[place, slot] = values
        self._merge(touched, ids, fresh)

    def _take_whole(self, start: int, scores: Tensor) -> None:
        self._merge(slice(None), *self._best_of(start, scores))

    def _best_of(self, start: int, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The ids and scores of a tile's k best, strongest first; at most T."""
        values, columns = self._keys(scores).topk(min(self.k, scores.shape[1]), dim=1)
        silent = values <= self.floor if self.floor > -math.inf else values == -math.inf
        if self.by_magnitude:
            values = scores.gather(1, columns)
        ids = columns.to(torch.int32).add_(start).masked_fill_(silent, NO_FEATURE)
        return ids, values.masked_fill_(silent, self.floor)

    def _merge(self, rows: Tensor | slice, ids: Tensor, scores: Tensor) -> None:
        all_ids = torch.cat([self.ids[rows], ids], dim=1)
        all_scores = torch.cat([self.scores[rows], scores], dim=1)
        best = self._keys(all_scores).topk(self.k, dim=1).indices
        self.ids[rows] = all_ids.gather(1, best)
        self.scores[rows] = all_scores.gather(1, best)


def best_of_each_run(
    tiles: Iterable[Tile], n_rows: int, n_features: int, groups: int
) -> tuple[Tensor, Tensor]:
    """Group-max: (ids, scores), each (N, groups): the strongest of each contiguous run, where positive."""
    run = n_features // groups
    ids: Tensor | None = None
    for tile in tiles:
        if ids is None:
            like = tile.scores
            ids = torch.full((n_rows, groups), NO_FEATURE, dtype=torch.int32, device=like.device)
            best = torch.zeros(n_rows, groups, dtype=like.dtype, device=like.device)
        stop = tile.start + tile.scores.shape[1]
        for group in range(tile.start // run, (stop - 1) // run + 1):
            low, high = max(tile.start, group * run), min(stop, (group + 1) * run)
            value, column = tile.scores[:, low - tile.start : high - tile.start].max(dim=1)
            better = value > best[:, group]
            best[:, group] = torch.where(better, value, best[:, group])
            ids[:, group] = torch.where(better, (column + low).to(torch.int32), ids[:, group])
    assert ids is not None, "a dictionary has at least one tile"
    return ids, best


def top_k(tiles: Iterable[Tile], k: int, floor: float, by_magnitude: bool) -> tuple[Tensor, Tensor]:
    """(ids, scores), each (N, k): the k best of every row over all tiles, `NO_FEATURE` in empty slots."""
    table: RunningTopK | None = None
    for tile in tiles:
        if table is None:
            table = RunningTopK(k, floor, by_magnitude, tile.start, tile.scores)
        else:
            table.offer(tile.start, tile.scores)
    assert table is not None, "a dictionary has at least one tile"
    return table.ids, table.scores


def select(
    tiles: Iterable[Tile], n_rows: int, n_features: int, selection: Selection
) -> tuple[Tensor, Tensor]:
    """The survivors of a competing architecture: (ids, scores), each (N, number of survivors at most)."""
    if selection.groups:
        return best_of_each_run(tiles, n_rows, n_features, selection.groups)
    if not selection.per_group:
        return top_k(tiles, selection.k, selection.floor, selection.by_magnitude)
    tables: dict[int, RunningTopK] = {}
    for tile in tiles:
        table = tables.get(tile.group)
        if table is None:
            tables[tile.group] = RunningTopK(
                selection.k, selection.floor, selection.by_magnitude, tile.start, tile.scores
            )
        else:
            table.offer(tile.start, tile.scores)
    order = sorted(tables)
    return torch.cat([tables[g].ids for g in order], 1), torch.cat([tables[g].scores for g in order], 1)


def compact(tiles: Iterable[Tile], n_rows: int, d_sae: int) -> SparseFeatures:
    """Every positive score as CSR: what an elementwise architecture fires."""
    rows: list[Tensor] = []
    ids: list[Tensor] = []
    values: list[Tensor] = []
    for tile in tiles:
        zero = torch.zeros(n_rows, 1, dtype=tile.scores.dtype, device=tile.scores.device)
        row, column, score = survivors(tile.scores, zero, by_magnitude=False)
        rows.append(row)
        ids.append(column + tile.start)
        values.append(score.float())
    return SparseFeatures.from_entries(torch.cat(rows), torch.cat(ids), torch.cat(values), n_rows, d_sae)


def concatenate(parts: list[SparseFeatures]) -> SparseFeatures:
    """Chunks of positions, in order, as one."""
    if len(parts) == 1:
        return parts[0]
    offsets = [0]
    for part in parts:
        offsets.append(offsets[-1] + part.ids.numel())
    indptr = torch.cat([parts[0].indptr[:1]] + [p.indptr[1:] + o for p, o in zip(parts, offsets)])
    return SparseFeatures(
        indptr=indptr,
        ids=torch.cat([p.ids for p in parts]),
        values=torch.cat([p.values for p in parts]),
        d_sae=parts[0].d_sae,
    )


def strongest_first(ids: Tensor, values: Tensor, k: int, d_sae: int) -> TopKFeatures:
    """A padded table cut or padded to exactly k columns, by |value| where values are signed by design."""
    if ids.shape[1] < k:
        pad = (0, k - ids.shape[1])
        ids = torch.nn.functional.pad(ids, pad, value=NO_FEATURE)
        values = torch.nn.functional.pad(values, pad)
    return TopKFeatures(ids=ids[:, :k].contiguous(), values=values[:, :k].float().contiguous(), d_sae=d_sae)
