"""A patch is what plain hooks on the Hugging Face model do by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.metrics import LogitDifference
from glasshouse.server.attribution.nodes import Node, node_grid
from glasshouse.server.attribution.path_patching import path_patch
from glasshouse.server.attribution.sweeps import PatchResult, mediate, patch_sweep
from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument

METRIC = LogitDifference(targets=(5,), foils=(9,))


def sweep(*args: Any, **kwargs: Any) -> list[PatchResult]:
    return [result for batch in patch_sweep(*args, **kwargs) for result in batch]


def by_hand(model: GradientModel, clean: Tensor, path: str, inputs: bool, edit: Any) -> float:
    """The metric with one module's input or output edited by a plain hook on the eager model."""
    hf: Any = model.loaded.model
    hf.set_attn_implementation("eager")

    def pre(module: Any, args: Any) -> Any:
        return (edit(args[0].clone()), *args[1:])

    def post(module: Any, args: Any, output: Any) -> Any:
        return (edit(output[0].clone()), *output[1:]) if isinstance(output, tuple) else edit(output.clone())

    module = hf.get_submodule(path)
    handle = module.register_forward_pre_hook(pre) if inputs else module.register_forward_hook(post)
    try:
        with torch.no_grad():
            logits = hf(input_ids=clean, use_cache=False).logits[0, -1]
    finally:
        handle.remove()
        hf.set_attn_implementation("glasshouse")
    return float(logits[5] - logits[9])


@pytest.mark.parametrize("component", ["hook_resid_pre", "hook_attn_out", "hook_mlp_out", "attn.hook_z"])
def test_patching_is_patching_by_hand(
    model: GradientModel, clean: Tensor, corrupt: Tensor, component: str
) -> None:
    heads = component == "attn.hook_z"
    grid = node_grid(
        model, component, n_positions=clean.shape[1], layers=[0, 2], positions=[2, -1], by_head=heads
    )
    results = sweep(model, clean, grid, METRIC, others=corrupt, batch_size=3)
    assert [r.node for r in results] == grid
    plain = METRIC(model.forward(clean)).item()
    for result in results:
        node = result.node
        tap = model.table.tap(node.hook_point)
        other = model.forward(corrupt, read=[node.hook_point]).readings[node.hook_point][0]
        columns = (
            slice(None)
            if node.head is None
            else slice(node.head * tap.point.d_head, (node.head + 1) * tap.point.d_head)
        )

        def edit(x: Tensor, node: Node = node, other: Tensor = other, columns: slice = columns) -> Tensor:
            x[0, node.position, columns] = other[node.position, columns]
            return x

        expected = by_hand(model, clean, tap.path, tap.where == "input", edit)
        assert result.value == pytest.approx(expected, abs=2e-5)
        assert result.effect == pytest.approx(expected - plain, abs=2e-5)


def test_ablations(various: GradientModel, clean: Tensor, corrupt: Tensor) -> None:
    node = Node(hook_point="blocks.1.hook_mlp_out", position=3)
    others = torch.cat([clean, corrupt])
    values = various.forward(others, read=[node.hook_point]).readings[node.hook_point]
    tap = various.table.tap(node.hook_point)

    def hand(value: Tensor) -> Any:
        def edit(x: Tensor) -> Tensor:
            x[0, 3] = value
            return x

        return pytest.approx(by_hand(various, clean, tap.path, False, edit), abs=2e-5)

    assert sweep(various, clean, [node], METRIC, replacement="zero")[0].value == hand(torch.zeros(1))
    mean = sweep(various, clean, [node], METRIC, replacement="mean", others=others)[0].value
    assert mean == hand(values.mean((0, 1)))
    drawn = [
        sweep(various, clean, [node], METRIC, replacement="resample", others=others, seed=s)[0]
        for s in range(6)
    ]
    either = [hand(values[0, 3]), hand(values[1, 3])]
    assert all(result.value in either for result in drawn)
    assert len({round(result.value, 5) for result in drawn}) == 2
    again = sweep(various, clean, [node], METRIC, replacement="resample", others=others, seed=0)[0]
    assert again.value == drawn[0].value


def test_a_whole_stream_carries_the_whole_effect(
    various: GradientModel, clean: Tensor, corrupt: Tensor
) -> None:
    """Patching every position of the stream is the other run; mediation through it is total."""
    nodes = node_grid(various, "hook_resid_post", n_positions=clean.shape[1], positions=[None])
    target = METRIC(various.forward(corrupt)).item()
    for result in sweep(various, clean, nodes, METRIC, others=corrupt):
        assert result.value == pytest.approx(target, abs=2e-5)
    for found in mediate(various, clean, corrupt, nodes, METRIC):
        assert found.indirect == pytest.approx(found.total, abs=2e-5)
        assert found.direct == pytest.approx(0.0, abs=2e-5)


def test_units_and_progress(various: GradientModel, clean: Tensor, corrupt: Tensor) -> None:
    nodes = [Node(hook_point="blocks.0.mlp.hook_post", unit=unit, position=-1) for unit in range(5)]
    told: list[tuple[int, int]] = []
    batches = patch_sweep(
        various, clean, nodes, METRIC, others=corrupt, batch_size=2, progress=lambda *x: told.append(x)
    )
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert told == [(2, 5), (4, 5), (5, 5)]


def test_a_path_to_every_receiver_is_the_direct_effect(
    various: GradientModel, clean: Tensor, corrupt: Tensor
) -> None:
    """To the last stream with everything held, a head's path is its contribution swapped there by hand."""
    last = Node(hook_point="blocks.2.hook_resid_post", position=None)
    sender = Node(hook_point="blocks.0.attn.hook_z", head=1)
    found = path_patch(various, clean, corrupt, sender, [last], METRIC, hold_mlps=True)
    out, z = "blocks.0.hook_attn_out", "blocks.0.attn.hook_z"
    theirs = various.forward(corrupt, read=[z]).readings[z]
    d_head = various.loaded.d_head
    patched = various.forward(
        clean,
        read=[out],
        edits={z: [lambda x: x[..., d_head : 2 * d_head].copy_(theirs[..., d_head : 2 * d_head])]},
    )
    plain = various.forward(clean, read=[out])
    swapped = patched.readings[out] - plain.readings[out]
    expected = METRIC(various.forward(clean, edits={last.hook_point: [lambda x: x.add_(swapped)]}))
    assert found.value == pytest.approx(float(expected), abs=2e-5)
    with pytest.raises(InvalidArgument, match="runs before"):
        path_patch(various, clean, corrupt, last, [sender], METRIC)


def test_refusals(clean: Tensor, corrupt: Tensor, various: GradientModel) -> None:
    with pytest.raises(InvalidArgument, match="position by position"):
        sweep(various, clean, [Node(hook_point="blocks.0.hook_mlp_out")], METRIC, others=corrupt[:, :3])
    with pytest.raises(InvalidArgument, match="needs another input"):
        sweep(various, clean, [Node(hook_point="blocks.0.hook_mlp_out")], METRIC)
    with pytest.raises(InvalidArgument, match="cannot be patched"):
        node_grid(various, "attn.hook_pattern", n_positions=3)
    with pytest.raises(InvalidArgument, match="no heads"):
        node_grid(various, "hook_mlp_out", n_positions=3, heads=[0])
    if not various.has("blocks.0.hook_resid_mid"):
        with pytest.raises(FailedPrecondition, match="parallel"):
            node_grid(various, "hook_resid_mid", n_positions=3)


@pytest.mark.parametrize("position", [-1, 4])
def test_starting_late_changes_nothing(
    model: GradientModel, clean: Tensor, corrupt: Tensor, position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches from the layer and position that they patch, against whole passes."""
    metric = LogitDifference(targets=(5,), foils=(9,), position=position)
    grid = node_grid(model, "hook_resid_pre", n_positions=clean.shape[1])
    grid += node_grid(
        model, "attn.hook_k", n_positions=clean.shape[1], by_head=True, positions=[2, 5, -1, -3]
    )
    grid += [Node(hook_point="hook_embed", position=3), Node(hook_point="blocks.1.hook_mlp_out")]
    late = sweep(model, clean, grid, metric, others=corrupt, batch_size=4)
    monkeypatch.setattr("glasshouse.server.attribution.sweeps._Runner._resume", lambda self, *rest: None)
    whole = sweep(model, clean, grid, metric, others=corrupt, batch_size=4)
    assert [r.value for r in late] == pytest.approx([r.value for r in whole], abs=2e-5)
    assert len({round(r.value, 4) for r in late}) > 5


def test_what_comes_after_the_reading_changes_nothing(
    various: GradientModel, clean: Tensor, corrupt: Tensor
) -> None:
    metric = LogitDifference(targets=(5,), foils=(9,), position=2)
    grid = node_grid(various, "hook_mlp_out", n_positions=clean.shape[1])
    results = sweep(various, clean, grid, metric, others=corrupt)
    plain = float(metric(various.forward(clean)))
    for result in results:
        assert result.node.position is not None
        if result.node.position > 2:
            assert result.effect == 0.0 and result.value == pytest.approx(plain, abs=1e-5)
    assert sum(abs(result.effect) > 1e-4 for result in results) > 3
