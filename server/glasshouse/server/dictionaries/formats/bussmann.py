"""BatchTopK (Bussmann): `sae.pt` and `config.json`; W_enc (D, F), W_dec (F, D), b_enc, b_dec.

| sae_type | encode | b_enc | subtracts b_dec |
|---|---|---|---|
| vanilla | ReLU | used | yes |
| topk, batchtopk | ReLU, then top-k | ignored | yes |
| jumprelu | threshold exp(jumprelu.log_threshold) | used | no |

`input_unit_norm` is a layer norm, undone on the output. A BatchTopK checkpoint stores no threshold: here each
position keeps its own k strongest, so that a position never depends on its batch; a note says so.

Source: https://github.com/bartbussmann/BatchTopK `sae.py`.
"""

from __future__ import annotations

import torch

from glasshouse.server.dictionaries.architectures import Activation, JumpReLU, ReLU, TopK
from glasshouse.server.dictionaries.formats.build import single_site
from glasshouse.server.dictionaries.formats.files import Source
from glasshouse.server.dictionaries.formats.format import (
    Format,
    Loaded,
    Overrides,
    hook_points,
    need_hook_point,
    number,
)
from glasshouse.server.dictionaries.normalisation import LayerNorm
from glasshouse.server.dictionaries.parameters import malformed

NAME = "batchtopk_bussmann"
CONFIG = "config.json"
WEIGHTS = "sae.pt"
NOTE = "BatchTopK without a stored threshold: each position keeps its own k strongest features."


def detects(source: Source) -> bool:
    return source.has(CONFIG, WEIGHTS)


def load(source: Source, overrides: Overrides) -> list[Loaded]:
    config = source.config(CONFIG)
    path = str(source.folder / CONFIG)
    file = source.tensors(WEIGHTS)
    W_enc = file.take("W_enc", shape=(None, None))
    d_in, d_sae = W_enc.shape
    kind = str(config.get("sae_type", "jumprelu" if "jumprelu.log_threshold" in file else "vanilla"))
    activation: Activation
    if kind == "vanilla":
        activation = ReLU()
    elif kind == "jumprelu":
        activation = JumpReLU(
            threshold=torch.exp(file.take("jumprelu.log_threshold", shape=(d_sae,)).float())
        )
    elif kind in ("topk", "batchtopk"):
        activation = TopK(keep=overrides.k or number(config, "top_k", path, int))
    else:
        raise malformed(path, f"sae_type is {kind!r}, expected vanilla, topk, batchtopk or jumprelu")
    hook = str(config.get("hook_point", "")) or _hook(config)
    points_in, points_out = hook_points(overrides, need_hook_point(source, overrides, hook))
    parameters = single_site(
        W_enc=W_enc,
        W_dec=file.take("W_dec", shape=(d_sae, d_in)),
        b_enc=file.take("b_enc", shape=(d_sae,)) if kind in ("vanilla", "jumprelu") else None,
        b_dec=file.take("b_dec", shape=(d_in,)),
        activation=activation,
        source_format=NAME,
        hook_points_in=points_in,
        hook_points_out=points_out,
        subtract_b_dec=kind != "jumprelu",
        normalisation=LayerNorm() if config.get("input_unit_norm") in (True, "True") else None,
        model_name=overrides.model_name or str(config.get("model_name", "")),
        notes=(NOTE,) if kind == "batchtopk" else (),
    )
    return [Loaded("", parameters)]


def _hook(config: dict[str, object]) -> str:
    if isinstance(config.get("layer"), int) and config.get("site"):
        return f"blocks.{config['layer']}.hook_{config['site']}"
    return ""


FORMAT = Format(NAME, detects, load)
