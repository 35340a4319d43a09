"""SAELens, old and new: `cfg.json` and `sae_weights.safetensors`.

Stored: W_enc (D, F), W_dec (F, E), b_enc, b_dec; gated has b_gate, b_mag, r_mag and no b_enc; JumpReLU has
threshold; skip transcoders W_skip (E, D). Since 6.0 hook names sit under `metadata`. Before it:
`hook_point` -> hook_name, `activation_fn_str` -> activation_fn (topk makes it a TopK whatever `architecture`
says), a boolean `normalize_activations` means expected_average_only_in, `apply_b_dec_to_input` defaults to
True, and the weights may hold a `scaling_factor` of ones.

Source: sae-lens 6.54 `saes/*.py` and `loading/pretrained_sae_loaders.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from glasshouse.server.dictionaries.architectures import AbsTopK, Activation, Gated, JumpReLU, ReLU, TopK
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
from glasshouse.server.dictionaries.normalisation import (
    ConstantNorm,
    FixedScale,
    Identity,
    InputOnly,
    LayerNorm,
    Normalisation,
)
from glasshouse.server.dictionaries.parameters import DecoderScale, malformed

NAME = "saelens"
CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"


def detects(source: Source) -> bool:
    return source.has(CONFIG, WEIGHTS)


def load(source: Source, overrides: Overrides) -> list[Loaded]:
    config = _modern(source.config(CONFIG))
    path = str(source.folder / CONFIG)
    file = source.tensors(WEIGHTS)
    architecture = str(config.get("architecture", "standard"))
    transcoder = architecture.endswith("transcoder")
    metadata = config.get("metadata") or {}
    hook_in = metadata.get("hook_name") or ""
    points_in = need_hook_point(source, overrides, hook_in)
    _, points_out = hook_points(
        overrides, points_in, (metadata["hook_name_out"],) if metadata.get("hook_name_out") else ()
    )
    if transcoder and not overrides.hook_points_out and points_out == points_in:
        raise malformed(path, "a transcoder without hook_name_out", "Name it: PATH?hook_point_out=...")
    d_in = number(config, "d_in", path, int)
    d_sae = number(config, "d_sae", path, int)
    d_out = number(config, "d_out", path, int, d_in) if transcoder else d_in
    _refuse_finetuning(file)
    normalisation = _normalisation(config, path, d_in, overrides)
    W_skip = file.maybe("W_skip", shape=(d_out, d_in)) if "skip" in architecture else None
    return [
        Loaded(
            "",
            single_site(
                W_enc=file.take("W_enc", shape=(d_in, d_sae)),
                W_dec=file.take("W_dec", shape=(d_sae, d_out)),
                b_enc=None if architecture == "gated" else file.take("b_enc", shape=(d_sae,)),
                b_dec=file.take("b_dec", shape=(d_out,)),
                activation=_activation(architecture, config, file, path, d_sae),
                source_format=NAME,
                hook_points_in=points_in,
                hook_points_out=points_out,
                subtract_b_dec=bool(config.get("apply_b_dec_to_input", True)) and not transcoder,
                W_skip=None if W_skip is None else W_skip.T,
                normalisation=_entering(normalisation) if transcoder else normalisation,
                scale=DecoderScale(keep=True) if config.get("rescale_acts_by_decoder_norm") else None,
                model_name=overrides.model_name or str(metadata.get("model_name") or ""),
                kind="transcoder" if transcoder else "sae",
                notes=_notes(points_in),
            ),
        )
    ]


def _modern(config: dict[str, Any]) -> dict[str, Any]:
    """A config of any version in the names of 6.0."""
    if "metadata" in config:
        return config
    config = dict(config)
    config.setdefault("hook_name", config.get("hook_point"))
    activation = config.get("activation_fn", config.get("activation_fn_str"))
    k = (config.get("activation_fn_kwargs") or {}).get("k")
    if activation == "topk" and k is not None:
        config.update(architecture="topk", k=k)
    if isinstance(config.get("normalize_activations"), bool):
        config["normalize_activations"] = (
            "expected_average_only_in" if config["normalize_activations"] else "none"
        )
    config["metadata"] = {key: config.get(key) for key in ("hook_name", "hook_name_out", "model_name")}
    return config


def _activation(
    architecture: str, config: dict[str, Any], file: TensorFile, path: str, d_sae: int
) -> Activation:
    if architecture in ("standard", "transcoder", "skip_transcoder"):
        return ReLU()
    if architecture in ("jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder"):
        return JumpReLU(threshold=file.take("threshold", shape=(d_sae,)))
    if architecture == "gated":
        return Gated(
            b_gate=file.take("b_gate", shape=(d_sae,)),
            b_mag=file.take("b_mag", shape=(d_sae,)),
            r_mag=file.take("r_mag", shape=(d_sae,)),
        )
    if architecture in ("topk", "abstopk"):
        k = number(config, "k", path, int)
        return TopK(keep=k) if architecture == "topk" else AbsTopK(keep=k)
    raise malformed(
        path,
        f"architecture {architecture!r} is not an affine encoder with a nonlinearity, and is not served",
        "Served: standard, gated, jumprelu, topk, abstopk and their transcoders. A training checkpoint of a "
        "BatchTopK or Matryoshka SAE must be exported with save_inference_model, which makes it jumprelu.",
    )


def _normalisation(config: dict[str, Any], path: str, d_in: int, overrides: Overrides) -> Normalisation:
    name = config.get("normalize_activations") or "none"
    if name == "none":
        return Identity()
    if name == "layer_norm":
        return LayerNorm()
    if name == "constant_norm_rescale":
        return ConstantNorm()
    if name == "expected_average_only_in" and overrides.average_norm:
        factor = torch.full((1, 1), math.sqrt(d_in) / overrides.average_norm[0])
        return FixedScale(scale_in=factor, scale_out=factor)
    if name == "expected_average_only_in":
        raise malformed(
            path,
            "normalize_activations is expected_average_only_in and its factor is not on disk",
            "Fold it when saving (fold_activation_norm_scaling_factor), or give the data set's average "
            "activation norm: PATH?average_norm=27.3.",
        )
    raise malformed(
        path, f"normalize_activations {name!r} keeps its statistics elsewhere", "Fold it when saving."
    )


def _entering(normalisation: Normalisation) -> Normalisation:
    """SAELens' transcoders normalise their input and never their output."""
    return normalisation if isinstance(normalisation, Identity) else InputOnly(inner=normalisation)


def _refuse_finetuning(file: TensorFile) -> None:
    factor = file.maybe("scaling_factor", "finetuning_scaling_factor")
    if factor is not None and not bool((factor == 1).all()):
        raise malformed(
            str(file.path),
            "holds a finetuning scaling_factor that is not all ones",
            "Fold it into W_dec before saving.",
        )


def _notes(points_in: tuple[str, ...]) -> tuple[str, ...]:
    if points_in[0].endswith("hook_z"):
        return ("Reads hook_z with its heads flattened to one vector.",)
    return ()


FORMAT = Format(NAME, detects, load)
