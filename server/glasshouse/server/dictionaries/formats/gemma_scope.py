"""Gemma Scope 1: `layer_N/width_16k/average_l0_X/params.npz`, JumpReLU, no decoder bias subtracted.

The folder says what the dictionary reads: the repository names end in -res, -mlp, -att and -transcoders.
Attention SAEs read hook_z flattened. Transcoders read `ln2.hook_normalized`, before the gain, and write
hook_mlp_out. Embedding SAEs were trained on x / sqrt(D): W_enc / sqrt(D), W_dec * sqrt(D), b_dec as it is.

Source: https://huggingface.co/google/gemma-scope, SAELens' gemma_2 loaders, circuit-tracer's loader.
"""

from __future__ import annotations

import math

import torch

from glasshouse.server.dictionaries.architectures import JumpReLU
from glasshouse.server.dictionaries.formats.build import single_site
from glasshouse.server.dictionaries.formats.files import Source
from glasshouse.server.dictionaries.formats.format import (
    Format,
    Loaded,
    Overrides,
    hook_points,
    layer_in,
    need_hook_point,
)
from glasshouse.server.dictionaries.normalisation import FixedScale

NAME = "gemma_scope"
WEIGHTS = "params.npz"


def detects(source: Source) -> bool:
    names = [n for n in source.weight_files if n.endswith(".npz")]
    return len(names) == 1 and {"W_enc", "W_dec", "threshold"} <= _upper(source.keys_of(names[0]))


def _upper(names: frozenset[str]) -> set[str]:
    return {"W" + name[1:] if name.startswith("w_") else name for name in names}


def load(source: Source, overrides: Overrides) -> list[Loaded]:
    file = source.tensors(next(n for n in source.weight_files if n.endswith(".npz")))
    W_enc = file.take("W_enc", "w_enc", shape=(None, None))
    d_in, d_sae = W_enc.shape
    W_dec = file.take("W_dec", "w_dec", shape=(d_sae, None))
    b_dec = file.take("b_dec", shape=(W_dec.shape[1],))
    found_in, found_out = _hooks(str(source.folder))
    points_in = need_hook_point(source, overrides, found_in)
    _, points_out = hook_points(overrides, points_in, (found_out,) if found_out else ())
    normalisation = None
    if "embedding" in source.folder.parts or points_in == ("hook_embed",):
        factor = torch.full((1, 1), 1 / math.sqrt(d_in))
        normalisation = FixedScale(scale_in=factor, scale_out=factor, name="embedding_sqrt_d")
        b_dec = b_dec / math.sqrt(d_in)
    parameters = single_site(
        W_enc=W_enc,
        W_dec=W_dec,
        b_enc=file.take("b_enc", shape=(d_sae,)),
        b_dec=b_dec,
        activation=JumpReLU(threshold=file.take("threshold", shape=(d_sae,))),
        source_format=NAME,
        hook_points_in=points_in,
        hook_points_out=points_out,
        normalisation=normalisation,
        model_name=overrides.model_name or _model(str(source.folder)),
        notes=("Reads hook_z with its heads flattened to one vector.",)
        if points_in[0].endswith("hook_z")
        else (),
    )
    return [Loaded("", parameters)]


def _hooks(folder: str) -> tuple[str, str]:
    """(in, out) from the path; "" where it does not say."""
    layer = layer_in(folder)
    if "embedding" in folder:
        return "hook_embed", ""
    if layer is None:
        return "", ""
    if "transcoder" in folder:
        return f"blocks.{layer}.ln2.hook_normalized", f"blocks.{layer}.hook_mlp_out"
    for mark, hook in (("-res", "hook_resid_post"), ("-mlp", "hook_mlp_out"), ("-att", "attn.hook_z")):
        if mark in folder:
            return f"blocks.{layer}.{hook}", ""
    return "", ""


def _model(folder: str) -> str:
    for size in ("2b", "9b", "27b"):
        for tuned in ("-it", ""):
            if f"gemma-scope-{size}{tuned or '-pt'}" in folder:
                return f"google/gemma-2-{size}{tuned}"
    return ""


FORMAT = Format(NAME, detects, load)
