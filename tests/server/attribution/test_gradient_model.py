"""Passes with gradients: the right slopes, the right numbers, and nothing shared with the engine but weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glasshouse.server.attribution.freezing import LINEAR, Freeze
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.metrics import (
    DirectionValue,
    KLDivergence,
    LogitDifference,
    LogProbability,
    Probability,
)
from glasshouse.server.hooks.attachment import attach
from glasshouse.server.hooks.attention import site_of
from glasshouse.server.hooks.table import HookTable
from glasshouse.server.types.errors import FailedPrecondition

from .conftest import load


def attachable(model: GradientModel) -> list[str]:
    return [point.name for point in model.table.points if point.name != "unembed"]


def test_probes_readings_and_freezes_leave_the_numbers(model: GradientModel, clean: Tensor) -> None:
    plain = model.forward(clean)
    names = attachable(model)
    probed = model.forward(clean, read=names, differentiate=names)
    frozen = model.forward(clean, read=names, differentiate=names, freeze=LINEAR)
    again = model.forward(
        clean, freeze=Freeze(patterns=True, norms=True, held=model.forward(clean, record=True).held)
    )
    for run in (probed, frozen, again):
        torch.testing.assert_close(run.logits(), plain.logits(), rtol=1e-4, atol=1e-5)
    for module in model.loaded.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_a_gradient_is_a_slope(various: GradientModel, clean: Tensor) -> None:
    """At every writable point, against a central difference made by editing."""
    metric = LogProbability(targets=(5, 9), position=-1)
    names = [p.name for p in various.table.points if p.name != "unembed" and not p.name.endswith("_scores")]
    run = various.forward(clean, differentiate=names)
    gradients = run.gradients(metric(run).sum())
    for name in names:
        gradient = gradients[name]
        step = 2e-3 * torch.randn(gradient.shape, generator=torch.Generator().manual_seed(len(name)))
        up, down = (
            metric(various.forward(clean, edits={name: [lambda x, s=sign, d=step: x.add_(s * d)]})).item()
            for sign in (1.0, -1.0)
        )
        slope = float((gradient * step).sum())
        assert (up - down) / 2 == pytest.approx(slope, rel=0.05, abs=3e-4), name


def test_frozen_parts_carry_no_gradient(various: GradientModel, clean: Tensor) -> None:
    """With everything frozen, the stream is linear along attention: a step of any size moves z as predicted."""
    point = "blocks.0.attn.hook_q"
    run = various.forward(clean, differentiate=[point], freeze=Freeze(patterns=True))
    assert run.gradients(run.logits().sum())[point].abs().max() == 0
    final, stream = "ln_final.hook_normalized", "blocks.2.hook_resid_post"
    held = various.forward(clean, record=True).held
    freeze = Freeze(norms=True, held=held)
    run = various.forward(clean, read=[final], differentiate=[stream], freeze=freeze)
    step = torch.randn(various.loaded.d_model, generator=torch.Generator().manual_seed(0))
    direction = torch.randn(various.loaded.d_model, generator=torch.Generator().manual_seed(1))
    gradient = run.gradients(run.readings[final][0, -1] @ direction)[stream][0, -1]
    moved = various.forward(clean, read=[final], edits={stream: [lambda x: x.add_(step)]}, freeze=freeze)
    change = (moved.readings[final] - run.readings[final].detach())[0, -1] @ direction
    torch.testing.assert_close(change, gradient @ step, rtol=1e-4, atol=1e-4)


def test_the_engine_and_the_twin_do_not_see_each_other(clean: Tensor) -> None:
    loaded = load("llama")
    seen: list[str] = []

    def callback(point: Any, tensor: Tensor) -> bool:
        seen.append(point.name)
        tensor.zero_()
        return True

    with attach(HookTable(loaded), ["blocks.0.hook_mlp_out", "blocks.1.attn.hook_rot_q"], callback):
        model = GradientModel(loaded)  # made while the engine's taps are on
        loaded.attention.memory = object()  # type: ignore[assignment]
        twin = model.forward(clean).logits()
        loaded.attention.memory = None
        assert not seen
        positions = torch.arange(clean.shape[1])[None]
        with torch.inference_mode():
            loaded.family.forward_hidden(loaded.model, clean, positions)
        assert seen == ["blocks.0.hook_mlp_out", "blocks.1.attn.hook_rot_q"]
    with torch.inference_mode():
        hidden = loaded.family.forward_hidden(loaded.model, clean, positions)
        torch.testing.assert_close(loaded.family.unembed(loaded.model, hidden[:, -1])[1], twin)
    ours = dict(model.loaded.model.named_parameters())
    for name, parameter in loaded.model.named_parameters():
        assert ours[name] is parameter
    assert model.loaded.model.config is loaded.model.config


def test_half_precision_weights_are_widened_once_and_stay_tied(clean: Tensor) -> None:
    loaded = load("qwen3", lambda model: model.to(torch.bfloat16))
    model = GradientModel(loaded)
    assert {p.dtype for p in model.loaded.model.parameters()} == {torch.float32}
    assert next(loaded.model.parameters()).dtype == torch.bfloat16
    twin: Any = model.loaded.model
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert model.forward(clean).logits().dtype == torch.float32


def test_metrics(various: GradientModel, clean: Tensor, corrupt: Tensor) -> None:
    run, other = various.forward(clean), various.forward(corrupt)
    logits, raw = run.logits(-2)[0], run.logits(-2, capped=False)[0]
    cap = various.loaded.family.final_logit_softcap
    torch.testing.assert_close(logits, raw if cap is None else cap * torch.tanh(raw / cap))
    p = logits.softmax(-1)
    difference = LogitDifference(targets=(3, 4), foils=(5,), position=-2)(run)
    torch.testing.assert_close(difference, (logits[3] + logits[4])[None] / 2 - logits[5])
    torch.testing.assert_close(Probability(targets=(3, 4), position=-2)(run), (p[3] + p[4])[None])
    torch.testing.assert_close(LogProbability(targets=(3, 4), position=-2)(run), (p[3] + p[4]).log()[None])
    q = other.logits(-2)[0].softmax(-1)
    divergence = KLDivergence(reference=KLDivergence.reference_of(run, -2), position=-2)(other)
    torch.testing.assert_close(divergence, (p * (p / q).log()).sum()[None], rtol=1e-4, atol=1e-6)
    direction = torch.randn(various.loaded.d_model)
    metric = DirectionValue(hook_point="blocks.1.hook_mlp_out", direction=direction, position=2)
    run = various.forward(clean, read=metric.reads)
    torch.testing.assert_close(metric(run), run.readings[metric.hook_point][:, 2] @ direction)


def test_models_without_hook_points_are_refused() -> None:
    import dataclasses

    loaded = load("llama")
    bare = dataclasses.replace(loaded, family=dataclasses.replace(loaded.family, taps=()))
    with pytest.raises(FailedPrecondition, match="without hook points"):
        GradientModel(bare)


def test_a_failing_edit_leaves_no_hook_behind(various: GradientModel, clean: Tensor) -> None:
    class Broken(Exception):
        pass

    def fail(live: Tensor) -> None:
        raise Broken

    names = attachable(various)
    with pytest.raises(Broken):
        various.forward(
            clean, read=names, edits={"blocks.1.hook_mlp_out": [fail]}, freeze=LINEAR, record=True
        )
    for module in various.loaded.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    for module in various.loaded.family.attention_modules(various.loaded.model):
        assert not site_of(module).tapped
    various.forward(clean)
