"""sparsify, dictionary_learning, OpenAI, Goodfire, Qwen-Scope and Bussmann."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tests.server.dictionaries import reference as ref
from tests.server.dictionaries.layouts.shared import Case, D, Draw, F, N, contiguous, dump, forward, pieces
from torch import Tensor


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


def dictionary_learning(name: str, seed: int) -> Callable[[Path], Case]:
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


def openai(seed: int, activation: str, tied: bool) -> Callable[[Path], Case]:
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


def bussmann(seed: int, kind: str) -> Callable[[Path], Case]:
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
