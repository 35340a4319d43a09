"""Files written to each format's documented layout, with their forward pass in float64 beside them.

A `Case` says where the files are, what goes in, and what must come out: features f (N, F) in the flat order
of the format's loader, and the output y (N, E) or (N, M, E). Nothing here uses the server's code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from tests.server.dictionaries import reference as ref
from torch import Tensor

N, D, F = 11, 16, 160


@dataclass(kw_only=True)
class Case:
    """query: settings after the path. expect: facts that must hold."""

    path: Path
    x: Tensor
    f: Tensor
    y: Tensor
    architecture: str
    query: str = ""
    hook_in: str = ""
    expect: dict[str, Any] = field(default_factory=dict)


class Draw:
    """Tensors from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * scale


def dump(path: Path, config: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))


def pieces(draw: Draw, d: int = D, f: int = F) -> dict[str, Tensor]:
    return {
        "W_enc": draw(d, f, scale=0.3),
        "W_dec": draw(f, d, scale=0.3),
        "b_enc": draw(f, scale=0.2),
        "b_dec": draw(d, scale=0.4),
    }


def forward(
    p: dict[str, Tensor], x: Tensor, rule: Callable[[Tensor], Tensor], subtract: bool
) -> tuple[Tensor, Tensor]:
    """(f, y) of an ordinary SAE in float64."""
    d = {name: tensor.double() for name, tensor in p.items()}
    h = (x - d["b_dec"] if subtract else x) @ d["W_enc"] + d.get("b_enc", torch.zeros(())).double()
    f = rule(h)
    return f, f @ d["W_dec"] + d["b_dec"]


def contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


# ---- SAELens
# -------------------------------------------------------------------------------------------------


def saelens_new(folder: Path) -> Case:
    draw = Draw(1)
    p, x = pieces(draw), draw(N, D)
    threshold = draw(F).abs()
    save_file({**p, "threshold": threshold}, folder / "sae_weights.safetensors")
    metadata = {"hook_name": "blocks.3.hook_resid_pre", "model_name": "m", "sae_lens_version": "6.54.12"}
    config = {"architecture": "jumprelu", "d_in": D, "d_sae": F, "apply_b_dec_to_input": True}
    dump(folder / "cfg.json", {**config, "normalize_activations": "layer_norm", "metadata": metadata})
    inside, mean, std = ref.layer_norm(x.double())
    f, y = forward(p, inside, lambda h: ref.jumprelu(h, threshold.double()), True)
    return Case(
        path=folder, x=x, f=f, y=y * std + mean, architecture="jumprelu", hook_in="blocks.3.hook_resid_pre"
    )


def saelens_old(folder: Path) -> Case:
    draw = Draw(2)
    p, x = pieces(draw), draw(N, D)
    save_file({**p, "scaling_factor": torch.ones(F)}, folder / "sae_weights.safetensors")
    config = {"d_in": D, "d_sae": F, "hook_point": "blocks.2.hook_mlp_out", "activation_fn_str": "topk"}
    dump(folder / "cfg.json", {**config, "architecture": "standard", "activation_fn_kwargs": {"k": 7}})
    f, y = forward(p, x.double(), lambda h: ref.topk(h, 7), True)
    return Case(path=folder, x=x, f=f, y=y, architecture="topk", hook_in="blocks.2.hook_mlp_out")


def saelens_unfolded(folder: Path) -> Case:
    draw = Draw(3)
    p, x = pieces(draw), draw(N, D)
    save_file(p, folder / "sae_weights.safetensors")
    config = {"d_in": D, "d_sae": F, "hook_name": "blocks.2.hook_resid_post", "normalize_activations": True}
    dump(folder / "cfg.json", config)
    s = math.sqrt(D) / 7.5
    f, y = forward(p, x.double() * s, ref.relu, True)
    return Case(path=folder, x=x, f=f, y=y / s, architecture="standard", query="?average_norm=7.5")


def saelens_skip_transcoder(folder: Path) -> Case:
    draw = Draw(4)
    p, x, W_skip = pieces(draw), draw(N, D), draw(D, D)
    save_file({**p, "W_skip": W_skip}, folder / "sae_weights.safetensors")
    metadata = {"hook_name": "blocks.1.hook_mlp_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    config = {"architecture": "skip_transcoder", "d_in": D, "d_out": D, "d_sae": F, "metadata": metadata}
    dump(folder / "cfg.json", {**config, "apply_b_dec_to_input": False})
    f, y = forward(p, x.double(), ref.relu, False)
    y = y + x.double() @ W_skip.double().T
    return Case(
        path=folder, x=x, f=f, y=y, architecture="standard", expect={"kind": "transcoder", "has_skip": True}
    )


def saelens_gated(folder: Path) -> Case:
    draw = Draw(5)
    p, x = pieces(draw), draw(N, D)
    del p["b_enc"]
    extra = {name: draw(F, scale=0.3) for name in ("b_gate", "b_mag", "r_mag")}
    save_file({**p, **extra}, folder / "sae_weights.safetensors")
    config = {
        "architecture": "gated",
        "d_in": D,
        "d_sae": F,
        "metadata": {"hook_name": "blocks.0.hook_resid_post"},
    }
    dump(folder / "cfg.json", config)
    f, y = forward(p, x.double(), lambda z: ref.gated(z, *ref.f64(*extra.values())), True)
    return Case(path=folder, x=x, f=f, y=y, architecture="gated")


# ---- Gemma Scope
# ---------------------------------------------------------------------------------------------


def _gemma_1(folder: Path, seed: int, compressed: bool) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    draw = Draw(seed)
    p, x, threshold = pieces(draw), draw(N, D), draw(F).abs()
    folder.mkdir(parents=True)
    arrays = {name: t.numpy() for name, t in {**p, "threshold": threshold}.items()}
    (np.savez_compressed if compressed else np.savez)(folder / "params.npz", **arrays)
    return p, x, threshold


def gemma_scope_1(folder: Path) -> Case:
    path = folder / "gemma-scope-2b-pt-res/layer_5/width_16k/average_l0_71"
    p, x, threshold = _gemma_1(path, 10, compressed=False)
    f, y = forward(p, x.double(), lambda h: ref.jumprelu(h, threshold.double()), False)
    expect = {"model_name": "google/gemma-2-2b"}
    return Case(
        path=path, x=x, f=f, y=y, architecture="jumprelu", hook_in="blocks.5.hook_resid_post", expect=expect
    )


def gemma_scope_1_transcoder(folder: Path) -> Case:
    path = folder / "gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_54"
    p, x, threshold = _gemma_1(path, 11, compressed=True)
    f, y = forward(p, x.double(), lambda h: ref.jumprelu(h, threshold.double()), False)
    expect = {"kind": "transcoder", "hook_points_out": ("blocks.3.hook_mlp_out",)}
    hook = "blocks.3.ln2.hook_normalized"
    return Case(path=path, x=x, f=f, y=y, architecture="jumprelu", hook_in=hook, expect=expect)


def gemma_scope_1_embedding(folder: Path) -> Case:
    path = folder / "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6"
    p, x, threshold = _gemma_1(path, 12, compressed=False)
    p = {**p, "W_enc": p["W_enc"] / math.sqrt(D), "W_dec": p["W_dec"] * math.sqrt(D)}
    f, y = forward(p, x.double(), lambda h: ref.jumprelu(h, threshold.double()), False)
    return Case(path=path, x=x, f=f, y=y, architecture="jumprelu", hook_in="hook_embed")


def _gemma_2_layer(draw: Draw, d_dec: tuple[int, ...]) -> dict[str, Tensor]:
    return {
        "w_enc": draw(D, F, scale=0.3),
        "w_dec": draw(F, *d_dec, scale=0.3),
        "b_enc": draw(F, scale=0.2),
        "b_dec": draw(D, scale=0.4),
        "threshold": draw(F).abs(),
    }


def _as_sae(p: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"W_enc": p["w_enc"], "W_dec": p["w_dec"], "b_enc": p["b_enc"], "b_dec": p["b_dec"]}


def gemma_scope_2(folder: Path) -> Case:
    path = folder / "attn_out_all/layer_7_width_16k_l0_small"
    draw = Draw(13)
    p, x = _gemma_2_layer(draw, (D,)), draw(N, D)
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-270m-pt"}
    dump(path / "config.json", {**config, "hf_hook_point_in": "model.layers.7.self_attn.o_proj.input"})
    save_file(p, path / "params.safetensors")
    f, y = forward(_as_sae(p), x.double(), lambda h: ref.jumprelu(h, p["threshold"].double()), False)
    return Case(path=path, x=x, f=f, y=y, architecture="jumprelu", hook_in="blocks.7.attn.hook_z")


def gemma_scope_2_affine_transcoder(folder: Path) -> Case:
    path = folder / "transcoder_all/layer_4_width_16k_l0_big_affine"
    draw = Draw(14)
    p, x, A = _gemma_2_layer(draw, (D,)), draw(N, D), draw(D, D)
    path.mkdir(parents=True)
    save_file({**p, "affine_skip_connection": A}, path / "params.safetensors")
    f, y = forward(_as_sae(p), x.double(), lambda h: ref.jumprelu(h, p["threshold"].double()), False)
    expect = {"hook_points_out": ("blocks.4.hook_mlp_out",), "has_skip": True, "kind": "transcoder"}
    hook = "blocks.4.ln2.hook_out"
    y = y + x.double() @ A.double()
    return Case(path=path, x=x, f=f, y=y, architecture="jumprelu", hook_in=hook, expect=expect)


def _gemma_2_layers(
    path: Path, seed: int, n: int, causal: bool, affine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes the layer files; (x, f, y)."""
    draw = Draw(seed)
    path.mkdir(parents=True)
    x = draw(N, n, D)
    features, y = [], torch.zeros(N, n, D, dtype=torch.float64)
    for layer in range(n):
        p = _gemma_2_layer(draw, (n, D))
        if causal:
            p["w_dec"][:, :layer] = 0
        if affine:
            p["affine_skip_connection"] = draw(D, D)
            y[:, layer] += x[:, layer].double() @ p["affine_skip_connection"].double()
        save_file(p, path / f"params_layer_{layer}.safetensors")
        d = {name: t.double() for name, t in p.items()}
        f = ref.jumprelu(x[:, layer].double() @ d["w_enc"] + d["b_enc"], d["threshold"])
        y += torch.einsum("nf,fmd->nmd", f, d["w_dec"])
        y[:, layer] += d["b_dec"]
        features.append(f)
    return x, torch.cat(features, 1), y


def gemma_scope_2_crosscoder(folder: Path) -> Case:
    path = folder / "crosscoder/layer_7_13_17_22_width_65k_l0_medium"
    x, f, y = _gemma_2_layers(path, 15, 4, causal=False, affine=False)
    expect = {"kind": "crosscoder", "group_sizes": (F,) * 4}
    hook = "blocks.7.hook_resid_post"
    return Case(path=path, x=x, f=f, y=y, architecture="jumprelu", hook_in=hook, expect=expect)


def gemma_scope_2_clt(folder: Path) -> Case:
    path = folder / "clt/width_262k_l0_big_affine"
    x, f, y = _gemma_2_layers(path, 16, 11, causal=True, affine=True)
    expect = {"kind": "cross_layer_transcoder", "has_skip": True}
    return Case(
        path=path, x=x, f=f, y=y, architecture="jumprelu", hook_in="blocks.0.ln2.hook_out", expect=expect
    )


# ---- sparsify, dictionary_learning, OpenAI
# -------------------------------------------------------------------


def _sparsify(folder: Path, seed: int, activation: str, transcode: bool | None) -> Case:
    path = folder / "layers.5.mlp"
    draw = Draw(seed)
    p, x, skip = pieces(draw), draw(N, D), draw(D, D)
    config = {"activation": activation, "expansion_factor": F // D, "num_latents": 0, "k": 8, "d_in": D}
    config["skip_connection"] = transcode is None
    if transcode is not None:
        config["transcode"] = transcode
    dump(path / "cfg.json", config)
    tensors = {
        "encoder.weight": p["W_enc"].T,
        "encoder.bias": p["b_enc"],
        "W_dec": p["W_dec"],
        "b_dec": p["b_dec"],
    }
    if transcode is None:
        tensors["W_skip"] = skip
    save_file(contiguous(tensors), path / "sae.safetensors")
    rule = (lambda h: ref.topk(h, 8)) if activation == "topk" else (lambda h: ref.groupmax(h, 8))
    f, y = forward(p, x.double(), rule, transcode is False)
    if transcode is None:
        y = y + x.double() @ skip.double().T
    hook = "blocks.5.hook_mlp_out" if transcode is False else "blocks.5.ln2.hook_out"
    kind = "sae" if transcode is False else "transcoder"
    return Case(path=path, x=x, f=f, y=y, architecture=activation, hook_in=hook, expect={"kind": kind})


def sparsify_topk(folder: Path) -> Case:
    return _sparsify(folder, 20, "topk", False)


def sparsify_groupmax_transcoder(folder: Path) -> Case:
    return _sparsify(folder, 21, "groupmax", True)


def sparsify_skip_without_transcode_key(folder: Path) -> Case:
    return _sparsify(folder, 22, "topk", None)


def _dictionary_learning(name: str, seed: int) -> Callable[[Path], Case]:
    def write(folder: Path) -> Case:
        draw = Draw(seed)
        p, x = pieces(draw), draw(N, D)
        subtract = name not in ("AutoEncoderNew", "JumpReluAutoEncoder")
        linear = {
            "encoder.weight": torch.empty_strided((F, D), (1, F)).copy_(p["W_enc"].T),
            "encoder.bias": p["b_enc"],
            "decoder.weight": p["W_dec"].T,
        }
        k, threshold = torch.tensor(6, dtype=torch.int32), torch.tensor(0.4)
        vector = draw(F).abs()
        gate = {n: draw(F, scale=0.3) for n in ("gate_bias", "mag_bias", "r_mag")}
        double = p["W_dec"].double()
        norms = (double**2).sum(1) ** 0.5
        layouts: dict[str, tuple[dict[str, Tensor], Callable[[Tensor], Tensor], str]] = {
            "AutoEncoder": ({"bias": p["b_dec"], **linear}, lambda h: ref.relu(h) * norms, "standard"),
            "AutoEncoderNew": ({**linear, "decoder.bias": p["b_dec"]}, ref.relu, "standard"),
            "GatedAutoEncoder": (
                {"decoder_bias": p["b_dec"], **linear, **gate},
                lambda z: ref.gated(z, *ref.f64(*gate.values())),
                "gated",
            ),
            "JumpReluAutoEncoder": (
                {**p, "threshold": vector},
                lambda h: ref.jumprelu(h, vector.double()),
                "jumprelu",
            ),
            "AutoEncoderTopK": (
                {**linear, "b_dec": p["b_dec"], "k": k, "threshold": threshold},
                lambda h: ref.topk(h, 6),
                "topk",
            ),
            "BatchTopKSAE": (
                {**linear, "b_dec": p["b_dec"], "k": k, "threshold": threshold},
                lambda h: ref.jumprelu(h, float(threshold)),
                "batchtopk",
            ),
            "MatryoshkaBatchTopKSAE": (
                {**p, "k": k, "threshold": torch.tensor(-1.0), "group_sizes": torch.tensor([60, 100])},
                ref.relu,
                "batchtopk",
            ),
        }
        tensors, rule, architecture = layouts[name]
        if name == "GatedAutoEncoder":
            del tensors["encoder.bias"]
            p = {key: value for key, value in p.items() if key != "b_enc"}
        trainer = {
            "dict_class": name,
            "layer": 4,
            "lm_name": "m",
            "submodule_name": "resid_post_layer_4",
            "k": 6,
        }
        dump(folder / "config.json", {"trainer": trainer, "buffer": {}})
        torch.save(tensors, folder / "ae.pt")
        f, y = forward(p, x.double(), rule, subtract)
        if name == "AutoEncoder":
            y = (f / norms) @ double + p["b_dec"].double()
        return Case(path=folder, x=x, f=f, y=y, architecture=architecture, hook_in="blocks.4.hook_resid_post")

    return write


def _openai(seed: int, activation: str, tied: bool) -> Callable[[Path], Case]:
    def write(folder: Path) -> Case:
        draw = Draw(seed)
        p, x = pieces(draw), draw(N, D)
        state: dict[str, Any] = {
            "pre_bias": p["b_dec"],
            "latent_bias": p["b_enc"],
            "encoder.weight": p["W_enc"].T.contiguous(),
            "stats_last_nonzero": torch.zeros(F, dtype=torch.long),
            "activation": activation,
        }
        if tied:
            p["W_dec"] = p["W_enc"].T
        else:
            state["decoder.weight"] = p["W_dec"].T.contiguous()
        if activation == "TopK":
            state["activation_state_dict"] = {"k": 9, "postact_fn": "ReLU"}
            state["activation.k"] = 9
        torch.save(state, folder / "7.pt")
        if activation == "ReLU":
            f, y = forward(p, x.double(), ref.relu, True)
        else:
            inside, mean, std = ref.layer_norm(x.double())
            f, y = forward(p, inside, lambda h: ref.topk(h, 9), True)
            y = y * std + mean
        hook = "blocks.7.hook_resid_post"
        architecture = "standard" if activation == "ReLU" else "topk"
        return Case(
            path=folder / "7.pt",
            x=x,
            f=f,
            y=y,
            architecture=architecture,
            query=f"?hook_point={hook}",
            hook_in=hook,
        )

    return write


# ---- Llama Scope, lm-saes
# ------------------------------------------------------------------------------------


def llama_scope(folder: Path) -> Case:
    draw = Draw(40)
    p, x = pieces(draw), draw(N, D)
    hooks = {"hook_point_in": "blocks.6.hook_resid_post", "hook_point_out": "blocks.6.hook_resid_post"}
    norms = {"in": 9.0, "out": 9.0}
    config = {"d_model": D, "d_sae": F, "act_fn": "jumprelu", "jump_relu_threshold": 1.1}
    dump(folder / "hyperparams.json", {**config, **hooks, "dataset_average_activation_norm": norms})
    tensors = {"encoder.weight": p["W_enc"].T, "decoder.weight": p["W_dec"].T}
    biases = {"encoder.bias": p["b_enc"], "decoder.bias": p["b_dec"]}
    (folder / "checkpoints").mkdir()
    save_file(contiguous({**tensors, **biases}), folder / "checkpoints/final.safetensors")
    s = math.sqrt(D) / 9.0
    f, y = forward(p, x.double() * s, lambda h: ref.jumprelu(h, 1.1 * s), False)
    return Case(path=folder, x=x, f=f, y=y / s, architecture="jumprelu", hook_in="blocks.6.hook_resid_post")


def llama_scope_r1_distill(folder: Path) -> Case:
    draw = Draw(41)
    p, x, log = pieces(draw), draw(N, D), draw(F, scale=0.3)
    hooks = {"hook_point_in": "blocks.6.hook_resid_post", "hook_point_out": "blocks.6.hook_resid_post"}
    dump(folder / "config.json", {"d_model": D, "expansion_factor": F // D, "act_fn": "jumprelu", **hooks})
    tensors = {"encoder.weight": p["W_enc"].T, "decoder.weight": p["W_dec"].T, "log_jumprelu_threshold": log}
    tensors |= {"encoder.bias": p["b_enc"], "decoder.bias": p["b_dec"]}
    tensors["dataset_average_activation_norm.blocks.6.hook_resid_post"] = torch.tensor(9.0)
    save_file(contiguous(tensors), folder / "sae_weights.safetensors")
    s = math.sqrt(D) / 9.0
    f, y = forward(p, x.double() * s, lambda h: ref.jumprelu(h, log.double().exp()), False)
    return Case(path=folder, x=x, f=f, y=y / s, architecture="jumprelu", hook_in="blocks.6.hook_resid_post")


def lm_saes_sae(folder: Path) -> Case:
    draw = Draw(42)
    p, x, log = pieces(draw), draw(N, D), draw(F, scale=0.3)
    hook_in, hook_out = "blocks.2.hook_resid_mid", "blocks.2.hook_mlp_out"
    config = {"sae_type": "sae", "d_model": D, "expansion_factor": F // D, "act_fn": "jumprelu"}
    config |= {"hook_point_in": hook_in, "hook_point_out": hook_out, "norm_activation": "dataset-wise"}
    dump(folder / "config.json", {**config, "sparsity_include_decoder_norm": True})
    tensors = {"W_E": p["W_enc"], "b_E": p["b_enc"], "W_D": p["W_dec"], "b_D": p["b_dec"]}
    tensors["activation_function.log_jumprelu_threshold"] = log
    tensors[f"dataset_average_activation_norm.{hook_in}"] = torch.tensor(5.0)
    tensors[f"dataset_average_activation_norm.{hook_out}"] = torch.tensor(2.0)
    save_file(tensors, folder / "sae_weights.safetensors")
    n = (p["W_dec"].double() ** 2).sum(1) ** 0.5
    inside = x.double() * math.sqrt(D) / 5.0
    f, y = forward(p, inside, lambda h: ref.jumprelu(h * n, log.double().exp()) / n, False)
    y = y / (math.sqrt(D) / 2.0)
    return Case(
        path=folder, x=x, f=f, y=y, architecture="jumprelu", hook_in=hook_in, expect={"kind": "transcoder"}
    )


def lm_saes_crosscoder(folder: Path) -> Case:
    draw, heads = Draw(43), 3
    x, log = draw(N, heads, D), draw(F, scale=0.3)
    W_E, b_E = draw(heads, D, F, scale=0.3), draw(heads, F, scale=0.2)
    W_D, b_D = draw(heads, F, D, scale=0.3), draw(heads, D)
    hooks = [f"blocks.{i}.hook_resid_post" for i in range(heads)]
    config = {"sae_type": "crosscoder", "d_model": D, "act_fn": "jumprelu", "norm_activation": "inference"}
    dump(folder / "config.json", {**config, "hook_points": hooks})
    tensors = {"W_E": W_E, "b_E": b_E, "W_D": W_D, "b_D": b_D}
    state = {**tensors, "activation_function.log_jumprelu_threshold": log}
    torch.save({"sae": state, "version": "1"}, folder / "sae_weights.pt")
    xd, We, be, Wd, bd = ref.f64(x, W_E, b_E, W_D, b_D)
    h = (torch.einsum("nhd,hdf->nhf", xd, We) + be).sum(1, keepdim=True)
    n = (Wd**2).sum(-1) ** 0.5
    f = ref.jumprelu(h * n, log.double().exp()) / n
    y = torch.einsum("nhf,hfd->nhd", f, Wd) + bd
    expect = {"kind": "crosscoder", "group_sizes": (F,) * heads}
    return Case(
        path=folder, x=x, f=f.flatten(1), y=y, architecture="jumprelu", hook_in=hooks[0], expect=expect
    )


def _lm_saes_clt(folder: Path, seed: int, act_fn: str) -> Case:
    draw, n = Draw(seed), 3
    x, log = draw(N, n, D), draw(n, F, scale=0.3)
    tensors = {"W_E": draw(n, D, F, scale=0.3), "b_E": draw(n, F, scale=0.2)}
    tensors |= {f"W_D.{to}": draw(to + 1, F, D, scale=0.3) for to in range(n)}
    tensors |= {f"b_D.{to}": draw(D) for to in range(n)}
    if act_fn == "jumprelu":
        tensors["activation_function.log_jumprelu_threshold"] = log
    save_file(tensors, folder / "sae_weights.safetensors")
    hooks_in, hooks_out = ([f"blocks.{i}.{h}" for i in range(n)] for h in ("hook_resid_mid", "hook_mlp_out"))
    config = {"sae_type": "clt", "d_model": D, "act_fn": act_fn, "norm_activation": "inference", "top_k": 5}
    dump(folder / "config.json", {**config, "hook_points_in": hooks_in, "hook_points_out": hooks_out})
    d = {name: t.double() for name, t in tensors.items()}
    norms = torch.stack(
        [sum((d[f"W_D.{to}"][i] ** 2).sum(-1) for to in range(i, n)) ** 0.5 for i in range(n)]
    )
    h = (torch.einsum("nld,ldf->nlf", x.double(), d["W_E"]) + d["b_E"]) * norms
    f = ref.jumprelu(h, log.double().exp()) if act_fn == "jumprelu" else ref.topk(h, 5)
    f = f / norms
    y = torch.stack(
        [d[f"b_D.{to}"] + sum(f[:, i] @ d[f"W_D.{to}"][i] for i in range(to + 1)) for to in range(n)], 1
    )
    architecture = "jumprelu" if act_fn == "jumprelu" else "topk"
    expect = {"kind": "cross_layer_transcoder"}
    return Case(
        path=folder, x=x, f=f.flatten(1), y=y, architecture=architecture, hook_in=hooks_in[0], expect=expect
    )


def lm_saes_clt(folder: Path) -> Case:
    return _lm_saes_clt(folder, 44, "jumprelu")


def lm_saes_clt_topk(folder: Path) -> Case:
    return _lm_saes_clt(folder, 45, "topk")


# ---- Goodfire, Qwen-Scope, Bussmann
# --------------------------------------------------------------------------


def goodfire(folder: Path) -> Case:
    draw = Draw(50)
    p, x = pieces(draw), draw(N, D)
    path = folder / "Llama-3.1-8B-Instruct-SAE-l19.pth"
    tensors = {"encoder_linear.weight": p["W_enc"].T, "decoder_linear.weight": p["W_dec"].T}
    torch.save({**tensors, "encoder_linear.bias": p["b_enc"], "decoder_linear.bias": p["b_dec"]}, path)
    f, y = forward(p, x.double(), ref.relu, False)
    return Case(path=path, x=x, f=f, y=y, architecture="standard", hook_in="blocks.19.hook_resid_post")


def qwen_scope(folder: Path) -> Case:
    path = folder / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_150/layer12.sae.pt"
    draw = Draw(51)
    p, x = pieces(draw), draw(N, D)
    path.parent.mkdir()
    torch.save({**p, "W_enc": p["W_enc"].T.contiguous(), "W_dec": p["W_dec"].T.contiguous()}, path)
    f, y = forward(p, x.double(), lambda h: ref.topk(h, 150, positive=False), False)
    expect = {"k": 150, "model_name": "Qwen/Qwen3-1.7B-Base"}
    hook = "blocks.12.hook_resid_post"
    return Case(path=path, x=x, f=f, y=y, architecture="topk", hook_in=hook, expect=expect)


def _bussmann(seed: int, kind: str) -> Callable[[Path], Case]:
    def write(folder: Path) -> Case:
        draw = Draw(seed)
        p, x, log = pieces(draw), draw(N, D), draw(F, scale=0.4)
        config = {
            "sae_type": kind,
            "top_k": 6,
            "input_unit_norm": kind != "vanilla",
            "dtype": "torch.float32",
        }
        dump(
            folder / "config.json", {**config, "hook_point": "blocks.8.hook_resid_pre", "model_name": "gpt2"}
        )
        torch.save(
            {**p, **({"jumprelu.log_threshold": log} if kind == "jumprelu" else {})}, folder / "sae.pt"
        )
        if kind in ("topk", "batchtopk"):
            del p["b_enc"]
        rule = {
            "vanilla": ref.relu,
            "jumprelu": lambda h: ref.jumprelu(h, log.double().exp()),
            "topk": lambda h: ref.topk(h, 6),
            "batchtopk": lambda h: ref.topk(h, 6),
        }[kind]
        if kind == "vanilla":
            f, y = forward(p, x.double(), rule, True)
        else:
            inside, mean, std = ref.layer_norm(x.double())
            f, y = forward(p, inside, rule, kind != "jumprelu")
            y = y * std + mean
        architecture = {"vanilla": "standard", "batchtopk": "topk"}.get(kind, kind)
        return Case(path=folder, x=x, f=f, y=y, architecture=architecture, hook_in="blocks.8.hook_resid_pre")

    return write


# ---- circuit-tracer
# ------------------------------------------------------------------------------------------


def _set_config(folder: Path, kind: str, **more: Any) -> None:
    config = {"model_name": "m", "model_kind": kind, "feature_input_hook": "mlp.hook_in", "scan": "s"}
    (folder / "config.yaml").write_text(
        yaml.safe_dump({**config, "feature_output_hook": "hook_mlp_out", **more})
    )


def _transcoder_layer(folder: Path, layer: int, seed: int, kind: str) -> Case:
    """Writes one layer of a set and returns its case; the path is the whole folder."""
    draw = Draw(seed)
    p, x, skip, threshold = pieces(draw), draw(N, D), draw(D, D), draw(F).abs()
    tensors = {**p, "W_enc": p["W_enc"].T}
    rule: Callable[[Tensor], Tensor] = ref.relu
    if kind == "jumprelu":
        tensors["activation_function.threshold"] = threshold
        rule = lambda h: ref.jumprelu(h, threshold.double())  # noqa: E731
    if kind == "skip":
        tensors["W_skip"] = skip
    if kind == "topk":
        rule = lambda h: ref.topk(h, 140, positive=False)  # noqa: E731
    save_file(contiguous(tensors), folder / f"layer_{layer}.safetensors")
    f, y = forward(p, x.double(), rule, False)
    if kind == "skip":
        y = y + x.double() @ skip.double().T
    architecture = {"relu": "standard", "skip": "standard"}.get(kind, kind)
    hook = f"blocks.{layer}.ln2.hook_out"
    return Case(
        path=folder, x=x, f=f, y=y, architecture=architecture, hook_in=hook, expect={"kind": "transcoder"}
    )


def transcoder_set(folder: Path, kinds: tuple[str, ...]) -> list[Case]:
    """A circuit-tracer set with one kind a layer."""
    _set_config(folder, "transcoder_set", **({"activation": "topk", "k": 140} if "topk" in kinds else {}))
    return [_transcoder_layer(folder, layer, 60 + layer, kind) for layer, kind in enumerate(kinds)]


def circuit_tracer_clt(folder: Path) -> Case:
    draw, n = Draw(70), 11
    _set_config(folder, "cross_layer_transcoder")
    x, features = draw(N, n, D), []
    y = torch.zeros(N, n, D, dtype=torch.float64)
    for layer in range(n):
        p, threshold, W_dec = pieces(draw), draw(F).abs(), draw(F, n - layer, D, scale=0.3)
        encoder = {f"W_enc_{layer}": p["W_enc"].T.contiguous(), f"b_enc_{layer}": p["b_enc"]}
        encoder |= {f"b_dec_{layer}": p["b_dec"], f"threshold_{layer}": threshold}
        if layer == 1:
            encoder["W_skip_1"] = draw(D, D)
            y[:, 1] += x[:, 1].double() @ encoder["W_skip_1"].double()
        save_file(encoder, folder / f"W_enc_{layer}.safetensors")
        save_file({f"W_dec_{layer}": W_dec}, folder / f"W_dec_{layer}.safetensors")
        h = x[:, layer].double() @ p["W_enc"].double() + p["b_enc"].double()
        f = ref.jumprelu(h, threshold.double())
        y[:, layer:] += torch.einsum("nf,fjd->njd", f, W_dec.double())
        y[:, layer] += p["b_dec"].double()
        features.append(f)
    expect = {"kind": "cross_layer_transcoder", "group_sizes": (F,) * n}
    hook = "blocks.0.ln2.hook_out"
    return Case(
        path=folder, x=x, f=torch.cat(features, 1), y=y, architecture="jumprelu", hook_in=hook, expect=expect
    )


# ---- crosscoders
# ---------------------------------------------------------------------------------------------


def _kissane(folder: Path, norms: tuple[float, float] | None) -> Case:
    draw = Draw(80)
    x, W_enc, W_dec = draw(N, 2, D), draw(2, D, F, scale=0.3), draw(F, 2, D, scale=0.3)
    b_enc, b_dec = draw(F, scale=0.2), draw(2, D)
    dump(folder / "cfg.json", {"d_in": D, "dict_size": F, "hook_point": "blocks.14.hook_resid_pre"})
    torch.save({"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}, folder / "cc_weights.pt")
    s = math.sqrt(D) / torch.tensor(norms or (math.sqrt(D),) * 2, dtype=torch.float64)[:, None]
    xd, We, Wd, be, bd = ref.f64(x, W_enc, W_dec, b_enc, b_dec)
    f = ref.relu(torch.einsum("nmd,mdf->nf", xd * s, We) + be)
    y = (torch.einsum("nf,fmd->nmd", f, Wd) + bd) / s
    query = "?average_norm=3.5,8.25" if norms else ""
    expect = {
        "kind": "crosscoder",
        "hook_points_in": tuple(f"model[{i}]:blocks.14.hook_resid_pre" for i in (0, 1)),
    }
    return Case(path=folder, x=x, f=f, y=y, architecture="standard", query=query, expect=expect)


def kissane(folder: Path) -> Case:
    return _kissane(folder, None)


def kissane_scaled(folder: Path) -> Case:
    return _kissane(folder, (3.5, 8.25))


def _finetuning(
    seed: int, code: int, *, batch: bool, normalised: bool, suffix: str = ".pt"
) -> Callable[[Path], Case]:
    def write(folder: Path) -> Case:
        draw, n = Draw(seed), 2
        x, W_enc, W_dec = draw(N, n, D), draw(n, D, F, scale=0.3), draw(n, F, D, scale=0.3)
        b_enc, b_dec = draw(F, scale=0.2), draw(n, D)
        mean, std = draw(n, D), draw(n, D).abs() + 0.5
        scale = 1.0 / torch.sqrt((std**2).sum(-1) + 1e-8)
        nan = torch.full((n, D), math.nan)
        state = {
            "encoder.weight": W_enc,
            "encoder.bias": b_enc,
            "decoder.weight": W_dec,
            "decoder.bias": b_dec,
            "code_normalization_id": torch.tensor(code),
            "activation_mean": mean if normalised else nan,
            "activation_std": std if normalised else nan.clone(),
            "activation_global_scale": scale if normalised else torch.ones(n),
            "target_rms": torch.tensor(1.0),
        }
        threshold = torch.tensor([1.0, 1.6]) if code == 5 else torch.tensor(1.2)
        if batch:
            state |= {"k": torch.tensor(20), "threshold": threshold}
        if suffix == ".pt":
            torch.save({f"_orig_mod.{name}": t for name, t in state.items()}, folder / "model_final.pt")
        else:
            save_file(state, folder / "model.safetensors")
        xd, We, Wd, be, bd = ref.f64(x, W_enc, W_dec, b_enc, b_dec)
        s = scale.double()[:, None] if normalised else torch.ones(n, 1, dtype=torch.float64)
        m = mean.double() if normalised else torch.zeros(n, D, dtype=torch.float64)
        f = ref.relu(torch.einsum("nld,ldf->nf", (xd - m) * s, We) + be)
        per_site = (Wd**2).sum(-1) ** 0.5
        c = {
            1: per_site.sum(0),
            2: (per_site**2).sum(0) ** 0.5,
            3: (per_site**2).sum(0) ** 0.5 + 0.1 * per_site.sum(0),
            4: torch.ones(F, dtype=torch.float64),
            5: per_site,
        }[code]
        if batch and code == 5:
            f = f[:, None] * (f[:, None] * c > threshold.double()[:, None])
            y = torch.einsum("nlf,lfd->nld", f, Wd) + bd
            f = f.flatten(1)
        else:
            f = f * (f * c > float(threshold)) if batch else f
            y = torch.einsum("nf,lfd->nld", f, Wd) + bd
        if normalised:
            y = y / (s + 1e-8) + m
        architecture = "standard" if not batch else "jumprelu" if code == 5 else "batchtopk"
        hooks = "blocks.13.hook_resid_post,other:blocks.13.hook_resid_post"
        return Case(path=folder, x=x, f=f, y=y, architecture=architecture, query=f"?hook_point={hooks}")

    return write


CASES: dict[str, Callable[[Path], Case]] = {
    "saelens new": saelens_new,
    "saelens old": saelens_old,
    "saelens unfolded norm": saelens_unfolded,
    "saelens skip transcoder": saelens_skip_transcoder,
    "saelens gated": saelens_gated,
    "gemma scope 1": gemma_scope_1,
    "gemma scope 1 transcoder": gemma_scope_1_transcoder,
    "gemma scope 1 embedding": gemma_scope_1_embedding,
    "gemma scope 2": gemma_scope_2,
    "gemma scope 2 affine transcoder": gemma_scope_2_affine_transcoder,
    "gemma scope 2 crosscoder": gemma_scope_2_crosscoder,
    "gemma scope 2 clt": gemma_scope_2_clt,
    "sparsify topk": sparsify_topk,
    "sparsify groupmax transcoder": sparsify_groupmax_transcoder,
    "sparsify skip, old config": sparsify_skip_without_transcode_key,
    "dictionary_learning AutoEncoder": _dictionary_learning("AutoEncoder", 30),
    "dictionary_learning AutoEncoderNew": _dictionary_learning("AutoEncoderNew", 31),
    "dictionary_learning GatedAutoEncoder": _dictionary_learning("GatedAutoEncoder", 32),
    "dictionary_learning JumpReluAutoEncoder": _dictionary_learning("JumpReluAutoEncoder", 33),
    "dictionary_learning AutoEncoderTopK": _dictionary_learning("AutoEncoderTopK", 34),
    "dictionary_learning BatchTopKSAE": _dictionary_learning("BatchTopKSAE", 35),
    "dictionary_learning MatryoshkaBatchTopKSAE": _dictionary_learning("MatryoshkaBatchTopKSAE", 36),
    "openai topk": _openai(37, "TopK", False),
    "openai relu tied": _openai(38, "ReLU", True),
    "llama scope": llama_scope,
    "llama scope r1 distill": llama_scope_r1_distill,
    "lm-saes sae": lm_saes_sae,
    "lm-saes crosscoder": lm_saes_crosscoder,
    "lm-saes clt": lm_saes_clt,
    "lm-saes clt topk": lm_saes_clt_topk,
    "goodfire": goodfire,
    "qwen-scope": qwen_scope,
    "bussmann vanilla": _bussmann(52, "vanilla"),
    "bussmann topk": _bussmann(53, "topk"),
    "bussmann batchtopk": _bussmann(54, "batchtopk"),
    "bussmann jumprelu": _bussmann(55, "jumprelu"),
    "circuit-tracer clt": circuit_tracer_clt,
    "kissane": kissane,
    "kissane scaled": kissane_scaled,
    "finetuning relu": _finetuning(81, 1, batch=False, normalised=False),
    "finetuning batchtopk crosscoder norm": _finetuning(82, 1, batch=True, normalised=True),
    "finetuning batchtopk sae norm": _finetuning(83, 2, batch=True, normalised=False, suffix=".safetensors"),
    "finetuning batchtopk mixed": _finetuning(84, 3, batch=True, normalised=False),
    "finetuning batchtopk none": _finetuning(85, 4, batch=True, normalised=True),
    "finetuning batchtopk decoupled": _finetuning(86, 5, batch=True, normalised=False),
}
