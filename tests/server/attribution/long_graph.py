"""`python -m tests.server.attribution.long_graph N_POSITIONS MAX_FEATURES`: one graph in a process of its own.

Prints JSON: what tracing took at its peak (bytes beyond what the process held), and what was estimated of it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from glasshouse.server.attribution.attribution_graph import trace_graph
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.graph_estimate import estimate
from glasshouse.server.attribution.local_model import LocalModel
from glasshouse.server.attribution.transcoders import Transcoders
from glasshouse.server.dictionaries.architectures import TopK
from glasshouse.server.dictionaries.formats.build import single_site
from glasshouse.server.dictionaries.linear import LinearDictionary
from glasshouse.server.models.loading import wrap_model

N_LAYERS, D_MODEL, N_FEATURES, N_ACTIVE = 4, 64, 512, 8


def main(n_positions: int, max_features: int) -> None:
    torch.set_num_threads(1)
    model = long_model()
    transcoders = Transcoders(model, [transcoder(layer) for layer in range(N_LAYERS)])
    tokens = torch.randint(3, 256, (n_positions,), generator=torch.Generator().manual_seed(1))
    model.forward(tokens[None, :8])
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    graph = trace_graph(model, transcoders, tokens, max_features=max_features)
    peak = resident("VmHWM") - before
    local = LocalModel(model, transcoders, tokens)
    expected = estimate(local, max_features=max_features, n_logits=10)
    pruning = graph.prune()
    found = {
        "n_active": len(local.features),
        "n_features": len(graph.features),
        "n_edges": graph.edges.weights.numel(),
        "n_nodes_kept": int(pruning.nodes.sum()),
        "n_nodes": graph.edges.n_nodes,
        "peak_bytes": peak,
        "expected": asdict(expected),
    }
    print(json.dumps(found))


def long_model() -> GradientModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=256,
        hidden_size=D_MODEL,
        intermediate_size=128,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
    )
    network = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    tokenizer = SimpleNamespace(bos_token_id=1, eos_token_id=2, all_special_ids=[1, 2])
    return GradientModel(wrap_model(network, tokenizer, name="long"))


def transcoder(layer: int) -> LinearDictionary:
    generator = torch.Generator().manual_seed(layer)
    parameters = single_site(
        W_enc=torch.randn(D_MODEL, N_FEATURES, generator=generator),
        W_dec=torch.randn(N_FEATURES, D_MODEL, generator=generator) / D_MODEL,
        b_enc=None,
        b_dec=None,
        activation=TopK(keep=N_ACTIVE),
        source_format="test",
        hook_points_in=(f"blocks.{layer}.ln2.hook_out",),
        hook_points_out=(f"blocks.{layer}.hook_mlp_out",),
    )
    return LinearDictionary(f"transcoder-{layer}", parameters)


def resident(field: str) -> int:
    """Bytes of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise LookupError(field)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
