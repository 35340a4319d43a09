"""GPT-2: learned positions, LayerNorm, fused qkv, an MLP without a gate."""

from __future__ import annotations

from glasshouse.server.models.families.norms import NormKind
from glasshouse.server.models.families.spec import ModelFacts
from glasshouse.server.models.families.table import BlockLayout, Part, StackLayout

MODEL_TYPES = ("gpt2",)


def layout(config: object, facts: ModelFacts) -> StackLayout:
    d_model = facts.d_model
    q, k, v = (
        Part(path="attn.c_attn", label=label, columns=(index * d_model, (index + 1) * d_model))
        for index, label in enumerate("qkv")
    )
    block = BlockLayout(
        attention="attn",
        q=q,
        k=k,
        v=v,
        out_proj="attn.c_proj",
        mlp="mlp",
        mlp_pre=Part(path="mlp.c_fc"),
        mlp_pre_linear=None,
        mlp_out_proj="mlp.c_proj",
        ln1="ln_1",
        ln2="ln_2",
        norm=NormKind.LAYER,
        rotary=False,
    )
    return StackLayout(
        base="transformer",
        blocks="transformer.h",
        embed="transformer.wte",
        pos_embed="transformer.wpe",
        final_norm="transformer.ln_f",
        head="lm_head",
        block=block,
    )
