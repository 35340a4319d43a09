"""The supported architectures, by the ``model_type`` of their configuration."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from glasshouse.server.models.families import (
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    llama,
    mistral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
)
from glasshouse.server.models.families.spec import FamilySpec, ModelFacts, TapSite
from glasshouse.server.models.families.table import StackLayout, absences, build_taps

__all__ = ["SUPPORTED", "FamilySpec", "ModelFacts", "TapSite", "family_spec", "unknown_family"]

_LAYOUTS: dict[str, Callable[[object, ModelFacts], StackLayout]] = {
    model_type: module.layout
    for module in (llama, mistral, qwen2, qwen3, gemma2, gemma3, gpt2, gpt_neox, olmo2, phi3)
    for model_type in module.MODEL_TYPES
}

SUPPORTED: tuple[str, ...] = tuple(_LAYOUTS)


def family_spec(config: object, facts: ModelFacts) -> FamilySpec | None:
    """The spec of a configuration's family, or None where its ``model_type`` is not in `SUPPORTED`."""
    model_type = str(getattr(config, "model_type", ""))
    layout = _LAYOUTS.get(model_type)
    if layout is None:
        return None
    stack = layout(config, facts)
    return FamilySpec(
        name=model_type,
        base=stack.base,
        head=stack.head,
        blocks=stack.blocks,
        attention=stack.block.attention,
        norm=stack.final_norm,
        norm_kind=stack.block.norm,
        final_logit_softcap=_softcap(config),
        direct=stack.direct,
        taps=build_taps(stack, facts),
        absent=absences(stack),
    )


def unknown_family(model: nn.Module, config: object) -> FamilySpec | None:
    """A spec without hook points for a model that keeps transformers' conventions; None where it does not."""
    base = str(getattr(model, "base_model_prefix", ""))
    head = model.get_output_embeddings()  # type: ignore[operator]
    names = {module: name for name, module in model.named_modules()}
    if not base or not hasattr(model, base) or head not in names:
        return None
    model_type = str(getattr(config, "model_type", "unknown"))
    return FamilySpec(name=model_type, base=base, head=names[head], final_logit_softcap=_softcap(config))


def _softcap(config: object) -> float | None:
    text = getattr(config, "text_config", config)
    cap = getattr(text, "final_logit_softcapping", None)
    return None if cap is None else float(cap)
