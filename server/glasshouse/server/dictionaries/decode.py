"""Sparse decode: only the rows of the features that fired, accumulated in float32.

1. Entries are cut into runs of whole positions whose distinct rows fit a bounded table.
2. The distinct rows of a run are gathered once from the mapped file and widened to float32.
3. `torch.nn.functional.embedding_bag` sums them per position, weighted by the values.

A contiguous float32 decoder skips step 2. The same primitive serves CPU and CUDA.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

#: Bytes of gathered float32 rows held at a time.
GATHER_BYTES = 64 << 20


def weighted_rows(indptr: Tensor, ids: Tensor, values: Tensor, W_dec: Tensor) -> Tensor:
    """(N, E) float32: row n is the sum of values[i] * W_dec[ids[i]] over its entries; W_dec (F, E), any
    strides.
    """
    n_rows = indptr.numel() - 1
    if n_rows == 0 or ids.numel() == 0:
        return torch.zeros(n_rows, W_dec.shape[1], device=values.device)
    if W_dec.dtype == torch.float32 and W_dec.is_contiguous():
        return embedding_bag(
            ids.long(), W_dec, indptr, mode="sum", per_sample_weights=values, include_last_offset=True
        )
    most = max(1, GATHER_BYTES // (4 * W_dec.shape[1]))
    parts: list[Tensor] = []
    bounds = indptr.tolist()
    first = 0
    while first < n_rows:
        last = first + 1
        while last < n_rows and bounds[last + 1] - bounds[first] <= most:
            last += 1
        start, stop = bounds[first], bounds[last]
        distinct, inverse = torch.unique(ids[start:stop].long(), return_inverse=True)
        parts.append(
            embedding_bag(
                inverse,
                W_dec[distinct].float(),
                indptr[first : last + 1] - start,
                mode="sum",
                per_sample_weights=values[start:stop],
                include_last_offset=True,
            )
        )
        first = last
    return torch.cat(parts)
