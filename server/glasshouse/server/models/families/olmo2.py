"""OLMo 2: no norm before attention and MLP, one after each; q/k-norm over all heads together.

``hook_attn_out`` and ``hook_mlp_out`` are after the post-norm, so that resid_pre + attn_out = resid_mid.
TransformerLens puts them before it.
"""

from __future__ import annotations

from glasshouse.server.models.families.llama_like import llama_like
from glasshouse.server.models.families.norms import NormKind
from glasshouse.server.models.families.spec import ModelFacts
from glasshouse.server.models.families.table import StackLayout

MODEL_TYPES = ("olmo2",)


def layout(config: object, facts: ModelFacts) -> StackLayout:
    return llama_like(
        facts,
        norm=NormKind.RMS_WIDE,
        ln1=None,
        ln2=None,
        ln1_post="post_attention_layernorm",
        ln2_post="post_feedforward_layernorm",
        post_norm_note=" (TransformerLens has OLMo 2's before the post-norm)",
    )
