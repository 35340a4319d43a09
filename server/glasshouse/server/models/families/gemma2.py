"""Gemma 2: sandwich norms, soft-capped attention scores and logits, every other layer sliding."""

from __future__ import annotations

from glasshouse.server.models.families.llama_like import llama_like
from glasshouse.server.models.families.norms import NormKind
from glasshouse.server.models.families.spec import ModelFacts
from glasshouse.server.models.families.table import StackLayout

MODEL_TYPES = ("gemma2",)


def layout(config: object, facts: ModelFacts) -> StackLayout:
    return sandwich(facts)


def sandwich(facts: ModelFacts, *, root: str = "model") -> StackLayout:
    """Gemma's block: a norm before and after both attention and MLP."""
    return llama_like(
        facts,
        root=root,
        norm=NormKind.RMS_PLUS_ONE,
        ln1="input_layernorm",
        ln1_post="post_attention_layernorm",
        ln2="pre_feedforward_layernorm",
        ln2_post="post_feedforward_layernorm",
        direct=False,
        embed_note="includes the sqrt(d_model) factor",
    )
