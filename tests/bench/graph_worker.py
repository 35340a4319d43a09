"""`python -m tests.bench.graph_worker FOLDER THREADS`: our graph of one prompt on fable, in a process of its own.

FOLDER holds `ask.json` with the tokens. Each line read traces once and answers SECONDS BYTES, as circuit-tracer's
worker does (`tests/server/attribution/peers`): the time from tokens to a graph of every active feature, and the peak
of memory above what the process held before. "save" writes the edges to `ours.safetensors`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from glasshouse import fable
from glasshouse.server.attribution.attribution_graph import AttributionGraph, trace_graph
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.transcoders import Transcoders
from glasshouse.server.dictionaries.open import open_dictionary
from glasshouse.server.models.loading import load_model

from .dictionaries_bench import peak_extra_bytes, seconds


def main(folder: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    tokens = torch.tensor(json.loads((folder / "ask.json").read_text())["tokens"])
    model = GradientModel(load_model(fable.model_path(), dtype="float32", device="cpu", name="fable"))
    dictionaries = [
        open_dictionary(name, fable.dictionary_path(name))
        for name in (f"transcoder-{layer}" for layer in range(model.n_layers))
    ]
    transcoders = Transcoders(model, dictionaries)
    print("ready", flush=True)
    made: list[AttributionGraph] = []
    taken: list[float] = []

    def trace() -> None:
        made[:] = [trace_graph(model, transcoders, tokens, max_features=sys.maxsize)]

    for line in sys.stdin:
        made.clear()
        peak = peak_extra_bytes(lambda: taken.append(seconds(trace)))
        if line.strip() == "save":
            save(made[0], folder / "ours.safetensors")
        print(taken[-1], peak, flush=True)


def save(graph: AttributionGraph, path: Path) -> None:
    features = graph.features
    tensors = {
        "features": torch.stack([features.layers, features.positions, features.indices], dim=1),
        "targets": graph.edges.targets,
        "sources": graph.edges.sources,
        "weights": graph.edges.weights,
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
