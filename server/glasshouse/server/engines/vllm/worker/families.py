"""Where vLLM's own model implementations can be hooked: an adapter per residual convention.

"pair": layers hand on (hidden, residual) and norms add the two (Llama and its relatives, Gemma 2 and 3). The middle
of a layer is the call of the norm before its MLP, whose arguments are what attention adds and the stream before it.

"one": layers hand on the stream itself (GPT-2; GPT-NeoX and OLMo 2, which vLLM runs through its Transformers backend). What
attention and the MLP add are outputs of modules of their own.

An adapter counts for the implementation that was read, by the name of the layer's class: another implementation of the same
architecture may hand on something else. What an adapter claims is checked on the loaded model at boot (`self_test`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glasshouse.server.engines.vllm.contract.settings import MLP_INPUT

from .junctions import Junction, PointTarget, reserve


@dataclass(frozen=True, kw_only=True)
class PairLayout:
    """A layer whose `mid_norm` is called with (what attention adds, the stream before it), and whose `mlp` reads what that
    norm puts out.
    """

    mid_norm: str
    mlp: str = "mlp"


@dataclass(frozen=True, kw_only=True)
class OneLayout:
    """Modules within a layer: outputs of `attention` and `mlp` are what is added; `mid` is called with the stream
    between them, None where both run in parallel.
    """

    attention: str
    mlp: str
    mid: str | None


Layout = PairLayout | OneLayout


@dataclass(frozen=True, kw_only=True)
class FamilyAdapter:
    """`layers`, `final_norm`: paths within the causal language model; `layer_class` the implementation this
    was read from.
    """

    name: str
    layers: str
    final_norm: str
    layer_class: str
    layout: Layout


def _llama_like(name: str, layer_class: str) -> FamilyAdapter:
    return FamilyAdapter(
        name=name,
        layers="model.layers",
        final_norm="model.norm",
        layer_class=layer_class,
        layout=PairLayout(mid_norm="post_attention_layernorm"),
    )


def _gemma(name: str, layer_class: str) -> FamilyAdapter:
    return FamilyAdapter(
        name=name,
        layers="model.layers",
        final_norm="model.norm",
        layer_class=layer_class,
        layout=PairLayout(mid_norm="pre_feedforward_layernorm"),
    )


_ADAPTERS: dict[str, FamilyAdapter] = {
    "llama": _llama_like("llama", "vllm.model_executor.models.llama.LlamaDecoderLayer"),
    "mistral": _llama_like("mistral", "vllm.model_executor.models.mistral.MistralDecoderLayer"),
    "qwen2": _llama_like("qwen2", "vllm.model_executor.models.qwen2.Qwen2DecoderLayer"),
    "qwen3": _llama_like("qwen3", "vllm.model_executor.models.qwen3.Qwen3DecoderLayer"),
    "phi3": _llama_like("phi3", "vllm.model_executor.models.llama.LlamaDecoderLayer"),
    "gemma2": _gemma("gemma2", "vllm.model_executor.models.gemma2.Gemma2DecoderLayer"),
    "gemma3_text": _gemma("gemma3", "vllm.model_executor.models.gemma3.Gemma3DecoderLayer"),
    "gpt2": FamilyAdapter(
        name="gpt2",
        layers="transformer.h",
        final_norm="transformer.ln_f",
        layer_class="vllm.model_executor.models.gpt2.GPT2Block",
        layout=OneLayout(attention="attn", mlp="mlp", mid="ln_2"),
    ),
    "gpt_neox": FamilyAdapter(
        name="gpt_neox",
        layers="model.layers",
        final_norm="model.final_layer_norm",
        layer_class="transformers.models.gpt_neox.modeling_gpt_neox.GPTNeoXLayer",
        layout=OneLayout(attention="attention", mlp="mlp", mid="post_attention_layernorm"),
    ),
    "olmo2": FamilyAdapter(
        name="olmo2",
        layers="model.layers",
        final_norm="model.norm",
        layer_class="transformers.models.olmo2.modeling_olmo2.Olmo2DecoderLayer",
        layout=OneLayout(attention="post_attention_layernorm", mlp="post_feedforward_layernorm", mid="mlp"),
    ),
}


def adapter_for(model: nn.Module, config: Any) -> FamilyAdapter | str:
    """The adapter of a loaded model, or why it has none."""
    model_type = str(getattr(config, "model_type", type(model).__name__))
    adapter = _ADAPTERS.get(model_type)
    if adapter is None:
        known = ", ".join(sorted(_ADAPTERS))
        return f"{model_type} models have no hook adapter in the vLLM engine (there are: {known})"
    try:
        layers = model.get_submodule(adapter.layers)
    except AttributeError:
        return f"this vLLM's {type(model).__name__} has no {adapter.layers}"
    classes = {_qualified(type(layer)) for layer in layers.children() if not _missing(layer)}
    if classes - {adapter.layer_class}:
        found = ", ".join(sorted(classes))
        return f"this vLLM runs {model_type} models by {found}, the adapter was written for {adapter.layer_class}"
    return adapter


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _missing(layer: nn.Module) -> bool:
    """Whether a layer lives on another pipeline stage."""
    return type(layer).__name__ == "PPMissingLayer"


def attach(model: nn.Module, adapter: FamilyAdapter, config: Any) -> tuple[Junction, ...]:
    """Hangs the junctions of this stage's layers on `model`, before anything is traced. In the order of the
    forward pass.
    """
    layers = list(model.get_submodule(adapter.layers).children())
    builder = _Builder()
    for index, layer in enumerate(layers):
        if _missing(layer):
            continue
        if index == 0:
            # Later stages get their stream from the end of the layer before, where its points are.
            _before_layer(builder, layer)
        after: tuple[str, ...] = (f"blocks.{index}.hook_resid_post",)
        if index + 1 < len(layers):
            # The same tensor: what enters the next layer.
            after = (*after, f"blocks.{index + 1}.hook_resid_pre")
        if isinstance(adapter.layout, PairLayout):
            _attach_pair(builder, layer, adapter.layout, index, after)
        else:
            _attach_one(builder, layer, adapter.layout, index, after, _parallel(config))
    reserve(len(builder.junctions))
    return tuple(builder.junctions)


def _parallel(config: Any) -> bool:
    return config.model_type == "gpt_neox" and bool(getattr(config, "use_parallel_residual", True))


class _Builder:
    def __init__(self) -> None:
        self.junctions: list[Junction] = []

    def add(self, *points: tuple[str, PointTarget]) -> int:
        index = len(self.junctions)
        self.junctions.append(Junction(index=index, points=points))
        return index


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    for value in (kwargs.get("hidden_states"), *args):
        # Llama-like layers take positions (int64) first.
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise AssertionError("a layer was called without hidden states")


def _before_layer(builder: _Builder, layer: nn.Module) -> None:
    junction = builder.add(("blocks.0.hook_resid_pre", "x"))

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        torch.ops.glasshouse.junction_one(_first_tensor(args, kwargs), junction)

    layer.register_forward_pre_hook(hook, with_kwargs=True)


def _attach_pair(
    builder: _Builder, layer: nn.Module, layout: PairLayout, index: int, after: tuple[str, ...]
) -> None:
    middle = builder.add((f"blocks.{index}.hook_attn_out", "x"), (f"blocks.{index}.hook_resid_mid", "sum"))

    def mid_hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        torch.ops.glasshouse.junction_pair(args[0], args[1], middle)

    layer.get_submodule(layout.mid_norm).register_forward_pre_hook(mid_hook)
    _before_mlp(builder, layer.get_submodule(layout.mlp), index)
    streams: list[tuple[str, PointTarget]] = [(name, "sum") for name in after]
    end = builder.add((f"blocks.{index}.hook_mlp_out", "x"), *streams)

    def end_hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        torch.ops.glasshouse.junction_pair(output[0], output[1], end)

    layer.register_forward_hook(end_hook)


def _before_mlp(builder: _Builder, mlp: nn.Module, index: int) -> None:
    junction = builder.add((f"blocks.{index}.{MLP_INPUT}", "x"))

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        torch.ops.glasshouse.junction_one(_first_tensor(args, kwargs), junction)

    mlp.register_forward_pre_hook(hook, with_kwargs=True)


def _attach_one(
    builder: _Builder,
    layer: nn.Module,
    layout: OneLayout,
    index: int,
    after: tuple[str, ...],
    parallel: bool,
) -> None:
    attention = builder.add((f"blocks.{index}.hook_attn_out", "x"))
    layer.get_submodule(layout.attention).register_forward_hook(_output_hook(attention))
    if layout.mid is not None and not parallel:
        mid = builder.add((f"blocks.{index}.hook_resid_mid", "x"))

        def mid_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            torch.ops.glasshouse.junction_one(_first_tensor(args, kwargs), mid)

        layer.get_submodule(layout.mid).register_forward_pre_hook(mid_hook, with_kwargs=True)
    mlp = builder.add((f"blocks.{index}.hook_mlp_out", "x"))
    layer.get_submodule(layout.mlp).register_forward_hook(_output_hook(mlp))
    streams: list[tuple[str, PointTarget]] = [(name, "x") for name in after]
    end = builder.add(*streams)
    layer.register_forward_hook(_output_hook(end))


def _output_hook(junction: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        torch.ops.glasshouse.junction_one(tensor, junction)

    return hook
