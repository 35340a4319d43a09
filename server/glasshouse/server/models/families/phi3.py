"""Phi-3 and Phi-4: Llama's block with fused qkv and gate-up projections, partly rotary heads."""

from __future__ import annotations

from glasshouse.server.models.families.llama_like import llama_like
from glasshouse.server.models.families.spec import ModelFacts
from glasshouse.server.models.families.table import StackLayout

MODEL_TYPES = ("phi3",)


def layout(config: object, facts: ModelFacts) -> StackLayout:
    return llama_like(facts, fused=True)
