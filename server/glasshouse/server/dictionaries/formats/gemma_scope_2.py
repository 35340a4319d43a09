"""Gemma Scope 2, one site: SAEs and per-layer transcoders.

Folders: `{resid_post,attn_out,mlp_out,transcoder}[_all]/layer_N_width_W_l0_S[_affine]/` with `config.json`
and `params.safetensors`: w_enc (D, F), w_dec (F, E), b_enc, b_dec, threshold and for affine transcoders
affine_skip_connection (D, E), y += x @ A. JumpReLU, no decoder bias subtracted. `attn_out` is o_proj's input,
that is hook_z. Transcoders read the MLP's input after the norm's gain and write the output of the
post-feedforward norm (hook_mlp_out on Gemma 3). config.json may be missing: then the folder name says it.

Source: https://huggingface.co/google/gemma-scope-2-270m-pt, SAELens' gemma_3 loaders.
"""

from __future__ import annotations

from typing import Any

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
from glasshouse.server.dictionaries.formats.hook_names import of_module

NAME = "gemma_scope_2"
WEIGHTS = "params.safetensors"
KEYS = {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"}


def detects(source: Source) -> bool:
    return source.has(WEIGHTS) and source.keys_of(WEIGHTS) >= KEYS


def load(source: Source, overrides: Overrides) -> list[Loaded]:
    file = source.tensors(WEIGHTS)
    config = source.config("config.json")
    W_enc = file.take("w_enc", shape=(None, None))
    d_in, d_sae = W_enc.shape
    W_dec = file.take("w_dec", shape=(d_sae, None))
    d_out = W_dec.shape[1]
    found_in, found_out = _hooks(config, "/".join(source.folder.parts[-2:]))
    points_in = need_hook_point(source, overrides, found_in)
    _, points_out = hook_points(overrides, points_in, (found_out,) if found_out else ())
    parameters = single_site(
        W_enc=W_enc,
        W_dec=W_dec,
        b_enc=file.take("b_enc", shape=(d_sae,)),
        b_dec=file.take("b_dec", shape=(d_out,)),
        activation=JumpReLU(threshold=file.take("threshold", shape=(d_sae,))),
        source_format=NAME,
        hook_points_in=points_in,
        hook_points_out=points_out,
        W_skip=file.maybe("affine_skip_connection", shape=(d_in, d_out)),
        model_name=overrides.model_name or str(config.get("model_name", "")),
        notes=() if config else ("config.json is missing: the hook points come from the folder's name.",),
    )
    return [Loaded("", parameters)]


def _hooks(config: dict[str, Any], folder: str) -> tuple[str, str]:
    hook_in, hook_out = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    if hook_in:
        return of_module(str(hook_in)), of_module(str(hook_out)) if hook_out else ""
    layer = layer_in(folder)
    if layer is None:
        return "", ""
    if "transcoder" in folder:
        return f"blocks.{layer}.ln2.hook_out", f"blocks.{layer}.hook_mlp_out"
    for mark, hook in (
        ("resid_post", "hook_resid_post"),
        ("attn_out", "attn.hook_z"),
        ("mlp_out", "hook_mlp_out"),
    ):
        if mark in folder:
            return f"blocks.{layer}.{hook}", ""
    return "", ""


FORMAT = Format(NAME, detects, load)
