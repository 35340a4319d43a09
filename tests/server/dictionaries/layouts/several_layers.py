"""circuit-tracer, and the crosscoders of Kissane and science-of-finetuning."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from tests.server.dictionaries import reference as ref
from tests.server.dictionaries.layouts.shared import Case, D, Draw, F, N, contiguous, dump, forward, pieces
from torch import Tensor


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


def finetuning(
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
