"""The graph's edges predict what interventions do; pruning and influence by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glasshouse.server.attribution.attribution_graph import (
    AttributionGraph,
    LogitTarget,
    top_logits,
    trace_graph,
)
from glasshouse.server.attribution.feature_interventions import FeatureSetting, intervene
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.graph_estimate import estimate
from glasshouse.server.attribution.influence import Edges, above_threshold, graph_scores, prune
from glasshouse.server.attribution.local_model import LocalModel, logit_vector
from glasshouse.server.attribution.transcoders import Transcoders
from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument

from .conftest import load
from .dictionaries import random_clt, random_dictionary

FAMILIES = ["llama", "gemma2", "gpt2", "gpt_neox", "olmo2", "qwen3", "mistral"]


def transcoders_for(model: GradientModel, kind: str) -> Transcoders:
    layers, d_model = range(model.n_layers), model.loaded.d_model
    point = "ln2.hook_out" if model.has("blocks.0.ln2.hook_out") else "hook_resid_mid"
    if kind == "normalized":
        point = point.replace("hook_out", "hook_normalized")
    reads = tuple(f"blocks.{layer}.{point}" for layer in layers)
    writes = tuple(f"blocks.{layer}.hook_mlp_out" for layer in layers)
    if kind == "clt":
        return Transcoders(model, [random_clt(reads, writes, d_model)])
    made = [
        random_dictionary(read, write, d_model, seed=10 * layer, skip=kind == "skip")
        for layer, (read, write) in enumerate(zip(reads, writes))
    ]
    return Transcoders(model, made)


@pytest.mark.parametrize("kind", ["per_layer", "skip", "clt", "normalized"])
@pytest.mark.parametrize("arch", FAMILIES)
def test_doubling_a_feature_moves_everything_by_its_column(arch: str, kind: str, clean: Tensor) -> None:
    model = GradientModel(load(arch))
    transcoders = transcoders_for(model, kind)
    graph = trace_graph(model, transcoders, clean, batch_size=16)
    local = LocalModel(model, transcoders, clean)
    features, adjacency = graph.features, graph.adjacency()
    assert len(features) == graph.n_active == len(local.features) > 20
    base = intervene(local, [])
    before = base.pre_activations(local, features)
    generator = torch.Generator().manual_seed(0)
    worst, largest = 0.0, 0.0
    for s in torch.randperm(len(features), generator=generator)[:12].tolist():
        setting = FeatureSetting(
            layer=int(features.layers[s]),
            position=int(features.positions[s]),
            index=int(features.indices[s]),
            value=2 * float(features.values[s]),
        )
        moved = intervene(local, [setting])
        change = moved.pre_activations(local, features) - before
        torch.testing.assert_close(change, adjacency[: len(features), s], atol=5e-4, rtol=1e-5)
        logits = moved.logits - base.logits
        logits = logits - logits.mean()
        tokens = [logit.token_id for logit in graph.logits]
        torch.testing.assert_close(logits[tokens], adjacency[graph.first_logit :, s], atol=1e-4, rtol=1e-3)
        worst = max(worst, float((change - adjacency[: len(features), s]).abs().max()))
        largest = max(largest, float(change.abs().max()))
    print(arch, kind, len(features), worst, largest)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2"])
def test_tokens_and_errors_move_everything_by_their_columns(arch: str, clean: Tensor) -> None:
    """The same for the other sources, by editing the embedding and the contribution."""
    model = GradientModel(load(arch))
    transcoders = transcoders_for(model, "per_layer")
    graph = trace_graph(model, transcoders, clean)
    local = LocalModel(model, transcoders, clean)
    adjacency, n = graph.adjacency(), len(graph.features)
    base = intervene(local, []).pre_activations(local, graph.features)
    for layer, position in ((0, 2), (1, 4)):
        mlp_out = local.mlp_out.clone()
        local.mlp_out[layer, position] += local.errors[layer, position]
        change = intervene(local, []).pre_activations(local, graph.features) - base
        local.mlp_out = mlp_out
        column = graph.first_error + layer * clean.shape[1] + position
        torch.testing.assert_close(change, adjacency[:n, column], atol=1e-3, rtol=1e-3)
    forward = model.forward

    def doubled(tokens: Tensor, *, edits: Any, **rest: Any) -> Any:
        def double(live: Tensor) -> None:
            live[:, 3] *= 2

        return forward(tokens, edits={"hook_embed": [double], **edits}, **rest)

    model.forward = doubled  # type: ignore[method-assign]
    change = intervene(local, []).pre_activations(local, graph.features) - base
    torch.testing.assert_close(change, adjacency[:n, graph.first_token + 3], atol=1e-3, rtol=1e-3)


def test_selection_keeps_the_rows_of_the_whole_graph(clean: Tensor) -> None:
    model = GradientModel(load("llama"))
    transcoders = transcoders_for(model, "clt")
    whole = trace_graph(model, transcoders, clean)
    part = trace_graph(model, transcoders, clean, max_features=15, batch_size=4, update_interval=1)
    assert len(part.features) == 15 and part.n_active == len(whole.features)

    def keys(graph: AttributionGraph) -> list[tuple[int, int, int]]:
        f = graph.features
        return list(zip(f.layers.tolist(), f.positions.tolist(), f.indices.tolist()))

    places = [keys(whole).index(key) for key in keys(part)]
    places += range(len(whole.features), whole.edges.n_nodes)
    torch.testing.assert_close(part.adjacency(), whole.adjacency()[places][:, places], rtol=1e-3, atol=1e-5)
    influence = whole.edges.influence(whole.weights)[: len(whole.features)]
    chosen = influence[places[:15]].sum() / influence.topk(15).values.sum()
    assert chosen > 0.8  # ranked by what was known at the time
    local = LocalModel(model, transcoders, clean)
    bound = estimate(local, max_features=4096, n_logits=len(whole.logits))
    assert bound.n_rows == len(whole.features) + len(whole.logits)
    assert bound.edge_bytes >= whole.edges.weights.numel() * 12


def test_logit_targets(clean: Tensor) -> None:
    model = GradientModel(load("gemma2"))
    logits = model.forward(clean).logits()[0]
    p = logits.softmax(-1).sort(descending=True).values
    found = top_logits(model, logits, desired_probability=0.3, max_logits=40)
    n = len(found)
    assert float(p[:n].sum()) >= 0.3 > float(p[: n - 1].sum())
    assert len(top_logits(model, logits, max_logits=3)) == 3
    custom = [LogitTarget(label="a - b", weight=1.0, vector=logit_vector(model, 5) - logit_vector(model, 9))]
    graph = trace_graph(model, transcoders_for(model, "per_layer"), clean, logits=custom)
    both = [LogitTarget(label=str(t), weight=0.5, vector=logit_vector(model, t), token_id=t) for t in (5, 9)]
    two = trace_graph(model, transcoders_for(model, "per_layer"), clean, logits=both)
    rows = two.adjacency()[two.first_logit :, : two.first_logit]
    torch.testing.assert_close(
        graph.adjacency()[-1, : graph.first_logit], rows[0] - rows[1], rtol=1e-3, atol=1e-4
    )


def test_modes_differ_and_open_is_steering(clean: Tensor) -> None:
    model = GradientModel(load("llama"))
    local = LocalModel(model, transcoders_for(model, "per_layer"), clean)
    f = local.features
    s = int((f.layers == 0).nonzero()[0])
    setting = FeatureSetting(
        layer=0, position=int(f.positions[s]), index=int(f.indices[s]), value=float(f.values[s]) + 3.0
    )
    found = {
        mode: intervene(local, [setting], mode=mode).logits
        for mode in ("constrained", "frozen_attention", "open")
    }  # type: ignore[arg-type]
    row = local.transcoders.dictionaries[0].decoder_rows(f.ids[s : s + 1])[0]

    def steer(live: Tensor) -> None:
        live[:, setting.position] += 3.0 * row

    by_hand = model.forward(clean, edits={"blocks.0.hook_mlp_out": [steer]}).logits()[0]
    torch.testing.assert_close(found["open"], by_hand, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found["open"], found["frozen_attention"], atol=1e-4)
    assert not torch.allclose(found["constrained"], found["frozen_attention"], atol=1e-4)
    with pytest.raises(InvalidArgument, match="no feature 99"):
        intervene(local, [FeatureSetting(layer=0, position=1, index=99, value=1.0)])


def hand_graph() -> tuple[Edges, Tensor, dict[str, Tensor]]:
    """feature 0 <- token 3; feature 1 <- error 2; logit 4 <- features 0 (3), 1 (-1)."""
    edges = Edges(
        targets=torch.tensor([0, 1, 4, 4]),
        sources=torch.tensor([3, 2, 0, 1]),
        weights=torch.tensor([2.0, 5.0, 3.0, -1.0]),
        n_nodes=5,
    )
    masks = {
        "is_feature": torch.tensor([True, True, False, False, False]),
        "is_error": torch.tensor([False, False, True, False, False]),
    }
    return edges, torch.tensor([0.0, 0, 0, 0, 0.5]), masks


def test_influence_pruning_and_scores_by_hand() -> None:
    edges, weights, masks = hand_graph()
    torch.testing.assert_close(edges.shares(), torch.tensor([1.0, 1.0, 0.75, 0.25]))
    influence = edges.influence(weights)
    torch.testing.assert_close(influence, torch.tensor([0.375, 0.125, 0.125, 0.375, 0.0]))
    scores = graph_scores(
        edges, weights, is_token=torch.tensor([False] * 3 + [True, False]), is_error=masks["is_error"]
    )
    assert scores.replacement == pytest.approx(0.75)
    assert scores.completeness == pytest.approx(1 - 0.125 / 1.5)
    found = prune(edges, weights, **masks, node_threshold=0.7, edge_threshold=1.0)
    assert found.nodes.tolist() == [True, False, False, True, True]
    assert found.edges.tolist() == [True, False, True, False]
    all_of_it = prune(edges, weights, **masks, node_threshold=1.0, edge_threshold=1.0)
    assert all_of_it.nodes.all() and all_of_it.edges.all()
    assert above_threshold(torch.tensor([4.0, 1.0, 3.0, 2.0]), 0.6).tolist() == [True, False, True, False]
    dense = torch.zeros(5, 5)
    dense[edges.targets, edges.sources] = edges.shares()
    total = weights @ (dense + dense @ dense + dense @ dense @ dense)
    torch.testing.assert_close(influence, total)


def test_pruning_a_real_graph_leaves_no_loose_ends(various: GradientModel, clean: Tensor) -> None:
    graph = trace_graph(various, transcoders_for(various, "per_layer"), clean)
    pruning = graph.prune(node_threshold=0.6, edge_threshold=0.9)
    edges = graph.edges.select(pruning.edges)
    out, into = edges.sources.unique(), edges.targets.unique()
    for node in (pruning.nodes & (graph.is_feature | graph.is_error)).nonzero().squeeze(1):
        assert node in out and (node >= graph.first_error or node in into)
    assert pruning.nodes[graph.first_token :].all()
    assert 0 < int(pruning.edges.sum()) < len(pruning.edges)
    for scores in (graph.scores(), graph.scores(pruning)):
        assert 0 < scores.replacement < 1 and 0 < scores.completeness < 1
    with pytest.raises(InvalidArgument, match="node_threshold"):
        graph.prune(node_threshold=0.0)


def test_refusals(various: GradientModel) -> None:
    d_model = various.loaded.d_model
    sae = random_dictionary("blocks.0.hook_mlp_out", "blocks.0.hook_mlp_out", d_model)
    with pytest.raises(FailedPrecondition, match="it is a sae"):
        Transcoders(various, [sae])
    backwards = random_dictionary("blocks.1.hook_resid_post", "blocks.1.hook_mlp_out", d_model)
    with pytest.raises(FailedPrecondition, match="runs after"):
        Transcoders(various, [backwards])
    aside = random_dictionary("blocks.1.hook_resid_pre", "blocks.1.hook_attn_out", d_model)
    with pytest.raises(FailedPrecondition, match="it writes at"):
        Transcoders(various, [aside])
    narrow = random_dictionary("blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out", d_model - 1)
    with pytest.raises(FailedPrecondition, match="dimensions"):
        Transcoders(various, [narrow])
