"""Llama Scope, first release and R1-Distill: encoder.weight (F, D), decoder.weight (D, F), biases.

First release: `hyperparams.json` and `checkpoints/final.safetensors`. A scalar jump_relu_threshold in the
units of raw activations, and the data set's average norms: activations are scaled by s = sqrt(D) / average
norm, and the threshold with them. R1-Distill: `config.json` and `sae_weights.safetensors` with
log_jumprelu_threshold, which is already in normalised units.

Source: https://huggingface.co/fnlp/Llama-Scope, SAELens' llama_scope loaders.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from glasshouse.server.dictionaries.architectures import Activation, JumpReLU, ReLU, TopK
from glasshouse.server.dictionaries.formats.build import single_site
from glasshouse.server.dictionaries.formats.files import Source, TensorFile
from glasshouse.server.dictionaries.formats.format import (
    Format,
    Loaded,
    Overrides,
    hook_points,
    need_hook_point,
    number,
)
from glasshouse.server.dictionaries.normalisation import FixedScale
from glasshouse.server.dictionaries.parameters import malformed

NAME = "llama_scope"
FIRST_CONFIG, FIRST_WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
LATER_CONFIG, LATER_WEIGHTS = "config.json", "sae_weights.safetensors"


def detects(source: Source) -> bool:
    if source.has(FIRST_CONFIG, FIRST_WEIGHTS):
        return True
    return source.has(LATER_CONFIG, LATER_WEIGHTS) and "encoder.weight" in source.keys_of(LATER_WEIGHTS)


def load(source: Source, overrides: Overrides) -> list[Loaded]:
    first = source.has(FIRST_CONFIG, FIRST_WEIGHTS)
    config_name = FIRST_CONFIG if first else LATER_CONFIG
    config = source.config(config_name)
    path = str(source.folder / config_name)
    file = source.tensors(FIRST_WEIGHTS if first else LATER_WEIGHTS)
    encoder = file.take("encoder.weight", shape=(None, None))
    d_sae, d_in = encoder.shape
    decoder = file.take("decoder.weight", shape=(None, d_sae))
    scale_in, scale_out = _scales(config, path, d_in, file, overrides)
    points_in = need_hook_point(source, overrides, str(config.get("hook_point_in", "")))
    points_in, points_out = hook_points(
        overrides, points_in, (str(config["hook_point_out"]),) if config.get("hook_point_out") else ()
    )
    b_dec = file.maybe("decoder.bias", shape=(decoder.shape[0],))
    parameters = single_site(
        W_enc=encoder.T,
        W_dec=decoder.T,
        b_enc=file.take("encoder.bias", shape=(d_sae,)),
        b_dec=b_dec,
        activation=_activation(config, path, file, d_sae, scale_in),
        source_format=NAME,
        hook_points_in=points_in,
        hook_points_out=points_out,
        subtract_b_dec=bool(config.get("apply_decoder_bias_to_pre_encoder", False)),
        normalisation=FixedScale(
            scale_in=torch.full((1, 1), scale_in), scale_out=torch.full((1, 1), scale_out)
        ),
        model_name=overrides.model_name or str(config.get("model_name", "")),
    )
    return [Loaded("", parameters)]


def _scales(
    config: dict[str, Any], path: str, d_in: int, file: TensorFile, overrides: Overrides
) -> tuple[float, float]:
    norms = config.get("dataset_average_activation_norm") or {}
    if overrides.average_norm:
        norms = {"in": overrides.average_norm[0], "out": overrides.average_norm[-1]}
    if not norms:
        norms = {
            side: file.number(f"dataset_average_activation_norm.{config.get(key)}") or 0
            for side, key in (("in", "hook_point_in"), ("out", "hook_point_out"))
        }
    average_in = number(norms, "in", path, float, 0.0)
    average_out = number(norms, "out", path, float, average_in)
    if not (average_in > 0 and math.isfinite(average_in) and average_out > 0):
        raise malformed(
            path, "the data set's average activation norm is not on disk", "Give it: PATH?average_norm=12.5."
        )
    return math.sqrt(d_in) / average_in, math.sqrt(d_in) / average_out


def _activation(config: dict[str, Any], path: str, file: TensorFile, d_sae: int, scale: float) -> Activation:
    log_threshold = file.maybe("log_jumprelu_threshold", "activation_function.log_jumprelu_threshold")
    if log_threshold is not None:
        return JumpReLU(threshold=log_threshold.float().exp())
    name = str(config.get("act_fn", "jumprelu")).lower()
    if name == "relu":
        return ReLU()
    if name == "topk":
        return TopK(keep=number(config, "top_k", path, int))
    threshold = number(config, "jump_relu_threshold", path, float) * scale
    return JumpReLU(threshold=torch.full((d_sae,), threshold))


FORMAT = Format(NAME, detects, load)
