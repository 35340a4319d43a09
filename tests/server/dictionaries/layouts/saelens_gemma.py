"""SAELens and Gemma Scope 1 and 2."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tests.server.dictionaries import reference as ref
from tests.server.dictionaries.layouts.shared import Case, D, Draw, F, N, dump, forward, pieces
from torch import Tensor


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
