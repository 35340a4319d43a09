"""An edit at every writable point of every family does what the reference does with the same edit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glasshouse.server.hooks.attachment import attach
from glasshouse.server.types.hook_points import HookPoint

ROW, POSITION = 1, 4


def writable(tiny: Any) -> list[HookPoint]:
    return [point for point in tiny.table.points if point.writable and point.name != "unembed"]


def delta_for(point: HookPoint) -> Tensor:
    return torch.randn(point.width, generator=torch.Generator().manual_seed(len(point.name)))


def run_edited(tiny: Any, edited: HookPoint | None, delta: Tensor | None = None) -> dict[str, Tensor]:
    """All points and the logits, with `delta` added at one point of one row and position."""
    read: dict[str, Tensor] = {}

    def callback(point: HookPoint, tensor: Tensor) -> bool:
        write = edited is not None and point.name == edited.name
        if write:
            assert delta is not None
            tensor[ROW, POSITION] += delta
        read[point.name] = tensor.clone()
        return write

    names = [point.name for point in tiny.table.points if point.name != "unembed"]
    with torch.inference_mode(), attach(tiny.table, names, callback):
        read["logits"] = tiny.forward()
    return read


def test_an_edit_does_what_the_reference_does(tiny: Any) -> None:
    """Downstream equals the reference under the same edit; upstream, neighbours and past are bit-equal."""
    plain = run_edited(tiny, None)
    for edited in writable(tiny):
        delta = delta_for(edited)

        def edit(name: str, x: Tensor, edited: HookPoint = edited, delta: Tensor = delta) -> Tensor:
            if name == edited.name:
                x = x.clone()
                x[ROW, POSITION] += delta
            return x

        expected = tiny.reference(edit)
        ours = run_edited(tiny, edited, delta)
        for name, tensor in ours.items():
            finite = ~tensor.isinf()
            scale = max(1.0, float(expected[name][finite].abs().max()))
            assert (tensor - expected[name])[finite].abs().max() <= 2e-5 * scale, (edited.name, name)
            assert torch.equal(tensor[0], plain[name][0]), (edited.name, name)
            if name != "logits" and tiny.table.position(name) < tiny.table.position(edited.name):
                assert torch.equal(tensor, plain[name]), (edited.name, name)
            past = tensor[ROW, :, :POSITION] if tensor.ndim == 4 else tensor[ROW, :POSITION]
            before = plain[name][ROW, :, :POSITION] if tensor.ndim == 4 else plain[name][ROW, :POSITION]
            assert torch.equal(past, before), (edited.name, name)
        assert not torch.equal(ours["logits"][ROW], plain["logits"][ROW]), edited.name


def test_edits_without_reading_take_the_fast_attention(tiny: Any) -> None:
    """The same edits with only the edited point attached, so that attention runs its usual kernel."""
    for edited in writable(tiny):
        delta = delta_for(edited)

        def callback(point: HookPoint, tensor: Tensor, delta: Tensor = delta) -> bool:
            tensor[ROW, POSITION] += delta
            return True

        with torch.inference_mode(), attach(tiny.table, [edited.name], callback):
            ours = tiny.forward()
        torch.testing.assert_close(ours, run_edited(tiny, edited, delta)["logits"], rtol=1e-4, atol=2e-5)


def test_plain_module_hooks_agree(tiny: Any) -> None:
    """Adding to a block's output with a forward hook on the eager Hugging Face model is `hook_resid_post`."""
    model, point = tiny.loaded.model, tiny.table.resolve("blocks.1.hook_resid_post")
    delta = delta_for(point)
    expected = run_edited(tiny, point, delta)["logits"]

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[ROW, POSITION] += delta
        return output

    model.set_attn_implementation("eager")
    handle = model.get_submodule(point.module_path).register_forward_hook(hook)
    try:
        with torch.inference_mode():
            logits = model(input_ids=tiny.ids, use_cache=False).logits
    finally:
        handle.remove()
        model.set_attn_implementation("glasshouse")
    torch.testing.assert_close(expected, logits, rtol=1e-4, atol=2e-5)


def test_gradients_flow_through_an_edit_at_every_point(tiny: Any) -> None:
    """The gradient at an edit is the slope of the reference's logits along it."""
    direction = torch.randn(tiny.loaded.vocab_size, generator=torch.Generator().manual_seed(1)).double()
    for edited in writable(tiny):
        if ".1." not in edited.name:
            continue
        delta = torch.zeros(edited.width, requires_grad=True)

        def callback(point: HookPoint, tensor: Tensor, delta: Tensor = delta) -> bool:
            tensor[ROW, POSITION] += delta
            return True

        with torch.inference_mode():  # what a served pass leaves behind must not get in the way
            tiny.forward()
        with torch.enable_grad(), attach(tiny.table, [edited.name], callback):
            objective = (tiny.forward()[ROW, -1].double() * direction).sum()
            (gradient,) = torch.autograd.grad(objective, delta)
        step = 1e-3 * delta_for(edited)

        def edit(name: str, x: Tensor, sign: float, at: str = edited.name, step: Tensor = step) -> Tensor:
            if name == at:
                x = x.clone()
                x[ROW, POSITION] += sign * step
            return x

        up, down = (
            tiny.reference(lambda name, x, sign=sign: edit(name, x, sign))["logits"][ROW, -1].double()
            @ direction
            for sign in (1.0, -1.0)
        )
        slope, predicted = float(up - down) / 2, float(gradient @ step)
        assert predicted == pytest.approx(slope, rel=0.05, abs=2e-4), edited.name


def test_maps_are_listed_as_not_writable(tiny: Any) -> None:
    maps = {point.name.rpartition(".")[2] for point in tiny.table.points if not point.writable}
    assert maps == {"hook_attn_scores", "hook_pattern"}
