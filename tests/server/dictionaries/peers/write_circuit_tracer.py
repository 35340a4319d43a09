"""A transcoder set, a CLT and Gemma Scope transcoders, written or read by circuit-tracer."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from circuit_tracer.transcoder.activation_functions import JumpReLU
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
from circuit_tracer.transcoder.single_layer_transcoder import (
    SingleLayerTranscoder,
    TranscoderSet,
    load_gemma_scope_2_transcoder,
    load_gemma_scope_transcoder,
)
from common import D, F, N, expected, randomise, seed, x_of
from safetensors.torch import save_file

CPU, F32 = torch.device("cpu"), torch.float32


def config(folder: Path, kind: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    values = {"model_name": "m", "model_kind": kind, "feature_input_hook": "hook_resid_mid", "scan": "s"}
    (folder / "config.yaml").write_text(yaml.safe_dump({**values, "feature_output_hook": "hook_mlp_out"}))


def write_set(out: Path, name: str, *, jump: bool, skip: bool) -> None:
    layers = {}
    for layer in range(3):
        rule = JumpReLU(torch.zeros(F), 0.1) if jump else torch.nn.functional.relu
        layers[layer] = SingleLayerTranscoder(D, F, rule, layer, skip_connection=skip, device=CPU, dtype=F32)
        randomise(layers[layer])
    whole = TranscoderSet(layers, "hook_resid_mid", "hook_mlp_out", "s")
    config(out / name, "transcoder_set")
    whole.to_safetensors(str(out / name))
    x = x_of(3, N, D)
    with torch.no_grad():
        f = whole.encode(x)
        expected(out / name, x, f, whole.decode(f, x))


def write_clt(out: Path, name: str, activation: str) -> None:
    n_layers = 4
    clt = CrossLayerTranscoder(n_layers, F, D, activation, lazy_decoder=False, device=CPU, dtype=F32)
    randomise(clt)
    config(out / name, "cross_layer_transcoder")
    clt.to_safetensors(str(out / name))
    x = x_of(n_layers, N, D)
    with torch.no_grad():
        f = clt.encode(x)
        y = clt.b_dec[:, None].repeat(1, N, 1)
        for source in range(n_layers):
            for target in range(source, n_layers):
                y[target] += f[source] @ clt.W_dec[source][:, target - source]
    expected(out / name, x.transpose(0, 1), f.transpose(0, 1).flatten(1), y.transpose(0, 1))


def write_gemma(out: Path) -> None:
    p = {"b_enc": torch.randn(F) * 0.3, "b_dec": torch.randn(D) * 0.3, "threshold": torch.rand(F)}
    W_enc, W_dec, A = torch.randn(D, F) * 0.3, torch.randn(F, D) * 0.3, torch.randn(D, D)
    x = x_of(N, D)
    opens = "gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_54"
    folder = out / "gemma_scope_1" / opens
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", W_enc=W_enc, W_dec=W_dec, **{k: v.numpy() for k, v in p.items()})
    with torch.no_grad():
        owner = load_gemma_scope_transcoder(str(folder / "params.npz"), 3, device=CPU, dtype=F32)
        f = owner.encode(x)
        expected(out / "gemma_scope_1", x, f, owner.decode(f, x), opens)
    opens = "transcoder_all/layer_3_width_16k_l0_big_affine"
    folder = out / "gemma_scope_2" / opens
    folder.mkdir(parents=True)
    save_file(
        {"w_enc": W_enc, "w_dec": W_dec, "affine_skip_connection": A, **p}, folder / "params.safetensors"
    )
    with torch.no_grad():
        owner = load_gemma_scope_2_transcoder(str(folder / "params.safetensors"), 3, device=CPU, dtype=F32)
        f = owner.encode(x)
        expected(out / "gemma_scope_2", x, f, owner.decode(f, x), opens)


def main(out: Path) -> None:
    seed(3)
    write_set(out, "set_relu", jump=False, skip=False)
    write_set(out, "set_jumprelu_skip", jump=True, skip=True)
    write_clt(out, "clt_relu", "relu")
    write_clt(out, "clt_jumprelu", "jump_relu")
    write_gemma(out)


main(Path(sys.argv[1]))
