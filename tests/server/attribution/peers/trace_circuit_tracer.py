"""circuit-tracer's graph of one prompt. Runs under the peers' interpreter, which has none of the server's code.

FOLDER holds `model/` (a Hugging Face folder), `transcoders.safetensors` and `ask.json`: {"tokens", "batch_size",
"max_features", "cross_layer", "threads"}. Each line read from standard input traces once and answers with one line,
SECONDS and the bytes of memory it took at its peak; "save" prunes too and writes `graph.safetensors`.

Transcoders are {W_enc (L, F, D), b_enc, threshold (L, F), b_dec (L, D)} with W_dec (L, F, D), or, cross-layer,
W_dec_l (F, L - l, D). They read the MLP's input after the norm's gain.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from circuit_tracer.attribution.attribute import attribute
from circuit_tracer.graph import compute_graph_scores, compute_node_influence, prune_graph
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.transcoder.activation_functions import JumpReLU
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet
from safetensors.torch import load_file, save_file
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import (
    convert_gemma_weights,
    convert_gpt2_weights,
    convert_llama_weights,
)
from transformers import AutoModelForCausalLM

CPU, F32 = torch.device("cpu"), torch.float32


def main(folder: Path) -> None:
    ask = json.loads((folder / "ask.json").read_text())
    torch.set_num_threads(ask["threads"])
    model = replacement_model(folder, ask)
    tokens = torch.tensor(ask["tokens"])
    model.tokenizer = SimpleNamespace(
        all_special_ids=[int(tokens[0])],
        decode=lambda ids: "",
        padding_side="right",
        vocab_size=model.cfg.d_vocab,
    )
    print("ready", flush=True)
    for line in sys.stdin:
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        begun = time.perf_counter()
        graph = attribute(
            tokens,
            model,
            batch_size=ask["batch_size"],
            max_feature_nodes=ask["max_features"],
            verbose=False,
        )
        seconds = time.perf_counter() - begun
        peak = memory("VmHWM") - before
        if line.strip() == "save":
            save(graph, folder / "graph.safetensors")
        print(seconds, peak, flush=True)


def save(graph: object, path: Path) -> None:
    adjacency = graph.adjacency_matrix
    weights = torch.zeros(len(adjacency))
    weights[-len(graph.logit_targets) :] = graph.logit_probabilities
    pruned = prune_graph(graph)
    tensors = {
        "adjacency": adjacency,
        "features": graph.active_features[graph.selected_features],
        "values": graph.activation_values[graph.selected_features],
        "logits": graph.logit_token_ids,
        "probabilities": graph.logit_probabilities,
        "influence": compute_node_influence(adjacency, weights),
        "nodes": pruned.node_mask,
        "edges": pruned.edge_mask,
        "cumulative": pruned.cumulative_scores,
        "scores": torch.tensor(compute_graph_scores(graph)),
    }
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)


def memory(field: str) -> int:
    """Bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise LookupError(field)


def replacement_model(folder: Path, ask: dict) -> TransformerLensReplacementModel:
    hf = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=F32)
    config = hf.config
    family = {"llama": llama, "gpt2": gpt2, "gemma2": gemma2}[config.model_type]
    cfg, weights = family(hf, config)
    tensors = load_file(folder / "transcoders.safetensors")
    made = cross_layer(tensors) if ask["cross_layer"] else per_layer(tensors)
    model = TransformerLensReplacementModel(cfg)
    model.load_state_dict(weights, strict=False)
    model._configure_replacement_model(made)
    return model


def shared(config: object) -> dict:
    return {
        "n_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "d_vocab": config.vocab_size,
        "n_ctx": config.max_position_embeddings,
        "device": "cpu",
        "dtype": F32,
        "model_name": config.model_type,
        "init_weights": False,
    }


def rotary(config: object) -> dict:
    return {
        "d_head": config.head_dim,
        "d_mlp": config.intermediate_size,
        "n_key_value_heads": config.num_key_value_heads,
        "eps": config.rms_norm_eps,
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_dim": config.head_dim,
        "rotary_base": 10000.0,
        "final_rms": True,
        "gated_mlp": True,
    }


def llama(hf: object, config: object) -> tuple[HookedTransformerConfig, dict]:
    cfg = HookedTransformerConfig(**shared(config), **rotary(config), act_fn="silu")
    return cfg, convert_llama_weights(hf, cfg)


def gemma2(hf: object, config: object) -> tuple[HookedTransformerConfig, dict]:
    cfg = HookedTransformerConfig(
        **shared(config),
        **rotary(config),
        act_fn="gelu_pytorch_tanh",
        use_attn_scale=True,
        attn_scale=config.query_pre_attn_scalar**0.5,
        window_size=config.sliding_window,
        use_local_attn=True,
        attn_types=["local" if kind == "sliding_attention" else "global" for kind in config.layer_types],
        attn_scores_soft_cap=config.attn_logit_softcapping,
        output_logits_soft_cap=config.final_logit_softcapping,
        use_normalization_before_and_after=True,
    )
    return cfg, convert_gemma_weights(hf, cfg)


def gpt2(hf: object, config: object) -> tuple[HookedTransformerConfig, dict]:
    cfg = HookedTransformerConfig(
        **shared(config),
        d_head=config.hidden_size // config.num_attention_heads,
        d_mlp=config.n_inner,
        eps=config.layer_norm_epsilon,
        act_fn="gelu_new",
        normalization_type="LN",
    )
    weights = convert_gpt2_weights(hf, cfg)
    weights.setdefault("unembed.b_U", torch.zeros(config.vocab_size))
    return cfg, weights


def per_layer(tensors: dict) -> TranscoderSet:
    n_layers, n_features, d_model = tensors["W_enc"].shape
    layers = {}
    for layer in range(n_layers):
        rule = JumpReLU(tensors["threshold"][layer])
        layers[layer] = SingleLayerTranscoder(d_model, n_features, rule, layer, device=CPU, dtype=F32)
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            getattr(layers[layer], name).data.copy_(tensors[name][layer])
    return TranscoderSet(layers, "mlp.hook_in", "hook_mlp_out")


def cross_layer(tensors: dict) -> CrossLayerTranscoder:
    n_layers, n_features, d_model = tensors["W_enc"].shape
    clt = CrossLayerTranscoder(
        n_layers,
        n_features,
        d_model,
        "jump_relu",
        lazy_decoder=False,
        feature_input_hook="mlp.hook_in",
        device=CPU,
        dtype=F32,
    )
    clt.activation_function.threshold.data.copy_(tensors["threshold"][:, None])
    for name in ("W_enc", "b_enc", "b_dec"):
        getattr(clt, name).data.copy_(tensors[name])
    for layer in range(n_layers):
        clt.W_dec[layer].data.copy_(tensors[f"W_dec_{layer}"])
    return clt


if __name__ == "__main__":
    main(Path(sys.argv[1]))
