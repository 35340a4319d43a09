"""Qwen-Scope: `layer{n}.sae.pt` with W_enc (F, D), W_dec (D, F), b_enc, b_dec.

TopK whose k is in the repository's name (`SAE-Res-Qwen3-1.7B-Base-W32K-L0_50`), hook_resid_post, no decoder
bias subtracted, and no ReLU after the selection in the model card's own code. A folder of several layers is a
set: NAME/n each.

Source: https://huggingface.co/collections/Qwen/qwen-scope, SAELens' qwen_scope loader.
"""

from __future__ import annotations

import re

from glasshouse.server.dictionaries.architectures import TopK
from glasshouse.server.dictionaries.formats.build import single_site
from glasshouse.server.dictionaries.formats.files import Source
from glasshouse.server.dictionaries.formats.format import Format, Loaded, Overrides, hook_points, layer_in
from glasshouse.server.dictionaries.parameters import malformed

NAME = "qwen_scope"
PATTERN = "layer*.sae.pt"


def detects(source: Source) -> bool:
    return bool(source.matching(PATTERN))


def load(source: Source, overrides: Overrides) -> list[Loaded]:
    match = re.search(r"SAE-Res-(.+)-W\d+K-L0_(\d+)", str(source.path))
    k = overrides.k or (int(match.group(2)) if match else None)
    if k is None:
        raise malformed(
            str(source),
            "k is in the repository's name, and the folder is called otherwise",
            "Give it: PATH?k=50.",
        )
    names = source.matching(PATTERN)
    loaded = []
    for name in names:
        file = source.tensors(name)
        layer = layer_in(name)
        W_enc = file.take("W_enc", shape=(None, None))
        d_sae, d_in = W_enc.shape
        points_in, points_out = hook_points(overrides, (f"blocks.{layer}.hook_resid_post",))
        parameters = single_site(
            W_enc=W_enc.T,
            W_dec=file.take("W_dec", shape=(d_in, d_sae)).T,
            b_enc=file.take("b_enc", shape=(d_sae,)),
            b_dec=file.take("b_dec", shape=(d_in,)),
            activation=TopK(keep=k, relu=False),
            source_format=NAME,
            hook_points_in=points_in,
            hook_points_out=points_out,
            model_name=overrides.model_name or (f"Qwen/{match.group(1)}" if match else ""),
        )
        loaded.append(Loaded("" if len(names) == 1 else str(layer), parameters))
    return loaded


FORMAT = Format(NAME, detects, load)
