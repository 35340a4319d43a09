"""All seven classes of dictionary_learning, saved the way its trainers do and read back by its own loader."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from common import D, F, N, expected, randomise, seed, x_of
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.utils import load_dictionary


def write(out: Path, dictionary: torch.nn.Module, name: str = "", threshold: float | None = None) -> None:
    cls = type(dictionary).__name__
    folder = out / (name or cls)
    folder.mkdir(parents=True)
    randomise(dictionary)
    if threshold is not None:
        dictionary.threshold.fill_(threshold)
    torch.save(dictionary.state_dict(), folder / "ae.pt")
    trainer = {"dict_class": cls, "layer": 4, "lm_name": "m", "submodule_name": "resid_post_layer_4", "k": 12}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"d_submodule": D}}))
    owner, _ = load_dictionary(str(folder), device="cpu")
    x = x_of(N, D)
    with torch.no_grad():
        f = owner.encode(x)
        expected(folder, x, f, owner.decode(f))


def main(out: Path) -> None:
    seed(2)
    write(out, AutoEncoder(D, F))
    write(out, AutoEncoderNew(D, F))
    write(out, GatedAutoEncoder(D, F))
    write(out, JumpReluAutoEncoder(D, F))
    write(out, AutoEncoderTopK(D, F, 12), threshold=0.5)
    write(out, BatchTopKSAE(D, F, 12), threshold=0.7)
    write(out, BatchTopKSAE(D, F, 12), "BatchTopKSAE_never_estimated")
    write(out, MatryoshkaBatchTopKSAE(D, F, 12, [64, F - 64]), threshold=0.7)


main(Path(sys.argv[1]))
