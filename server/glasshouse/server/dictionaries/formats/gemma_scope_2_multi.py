"""Gemma Scope 2 over several layers: crosscoders and cross-layer transcoders.

Crosscoder: `crosscoder/layer_a_b_c_d_width_W_l0_S/params_layer_{0..3}.safetensors`. CLT:
`clt/width_W_l0_S[_affine]/params_layer_{i}.safetensors`. Each file holds one layer's encoder w_enc (D, F),
its decoders to all layers w_dec (F, L, D), b_enc, b_dec, threshold and perhaps affine_skip_connection (D, D).

Both are the same arithmetic: every layer encodes features of its own, and layer m is the sum of what all
layers' features write there, plus b_dec of layer m. The crosscoder's encoder is NOT summed over layers. A CLT
is causal because its weights towards earlier layers are zero; only the slice from its own layer on is read.
The width in the folder's name counts all the layers.
"""

from __future__ import annotations

import re

import torch

from glasshouse.server.dictionaries.architectures import JumpReLU
from glasshouse.server.dictionaries.formats.build import cross_layer
from glasshouse.server.dictionaries.formats.files import Source
from glasshouse.server.dictionaries.formats.format import Format, Loaded, Overrides, hook_points
from glasshouse.server.dictionaries.formats.hook_names import of_layer, of_module
from glasshouse.server.dictionaries.parameters import DecoderBlock, Skip, malformed

NAME = "gemma_scope_2_multi_layer"
PATTERN = "params_layer_*.safetensors"


def detects(source: Source) -> bool:
    names = source.matching(PATTERN)
    return bool(names) and {"w_enc", "w_dec", "threshold"} <= source.keys_of(names[0])


def load(source: Source, overrides: Overrides) -> list[Loaded]:
    names = source.matching(PATTERN)
    n_layers = len(names)
    expected = [f"params_layer_{i}.safetensors" for i in range(n_layers)]
    if names != expected:
        missing = sorted(set(expected) - set(names))
        raise malformed(str(source), f"layer files are not 0 to {n_layers - 1}: {', '.join(missing)} missing")
    folder = "/".join(source.folder.parts[-2:])
    is_clt = "crosscoder" not in folder
    encoders, decoders, b_enc, b_dec, thresholds, skips = [], [], [], [], [], []
    for layer, name in enumerate(names):
        file = source.tensors(name)
        W_enc = file.take("w_enc", shape=(None, None))
        d_in, d_sae = W_enc.shape
        W_dec = file.take("w_dec", shape=(d_sae, n_layers, None))
        encoders.append(W_enc)
        for site in range(layer if is_clt else 0, n_layers):
            decoders.append(DecoderBlock(W_dec=W_dec[:, site], group=layer, site=site))
        b_enc.append(file.take("b_enc", shape=(d_sae,)))
        b_dec.append(file.take("b_dec", shape=(W_dec.shape[2],)))
        thresholds.append(file.take("threshold", shape=(d_sae,)))
        skip = file.maybe("affine_skip_connection", shape=(d_in, W_dec.shape[2]))
        if skip is not None:
            skips.append(Skip(W_skip=skip, site_in=layer, site_out=layer))
    points_in, points_out = hook_points(overrides, *_hooks(source, folder, n_layers, is_clt))
    if len(points_in) != n_layers:
        raise malformed(
            str(source),
            f"{n_layers} layers but {len(points_in)} hook points",
            "Name one hook point a layer: PATH?hook_point=blocks.7.hook_resid_post,blocks.13...",
        )
    config = source.config("config.json")
    parameters = cross_layer(
        encoders=encoders,
        decoders=decoders,
        activation=JumpReLU(threshold=torch.cat(thresholds)),
        b_enc=torch.cat(b_enc),
        b_dec=torch.stack(b_dec),
        source_format=NAME,
        hook_points_in=points_in,
        hook_points_out=points_out,
        kind="cross_layer_transcoder" if is_clt else "crosscoder",
        skips=tuple(skips),
        model_name=overrides.model_name or str(config.get("model_name", "")),
        notes=()
        if is_clt
        else ("Each layer encodes features of its own; the encoder is not summed over layers.",),
    )
    return [Loaded("", parameters)]


def _hooks(
    source: Source, folder: str, n_layers: int, is_clt: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if is_clt:
        config = source.config("config.json")
        points_in = config.get("hf_hook_point_in") or ()
        points_out = config.get("hf_hook_point_out") or ()
        if len(points_in) == len(points_out) == n_layers:
            return tuple(of_module(p) for p in points_in), tuple(of_module(p) for p in points_out)
        layers = range(n_layers)
        return (
            tuple(of_layer(layer, "ln2.hook_out") for layer in layers),
            tuple(of_layer(layer, "hook_mlp_out") for layer in layers),
        )
    match = re.search(r"layer_((?:\d+_)+)width", folder)
    layers_named = [int(n) for n in match.group(1).split("_") if n] if match else []
    points = tuple(of_layer(layer, "hook_resid_post") for layer in layers_named)
    return points, points


FORMAT = Format(NAME, detects, load)
