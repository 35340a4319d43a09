"""A trained coder as a dictionary of the server, in raw units, with nothing left to do at inference.

With input means and scales mu_s, a_s, output ones nu_m, c_m, and n_i the norm of what feature i writes in raw units:

- W_enc = a_s W_enc n_i, rounded to bfloat16, and b_enc = (b - sum_s mu_s W_enc / n_i) n_i computed from the
  rounded encoder: the mean, which is the largest thing it reads, costs no precision;
- W_dec = W_dec / (c_m n_i), so every row has unit norm and activations are in the units of the stream;
- b_dec = b_dec / c_m + nu_m; thresholds and the gated biases times n_i.

TopK keeps its order under this only where n_i is the same for all features: where one hook point is written.
BatchTopK's one threshold becomes one a feature where several are, and the dictionary a JumpReLU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glasshouse.fable.dictionaries.coder import SparseCoder
from glasshouse.fable.dictionaries.sparsity import GatedPenalty, JumpPenalty, KeepBatchTopK, KeepTopK
from glasshouse.server.dictionaries.formats.glasshouse import Recipe, save_dictionary

STORED_DTYPE = torch.bfloat16


@torch.no_grad()
def export(coder: SparseCoder, path: Path) -> None:
    """Writes the coder to a folder in the native format."""
    recipe, units_out = coder.recipe, coder.units_out
    n_out = units_out.mean.shape[0]
    rows_FMD = coder.W_dec.view(-1, *units_out.mean.shape) / units_out.scale
    norms_F = rows_FMD.flatten(1).norm(dim=1)
    assert recipe.architecture != "topk" or n_out == 1, "TopK's order would change"
    rows_FMD = (rows_FMD / norms_F[:, None, None]).to(STORED_DTYPE)
    mean_FSD, scale_FS1 = _read_units(coder)
    encoder_FSD = (_encoder(coder) * scale_FS1 * norms_F[:, None, None]).to(STORED_DTYPE)
    read_mean_F = (encoder_FSD.float() * mean_FSD).sum((1, 2))
    b_dec_MD = coder.b_dec.view(units_out.mean.shape) / units_out.scale + units_out.mean
    architecture, extra, settings = _nonlinearity(coder, norms_F, read_mean_F)
    tensors = {"b_dec": b_dec_MD, **extra}
    if recipe.kind == "cross_layer_transcoder":
        tensors |= _by_source_layer(encoder_FSD, rows_FMD, tensors)
    elif recipe.kind == "crosscoder":
        tensors |= {"W_enc": encoder_FSD, "W_dec": rows_FMD}
    else:
        tensors |= {"W_enc": encoder_FSD[:, 0], "W_dec": rows_FMD[:, 0], "b_dec": b_dec_MD[0]}
    save_dictionary(
        Recipe(
            kind=recipe.kind,
            architecture=architecture,
            hook_points_in=recipe.hook_points_in,
            hook_points_out=recipe.hook_points_out,
            tensors=tensors,
            model_name="fable",
            card={
                "trained_as": recipe.architecture,
                "positions": recipe.n_tokens,
                "target_l0": recipe.target_l0,
            },
            **settings,
        ),
        path,
    )


def _encoder(coder: SparseCoder) -> Tensor:
    """(F, S', D): what each feature reads; S' is 1 for a cross-layer transcoder, else all hook points in."""
    W_enc = coder.W_enc
    width = coder.mean_in.shape[1]
    return W_enc.transpose(1, 2).reshape(coder.recipe.d_sae, -1, width)


def _read_units(coder: SparseCoder) -> tuple[Tensor, Tensor]:
    """mean (F or 1, S', D) and scale (F or 1, S', 1) of what each feature reads, shaped as `_encoder`."""
    if coder.recipe.n_groups == 1:
        return coder.mean_in.unsqueeze(0), coder.scale_in.unsqueeze(0)
    per_group = coder.W_enc.shape[2]
    own = [values.repeat_interleave(per_group, 0).unsqueeze(1) for values in coder.units_in]
    return own[0], own[1]


def _nonlinearity(
    coder: SparseCoder, norms_F: Tensor, read_mean_F: Tensor
) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """The saved architecture, its tensors and its settings, in raw units."""
    sparsifier = coder.sparsifier
    if isinstance(sparsifier, GatedPenalty):
        gated = {
            "b_gate": sparsifier.b_gate * norms_F - read_mean_F,
            "b_mag": sparsifier.b_mag * norms_F - read_mean_F * sparsifier.r_mag.exp(),
            "r_mag": sparsifier.r_mag,
        }
        return "gated", gated, {}
    bias: Tensor = sparsifier.b_enc  # type: ignore[assignment]
    b_enc = {"b_enc": bias * norms_F - read_mean_F}
    if isinstance(sparsifier, JumpPenalty):
        return "jumprelu", {**b_enc, "threshold": sparsifier.log_threshold.exp() * norms_F}, {}
    if isinstance(sparsifier, KeepTopK):
        return "topk", b_enc, {"k": sparsifier.k}
    if isinstance(sparsifier, KeepBatchTopK):
        if len(coder.mean_out) > 1:
            return "jumprelu", {**b_enc, "threshold": sparsifier.threshold * norms_F}, {}
        threshold = float(sparsifier.threshold * norms_F[0])
        return "batchtopk", b_enc, {"k": round(sparsifier.k), "threshold": threshold}
    return "standard", b_enc, {}


def _by_source_layer(encoder_FSD: Tensor, rows_FMD: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The cross-layer layout: an encoder, a bias and the decoders to its own and later layers, a source layer."""
    n_layers = rows_FMD.shape[1]
    b_enc = tensors.pop("b_enc")
    split: dict[str, Tensor] = {}
    per_layer = zip(
        encoder_FSD[:, 0].chunk(n_layers), b_enc.chunk(n_layers), rows_FMD.chunk(n_layers), strict=True
    )
    for layer, (encoder, bias, rows) in enumerate(per_layer):
        split |= {f"W_enc.{layer}": encoder, f"b_enc.{layer}": bias, f"W_dec.{layer}": rows[:, layer:]}
    return split
