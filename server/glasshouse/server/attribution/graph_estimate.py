"""What tracing an attribution graph will hold and take, before it starts.

Known exactly once the prompt has run: which features fire, so how many sources each row can have. A target of layer
l at position t hears from the features of earlier layers up to t, their errors and the tokens.

- edges: 12 bytes each in the graph, 4 (and its source's number once a layer and position) while rows are computed;
- decoder rows: each distinct feature's at every contribution it writes, as far as they are kept;
- batches: gradients and rows at hand; patterns of the prompt.

Where features are selected, which rows come is not known: the longest are counted. Bytes are an upper bound, at most
four times the peak; seconds are one batch measured here, scaled by what each row's share of the work is.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from glasshouse.server.attribution.attribution_graph import BATCH_BYTES, MOST_ROWS, rows_at_once
from glasshouse.server.attribution.local_model import KEPT_BYTES, LocalModel

_EDGE, _WEIGHT, _NUMBER = 12, 4, 4
_SLACK = 1.15
_ASSEMBLED_PER_S = 20e6
"""Edges that are put together a second, about."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """n_features fire; n_rows are computed; n_edges at most are kept. Bytes are beyond the model and its dictionaries.

    edge_bytes: of the finished graph. memory_bytes: at the peak of tracing. seconds: on this machine as busy as now.
    """

    n_features: int
    n_rows: int
    n_edges: int
    edge_bytes: int
    decoder_bytes: int
    memory_bytes: int
    seconds: float


def estimate(local: LocalModel, *, max_features: int, n_logits: int) -> Estimate:
    """What a trace of this prompt will cost. Computes one batch of rows."""
    n_active, n_layers, n_positions = len(local.features), local.model.n_layers, local.n_positions
    n_wanted = min(max_features, n_active)
    counts_LT = _source_counts(local)
    layers, positions = local.features.layers, local.features.positions
    counts = counts_LT[layers, positions]
    rows = counts.topk(n_wanted).values if n_wanted < n_active else counts
    n_computed = int(rows.sum()) + n_logits * local.n_sources
    widest = n_wanted + (n_layers + 1) * n_positions
    n_edges = int(rows.clamp_max(widest).sum()) + n_logits * min(local.n_sources, widest)
    places = torch.unique(layers * n_positions + positions)  # one list of sources each, or each row's own
    n_lists = int(counts_LT.flatten()[places].sum()) if n_wanted == n_active else int(rows.sum())
    decoder_bytes = _decoder_bytes(local)
    pattern = 4 * local.model.loaded.n_heads * n_positions**2  # kept as it is and scaled; three at work
    batch = 3 * BATCH_BYTES + 2 * 4 * local.n_sources
    taken = (
        _EDGE * n_edges
        + _WEIGHT * n_computed
        + _NUMBER * n_lists
        + min(decoder_bytes, KEPT_BYTES)
        + (2 * n_layers + 3) * pattern
        + batch
    )
    return Estimate(
        n_features=n_active,
        n_rows=n_wanted + n_logits,
        n_edges=n_edges,
        edge_bytes=_EDGE * n_edges,
        decoder_bytes=decoder_bytes,
        memory_bytes=int(_SLACK * taken),
        seconds=_seconds(local, counts, n_wanted) + n_computed / _ASSEMBLED_PER_S,
    )


def _source_counts(local: LocalModel) -> Tensor:
    """(L + 1, T) int64: how many sources a target of a layer has at a position."""
    n_layers, n_positions = local.model.n_layers, local.n_positions
    device = local.tokens.device
    fired = torch.zeros(n_layers + 1, n_positions, dtype=torch.int64, device=device)
    ones = torch.ones_like(local.features.layers)
    fired.index_put_((local.features.layers + 1, local.features.positions), ones, accumulate=True)
    places = torch.arange(1, n_positions + 1, device=device)
    errors = (places - int(local.skip_first)) * torch.arange(n_layers + 1, device=device)[:, None]
    return fired.cumsum(0).cumsum(1) + errors + places


def _decoder_bytes(local: LocalModel) -> int:
    total = 0
    for layer in range(local.model.n_layers):
        for read in local.transcoders.writers(layer):
            low, high = local.first_of_layer[read], local.first_of_layer[read + 1]
            total += 4 * local.features.indices[low:high].unique().numel() * local.model.loaded.d_model  # type: ignore[no-untyped-call]
    return total


def _seconds(local: LocalModel, counts: Tensor, n_wanted: int) -> float:
    """Of all rows, by one batch of the middle layer's."""
    n_active = len(local.features)
    if n_active == 0:
        return 0.0
    loaded = local.model.loaded
    lengths, layers = local.features.positions + 1, local.features.layers
    width = loaded.n_heads * loaded.d_head
    a_position = width * (loaded.d_model * (1 + loaded.n_kv_heads / loaded.n_heads) + lengths)
    work = lengths * (layers + 0.5) * a_position + counts * loaded.d_model
    middle = layers[n_active // 2]
    mine = (layers == middle).nonzero().squeeze(1)
    mine = mine[len(mine) // 2 :][:MOST_ROWS]
    batch = mine[: rows_at_once(local, lengths[mine])]
    local.feature_rows(batch[:1])  # gathers what is kept
    begun = time.perf_counter()
    local.feature_rows(batch)
    seconds = time.perf_counter() - begun
    return seconds * n_wanted * float(work.mean()) / float(work[batch].sum())
