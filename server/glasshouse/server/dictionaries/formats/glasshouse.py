"""Our own format, for every architecture: `dictionary.json` and `dictionary.safetensors`.

Tensors, all rows-first so that one feature is one contiguous run of the file (S sites in, M sites out):

- SAE, transcoder:  W_enc (F, D), W_dec (F, E), b_enc (F,), b_dec (E,)
- crosscoder:       W_enc (F, S, D), W_dec (F, M, E), b_enc (F,), b_dec (M, E)
- cross-layer transcoder of L layers: W_enc.{l} (F, D), W_dec.{l} (F, L - l, E) whose slot j writes layer l +
  j, b_enc.{l} (F,), b_dec (L, E)
- threshold (F,) for jumprelu, of all features flat for a cross-layer transcoder; b_gate, b_mag, r_mag for
  gated
- W_skip (D, E), y += x @ W_skip, for a transcoder

`tied` leaves out W_enc: the encoder is the decoder's transpose.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from glasshouse.server.dictionaries.architectures import (
    AbsTopK,
    Activation,
    BatchTopK,
    Gated,
    GroupMax,
    JumpReLU,
    ReLU,
    TopK,
)
from glasshouse.server.dictionaries.formats.build import cross_layer, crosscoder, single_site
from glasshouse.server.dictionaries.formats.files import Source, TensorFile
from glasshouse.server.dictionaries.formats.format import Format, Loaded, Overrides, hook_points, number
from glasshouse.server.dictionaries.normalisation import (
    ConstantNorm,
    FixedScale,
    Identity,
    LayerNorm,
    Normalisation,
)
from glasshouse.server.dictionaries.parameters import (
    KINDS,
    DecoderBlock,
    DecoderScale,
    DictionaryParameters,
    malformed,
)

NAME = "glasshouse"
CONFIG = "dictionary.json"
WEIGHTS = "dictionary.safetensors"
VERSION = 1
ARCHITECTURES = ("standard", "gated", "jumprelu", "topk", "batchtopk", "groupmax", "abstopk")
NORMALISATIONS = ("none", "fixed_scale", "constant_norm_rescale", "layer_norm")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to save: the tensors in the layout above and what the config says.

    k: topk, abstopk, groupmax (groups), batchtopk (as trained). relu: topk survivors must be positive.
    threshold: batchtopk's scalar. apply_b_dec_to_input: subtract b_dec from x before encoding (SAEs).
    rescale_by_decoder_norm: "" | "keep" | "selection", see `DecoderScale`.
    scale_in, scale_out: factors per site for normalisation fixed_scale.
    card: anything a reader should know (training data, measured figures); returned untouched by `read_card`.
    """

    kind: str
    architecture: str
    hook_points_in: tuple[str, ...]
    hook_points_out: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    k: int | None = None
    relu: bool = True
    threshold: float = -1.0
    apply_b_dec_to_input: bool = False
    tied: bool = False
    rescale_by_decoder_norm: str = ""
    normalisation: str = "none"
    scale_in: tuple[float, ...] = ()
    scale_out: tuple[float, ...] = ()
    model_name: str = ""
    notes: tuple[str, ...] = ()
    card: Mapping[str, Any] = field(default_factory=dict)


def save_dictionary(recipe: Recipe, path: Path) -> None:
    """Writes the folder (made where missing) and checks it by assembling it again from the tensors given."""
    _assemble(_config(recipe), dict(recipe.tensors), str(path), Overrides()).check(str(path))
    path.mkdir(parents=True, exist_ok=True)
    # Copies: safetensors takes no two tensors of one memory, which tied weights and expanded ones are.
    tensors = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in recipe.tensors.items()
    }
    save_file(tensors, str(path / WEIGHTS), metadata={"format": f"{NAME}-{VERSION}"})
    (path / CONFIG).write_text(json.dumps(_config(recipe), indent=2) + "\n", encoding="utf-8")


def read_card(path: Path) -> dict[str, Any]:
    """The card saved with a native dictionary; {} where there is none."""
    card = Source(path).config(CONFIG).get("card", {})
    return card if isinstance(card, dict) else {}


def _config(recipe: Recipe) -> dict[str, Any]:
    config: dict[str, Any] = {"format": NAME, "version": VERSION}
    for name, value in vars(recipe).items():
        if name != "tensors":
            config[name] = list(value) if isinstance(value, tuple) else value
    config["card"] = dict(recipe.card)
    return config


def detects(source: Source) -> bool:
    return source.has(CONFIG, WEIGHTS) and not source.is_file


def load(source: Source, overrides: Overrides) -> list[Loaded]:
    config = source.config(CONFIG)
    if config.get("format") != NAME or config.get("version") != VERSION:
        raise malformed(
            str(source),
            f"format {config.get('format')!r} version {config.get('version')!r}, expected {NAME!r} {VERSION}",
            "Use a newer server, or export the dictionary again.",
        )
    file = source.tensors(WEIGHTS)
    return [Loaded("", _assemble(config, _Checked(file), str(file.path), overrides))]


class _Checked(dict[str, Tensor]):
    """A file's tensors, each checked when it is first read."""

    def __init__(self, file: TensorFile) -> None:
        super().__init__()
        self.file = file

    def __missing__(self, name: str) -> Tensor:
        self[name] = self.file.take(name)
        return self[name]

    def __contains__(self, name: object) -> bool:
        return name in self.file.entries


def _assemble(
    config: Mapping[str, Any], tensors: dict[str, Tensor], path: str, overrides: Overrides
) -> DictionaryParameters:
    kind, architecture = str(config.get("kind")), str(config.get("architecture"))
    if kind not in KINDS:
        raise malformed(path, f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    points_in, points_out = hook_points(
        overrides, tuple(config.get("hook_points_in", ())), tuple(config.get("hook_points_out", ()))
    )
    if not points_in:
        raise malformed(path, "hook_points_in is empty, expected at least one name")
    common: dict[str, Any] = {
        "activation": _activation(dict(config), architecture, tensors, path),
        "source_format": NAME,
        "normalisation": _normalisation(dict(config), path),
        "scale": _scale(str(config.get("rescale_by_decoder_norm", "")), path),
        "model_name": overrides.model_name or str(config.get("model_name", "")),
        "notes": tuple(config.get("notes", ())),
    }
    if kind == "cross_layer_transcoder":
        return _cross_layer(tensors, points_in, points_out, common, path)
    W_dec = _of_rank(tensors, "W_dec", 3 if kind == "crosscoder" else 2, path)
    W_enc = W_dec if config.get("tied") else _of_rank(tensors, "W_enc", W_dec.ndim, path)
    b_enc = None if architecture == "gated" else _of_rank(tensors, "b_enc", 1, path)
    if kind == "crosscoder":
        return crosscoder(
            W_enc=W_enc.flatten(1).T,
            W_dec=list(W_dec.unbind(1)),
            b_enc=b_enc if b_enc is not None else torch.zeros(W_dec.shape[0]),
            b_dec=_of_rank(tensors, "b_dec", 2, path),
            hook_points=points_in,
            **common,
        )
    return single_site(
        W_enc=W_enc.T,
        W_dec=W_dec,
        b_enc=b_enc,
        b_dec=_of_rank(tensors, "b_dec", 1, path),
        hook_points_in=points_in,
        hook_points_out=points_out,
        subtract_b_dec=bool(config.get("apply_b_dec_to_input")) and kind == "sae",
        W_skip=_of_rank(tensors, "W_skip", 2, path) if "W_skip" in tensors else None,
        kind=kind,
        **common,
    )


def _cross_layer(
    tensors: dict[str, Tensor],
    points_in: tuple[str, ...],
    points_out: tuple[str, ...],
    common: dict[str, Any],
    path: str,
) -> DictionaryParameters:
    n_layers = len(points_in)
    encoders, biases, decoders = [], [], []
    for layer in range(n_layers):
        encoders.append(_of_rank(tensors, f"W_enc.{layer}", 2, path).T)
        biases.append(_of_rank(tensors, f"b_enc.{layer}", 1, path))
        W_dec = _of_rank(tensors, f"W_dec.{layer}", 3, path)
        if W_dec.shape[1] != n_layers - layer:
            raise malformed(
                path, f"W_dec.{layer} writes {W_dec.shape[1]} layers, expected {n_layers - layer}"
            )
        decoders += [
            DecoderBlock(W_dec=W_dec[:, j], group=layer, site=layer + j) for j in range(n_layers - layer)
        ]
    return cross_layer(
        encoders=encoders,
        decoders=decoders,
        b_enc=torch.cat(biases),
        b_dec=_of_rank(tensors, "b_dec", 2, path),
        hook_points_in=points_in,
        hook_points_out=points_out,
        **common,
    )


def _of_rank(tensors: dict[str, Tensor], name: str, rank: int, path: str) -> Tensor:
    if name not in tensors:
        raise malformed(path, f"has no tensor {name}")
    tensor = tensors[name]
    if tensor.ndim != rank:
        raise malformed(path, f"tensor {name} has shape {tuple(tensor.shape)}, expected {rank} dimensions")
    return tensor


def _activation(
    config: dict[str, Any], architecture: str, tensors: dict[str, Tensor], path: str
) -> Activation:
    if architecture == "standard":
        return ReLU()
    if architecture == "gated":
        return Gated(
            b_gate=_of_rank(tensors, "b_gate", 1, path),
            b_mag=_of_rank(tensors, "b_mag", 1, path),
            r_mag=_of_rank(tensors, "r_mag", 1, path),
        )
    if architecture == "jumprelu":
        return JumpReLU(threshold=_of_rank(tensors, "threshold", 1, path))
    if architecture == "batchtopk":
        return BatchTopK(threshold=number(config, "threshold", path, float, -1.0), trained_k=config.get("k"))
    if architecture not in ARCHITECTURES:
        raise malformed(path, f"architecture is {architecture!r}, expected one of {', '.join(ARCHITECTURES)}")
    k = number(config, "k", path, int)
    if architecture == "topk":
        return TopK(keep=k, relu=bool(config.get("relu", True)))
    return AbsTopK(keep=k) if architecture == "abstopk" else GroupMax(groups=k)


def _normalisation(config: dict[str, Any], path: str) -> Normalisation:
    name = str(config.get("normalisation", "none"))
    if name == "none":
        return Identity()
    if name == "layer_norm":
        return LayerNorm()
    if name == "constant_norm_rescale":
        return ConstantNorm()
    if name != "fixed_scale":
        raise malformed(path, f"normalisation is {name!r}, expected one of {', '.join(NORMALISATIONS)}")
    factors = [torch.tensor(config.get(key) or [], dtype=torch.float32) for key in ("scale_in", "scale_out")]
    if any(f.numel() == 0 or not bool((f > 0).all()) for f in factors):
        raise malformed(path, "fixed_scale needs positive scale_in and scale_out, one a hook point")
    return FixedScale(scale_in=factors[0].unsqueeze(1), scale_out=factors[1].unsqueeze(1))


def _scale(name: str, path: str) -> DecoderScale | None:
    if name not in ("", "keep", "selection"):
        raise malformed(path, f"rescale_by_decoder_norm is {name!r}, expected '', 'keep' or 'selection'")
    return DecoderScale(keep=name == "keep") if name else None


FORMAT = Format(NAME, detects, load)
