"""ACDC on a hand-built model returns its circuit, and on any model what it claims."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glasshouse.server.attribution.circuits import (
    EdgeExperiment,
    discover_circuit,
    discover_circuit_of_size,
    measure_circuit,
)
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.metrics import DirectionValue
from glasshouse.server.attribution.wiring import Wiring
from glasshouse.server.types.errors import InvalidArgument

from .conftest import load


def two_step_copy(model: Any) -> None:
    """A Llama whose one circuit is embed -> a0.h1.v -> a1.h2.v -> logits.

    Queries and keys are zero, so attention is uniform. Tokens are embedded in dimensions 0-7; head 1 of layer 0
    moves them to 8-15 and head 2 of layer 1 from there to 16-23, which is all that the head reads. Norm gains
    are one and every token has the same norm.
    """
    for parameter in model.parameters():
        parameter.zero_()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
    core, d_head = model.model, 8
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(61, 32))
    for token in range(61):
        core.embed_tokens.weight[token, token % 8] = 1.0
        model.lm_head.weight[token, 16 + token % 8] = 2.0
    for layer, head, read, write in ((0, 1, 0, 8), (1, 2, 8, 16)):
        attention = core.layers[layer].self_attn
        group = head // 2
        for i in range(d_head):
            attention.v_proj.weight[group * d_head + i, read + i] = 1.0
            attention.o_proj.weight[write + i, head * d_head + i] = 1.0


def test_acdc_finds_exactly_the_circuit_of_a_hand_built_model() -> None:
    model = GradientModel(load("llama", two_step_copy))
    clean, corrupt = torch.tensor([[10, 10, 11, 12, 13]]), torch.tensor([[15, 15, 11, 12, 13]])
    found = discover_circuit(model, clean, corrupt, threshold=1e-4)
    names = {(str(source), str(destination)) for source, destination in found.edges}
    print(names, found.n_passes, int(found.kept.numel()))
    assert names == {("a1.h2", "logits"), ("a0.h1", "a1.h1.v"), ("embed", "a0.h0.v")}  # v by key-value head
    assert found.clean_value == pytest.approx(0.0, abs=1e-6)
    assert found.faithfulness == pytest.approx(1.0, abs=1e-3)
    assert found.completeness == pytest.approx(1.0, abs=1e-3)
    assert found.n_passes < int(found.wiring.valid.sum()) / 3


def test_a_circuit_is_what_its_edges_do(various: GradientModel, clean: Tensor, corrupt: Tensor) -> None:
    found = discover_circuit(various, clean, corrupt, threshold=0.05)
    n_edges = int(found.wiring.valid.sum())
    assert 0 < len(found.edges) == int(found.kept.sum()) < n_edges
    again = measure_circuit(EdgeExperiment(found.wiring, clean, corrupt), found.kept)
    assert again.value == pytest.approx(found.value, abs=1e-6)
    everything = measure_circuit(EdgeExperiment(found.wiring, clean, corrupt), found.wiring.valid)
    assert everything.faithfulness == pytest.approx(1.0, abs=1e-4)
    assert everything.completeness == pytest.approx(1.0, abs=1e-4)
    assert everything.clean_value == pytest.approx(0.0, abs=1e-4)


def test_a_lower_threshold_keeps_more(various: GradientModel, clean: Tensor, corrupt: Tensor) -> None:
    sizes = [len(discover_circuit(various, clean, corrupt, threshold=t).edges) for t in (0.2, 1e-3)]
    assert sizes[0] < sizes[1]


def test_progress_and_refusal(clean: Tensor, corrupt: Tensor) -> None:
    model = GradientModel(load("llama"))
    told: list[tuple[int, int]] = []

    class Stop(Exception):
        pass

    def progress(done: int, total: int) -> None:
        told.append((done, total))
        if done == 3:
            raise Stop

    with pytest.raises(Stop):
        discover_circuit(model, clean, corrupt, threshold=0.1, progress=progress)
    assert told[-1] == (3, int(Wiring(model).valid.sum()))
    with pytest.raises(InvalidArgument, match="threshold"):
        discover_circuit(model, clean, corrupt, threshold=0.0)
    direction = torch.ones(model.loaded.d_model)
    for place in ("blocks.1.hook_resid_post", "hook_embed", "blocks.2.hook_mlp_out"):
        metric = DirectionValue(hook_point=place, direction=direction)
        with pytest.raises(InvalidArgument, match="none ends there"):
            discover_circuit(model, clean, corrupt, threshold=0.1, metric=metric)


@pytest.mark.parametrize("place", ["blocks.2.hook_resid_post", "ln_final.hook_normalized"])
def test_a_metric_of_activations_behind_the_last_block(
    various: GradientModel, clean: Tensor, corrupt: Tensor, place: str
) -> None:
    ends = [various.forward(tokens, read=[place]).readings[place][0, -1] for tokens in (clean, corrupt)]
    direction = (ends[1] - ends[0]) / (ends[1] - ends[0]).norm()
    metric = DirectionValue(hook_point=place, direction=direction)
    found = discover_circuit(various, clean, corrupt, threshold=0.1, metric=metric)
    assert found.edges
    assert found.corrupt_value - found.clean_value == pytest.approx(
        float((ends[1] - ends[0]).norm()), rel=1e-3
    )


def test_steps_tried_together_keep_what_one_by_one_keeps(
    model: GradientModel, clean: Tensor, corrupt: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glasshouse.server.attribution.circuits.ROWS_AT_ONCE", 1)
    one_by_one = discover_circuit(model, clean, corrupt, threshold=0.02)
    monkeypatch.setattr("glasshouse.server.attribution.circuits.ROWS_AT_ONCE", 8)
    together = discover_circuit(model, clean, corrupt, threshold=0.02)
    assert torch.equal(one_by_one.kept, together.kept)
    assert together.n_passes < one_by_one.n_passes


def test_every_step_of_a_pass_is_a_full_recompute(
    model: GradientModel, clean: Tensor, corrupt: Tensor
) -> None:
    """Rows that start late against whole passes: ACDC's own check."""
    experiment = EdgeExperiment(Wiring(model), clean, corrupt)
    drawn = torch.rand(6, *experiment.wiring.valid.shape, generator=torch.Generator().manual_seed(2))
    kept = experiment.wiring.valid & (drawn > 0.3)
    early = torch.tensor([d.layer < 2 for d in experiment.wiring.destinations])
    kept[:3] |= experiment.wiring.valid & early
    for rows in (kept[:3], kept[3:]):
        whole = [experiment.value(row) for row in rows]
        assert experiment.values(rows) == pytest.approx(whole, abs=1e-5)


def test_a_circuit_of_a_size(various: GradientModel, clean: Tensor, corrupt: Tensor) -> None:
    found = discover_circuit_of_size(various, clean, corrupt, n_edges=25)
    assert 5 < len(found.edges) <= 25
    again = discover_circuit(various, clean, corrupt, threshold=found.threshold)
    assert torch.equal(again.kept, found.kept)
    with pytest.raises(InvalidArgument, match="n_edges"):
        discover_circuit_of_size(various, clean, corrupt, n_edges=0)


def test_several_pairs_share_a_circuit(various: GradientModel) -> None:
    """Of one pair twice it is that pair's; of two the metric is their mean."""
    drawn = torch.randint(3, 61, (4, 7), generator=torch.Generator().manual_seed(8))
    clean, corrupt = drawn[:2], drawn[2:]
    alone = discover_circuit(various, clean[:1], corrupt[:1], threshold=0.05)
    twice = discover_circuit(various, clean[:1].repeat(2, 1), corrupt[:1].repeat(2, 1), threshold=0.05)
    assert torch.equal(alone.kept, twice.kept)
    both = discover_circuit(various, clean, corrupt, threshold=0.05)
    values = [
        EdgeExperiment(both.wiring, clean[i : i + 1], corrupt[i : i + 1]).value(both.kept) for i in range(2)
    ]
    assert both.value == pytest.approx(sum(values) / 2, abs=1e-5)
