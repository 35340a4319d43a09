"""SAEs and transcoders saved by EleutherAI's sparsify."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from common import D, F, N, expected, randomise, seed, x_of
from sparsify import SparseCoder
from sparsify.config import SparseCoderConfig


def write(out: Path, name: str, hook: str, **settings: object) -> None:
    coder = SparseCoder(D, SparseCoderConfig(num_latents=F, k=16, **settings))
    randomise(coder)
    coder.save_to_disk(out / name / hook)
    x = x_of(N, D)
    with torch.no_grad():
        encoded = coder.encode(x)
        f = torch.zeros(N, F).scatter_(1, encoded.top_indices, encoded.top_acts)
        y = coder(x).sae_out
    expected(out / name, x, f, y, hook)


def main(out: Path) -> None:
    seed(1)
    write(out, "topk", "layers.5")
    write(out, "groupmax", "layers.5.mlp", activation="groupmax")
    write(out, "transcoder", "layers.5.mlp", transcode=True)
    write(out, "transcoder_skip", "layers.5.mlp", transcode=True, skip_connection=True)
    write(out, "sae_skip", "layers.2", skip_connection=True)


main(Path(sys.argv[1]))
