"""Qwen 3: Llama's layout with a norm on each head's query and key; ``hook_q``, ``hook_k`` are before it."""

from __future__ import annotations

from glasshouse.server.models.families.llama_like import llama_like
from glasshouse.server.models.families.spec import ModelFacts
from glasshouse.server.models.families.table import StackLayout

MODEL_TYPES = ("qwen3",)


def layout(config: object, facts: ModelFacts) -> StackLayout:
    return llama_like(facts)
