"""Captured activations encoded into features: rows of one pass that share a dictionary go through it together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glasshouse.server.dictionaries.features import NO_FEATURE
from glasshouse.server.types.readouts import FeatureActivations, FeatureRows

from .capture import CapturePlan
from .prepared import PreparedReadout


@dataclass(frozen=True, eq=False, kw_only=True)
class FeatureTable:
    """Features of n positions: `ids` int32 (n, k) with NO_FEATURE in empty slots, `activations` float32 (n, k)."""

    ids: np.ndarray
    activations: np.ndarray
    padded: bool

    def at(self, row: int) -> FeatureActivations:
        """The features of one position."""
        if not self.padded:
            return FeatureActivations(self.ids[row], self.activations[row])
        n_found = int((self.ids[row] != NO_FEATURE).sum())
        return FeatureActivations(self.ids[row, :n_found], self.activations[row, :n_found])

    def rows(self) -> FeatureRows:
        """All positions as compressed sparse rows."""
        keep = self.ids != NO_FEATURE
        indptr = np.zeros(self.ids.shape[0] + 1, dtype=np.int64)
        np.cumsum(keep.sum(axis=1), out=indptr[1:])
        return FeatureRows(indptr, self.ids[keep], self.activations[keep])


def concatenate(tables: Sequence[FeatureTable]) -> FeatureTable:
    """Tables of the same readout, one after the other."""
    if len(tables) == 1:
        return tables[0]
    return FeatureTable(
        ids=np.concatenate([table.ids for table in tables]),
        activations=np.concatenate([table.activations for table in tables]),
        padded=tables[0].padded,
    )


def encode_captures(plan: CapturePlan) -> dict[tuple[int, int], FeatureTable]:
    """Every feature readout of a pass: (row of the batch, readout index) -> its features at the positions captured."""
    gathered: dict[tuple[int, int], tuple[PreparedReadout, list[Tensor]]] = {}
    for site, share in plan:
        if share.readout.dictionary is None:
            continue
        key = (share.row, share.readout.index)
        entry = gathered.setdefault(key, (share.readout, [torch.empty(0)] * len(share.readout.points)))
        entry[1][share.source] = site.values(share)
    groups: dict[tuple[int, int, tuple[int, ...]], list[tuple[int, int]]] = {}
    for key, (readout, _) in gathered.items():
        asked = () if readout.feature_ids is None else tuple(readout.feature_ids.tolist())
        groups.setdefault((id(readout.dictionary), readout.top_k, asked), []).append(key)
    tables: dict[tuple[int, int], FeatureTable] = {}
    for keys in groups.values():
        readout = gathered[keys[0]][0]
        inputs = [_stacked(gathered[key][1]) for key in keys]
        table = encode(readout, torch.cat(inputs))
        offset = 0
        for key, rows in zip(keys, inputs, strict=True):
            stop = offset + rows.shape[0]
            tables[key] = FeatureTable(
                ids=table.ids[offset:stop], activations=table.activations[offset:stop], padded=table.padded
            )
            offset = stop
    return tables


def _stacked(sources: Sequence[Tensor]) -> Tensor:
    return sources[0] if len(sources) == 1 else torch.stack(list(sources), dim=1)


def encode(readout: PreparedReadout, x: Tensor) -> FeatureTable:
    """Features of x, (n, D) or (n, S, D), as the readout asks for them."""
    assert readout.dictionary is not None
    if readout.feature_ids is None:
        top = readout.dictionary.encode_top_k(x, readout.top_k)
        return FeatureTable(ids=top.ids.cpu().numpy(), activations=top.values.cpu().numpy(), padded=True)
    values = readout.dictionary.encode_features(x, readout.feature_ids).cpu().numpy()
    ids = np.broadcast_to(readout.feature_ids.to(torch.int32).cpu().numpy(), values.shape)
    return FeatureTable(ids=ids, activations=values, padded=False)
