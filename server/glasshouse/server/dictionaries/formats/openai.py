"""OpenAI's sparse_autoencoder: one `{layer}.pt`.

pre_bias (D,), latent_bias (F,), encoder.weight (F, D), decoder.weight (D, F) (absent when tied), the strings
`activation` and `activation_state_dict` {k, postact_fn}. Activations are layer-normed if and only if the
activation is TopK; pre_bias is subtracted after that. TopK selects, then applies postact_fn. Extra keys
(`activation.k` and training statistics) are ignored. The file does not name its hook point.

Source: https://github.com/openai/sparse_autoencoder `model.py`.
"""

from __future__ import annotations

from glasshouse.server.dictionaries.architectures import Activation, ReLU, TopK
from glasshouse.server.dictionaries.formats.build import single_site
from glasshouse.server.dictionaries.formats.files import Source, TensorFile
from glasshouse.server.dictionaries.formats.format import (
    Format,
    Loaded,
    Overrides,
    hook_points,
    need_hook_point,
)
from glasshouse.server.dictionaries.normalisation import LayerNorm
from glasshouse.server.dictionaries.parameters import malformed

NAME = "openai"


def detects(source: Source) -> bool:
    names = source.weight_files
    return (
        len(names) == 1
        and names[0].endswith(".pt")
        and {"pre_bias", "latent_bias"} <= source.keys_of(names[0])
    )


def load(source: Source, overrides: Overrides) -> list[Loaded]:
    file = source.tensors(source.weight_files[0])
    encoder = file.take("encoder.weight", "encoder.linear.weight", shape=(None, None))
    d_sae, d_in = encoder.shape
    decoder = file.maybe("decoder.weight", shape=(d_in, d_sae))
    pre_bias = file.take("pre_bias", shape=(d_in,))
    activation, normalise = _activation(file, overrides)
    points_in, points_out = hook_points(overrides, need_hook_point(source, overrides))
    parameters = single_site(
        W_enc=encoder.T,
        W_dec=encoder if decoder is None else decoder.T,
        b_enc=file.take("latent_bias", shape=(d_sae,)),
        b_dec=pre_bias,
        activation=activation,
        source_format=NAME,
        hook_points_in=points_in,
        hook_points_out=points_out,
        subtract_b_dec=True,
        normalisation=LayerNorm() if normalise else None,
        model_name=overrides.model_name,
    )
    return [Loaded("", parameters)]


def _activation(file: TensorFile, overrides: Overrides) -> tuple[Activation, bool]:
    name = file.raw("activation") or "ReLU"
    if name == "ReLU":
        return ReLU(), False
    if name != "TopK":
        raise malformed(str(file.path), f"activation is {name!r}, expected ReLU or TopK")
    state = file.raw("activation_state_dict") or {}
    k = overrides.k or state.get("k") or file.number("activation.k")
    if k is None:
        raise malformed(str(file.path), "a TopK without k", "Give it: PATH?k=32.")
    post = state.get("postact_fn", "ReLU")
    if post not in ("ReLU", "Identity"):
        raise malformed(str(file.path), f"postact_fn is {post!r}, expected ReLU or Identity")
    return TopK(keep=int(k), relu=post == "ReLU"), True


FORMAT = Format(NAME, detects, load)
