"""circuit-tracer: per-layer transcoder sets and cross-layer transcoders, `config.yaml` beside safetensors.

Set: `layer_i.safetensors` with W_enc (F, D), W_dec (F, D), b_enc, b_dec, perhaps
`activation_function.threshold` (then JumpReLU, else ReLU; `activation: topk` with `k` in the config
overrides, and that TopK has no ReLU) and perhaps
W_skip: y += x @ W_skip^T. One dictionary a layer, named NAME/i.

CLT: `W_enc_i.safetensors` {W_enc_i (F, D), b_enc_i, b_dec_i, threshold_i?, W_skip_i?} and
`W_dec_i.safetensors` {W_dec_i (F, L - i, D)} whose slot j writes layer i + j. b_dec is indexed by the layer
written and added once; the skip is y += x @ W_skip, NOT transposed here.

Source: circuit_tracer/transcoder/{single_layer,cross_layer}_transcoder.py.
"""

from __future__ import annotations

from typing import Any

import torch

from glasshouse.server.dictionaries.architectures import Activation, JumpReLU, ReLU, TopK
from glasshouse.server.dictionaries.formats.build import cross_layer, single_site
from glasshouse.server.dictionaries.formats.files import Source, TensorFile
from glasshouse.server.dictionaries.formats.format import Format, Loaded, Overrides, layer_in, number
from glasshouse.server.dictionaries.formats.hook_names import of_layer
from glasshouse.server.dictionaries.parameters import DecoderBlock, DictionaryParameters, Skip, malformed

SET_NAME = "circuit_tracer_transcoder_set"
CLT_NAME = "circuit_tracer_clt"
CONFIG = "config.yaml"
LAYER_FILES = "layer_*.safetensors"
DEFAULT_IN, DEFAULT_OUT = "hook_resid_mid", "hook_mlp_out"


def detects_set(source: Source) -> bool:
    names = source.matching(LAYER_FILES)
    return bool(names) and {"W_enc", "W_dec", "b_enc", "b_dec"} <= source.keys_of(names[0])


def load_set(source: Source, overrides: Overrides) -> list[Loaded]:
    config = source.config(CONFIG)
    loaded = []
    for name in source.matching(LAYER_FILES):
        layer = layer_in(name)
        assert layer is not None, "the pattern has a number"
        parameters = _layer(source.tensors(name), layer, config, overrides, str(source.folder / CONFIG))
        loaded.append(Loaded(str(layer), parameters))
    return loaded


def _layer(
    file: TensorFile, layer: int, config: dict[str, Any], overrides: Overrides, path: str
) -> DictionaryParameters:
    W_enc = file.take("W_enc", shape=(None, None))
    d_sae, d_in = W_enc.shape
    W_dec = file.take("W_dec", shape=(d_sae, None))
    d_out = W_dec.shape[1]
    threshold = file.maybe("activation_function.threshold", shape=(d_sae,))
    activation: Activation = ReLU() if threshold is None else JumpReLU(threshold=threshold)
    if config.get("activation") == "topk" or "activation_function.k" in file:
        k = overrides.k or file.number("activation_function.k")
        activation = TopK(keep=int(k) if k else number(config, "k", path, int), relu=False)
    W_skip = file.maybe("W_skip", shape=(d_out, d_in))
    points_in, points_out, notes = _points(config, [layer], overrides)
    return single_site(
        W_enc=W_enc.T,
        W_dec=W_dec,
        b_enc=file.take("b_enc", shape=(d_sae,)),
        b_dec=file.take("b_dec", shape=(d_out,)),
        activation=activation,
        source_format=SET_NAME,
        hook_points_in=points_in,
        hook_points_out=points_out,
        W_skip=None if W_skip is None else W_skip.T,
        model_name=overrides.model_name or str(config.get("model_name", "")),
        kind="transcoder",
        notes=notes,
    )


def detects_clt(source: Source) -> bool:
    return source.has("W_enc_0.safetensors", "W_dec_0.safetensors")


def load_clt(source: Source, overrides: Overrides) -> list[Loaded]:
    config = source.config(CONFIG)
    n_layers = len(source.matching("W_enc_*.safetensors"))
    for layer in range(n_layers):
        for name in (f"W_enc_{layer}.safetensors", f"W_dec_{layer}.safetensors"):
            if not source.has(name):
                raise malformed(str(source), f"has no file {name} among {n_layers} layers")
    encoders, decoders, b_enc, b_dec, thresholds, skips = [], [], [], [], [], []
    for layer in range(n_layers):
        file = source.tensors(f"W_enc_{layer}.safetensors")
        W_enc = file.take(f"W_enc_{layer}", shape=(None, None))
        d_sae, d_in = W_enc.shape
        dec_file = source.tensors(f"W_dec_{layer}.safetensors")
        W_dec = dec_file.take(f"W_dec_{layer}", shape=(d_sae, n_layers - layer, d_in))
        encoders.append(W_enc.T)
        decoders += [
            DecoderBlock(W_dec=W_dec[:, j], group=layer, site=layer + j) for j in range(n_layers - layer)
        ]
        b_enc.append(file.take(f"b_enc_{layer}", shape=(d_sae,)))
        b_dec.append(file.take(f"b_dec_{layer}", shape=(d_in,)))
        threshold = file.maybe(f"threshold_{layer}")
        if threshold is not None:
            thresholds.append(threshold.reshape(-1))
        skip = file.maybe(f"W_skip_{layer}", shape=(d_in, d_in))
        if skip is not None:
            skips.append(Skip(W_skip=skip, site_in=layer, site_out=layer))
    if len(thresholds) not in (0, n_layers):
        raise malformed(str(source), f"{len(thresholds)} of {n_layers} layers have a threshold")
    points_in, points_out, notes = _points(config, list(range(n_layers)), overrides)
    parameters = cross_layer(
        encoders=encoders,
        decoders=decoders,
        activation=JumpReLU(threshold=torch.cat(thresholds)) if thresholds else ReLU(),
        b_enc=torch.cat(b_enc),
        b_dec=torch.stack(b_dec),
        source_format=CLT_NAME,
        hook_points_in=points_in,
        hook_points_out=points_out,
        skips=tuple(skips),
        model_name=overrides.model_name or str(config.get("model_name", "")),
        notes=notes,
    )
    return [Loaded("", parameters)]


def _points(
    config: dict[str, Any], layers: list[int], overrides: Overrides
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    hook_in, hook_out = config.get("feature_input_hook"), config.get("feature_output_hook")
    found_in = tuple(of_layer(layer, str(hook_in or DEFAULT_IN)) for layer in layers)
    found_out = tuple(of_layer(layer, str(hook_out or DEFAULT_OUT)) for layer in layers)
    usable_in = overrides.hook_points_in if len(overrides.hook_points_in) == len(layers) else ()
    usable_out = overrides.hook_points_out if len(overrides.hook_points_out) == len(layers) else ()
    notes = () if hook_in else (f"No config.yaml: {DEFAULT_IN} as the input is a guess. Check its FVU.",)
    return usable_in or found_in, usable_out or found_out, notes


SET_FORMAT = Format(SET_NAME, detects_set, load_set)
CLT_FORMAT = Format(CLT_NAME, detects_clt, load_clt)
