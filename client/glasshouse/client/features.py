"""Feature activations as numpy: at one position, over several, and what a person reads of them.

Over several positions they are compressed sparse rows: row i has the entries indptr[i] to indptr[i + 1].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from glasshouse.client.feature_tables import FeatureTable, FeatureTableRow

_SHOWN: Final = 8
"""Entries that a repr shows."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class FeatureActivations:
    """Features at one position, the strongest first or in the order asked for: pairs (id, activation).

    ids: (n,) int32. activations: (n,) float32.
    """

    ids: NDArray[np.int32]
    activations: NDArray[np.float32]

    def __iter__(self) -> Iterator[tuple[int, float]]:
        return iter(zip(self.ids.tolist(), self.activations.tolist()))

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        shown = [f"{i}: {value:.4g}" for i, value in islice(self, _SHOWN)]
        rest = [f"and {len(self) - _SHOWN} more"] if len(self) > _SHOWN else []
        return f"FeatureActivations({', '.join(shown + rest)})"

    def get(self, feature: int, default: float = 0.0) -> float:
        """The activation of one feature; `default` where it is not among these."""
        found = np.flatnonzero(self.ids == feature)
        return float(self.activations[found[0]]) if len(found) else default

    def top(self, k: int) -> FeatureActivations:
        """The `k` strongest by magnitude, the strongest first; the lower id where two are equal."""
        order = np.lexsort((self.ids, -np.abs(self.activations)))[:k]
        return FeatureActivations(self.ids[order], self.activations[order])

    def joined(self, other: FeatureActivations) -> FeatureActivations:
        """These, then those of `other` that are not among these."""
        new = ~np.isin(other.ids, self.ids)
        return FeatureActivations(
            np.concatenate([self.ids, other.ids[new]]),
            np.concatenate([self.activations, other.activations[new]]),
        )


@dataclass(frozen=True, eq=False, repr=False)
class FeatureRows:
    """Features at several positions of one sequence.

    positions: (n_pos,) int64, ascending. indptr: (n_pos + 1,) int64. ids: (nnz,) int32. activations: (nnz,)
    float32.
    """

    positions: NDArray[np.int64]
    indptr: NDArray[np.int64]
    ids: NDArray[np.int32]
    activations: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[tuple[int, FeatureActivations]]:
        """(position, features) in order."""
        return ((position, self._at(index)) for index, position in enumerate(self.positions.tolist()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} positions, {len(self.ids)} activations)"

    def row(self, position: int) -> FeatureActivations:
        """The features at a position. Raises KeyError where it was not read."""
        index = int(np.searchsorted(self.positions, position))
        if index == len(self.positions) or self.positions[index] != position:
            raise KeyError(position)
        return self._at(index)

    def dense(self, d_sae: int) -> NDArray[np.float32]:
        """(n_pos, d_sae) float32, zero where nothing was sent. Raises ValueError for a `d_sae` too small."""
        if len(self.ids) and d_sae <= self.ids.max():
            raise ValueError(f"d_sae {d_sae} is too small: there is a feature {self.ids.max()}")
        dense = np.zeros((len(self), d_sae), dtype=np.float32)
        dense[np.repeat(np.arange(len(self)), np.diff(self.indptr)), self.ids] = self.activations
        return dense

    def column(self, feature: int) -> NDArray[np.float32]:
        """(n_pos,) float32: one feature along the positions, zero where it was not sent."""
        column = np.zeros(len(self), dtype=np.float32)
        entries = np.flatnonzero(self.ids == feature)
        column[np.searchsorted(self.indptr, entries, side="right") - 1] = self.activations[entries]
        return column

    def strongest(self, k: int) -> FeatureActivations:
        """The `k` features strongest anywhere by magnitude, each with its activation there."""
        order = np.lexsort((-np.abs(self.activations), self.ids))
        ids, first = np.unique(self.ids[order], return_index=True)
        return FeatureActivations(ids, self.activations[order][first]).top(k)

    def joined(self, other: FeatureRows) -> FeatureRows:
        """The positions of both; where both have one, this one's features first."""
        mine, theirs = dict(self), dict(other)
        rows = {
            position: mine[position].joined(theirs[position])
            if position in mine and position in theirs
            else mine[position]
            if position in mine
            else theirs[position]
            for position in sorted({*mine, *theirs})
        }
        return rows_of(rows)

    def _at(self, index: int) -> FeatureActivations:
        here = slice(int(self.indptr[index]), int(self.indptr[index + 1]))
        return FeatureActivations(self.ids[here], self.activations[here])


@dataclass(frozen=True, eq=False, repr=False)
class EncodedFeatures(FeatureRows):
    """Features of one input: row i belongs to `positions[i]`, an index into `token_ids` and `tokens`.

    Of given activations: positions 0 to n - 1, and no tokens. `dictionary` is the one that encoded.
    """

    dictionary: str = ""
    token_ids: list[int] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)

    def top(self, k: int = 5) -> FeatureTable:
        """The `k` strongest features of each token, as a table to print."""
        rows = [
            FeatureTableRow(position, self.tokens[position] if self.tokens else "", list(features.top(k)))
            for position, features in self
        ]
        return FeatureTable(self.dictionary, k, rows)


FeaturesLike: TypeAlias = "FeatureRows | FeatureActivations | Mapping[int, float]"
"""Features to decode: of several positions, of one, or ``{feature: activation}``."""


def rows_of(rows: Mapping[int, FeatureActivations]) -> FeatureRows:
    """Rows from position -> features, in the mapping's order."""
    parts = list(rows.values())
    return FeatureRows(
        positions=np.array(list(rows), dtype=np.int64),
        indptr=indptr_of([len(part) for part in parts]),
        ids=np.concatenate([np.empty(0, np.int32), *(part.ids for part in parts)]),
        activations=np.concatenate([np.empty(0, np.float32), *(part.activations for part in parts)]),
    )


def indptr_of(lengths: Sequence[int]) -> NDArray[np.int64]:
    """(n + 1,) int64: where each of n rows of these lengths begins, and the end."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
