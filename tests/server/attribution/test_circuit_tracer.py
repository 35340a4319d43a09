"""Graphs equal to circuit-tracer's on the same weights and transcoders: adjacency, influence, pruning, scores.

circuit-tracer lives in the peers' environment (`deploy/peers.txt`); without it these tests are skipped, and the
oracle of `test_graphs.py` (doubling a feature) stands alone.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.oracles.circuit_tracer import PYTHON, CircuitTracer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from glasshouse import fable
from glasshouse.server.attribution.attribution_graph import AttributionGraph, trace_graph
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.transcoders import Transcoders
from glasshouse.server.dictionaries.dictionary import Dictionary
from glasshouse.server.dictionaries.open import open_dictionary
from glasshouse.server.models.loading import load_model, wrap_model

from .dictionaries import random_clt, random_dictionary

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="no peers' environment (deploy/peers.txt)")

_BASE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _BASE | {"model_type": "llama", "tie_word_embeddings": True},
    "gemma2": _BASE
    | {
        "model_type": "gemma2",
        "query_pre_attn_scalar": 20,
        "sliding_window": 4,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 3.0,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 61,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "n_inner": 40,
    },
}
TOKENS = [1, 17, 44, 8, 30, 52, 9, 23, 5]


def tiny(architecture: str, folder: Path) -> GradientModel:
    torch.manual_seed(5)
    settings = dict(CONFIGS[architecture])
    config = AutoConfig.for_model(
        settings.pop("model_type"), **settings, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    model.save_pretrained(folder / "model")
    tokenizer = SimpleNamespace(bos_token_id=1, eos_token_id=2, all_special_ids=[1, 2])
    return GradientModel(wrap_model(model, tokenizer, name=architecture))


def random_transcoders(model: GradientModel, kind: str) -> list[Dictionary]:
    layers, d_model = range(model.n_layers), model.loaded.d_model
    reads = tuple(f"blocks.{layer}.ln2.hook_out" for layer in layers)
    writes = tuple(f"blocks.{layer}.hook_mlp_out" for layer in layers)
    if kind == "clt":
        return [random_clt(reads, writes, d_model)]
    return [random_dictionary(reads[layer], writes[layer], d_model, seed=10 * layer) for layer in layers]


def compare(graph: AttributionGraph, theirs: dict[str, Tensor]) -> None:
    features = graph.features
    keys = torch.stack([features.layers, features.positions, features.indices], dim=1)
    place = {tuple(key): i for i, key in enumerate(keys.tolist())}
    order = torch.tensor([place[tuple(key)] for key in theirs["features"].tolist()], dtype=torch.int64)
    assert len(order) == len(place), "the same features"
    assert [logit.token_id for logit in graph.logits] == theirs["logits"].tolist()
    order = torch.cat([order, torch.arange(graph.first_error, graph.edges.n_nodes)])
    expected = theirs["adjacency"]
    torch.testing.assert_close(
        features.values[order[: len(features)]], theirs["values"], rtol=1e-4, atol=1e-4
    )
    ours = graph.adjacency()[order][:, order]
    scale = expected.abs().amax(1, keepdim=True).clamp_min(1.0)
    assert float(((ours - expected) / scale).abs().max()) < 1e-4

    influence = graph.edges.influence(graph.weights)[order]
    assert float((influence - theirs["influence"]).abs().max()) < 1e-4
    pruning = graph.prune()
    # A node or edge may fall on the other side where the cumulative share is the threshold to rounding.
    assert int((pruning.nodes[order] ^ theirs["nodes"]).sum()) <= len(order) // 2000
    kept = graph.edges.select(pruning.edges)
    mask = torch.zeros_like(theirs["edges"])
    mask[kept.targets.long(), kept.sources.long()] = True
    n_edges = int(theirs["edges"].sum())
    assert int((mask[order][:, order] ^ theirs["edges"]).sum()) <= n_edges // 200
    torch.testing.assert_close(pruning.cumulative[order], theirs["cumulative"], rtol=0, atol=1e-4)
    scores = graph.scores()
    torch.testing.assert_close(
        torch.tensor([scores.replacement, scores.completeness]), theirs["scores"], rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["per_layer", "clt"])
@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_tiny_models(architecture: str, kind: str, tmp_path: Path) -> None:
    model = tiny(architecture, tmp_path)
    dictionaries = random_transcoders(model, kind)
    transcoders = Transcoders(model, dictionaries)
    graph = trace_graph(model, transcoders, torch.tensor(TOKENS), max_features=10**9)
    assert len(graph.features) > 50
    with CircuitTracer(tmp_path, dictionaries, TOKENS, batch_size=32) as peer:
        peer.trace(save=True)
        compare(graph, peer.graph())


def test_selected_features_on_a_tiny_model(tmp_path: Path) -> None:
    """Fewer rows than features: the same ones are chosen."""
    model = tiny("llama", tmp_path)
    dictionaries = random_transcoders(model, "per_layer")
    graph = trace_graph(
        model,
        Transcoders(model, dictionaries),
        torch.tensor(TOKENS),
        max_features=30,
        batch_size=4,
        update_interval=4,
    )
    with CircuitTracer(tmp_path, dictionaries, TOKENS, batch_size=4, max_features=30) as peer:
        peer.trace(save=True)
        theirs = peer.graph()
    ours = graph.features
    found = set(zip(ours.layers.tolist(), ours.positions.tolist(), ours.indices.tolist()))
    chosen = {tuple(key) for key in theirs["features"].tolist()}
    assert found == chosen


@pytest.mark.parametrize("kind", ["transcoder", "clt"])
def test_fable(kind: str, tmp_path: Path) -> None:
    model = GradientModel(load_model(fable.model_path(), dtype="float32", device="cpu", name="fable"))
    names = [kind] if kind == "clt" else [f"transcoder-{layer}" for layer in range(model.n_layers)]
    dictionaries = [open_dictionary(name, fable.dictionary_path(name)) for name in names]
    tokens = model.loaded.tokenizer.encode("The capital of France is")
    (tmp_path / "model").symlink_to(fable.model_path())
    graph = trace_graph(model, Transcoders(model, dictionaries), torch.tensor(tokens), max_features=10**9)
    with CircuitTracer(tmp_path, dictionaries, tokens, batch_size=64) as peer:
        peer.trace(save=True)
        compare(graph, peer.graph())
