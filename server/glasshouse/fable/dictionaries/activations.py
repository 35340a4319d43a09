"""fable's activations on disk: what the dictionaries are trained on.

1. Shard i is the text of seed `FIRST_SEED + i` of the training corpus, so it can be made, and made again, alone.
2. Every document runs through the model as it is served: its own row, BOS first, cut at the context length.
3. The positions of BOS are left out; the rest of a shard is shuffled and cut to `SHARD_TOKENS` rows.
4. A shard is one float16 file a hook point, (SHARD_TOKENS, d_model), in a folder renamed when it is whole.

The folder's name holds a fingerprint of the weights: other weights have other activations.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from glasshouse.fable.corpus.mixture import documents
from glasshouse.server.hooks.attachment import attach
from glasshouse.server.hooks.table import HookTable
from glasshouse.server.models.loaded import LoadedModel
from glasshouse.server.types.hook_points import HookPoint

SHARD_TOKENS = 65_536
FIRST_SEED = 40_000
_CHARS_PER_TOKEN = 4.5  # a little more text than a shard needs
_CELLS_PER_PASS = 8192


def fingerprint(weights: Path) -> str:
    """Eight hexadecimal digits of a model folder's weights."""
    return hashlib.sha256((weights / "model.safetensors").read_bytes()).hexdigest()[:8]


def encode(loaded: LoadedModel, texts: Iterable[str]) -> list[list[int]]:
    """Token ids of each text, BOS first, cut at the model's context length."""
    return [loaded.tokenizer.encode(text)[: loaded.context_length] for text in texts]


def padded_batches(rows: Sequence[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, mask), each (B, P), of rows of similar length; the mask is of real tokens. Padding is on the right,
    where a causal model's earlier positions cannot see it.
    """
    ordered = sorted(rows, key=len)
    first = 0
    while first < len(ordered):
        last = first + 1
        while last < len(ordered) and len(ordered[last]) * (last + 1 - first) <= _CELLS_PER_PASS:
            last += 1
        longest = len(ordered[last - 1])
        ids_BP = torch.zeros(last - first, longest, dtype=torch.int64)
        mask_BP = torch.zeros(last - first, longest, dtype=torch.bool)
        for row, ids in enumerate(ordered[first:last]):
            ids_BP[row, : len(ids)] = torch.tensor(ids)
            mask_BP[row, : len(ids)] = True
        yield ids_BP, mask_BP
        first = last


@torch.inference_mode()
def harvest(table: HookTable, rows: Sequence[list[int]], hook_points: Sequence[str]) -> dict[str, Tensor]:
    """(N, width) float32 at each hook point: all positions of all rows but those of BOS, in one order for all."""
    loaded = table.loaded
    found: dict[str, list[Tensor]] = {point: [] for point in hook_points}
    for ids_BP, mask_BP in padded_batches(rows):
        ids_BP = ids_BP.to(loaded.device)
        keep_BP = mask_BP.to(loaded.device) & (ids_BP != loaded.bos_token_id)

        def take(point: HookPoint, tensor: Tensor, keep_BP: Tensor = keep_BP) -> bool:
            found[point.name].append(tensor[keep_BP].float().cpu())
            return False

        positions_BP = torch.arange(ids_BP.shape[1], device=loaded.device).expand_as(ids_BP)
        with attach(table, hook_points, take):
            loaded.family.forward_hidden(loaded.model, ids_BP, positions_BP)
    return {point: torch.cat(parts) for point, parts in found.items()}


@dataclass(frozen=True, kw_only=True)
class ActivationStore:
    """The shards under `folder`: a batch is a pure function of its step number, going round at the end."""

    folder: Path
    n_shards: int

    def shard(self, index: int, hook_point: str) -> np.ndarray:
        """(SHARD_TOKENS, width) float16, mapped."""
        mapped: np.ndarray = np.load(_shard_folder(self.folder, index) / f"{hook_point}.npy", mmap_mode="r")
        return mapped

    def batch(self, step: int, batch_size: int, hook_points: Sequence[str]) -> Tensor:
        """(batch_size, S, width) float32: the rows of one step at these hook points."""
        steps_per_shard = self._rows_of(hook_points[0]) // batch_size
        shard, place = divmod(step, steps_per_shard)
        rows = slice(place * batch_size, (place + 1) * batch_size)
        picked = [self.shard(shard % self.n_shards, point)[rows] for point in hook_points]
        return torch.stack([torch.from_numpy(part.astype(np.float32)) for part in picked], dim=1)

    def _rows_of(self, hook_point: str) -> int:
        return int(self.shard(0, hook_point).shape[0])


def _shard_folder(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:03}"


def write_shard(folder: Path, activations: dict[str, Tensor]) -> None:
    """A whole shard or none: written aside, then renamed."""
    if folder.exists():
        return
    aside = folder.with_name(f"{folder.name}.{random.getrandbits(32):08x}.part")
    aside.mkdir(parents=True)
    for point, values in activations.items():
        np.save(aside / f"{point}.npy", values.numpy().astype(np.float16))
    try:
        aside.rename(folder)
    except OSError:  # another run was faster
        shutil.rmtree(aside)


def prepare(
    loaded: LoadedModel, folder: Path, corpora: Path | None, n_tokens: int, hook_points: Sequence[str]
) -> ActivationStore:
    """The store of at least `n_tokens` positions.

    Shards that exist are kept, so an interrupted harvest goes on. The next shard is drawn among those missing:
    processes that harvest together rarely make the same one, and where they do the first to finish wins.
    """
    n_shards = max(1, -(-n_tokens // SHARD_TOKENS))
    table = HookTable(loaded)
    while missing := [index for index in range(n_shards) if not _shard_folder(folder, index).exists()]:
        index = random.choice(missing)
        started = time.monotonic()
        n_chars = int(SHARD_TOKENS * _CHARS_PER_TOKEN)
        texts = [text for _, text in documents(FIRST_SEED + index, n_chars, corpora)]
        activations = harvest(table, encode(loaded, texts), hook_points)
        n_found = next(iter(activations.values())).shape[0]
        assert n_found >= SHARD_TOKENS, f"shard {index} has {n_found} positions, fewer than {SHARD_TOKENS}"
        order = torch.randperm(n_found, generator=torch.Generator().manual_seed(index))[:SHARD_TOKENS]
        write_shard(
            _shard_folder(folder, index), {point: values[order] for point, values in activations.items()}
        )
        speed = n_found / (time.monotonic() - started)
        print(
            f"shard {index}, {len(missing) - 1} to go: {n_found} positions, {speed:.0f} a second", flush=True
        )
    return ActivationStore(folder=folder, n_shards=n_shards)
