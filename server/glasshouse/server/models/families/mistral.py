"""Mistral: Llama's layout; every layer slides where the checkpoint has a window."""

from __future__ import annotations

from glasshouse.server.models.families.llama_like import llama_like
from glasshouse.server.models.families.spec import ModelFacts
from glasshouse.server.models.families.table import StackLayout

MODEL_TYPES = ("mistral",)


def layout(config: object, facts: ModelFacts) -> StackLayout:
    return llama_like(facts)
