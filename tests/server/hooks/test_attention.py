"""Our attention against transformers' eager attention, with and without a memory."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glasshouse.server.hooks.attachment import attach
from glasshouse.server.models import attention
from glasshouse.server.types.errors import FailedPrecondition
from glasshouse.server.types.hook_points import HookPoint
from glasshouse.wire import reasons


class PlainMemory:
    """Concatenates: rows of equal length, every earlier step kept."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.n_before = 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.keys:
            key = torch.cat([self.keys[layer], key], dim=2)
            value = torch.cat([self.values[layer], value], dim=2)
        self.keys[layer], self.values[layer] = key, value
        return key, value

    def mask(self, sliding_window: int | None) -> Tensor | None:
        n_keys = next(iter(self.keys.values())).shape[2]
        query = torch.arange(self.n_before, n_keys)[:, None]
        key = torch.arange(n_keys)[None, :]
        allowed = key <= query
        if sliding_window is not None:
            allowed &= query - key < sliding_window
        return allowed[None, None].expand(2, 1, -1, -1)


def stepwise(tiny: Any, n_prefill: int) -> Tensor:
    """Logits of the whole sequence: a prefill of some positions, then one position a step."""
    loaded, memory, pieces = tiny.loaded, PlainMemory(), []
    n_positions = tiny.ids.shape[1]
    bounds = [0, n_prefill, *range(n_prefill + 1, n_positions + 1)]
    for start, stop in pairwise(bounds):
        memory.n_before = start
        loaded.attention.memory = memory
        try:
            hidden = loaded.family.forward_hidden(
                loaded.model, tiny.ids[:, start:stop], tiny.positions[:, start:stop]
            )
        finally:
            loaded.attention.memory = None
        pieces.append(
            loaded.family.unembed(loaded.model, hidden.flatten(0, 1))[1].unflatten(0, hidden.shape[:2])
        )
    return torch.cat(pieces, dim=1)


@torch.inference_mode()
def test_logits_equal_eager_transformers_in_a_padded_batch(tiny: Any) -> None:
    model, ids = tiny.loaded.model, tiny.ids
    real = torch.arange(ids.shape[1])[None, :] < torch.tensor([[9], [6]])
    ours = tiny.forward()
    model.set_attn_implementation("eager")
    expected = model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits
    model.set_attn_implementation("glasshouse")
    torch.testing.assert_close(ours[real], expected[real], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_steps_with_a_memory_equal_the_whole(tiny: Any) -> None:
    for n_prefill in (1, 6):
        torch.testing.assert_close(stepwise(tiny, n_prefill), tiny.forward(), rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_an_edited_key_is_the_key_that_is_cached(tiny: Any) -> None:
    point = tiny.table.resolve("blocks.1.attn.hook_k" if tiny.arch == "gpt2" else "blocks.1.attn.hook_rot_k")
    delta = torch.randn(point.width, generator=torch.Generator().manual_seed(0))

    def at_position_two(point: HookPoint, tensor: Tensor) -> bool:
        if tensor.shape[1] == 1:  # a later step
            return False
        tensor[:, 2] += delta
        return True

    def edit(name: str, x: Tensor) -> Tensor:
        if name != point.name:
            return x
        x = x.clone()
        x[:, 2] += delta
        return x

    with attach(tiny.table, [point.name], at_position_two):
        ours = stepwise(tiny, 5)
    torch.testing.assert_close(ours, tiny.reference(edit)["logits"], rtol=1e-4, atol=2e-5)


@torch.inference_mode()
def test_maps_of_a_step_cover_the_cached_keys(tiny: Any) -> None:
    read: list[Tensor] = []

    def keep(point: HookPoint, tensor: Tensor) -> bool:
        read.append(tensor.clone())
        return False

    with attach(tiny.table, ["blocks.2.attn.hook_pattern"], keep):
        stepwise(tiny, 5)
    expected = tiny.reference()["blocks.2.attn.hook_pattern"]
    for query, pattern in enumerate(read[1:], start=5):
        assert pattern.shape[-2:] == (1, query + 1)
        torch.testing.assert_close(pattern[:, :, 0], expected[:, :, query, : query + 1], rtol=1e-4, atol=1e-5)


def module_with_site(**attributes: object) -> nn.Module:
    module = nn.Module()
    module.layer_idx = 3  # type: ignore[assignment]
    for name, value in attributes.items():
        setattr(module, name, value)
    attention.install(module, attention.AttentionSwitch(), 3)
    return module


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"head_mask": torch.zeros(1)}, "head_mask"),
        ({"is_causal": False, "unknown": 1}, "unknown"),
        ({"attention_mask": torch.ones(1, 1, 2, 2)}, "mask"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_unknown_semantics_are_refused(arguments: dict[str, Any], named: str) -> None:
    q = torch.randn(1, 2, 2, 4)
    with pytest.raises(FailedPrecondition, match=named) as caught:
        attention.attention_forward(module_with_site(), q, q, q, **arguments)
    assert caught.value.reason == reasons.MODEL_NOT_SUPPORTED
    assert "layer 3" in caught.value.message


def test_arguments_without_effect_are_ignored() -> None:
    q = torch.randn(1, 2, 2, 4)
    attention.attention_forward(
        module_with_site(), q, q, q, is_causal=True, cache_position=torch.arange(2), s_aux=None
    )


def test_bidirectional_and_cross_attention_are_refused() -> None:
    with pytest.raises(FailedPrecondition, match="both directions"):
        module_with_site(is_causal=False)
    with pytest.raises(FailedPrecondition, match="cross-attention"):
        module_with_site(is_cross_attention=True)


def test_a_row_that_attends_to_nothing_is_zero_not_nan() -> None:
    module = module_with_site()
    site = attention.site_of(module)
    seen: list[Tensor] = []
    site.pattern.append(seen.append)
    site.refresh()
    mask = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    mask[..., 0, :] = False
    site.switch.memory = SimpleNamespace(append=lambda layer, k, v: (k, v), mask=lambda window: mask)  # type: ignore[assignment]
    q = torch.randn(1, 2, 2, 4)
    z, _ = attention.attention_forward(module, q, q, q)
    assert torch.equal(seen[0][:, :, 0], torch.zeros(1, 2, 2))
    assert not z.isnan().any()


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_eager(tiny: Any, dtype: torch.dtype) -> None:
    model = tiny.loaded.model.to(dtype)
    ours = tiny.forward()
    assert ours.dtype == dtype
    model.set_attn_implementation("eager")
    expected = model(input_ids=tiny.ids, use_cache=False).logits
    model.set_attn_implementation("glasshouse")
    scale = expected.float().abs().max()
    assert (ours.float() - expected.float()).abs().max() <= (
        0.06 if dtype == torch.bfloat16 else 0.01
    ) * scale
