"""Llama Scope and lm-saes."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from tests.server.dictionaries import reference as ref
from tests.server.dictionaries.layouts.shared import Case, D, Draw, F, N, contiguous, dump, forward, pieces


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
