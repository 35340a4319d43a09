"""Every listed point of every family, read and compared with the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glasshouse.server.hooks.attachment import attach
from glasshouse.server.types.hook_points import HookPoint

TOLERANCE = 1e-5


def read_all(tiny: Any, ids: Tensor | None = None, names: list[str] | None = None) -> dict[str, Tensor]:
    """Clones of every attachable point, in the order in which the callbacks ran."""
    read: dict[str, Tensor] = {}

    def keep(point: HookPoint, tensor: Tensor) -> bool:
        assert point.name not in read
        read[point.name] = tensor.clone()
        return False

    names = names or [point.name for point in tiny.table.points if point.name != "unembed"]
    with torch.inference_mode(), attach(tiny.table, names, keep):
        tiny.forward(ids)
    return read


def test_every_point_is_what_the_reference_computes(tiny: Any) -> None:
    expected = tiny.reference()
    read = read_all(tiny)
    assert {"logits", "unembed"} ^ expected.keys() == read.keys()
    for name, tensor in read.items():
        assert tensor.shape == expected[name].shape, name
        same_inf = tensor.isinf() == expected[name].isinf()
        assert same_inf.all(), name
        difference = (tensor - expected[name])[~tensor.isinf()].abs().max()
        assert difference <= TOLERANCE * max(1.0, float(expected[name][~tensor.isinf()].abs().max())), name


def test_callbacks_run_in_the_order_of_the_listing(tiny: Any) -> None:
    assert list(read_all(tiny)) == [point.name for point in tiny.table.points][:-1]


def test_points_have_the_shape_they_state(tiny: Any) -> None:
    n_positions = tiny.ids.shape[1]
    read = read_all(tiny)
    for point in tiny.table.points[:-1]:
        if point.kind == "attention":
            assert read[point.name].shape == (2, point.n_heads, n_positions, n_positions)
            assert (point.width, point.writable) == (0, False)
        else:
            assert read[point.name].shape == (2, n_positions, point.width)
            assert point.kind != "heads" or point.width == point.n_heads * point.d_head
    assert tiny.table.points[-1].name == "unembed"
    assert tiny.table.points[-1].width == tiny.loaded.vocab_size


def test_logits_before_and_after_the_cap(tiny: Any) -> None:
    expected = tiny.reference()
    family, model = tiny.loaded.family, tiny.loaded.model
    with torch.inference_mode():
        hidden = family.forward_hidden(model, tiny.ids, tiny.positions)
        raw, capped = family.unembed(model, hidden[0])
        lens = family.final_norm(model, expected[f"blocks.{tiny.loaded.n_layers - 1}.hook_resid_post"][0])
    torch.testing.assert_close(raw, expected["unembed"][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(capped, expected["logits"][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lens, expected["ln_final.hook_out"][0], rtol=1e-4, atol=1e-5)
    assert (raw is capped) == (family.final_logit_softcap is None)


def test_a_right_padded_batch_reads_as_one_at_a_time(tiny: Any) -> None:
    lengths = (9, 5)
    padded = tiny.ids.clone()
    padded[1, 5:] = 0
    batch = read_all(tiny, padded)
    for row, length in enumerate(lengths):
        alone = read_all(tiny, tiny.ids[row : row + 1, :length])
        for name, tensor in alone.items():
            together = batch[name][row : row + 1]
            real = together[..., :length, :length] if tensor.shape[1] != length else together[:, :length]
            torch.testing.assert_close(tensor, real, rtol=1e-5, atol=1e-5, msg=name)


def test_reading_changes_nothing_and_leaves_nothing(tiny: Any) -> None:
    with torch.inference_mode():
        before = tiny.forward()
    read_all(tiny)
    for module in tiny.loaded.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert not any(
        module.glasshouse_attention.tapped
        for module in tiny.loaded.family.attention_modules(tiny.loaded.model)
    )
    with torch.inference_mode():
        assert torch.equal(tiny.forward(), before)


def test_a_failing_callback_leaves_nothing(tiny: Any) -> None:
    def fail(point: HookPoint, tensor: Tensor) -> bool:
        raise RuntimeError("no")

    try:
        with torch.inference_mode(), attach(tiny.table, ["blocks.1.attn.hook_pattern"], fail):
            tiny.forward()
    except RuntimeError as error:
        assert str(error) == "no"
    else:
        raise AssertionError("the callback's error was swallowed")
    with torch.inference_mode():
        tiny.forward()


def test_only_the_asked_modules_get_hooks(tiny: Any) -> None:
    with attach(tiny.table, ["blocks.1.hook_resid_post"], lambda point, tensor: False) as attachment:
        hooked = [
            name for name, m in tiny.loaded.model.named_modules() if m._forward_hooks or m._forward_pre_hooks
        ]
        assert hooked == [tiny.table.resolve("blocks.1.hook_resid_post").module_path]
        attachment.remove()
        assert not any(m._forward_hooks for m in tiny.loaded.model.modules())


def test_aliases_name_the_same_point(tiny: Any) -> None:
    for point in tiny.table.points:
        assert tiny.table.resolve(point.name) is point
        assert tiny.table.resolve(point.module_path) is point
        assert tiny.table.tap(point.name).point is point
        for alias in tiny.table.tap(point.name).aliases:
            assert tiny.table.resolve(alias) is point
    paths = [point.module_path for point in tiny.table.points]
    assert len(set(paths)) == len(paths)
    if tiny.arch != "olmo2":
        assert tiny.table.resolve("blocks.1.mlp.hook_in").name == "blocks.1.ln2.hook_out"
        assert tiny.table.resolve("blocks.1.attn.hook_in").name == "blocks.1.ln1.hook_out"


def test_module_paths_are_modules(tiny: Any) -> None:
    for point in tiny.table.points:
        tiny.loaded.model.get_submodule(point.module_path.partition(":")[0])
