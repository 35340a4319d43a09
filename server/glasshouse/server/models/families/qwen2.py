"""Qwen 2 and 2.5: Llama's layout with biases on q, k and v; upper layers may slide."""

from __future__ import annotations

from glasshouse.server.models.families.llama_like import llama_like
from glasshouse.server.models.families.spec import ModelFacts
from glasshouse.server.models.families.table import StackLayout

MODEL_TYPES = ("qwen2",)


def layout(config: object, facts: ModelFacts) -> StackLayout:
    return llama_like(facts)
