"""Kissane's model-diffing crosscoder: `cfg.json` and `cc_weights.pt`.

W_enc (2, D, F), W_dec (F, 2, D), b_enc (F,), b_dec (2, D): ReLU of the sum over the two models. Each model's
activations are scaled to a mean norm of sqrt(D) before, and the factors are NOT in the files: give the
average norms as PATH?average_norm=A,B, or feed activations that are already scaled; a note says which.

Source: https://github.com/ckkissane/crosscoder-model-diff-replication `crosscoder.py`.
"""

from __future__ import annotations

import math

import torch

from glasshouse.server.dictionaries.architectures import ReLU
from glasshouse.server.dictionaries.formats.build import crosscoder
from glasshouse.server.dictionaries.formats.files import Source
from glasshouse.server.dictionaries.formats.format import Format, Loaded, Overrides
from glasshouse.server.dictionaries.normalisation import FixedScale, Identity, Normalisation

NAME = "kissane_crosscoder"
NOTE = (
    "Its scale factors are not on disk: activations must be scaled to a mean norm of sqrt(d_in) before, or "
    "give average_norm."
)


def detects(source: Source) -> bool:
    names = [n for n in source.weight_files if n.endswith((".pt", ".safetensors"))]
    return (
        len(names) == 1
        and source.keys_of(names[0]) == {"W_enc", "W_dec", "b_enc", "b_dec"}
        and _is_3d(source, names)
    )


def _is_3d(source: Source, names: list[str]) -> bool:
    return getattr(source.tensors(names[0]).raw("W_enc"), "ndim", 0) == 3


def load(source: Source, overrides: Overrides) -> list[Loaded]:
    file = source.tensors(next(n for n in source.weight_files if n.endswith((".pt", ".safetensors"))))
    config = next(
        (c for c in map(source.config, sorted(n for n in source.names if n.endswith("cfg.json"))) if c), {}
    )
    W_enc = file.take("W_enc", shape=(None, None, None))
    n_models, d_in, d_sae = W_enc.shape
    points = overrides.hook_points_in
    if len(points) != n_models:
        hook = points[0] if points else str(config.get("hook_point", "")) or source.folder.name
        points = tuple(f"{config.get('model_name', 'model')}[{i}]:{hook}" for i in range(n_models))
    normalisation: Normalisation = Identity()
    if overrides.average_norm:
        norms = torch.tensor(overrides.average_norm).expand(n_models).unsqueeze(1)
        normalisation = FixedScale(scale_in=math.sqrt(d_in) / norms, scale_out=math.sqrt(d_in) / norms)
    parameters = crosscoder(
        W_enc=W_enc.flatten(0, 1),
        W_dec=list(file.take("W_dec", shape=(d_sae, n_models, d_in)).unbind(1)),
        activation=ReLU(),
        b_enc=file.take("b_enc", shape=(d_sae,)),
        b_dec=file.take("b_dec", shape=(n_models, d_in)),
        source_format=NAME,
        hook_points=points,
        normalisation=normalisation,
        model_name=overrides.model_name or str(config.get("model_name", "")),
        notes=() if overrides.average_norm else (NOTE,),
    )
    return [Loaded("", parameters)]


FORMAT = Format(NAME, detects, load)
