"""Captured activations encoded into features: rows of one pass that share a dictionary go through it together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from glasshouse.server.dictionaries.dictionary import stacked
from glasshouse.server.dictionaries.features import NO_FEATURE
from glasshouse.server.types.readouts import FeatureActivations, FeatureRows

from .capture import CapturePlan, Share
from .prepared import PreparedReadout


@dataclass(eq=False, kw_only=True)
class FeatureTable:
    """Features of n positions: `ids` int32 (n, k) with NO_FEATURE in empty slots, `activations` float32 (n, k)."""

    ids: np.ndarray
    activations: np.ndarray
    padded: bool

    def at(self, row: int) -> FeatureActivations:
        """The features of one position."""
        n_found = self._counts[row]
        return FeatureActivations(self.ids[row, :n_found], self.activations[row, :n_found])

    @cached_property
    def _counts(self) -> list[int]:
        if not self.padded:
            return [self.ids.shape[1]] * self.ids.shape[0]
        counts: list[int] = (self.ids != NO_FEATURE).sum(axis=1).tolist()
        return counts

    def part(self, start: int, stop: int) -> FeatureTable:
        """Some of its rows."""
        return FeatureTable(
            ids=self.ids[start:stop], activations=self.activations[start:stop], padded=self.padded
        )

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


# Readouts that ask the same of the same dictionary: what one encode answers.
_Question = tuple[int, int, tuple[int, ...]]


def _question(readout: PreparedReadout) -> _Question:
    asked = () if readout.feature_ids is None else tuple(readout.feature_ids.tolist())
    return id(readout.dictionary), readout.top_k, asked


def encode_captures(plan: CapturePlan) -> dict[tuple[int, int], FeatureTable]:
    """Every feature readout of a pass: (row of the batch, readout index) -> its features at the positions captured."""
    gathered: dict[tuple[int, int], tuple[PreparedReadout, list[Tensor]]] = {}
    for site, share in plan:
        if share.readout.dictionary is None:
            continue
        key = (share.row, share.readout.index)
        entry = gathered.setdefault(key, (share.readout, [torch.empty(0)] * len(share.readout.points)))
        entry[1][share.source] = site.values(share)
    groups: dict[_Question, list[tuple[int, int]]] = {}
    for key, (readout, _) in gathered.items():
        groups.setdefault(_question(readout), []).append(key)
    tables: dict[tuple[int, int], FeatureTable] = {}
    for keys in groups.values():
        readout = gathered[keys[0]][0]
        inputs = [stacked(gathered[key][1]) for key in keys]
        table = encode(readout, torch.cat(inputs))
        offset = 0
        for key, rows in zip(keys, inputs, strict=True):
            tables[key] = table.part(offset, offset + rows.shape[0])
            offset += rows.shape[0]
    return tables


def encode_step(plan: CapturePlan) -> Iterator[tuple[int, int, FeatureActivations]]:
    """The same of a pass of one token a row, without a table a row: (row of the batch, readout index, features)."""
    groups: dict[_Question, tuple[PreparedReadout, list[tuple[int, int]], list[list[Tensor]]]] = {}
    for site in plan.sites.values():
        merged: dict[tuple[_Question, int], list[Share]] = {}
        for share in site.shares:
            if share.readout.dictionary is not None:
                merged.setdefault((_question(share.readout), share.source), []).append(share)
        for (question, source), shares in merged.items():
            first = shares[0].readout
            entry = groups.setdefault(question, (first, [], [[] for _ in first.points]))
            entry[2][source].append(site.rows_of(shares))
            if source == 0:
                entry[1].extend((share.row, share.readout.index) for share in shares)
    for readout, keys, sources in groups.values():
        table = encode(readout, stacked([torch.cat(parts) for parts in sources]))
        for place, (row, index) in enumerate(keys):
            yield row, index, table.at(place)


def encode(readout: PreparedReadout, x: Tensor) -> FeatureTable:
    """Features of x, (n, D) or (n, S, D), as the readout asks for them."""
    assert readout.dictionary is not None
    if readout.feature_ids is None:
        top = readout.dictionary.encode_top_k(x, readout.top_k)
        return FeatureTable(ids=top.ids.cpu().numpy(), activations=top.values.cpu().numpy(), padded=True)
    values = readout.dictionary.encode_features(x, readout.feature_ids).cpu().numpy()
    ids = np.broadcast_to(readout.feature_ids.to(torch.int32).cpu().numpy(), values.shape)
    return FeatureTable(ids=ids, activations=values, padded=False)
