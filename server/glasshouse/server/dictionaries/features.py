"""What an encode returns: the features that fired, position by position.

Two layouts of the same thing. `SparseFeatures` is a CSR matrix by position (every feature that fired);
`TopKFeatures` is a padded table (the k strongest). A feature *fires* when its value is not zero: absolute
TopK features fire with negative values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: The feature id of an empty slot in `TopKFeatures.ids`; its value is 0.
NO_FEATURE = -1


@dataclass(frozen=True, kw_only=True)
class SparseFeatures:
    """Features of N positions as CSR rows. Within a row the ids ascend.

    indptr: (N + 1,) int64; row n owns the entries indptr[n]..indptr[n + 1].
    ids:    (nnz,) int32 feature ids in 0..d_sae-1.
    values: (nnz,) float32 activations, never zero.
    """

    indptr: Tensor
    ids: Tensor
    values: Tensor
    d_sae: int

    @property
    def n_positions(self) -> int:
        return int(self.indptr.numel()) - 1

    @property
    def rows(self) -> Tensor:
        """(nnz,) int64: the position of each entry."""
        return torch.repeat_interleave(
            torch.arange(self.n_positions, device=self.indptr.device), self.indptr.diff()
        )

    def row(self, position: int) -> tuple[Tensor, Tensor]:
        """(ids, values) of one position."""
        start, stop = int(self.indptr[position]), int(self.indptr[position + 1])
        return self.ids[start:stop], self.values[start:stop]

    def to_dense(self) -> Tensor:
        """(N, d_sae) float32: only for small inputs and tests."""
        dense = torch.zeros(self.n_positions, self.d_sae, device=self.values.device)
        dense[self.rows, self.ids.long()] = self.values
        return dense

    def with_values(self, values: Tensor) -> SparseFeatures:
        """The same entries with other values (nnz,)."""
        return SparseFeatures(indptr=self.indptr, ids=self.ids, values=values, d_sae=self.d_sae)

    @staticmethod
    def from_entries(
        rows: Tensor, ids: Tensor, values: Tensor, n_positions: int, d_sae: int
    ) -> SparseFeatures:
        """From unordered (row, id, value) entries; zero values are dropped."""
        keep = values != 0
        rows, ids, values = rows[keep].long(), ids[keep].long(), values[keep]
        order = torch.argsort(rows * d_sae + ids)
        indptr = torch.zeros(n_positions + 1, dtype=torch.int64, device=rows.device)
        indptr[1:] = torch.bincount(rows, minlength=n_positions).cumsum(0)
        return SparseFeatures(
            indptr=indptr, ids=ids[order].to(torch.int32), values=values[order].float(), d_sae=d_sae
        )

    @staticmethod
    def from_dense(dense: Tensor) -> SparseFeatures:
        """From (N, d_sae) values; zeros are features that did not fire."""
        rows, ids = dense.nonzero(as_tuple=True)
        return SparseFeatures.from_entries(rows, ids, dense[rows, ids], dense.shape[0], dense.shape[1])


@dataclass(frozen=True, kw_only=True)
class TopKFeatures:
    """The k strongest features of N positions, strongest first.

    ids:    (N, k) int32, `NO_FEATURE` where fewer than k fired.
    values: (N, k) float32, 0 in empty slots.
    """

    ids: Tensor
    values: Tensor
    d_sae: int

    def sparse(self) -> SparseFeatures:
        """The same features as CSR."""
        n, k = self.ids.shape
        rows = torch.arange(n, device=self.ids.device).unsqueeze(1).expand(n, k)
        keep = self.ids != NO_FEATURE
        return SparseFeatures.from_entries(rows[keep], self.ids[keep], self.values[keep], n, self.d_sae)
