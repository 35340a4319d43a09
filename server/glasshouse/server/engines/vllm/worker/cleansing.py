"""What an edit drove out of range leaves nothing behind.

An edit may make a request's stream infinite. Its logits then say so and its request ends, but its keys and values lie in
blocks that the next request gets, and attention multiplies what it masks by zero: zero times infinity is not a number. So
the blocks of a request whose last hidden state is not finite are set to zero after every pass that it is in.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

_log = logging.getLogger(__name__)


def cleanse_v1(runner: Any, scheduler_output: Any, edited: Callable[[str], bool]) -> None:
    """After a pass of `vllm.v1.worker.gpu_model_runner.GPUModelRunner`. `edited`: whether a request of that id is. Raises
    nothing: it would end the engine.
    """
    try:
        _cleanse_v1(runner, scheduler_output, edited)
    except Exception:
        _log.exception("glasshouse: blocks of requests that are not finite could not be cleared")


def _cleanse_v1(runner: Any, scheduler_output: Any, edited: Callable[[str], bool]) -> None:
    state = runner.execute_model_state
    if state is None:  # an earlier pipeline stage, or a step without tokens
        return
    batch = runner.input_batch
    # First, for it costs nothing: to look at the stream is to wait for the device.
    if not any(map(edited, batch.req_ids)):
        return
    hidden = state.hidden_states[: scheduler_output.total_num_scheduled_tokens]
    # A sum is finite only where all of it is; one that overflowed is looked at row by row.
    if math.isfinite(hidden.sum(dtype=torch.float32).item()):
        return
    finite_T = torch.isfinite(hidden.float()).all(dim=-1)
    counts = np.array([scheduler_output.num_scheduled_tokens[req_id] for req_id in batch.req_ids])
    rows = np.flatnonzero(~finite_T.cpu().numpy())
    for place in np.unique(np.searchsorted(np.cumsum(counts), rows, side="right")).tolist():
        if edited(batch.req_ids[place]):
            _clear_blocks(runner, place)


def _clear_blocks(runner: Any, place: int) -> None:
    """Zeroes the cached keys and values of the request at `place` of the batch."""
    for table in runner.input_batch.block_table.block_tables:
        blocks = table.block_table.np[place, : table.num_blocks_per_row[place]]
        ids = torch.from_numpy(blocks.astype(np.int64))
        for cache in runner.kv_caches:
            n_blocks = runner.kv_cache_config.num_blocks
            axis = next(axis for axis, size in enumerate(cache.shape) if size >= n_blocks)
            cache.index_fill_(axis, ids.to(cache.device), 0)
