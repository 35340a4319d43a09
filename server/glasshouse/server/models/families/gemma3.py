"""Gemma 3: Gemma 2's block without the caps, with q/k-norms and two rotary bases.

The text model is served alone (``gemma3_text``), or out of the image-and-text checkpoint (``gemma3``), whose
vision tower is left idle.
"""

from __future__ import annotations

from glasshouse.server.models.families.gemma2 import sandwich
from glasshouse.server.models.families.spec import ModelFacts
from glasshouse.server.models.families.table import StackLayout

MODEL_TYPES = ("gemma3_text", "gemma3")


def layout(config: object, facts: ModelFacts) -> StackLayout:
    wrapped = getattr(config, "model_type", "") == "gemma3"
    return sandwich(facts, root="model.language_model" if wrapped else "model")
