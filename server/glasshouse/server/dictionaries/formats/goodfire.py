"""Goodfire: one `.pth` or `.pt` with encoder_linear.{weight, bias} and decoder_linear.{weight, bias}.

ReLU, no decoder bias subtracted. The layer is in the file's name (`...-SAE-l19.pth`): hook_resid_post of it.

Source: https://huggingface.co/Goodfire/Llama-3.1-8B-Instruct-SAE-l19, SAELens' goodfire loader.
"""

from __future__ import annotations

from glasshouse.server.dictionaries.architectures import ReLU
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

NAME = "goodfire"


def detects(source: Source) -> bool:
    names = source.weight_files
    return len(names) == 1 and {"encoder_linear.weight", "decoder_linear.weight"} <= source.keys_of(names[0])


def load(source: Source, overrides: Overrides) -> list[Loaded]:
    name = source.weight_files[0]
    file = source.tensors(name)
    encoder = file.take("encoder_linear.weight", shape=(None, None))
    d_sae, d_in = encoder.shape
    layer = layer_in(name, r"-l(\d+)")
    found = "" if layer is None else f"blocks.{layer}.hook_resid_post"
    points_in, points_out = hook_points(overrides, need_hook_point(source, overrides, found))
    parameters = single_site(
        W_enc=encoder.T,
        W_dec=file.take("decoder_linear.weight", shape=(d_in, d_sae)).T,
        b_enc=file.take("encoder_linear.bias", shape=(d_sae,)),
        b_dec=file.take("decoder_linear.bias", shape=(d_in,)),
        activation=ReLU(),
        source_format=NAME,
        hook_points_in=points_in,
        hook_points_out=points_out,
        model_name=overrides.model_name,
    )
    return [Loaded("", parameters)]


FORMAT = Format(NAME, detects, load)
