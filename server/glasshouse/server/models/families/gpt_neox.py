"""GPT-NeoX (Pythia): attention and MLP in parallel, partly rotary heads, q/k/v interleaved head by head.

With ``use_parallel_residual=False`` the block is sequential and has ``hook_resid_mid``.
"""

from __future__ import annotations

from glasshouse.server.models.families.norms import NormKind
from glasshouse.server.models.families.spec import ModelFacts
from glasshouse.server.models.families.table import BlockLayout, Part, StackLayout

MODEL_TYPES = ("gpt_neox",)


def layout(config: object, facts: ModelFacts) -> StackLayout:
    q, k, v = (
        Part(path="attention.query_key_value", label=label, interleave=(index, 3))
        for index, label in enumerate("qkv")
    )
    block = BlockLayout(
        attention="attention",
        q=q,
        k=k,
        v=v,
        out_proj="attention.dense",
        mlp="mlp",
        mlp_pre=Part(path="mlp.dense_h_to_4h"),
        mlp_pre_linear=None,
        mlp_out_proj="mlp.dense_4h_to_h",
        ln1="input_layernorm",
        ln2="post_attention_layernorm",
        norm=NormKind.LAYER,
        parallel=bool(getattr(config, "use_parallel_residual", True)),
    )
    return StackLayout(
        base="gpt_neox",
        blocks="gpt_neox.layers",
        embed="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        head="lm_head",
        block=block,
    )
