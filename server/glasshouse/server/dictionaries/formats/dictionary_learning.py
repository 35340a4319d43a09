"""dictionary_learning: `config.json` {trainer, buffer} and `ae.pt`, seven classes.

| dict_class | stored | subtracts its bias from x |
|---|---|---|
| AutoEncoder | bias, encoder.{weight (F, D), bias}, decoder.weight (D, F) | yes; decoder made unit norm |
| AutoEncoderNew | encoder.*, decoder.{weight, bias} | no |
| GatedAutoEncoder | decoder_bias, encoder.weight, r_mag, gate_bias, mag_bias, decoder.weight | yes |
| JumpReluAutoEncoder | W_enc (D, F), b_enc, W_dec (F, D), b_dec, threshold | no |
| AutoEncoderTopK | encoder.*, decoder.weight, b_dec, k, threshold | yes; top-k a token, threshold ignored |
| BatchTopKSAE | the same keys | yes; scalar threshold |
| MatryoshkaBatchTopKSAE | W_enc, W_dec, b_enc, b_dec, k, threshold, group_sizes | yes; scalar threshold |

The norm factor of training is already folded in at save. Trained encoders are stored with strides (1, F); a
strided view serves them as they are. Source: dictionary-learning 0.1 `dictionary.py`, `trainers/`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from glasshouse.server.dictionaries.architectures import Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK
from glasshouse.server.dictionaries.formats.build import single_site
from glasshouse.server.dictionaries.formats.files import Source, TensorFile
from glasshouse.server.dictionaries.formats.format import Format, Loaded, Overrides, layer_in, need_hook_point
from glasshouse.server.dictionaries.parameters import DecoderScale, malformed

NAME = "dictionary_learning"
CONFIG = "config.json"
WEIGHTS = "ae.pt"
CLASSES = (
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "JumpReluAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
)


def detects(source: Source) -> bool:
    return source.has(CONFIG, WEIGHTS)


def load(source: Source, overrides: Overrides) -> list[Loaded]:
    trainer = source.config(CONFIG).get("trainer") or {}
    name = str(trainer.get("dict_class"))
    path = str(source.folder / CONFIG)
    if name not in CLASSES:
        raise malformed(path, f"trainer.dict_class is {name!r}, expected one of {', '.join(CLASSES)}")
    file = source.tensors(WEIGHTS)
    points, notes = _hook(source, trainer, overrides)
    W_enc, W_dec = _weights(file)
    d_sae, d_in = W_dec.shape
    b_dec = file.maybe("bias", "decoder_bias", "decoder.bias", "b_dec", shape=(d_in,))
    gated = name == "GatedAutoEncoder"
    parameters = single_site(
        W_enc=W_enc,
        W_dec=W_dec,
        b_enc=None if gated else file.take("encoder.bias", "b_enc", shape=(d_sae,)),
        b_dec=b_dec,
        activation=_activation(name, trainer, file, d_sae, overrides, path),
        source_format=NAME,
        hook_points_in=points,
        hook_points_out=points,
        subtract_b_dec=name not in ("AutoEncoderNew", "JumpReluAutoEncoder"),
        scale=DecoderScale(keep=True) if name == "AutoEncoder" else None,
        model_name=overrides.model_name or str(trainer.get("lm_name", "")),
        notes=notes,
    )
    return [Loaded("", parameters)]


def _weights(file: TensorFile) -> tuple[Tensor, Tensor]:
    """(W_enc (D, F), W_dec (F, D)), as views."""
    if "W_enc" in file:
        W_enc = file.take("W_enc", shape=(None, None))
        return W_enc, file.take("W_dec", shape=(W_enc.shape[1], W_enc.shape[0]))
    encoder = file.take("encoder.weight", shape=(None, None))
    return encoder.T, file.take("decoder.weight", shape=(encoder.shape[1], encoder.shape[0])).T


def _activation(
    name: str, trainer: dict[str, Any], file: TensorFile, d_sae: int, overrides: Overrides, path: str
) -> Activation:
    if name in ("AutoEncoder", "AutoEncoderNew"):
        return ReLU()
    if name == "GatedAutoEncoder":
        return Gated(
            b_gate=file.take("gate_bias", shape=(d_sae,)),
            b_mag=file.take("mag_bias", shape=(d_sae,)),
            r_mag=file.take("r_mag", shape=(d_sae,)),
        )
    if name == "JumpReluAutoEncoder":
        return JumpReLU(threshold=file.take("threshold", shape=(d_sae,)))
    k = overrides.k or file.number("k") or trainer.get("k")
    if name == "AutoEncoderTopK":
        if k is None:
            raise malformed(path, "neither the weights nor the config say k")
        return TopK(keep=int(k))
    threshold = file.number("threshold")
    return BatchTopK(
        threshold=-1.0 if threshold is None else threshold, trained_k=None if k is None else int(k)
    )


def _hook(
    source: Source, trainer: dict[str, Any], overrides: Overrides
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    submodule = str(trainer.get("submodule_name") or "")
    layer = trainer.get("layer")
    if not isinstance(layer, int):
        layer = layer_in(submodule)
    if layer is None or overrides.hook_points_in:
        return need_hook_point(source, overrides), ()
    for mark, hook in (("resid", "hook_resid_post"), ("mlp", "hook_mlp_out"), ("att", "hook_attn_out")):
        if mark in submodule:
            return (f"blocks.{layer}.{hook}",), ()
    note = "The config names a layer and no submodule: hook_resid_post is a guess. Check its FVU."
    return (f"blocks.{layer}.hook_resid_post",), (note,)


FORMAT = Format(NAME, detects, load)
