"""EleutherAI's sparsify: `<hookpoint>/cfg.json` and `sae.safetensors`.

encoder.weight (F, D), encoder.bias, W_dec (F, E), b_dec and perhaps W_skip (E, D): y += x @ W_skip^T on the
raw x. The hook point IS the folder's name, a module path such as `layers.5.mlp`. b_dec is always subtracted
from the input unless `transcode`. TopK or group-max, after a ReLU. Older configs lack `transcode` even where
`skip_connection` is true: such a dictionary is taken for a transcoder, and the note says so.

Source: eai-sparsify 1.3 `sparse_coder.py`, `fused_encoder.py`.
"""

from __future__ import annotations

from glasshouse.server.dictionaries.architectures import Activation, GroupMax, TopK
from glasshouse.server.dictionaries.formats.build import single_site
from glasshouse.server.dictionaries.formats.files import Source
from glasshouse.server.dictionaries.formats.format import Format, Loaded, Overrides, hook_points, number
from glasshouse.server.dictionaries.formats.hook_names import of_module
from glasshouse.server.dictionaries.parameters import malformed

NAME = "sparsify"
CONFIG = "cfg.json"
WEIGHTS = "sae.safetensors"


def detects(source: Source) -> bool:
    return source.has(CONFIG, WEIGHTS)


def load(source: Source, overrides: Overrides) -> list[Loaded]:
    config = source.config(CONFIG)
    path = str(source.folder / CONFIG)
    file = source.tensors(WEIGHTS)
    d_in = number(config, "d_in", path, int)
    d_sae = number(config, "num_latents", path, int, 0) or d_in * number(
        config, "expansion_factor", path, int
    )
    k = overrides.k or number(config, "k", path, int)
    kind = str(config.get("activation", "topk"))
    if kind not in ("topk", "groupmax"):
        raise malformed(path, f"activation is {kind!r}, expected topk or groupmax")
    activation: Activation = TopK(keep=k) if kind == "topk" else GroupMax(groups=k)
    W_skip = file.maybe("W_skip", shape=(d_in, d_in))
    notes: tuple[str, ...] = ()
    transcode = bool(config.get("transcode", False))
    if "transcode" not in config and (config.get("skip_connection") or W_skip is not None):
        transcode = True
        notes = (
            "The config does not say whether this transcodes; its skip connection says so. Check its FVU.",
        )
    module = source.folder.name
    found_in = of_module(module, reads_input=transcode)
    points_in, points_out = hook_points(overrides, (found_in,), (of_module(module),))
    return [
        Loaded(
            "",
            single_site(
                W_enc=file.take("encoder.weight", shape=(d_sae, d_in)).T,
                W_dec=file.take("W_dec", shape=(d_sae, d_in)),
                b_enc=file.take("encoder.bias", shape=(d_sae,)),
                b_dec=file.take("b_dec", shape=(d_in,)),
                activation=activation,
                source_format=NAME,
                hook_points_in=points_in,
                hook_points_out=points_out,
                subtract_b_dec=not transcode,
                W_skip=None if W_skip is None else W_skip.T,
                model_name=overrides.model_name,
                kind="transcoder" if transcode else "sae",
                notes=notes,
            ),
        )
    ]


FORMAT = Format(NAME, detects, load)
