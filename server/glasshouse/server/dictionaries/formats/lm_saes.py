"""lm-saes (OpenMOSS) as it saves today: `config.json` and `sae_weights.{safetensors,pt}`; SAE, crosscoder,
CLT.

| sae_type | tensors |
|---|---|
| sae | W_E (D, F), b_E, W_D (F, E), b_D |
| crosscoder | W_E (H, D, F), b_E (H, F), W_D (H, F, D), b_D (H, D) |
| clt | W_E (L, D, F), b_E (L, F), W_D.{to} (to + 1, F, D), b_D.{to}: grouped by TARGET |

`activation_function.log_jumprelu_threshold` holds log thresholds. With sparsity_include_decoder_norm f =
phi(h * n) / n, n the norm of all a feature writes (per head for a crosscoder, whose pre-activation is summed
over heads and then gated once a head). `norm_activation`: dataset-wise scales every hook point by sqrt(D) /
its average norm, stored as `dataset_average_activation_norm.<hook>`; token-wise by sqrt(D) / ||x||; inference
means folded.

Batch-level top-k depends on the batch: served as its per-position counterpart, with a note.

Source: https://github.com/OpenMOSS/Language-Model-SAEs `models/{sae,crosscoder,clt,sparse_dictionary}.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from glasshouse.server.dictionaries.architectures import Activation, JumpReLU, ReLU, TopK
from glasshouse.server.dictionaries.formats.build import cross_layer, crosscoder, single_site
from glasshouse.server.dictionaries.formats.files import Source, TensorFile
from glasshouse.server.dictionaries.formats.format import Format, Loaded, Overrides, hook_points, number
from glasshouse.server.dictionaries.normalisation import ConstantNorm, FixedScale, Identity, Normalisation
from glasshouse.server.dictionaries.parameters import (
    DecoderBlock,
    DecoderScale,
    DictionaryParameters,
    malformed,
)

NAME = "lm_saes"
CONFIG = "config.json"
WEIGHTS = ("sae_weights.safetensors", "sae_weights.pt")
BATCH_NOTE = "Trained with a batch-level top-k: here each position keeps its own k strongest features."


def detects(source: Source) -> bool:
    return any(source.has(CONFIG, name) and "W_E" in source.keys_of(name) for name in WEIGHTS)


def load(source: Source, overrides: Overrides) -> list[Loaded]:
    config = source.config(CONFIG)
    path = str(source.folder / CONFIG)
    file = source.tensors(next(name for name in WEIGHTS if source.has(name)))
    kind = str(config.get("sae_type"))
    if kind not in ("sae", "crosscoder", "clt"):
        raise malformed(path, f"sae_type is {kind!r}, expected sae, crosscoder or clt")
    if config.get("use_glu_encoder"):
        raise malformed(
            path, "use_glu_encoder multiplies two encoders, which is not served", "Use a plain encoder."
        )
    if kind == "sae":
        stored_in, stored_out = (str(config.get("hook_point_in")),), (str(config.get("hook_point_out")),)
    elif kind == "crosscoder":
        stored_in = stored_out = tuple(config.get("hook_points", ()))
    else:
        stored_in, stored_out = (
            tuple(config.get("hook_points_in", ())),
            tuple(config.get("hook_points_out", ())),
        )
    points_in, points_out = hook_points(overrides, stored_in, stored_out)
    activation, notes = _activation(config, path, kind, file, overrides)
    common: dict[str, Any] = {
        "activation": activation,
        "source_format": NAME,
        "normalisation": _normalisation(config, path, file, stored_in, stored_out),
        "scale": DecoderScale(keep=False) if config.get("sparsity_include_decoder_norm", True) else None,
        "model_name": overrides.model_name,
        "notes": notes,
    }
    if kind == "sae":
        parameters = _sae(file, points_in, points_out, common)
    elif kind == "crosscoder":
        parameters = _crosscoder(file, points_in, common)
    else:
        parameters = _clt(file, points_in, points_out, common)
    return [Loaded("", parameters)]


def _sae(
    file: TensorFile, points_in: tuple[str, ...], points_out: tuple[str, ...], common: dict[str, Any]
) -> DictionaryParameters:
    W_enc = file.take("W_E", shape=(None, None))
    d_sae = W_enc.shape[1]
    W_dec = file.take("W_D", shape=(d_sae, None))
    return single_site(
        W_enc=W_enc,
        W_dec=W_dec,
        b_enc=file.take("b_E", shape=(d_sae,)),
        b_dec=file.maybe("b_D", shape=(W_dec.shape[1],)),
        hook_points_in=points_in,
        hook_points_out=points_out,
        **common,
    )


def _crosscoder(file: TensorFile, points: tuple[str, ...], common: dict[str, Any]) -> DictionaryParameters:
    n_heads = len(points)
    W_enc = file.take("W_E", shape=(n_heads, None, None))
    d_in, d_sae = W_enc.shape[1:]
    b_enc = file.take("b_E", shape=(n_heads, d_sae)).float().sum(0)
    return crosscoder(
        W_enc=W_enc.flatten(0, 1),
        W_dec=list(file.take("W_D", shape=(n_heads, d_sae, d_in)).unbind(0)),
        b_enc=b_enc.repeat(n_heads),
        b_dec=file.take("b_D", shape=(n_heads, d_in)),
        hook_points=points,
        per_site=True,
        **common,
    )


def _clt(
    file: TensorFile, points_in: tuple[str, ...], points_out: tuple[str, ...], common: dict[str, Any]
) -> DictionaryParameters:
    n_layers = len(points_in)
    W_enc = file.take("W_E", shape=(n_layers, None, None))
    d_in, d_sae = W_enc.shape[1:]
    decoders, b_dec = [], []
    for to in range(n_layers):
        W_dec = file.take(f"W_D.{to}", shape=(to + 1, d_sae, d_in))
        decoders += [DecoderBlock(W_dec=W_dec[layer], group=layer, site=to) for layer in range(to + 1)]
        b_dec.append(file.take(f"b_D.{to}", shape=(d_in,)))
    return cross_layer(
        encoders=list(W_enc.unbind(0)),
        decoders=decoders,
        b_enc=file.take("b_E", shape=(n_layers, d_sae)).flatten(),
        b_dec=torch.stack(b_dec),
        hook_points_in=points_in,
        hook_points_out=points_out,
        **common,
    )


def _activation(
    config: dict[str, Any], path: str, kind: str, file: TensorFile, overrides: Overrides
) -> tuple[Activation, tuple[str, ...]]:
    name = str(config.get("act_fn", "relu")).lower()
    if name == "relu":
        return ReLU(), ()
    if name == "jumprelu":
        log = file.take("activation_function.log_jumprelu_threshold", "log_jumprelu_threshold")
        threshold = log.float().exp().flatten()
        repeats = len(config.get("hook_points", ())) if kind == "crosscoder" else 1
        return JumpReLU(threshold=threshold.repeat(repeats)), ()
    if name not in ("topk", "layertopk", "batchtopk", "batchlayertopk"):
        raise malformed(path, f"act_fn is {name!r}, expected relu, jumprelu or a top-k")
    k = overrides.k or number(config, "top_k", path, int)
    whole_row = name in ("layertopk", "batchlayertopk") or kind == "sae"
    return TopK(keep=k, per_group=not whole_row), (BATCH_NOTE,) if name.startswith("batch") else ()


def _normalisation(
    config: dict[str, Any],
    path: str,
    file: TensorFile,
    points_in: tuple[str, ...],
    points_out: tuple[str, ...],
) -> Normalisation:
    name = str(config.get("norm_activation", "dataset-wise"))
    if name == "inference":
        return Identity()
    if name == "token-wise" and points_in == points_out:
        return ConstantNorm()
    if name != "dataset-wise":
        raise malformed(
            path, f"norm_activation {name!r} needs the norms of the target", "Fold it when saving."
        )
    d_model = number(config, "d_model", path, int)
    return FixedScale(
        scale_in=_factors(file, points_in, d_model), scale_out=_factors(file, points_out, d_model), name=name
    )


def _factors(file: TensorFile, points: tuple[str, ...], d_model: int) -> torch.Tensor:
    factors = []
    for point in points:
        norm = file.number(f"dataset_average_activation_norm.{point}")
        if norm is None or not (math.isfinite(norm) and norm > 0):
            raise malformed(
                str(file.path),
                f"dataset_average_activation_norm.{point} is {norm}, expected the data set's average norm",
                "Save after training has measured it, or with fold_activation_scale=True.",
            )
        factors.append([math.sqrt(d_model) / norm])
    return torch.tensor(factors)


FORMAT = Format(NAME, detects, load)
