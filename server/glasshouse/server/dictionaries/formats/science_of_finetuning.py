"""science-of-finetuning's crosscoders: safetensors or `.pt`, ReLU or BatchTopK.

encoder.weight (L, D, F), encoder.bias, decoder.weight (L, F, D), decoder.bias (L, D), code_normalization_id,
and for BatchTopK k and threshold. Names may carry `_orig_mod.` (saved under torch.compile). BatchTopK at
inference keeps ReLU(h) where ReLU(h) * c > threshold; c is by code_normalization_id: 1 the sum over layers of
the decoder's norms, 2 the norm of them all, 3 a mix, 4 one, 5 per layer, each layer with its own threshold
and gate.

Activations are standardised with activation_mean and activation_global_scale (target_rms / sqrt(sum std^2))
when activation_mean and activation_std hold no NaN: NaN there means no normalisation, and is no reason to
refuse.

Source: https://github.com/science-of-finetuning/dictionary_learning `dictionary.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glasshouse.server.dictionaries.architectures import Activation, BatchTopK, JumpReLU, ReLU
from glasshouse.server.dictionaries.formats.build import crosscoder
from glasshouse.server.dictionaries.formats.files import Source, TensorFile
from glasshouse.server.dictionaries.formats.format import Format, Loaded, Overrides
from glasshouse.server.dictionaries.normalisation import Identity, Normalisation, Standardise
from glasshouse.server.dictionaries.parameters import DecoderScale, malformed

NAME = "science_of_finetuning_crosscoder"
PREFIX = "_orig_mod."
CROSSCODER, SAE, MIXED, NONE, DECOUPLED = 1, 2, 3, 4, 5


def detects(source: Source) -> bool:
    names = source.weight_files
    if len(names) != 1:
        return False
    keys = {key.removeprefix(PREFIX) for key in source.keys_of(names[0])}
    if not {"encoder.weight", "decoder.weight", "encoder.bias"} <= keys:
        return False
    file = source.tensors(names[0])
    weight = file.raw("encoder.weight")
    return getattr(file.raw(PREFIX + "encoder.weight") if weight is None else weight, "ndim", 0) == 3


def load(source: Source, overrides: Overrides) -> list[Loaded]:
    file = source.tensors(source.weight_files[0])
    if PREFIX + "encoder.weight" in file:
        file.entries = {key.removeprefix(PREFIX): value for key, value in file.entries.items()}
    config = source.config("config.json")
    W_enc = file.take("encoder.weight", shape=(None, None, None))
    n_sites, d_in, d_sae = W_enc.shape
    code = int(file.number("code_normalization_id") or CROSSCODER)
    if code not in (CROSSCODER, SAE, MIXED, NONE, DECOUPLED):
        raise malformed(str(file.path), f"code_normalization_id is {code}, expected 1 to 5")
    batch_top_k = "threshold" in file
    decoupled = code == DECOUPLED and batch_top_k
    b_enc = file.take("encoder.bias", shape=(d_sae,))
    points = overrides.hook_points_in
    notes: tuple[str, ...] = ()
    if len(points) != n_sites:
        points = tuple(f"{points[0] if points else 'site'}[{i}]" for i in range(n_sites))
        notes = ("The files do not name the hook points: give one a site, in order.",)
    parameters = crosscoder(
        W_enc=W_enc.flatten(0, 1),
        W_dec=list(file.take("decoder.weight", shape=(n_sites, d_sae, d_in)).unbind(0)),
        activation=_activation(file, n_sites, d_sae, decoupled) if batch_top_k else ReLU(),
        b_enc=b_enc.repeat(n_sites) if decoupled else b_enc,
        b_dec=file.take("decoder.bias", shape=(n_sites, d_in)),
        source_format=NAME,
        hook_points=points,
        normalisation=_normalisation(file, n_sites, d_in),
        scale=_scale(code, config) if batch_top_k else None,
        per_site=decoupled,
        model_name=overrides.model_name,
        notes=notes,
    )
    return [Loaded("", parameters)]


def _activation(file: TensorFile, n_sites: int, d_sae: int, decoupled: bool) -> Activation:
    if decoupled:
        threshold = file.take("threshold", shape=(n_sites,)).float()
        return JumpReLU(threshold=threshold.repeat_interleave(d_sae))
    k = file.number("k")
    return BatchTopK(threshold=file.number("threshold") or 0.0, trained_k=None if k is None else int(k))


def _scale(code: int, config: dict[str, object]) -> DecoderScale | None:
    if code == NONE:
        return None
    if code == CROSSCODER:
        return DecoderScale(keep=False, l2=0.0, total=1.0)
    if code == MIXED:
        l2, total = (
            config.get("code_normalization_alpha_sae", 1.0),
            config.get("code_normalization_alpha_cc", 0.1),
        )
        assert isinstance(l2, (int, float)) and isinstance(total, (int, float)), (
            "numbers by the library's signature"
        )
        return DecoderScale(keep=False, l2=float(l2), total=float(total))
    return DecoderScale(keep=False)


def _normalisation(file: TensorFile, n_sites: int, d_in: int) -> Normalisation:
    mean, std = file.raw("activation_mean"), file.raw("activation_std")
    if not isinstance(mean, Tensor) or not isinstance(std, Tensor):
        return Identity()
    if bool(mean.isnan().any()) or bool(std.isnan().any()):
        return Identity()
    mean = file.take("activation_mean", shape=(n_sites, d_in)).float()
    stored = file.maybe("activation_global_scale", shape=(n_sites,))
    if stored is None:
        target = file.number("target_rms") or 1.0
        stored = target / torch.sqrt(std.float().square().sum(-1) + 1e-8)
    return Standardise(mean=mean, scale=stored.float().unsqueeze(1))


FORMAT = Format(NAME, detects, load)
