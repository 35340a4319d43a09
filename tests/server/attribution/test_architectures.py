"""Every method on every architecture: the one exception is named where it is met."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from glasshouse.server.attribution import (
    attribution_patching,
    circuits,
    direct,
    edge_attribution,
    edge_verification,
    feature_attribution,
    nodes,
    path_patching,
    sweeps,
    tokens,
)
from glasshouse.server.attribution.attribution_graph import trace_graph
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.metrics import LogitDifference
from glasshouse.server.attribution.transcoders import Transcoders
from glasshouse.server.attribution.wiring import Wiring
from glasshouse.server.types.errors import FailedPrecondition

from .conftest import N_TOKENS
from .dictionaries import random_dictionary

METRIC = LogitDifference(targets=(5,), foils=(9,))
COMPONENTS = ("hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_mlp_out", "mlp.hook_post")
Case = Callable[[GradientModel, Tensor, Tensor], Any]


def sweep(model: GradientModel, clean: Tensor, corrupt: Tensor) -> float:
    found = 0.0
    for component in COMPONENTS:
        grid = nodes.node_grid(model, component, n_positions=N_TOKENS)
        for batch in sweeps.patch_sweep(model, clean, grid, METRIC, others=corrupt):
            found += sum(abs(result.effect) for result in batch)
    return found


def path(model: GradientModel, clean: Tensor, corrupt: Tensor) -> float:
    sender = nodes.Node(hook_point="blocks.0.attn.hook_z", head=0)
    last = nodes.Node(hook_point=f"blocks.{model.n_layers - 1}.hook_resid_post")
    return path_patching.path_patch(model, clean, corrupt, sender, [last], METRIC).effect


def edges(model: GradientModel, clean: Tensor, corrupt: Tensor) -> float:
    wiring = Wiring(model)
    scores = edge_attribution.attribute_edges(model, clean, corrupt, METRIC, wiring=wiring)
    found = edge_verification.verify_edges(wiring, clean, corrupt, METRIC, scores, top=3)
    return abs(found.exact[0])


def features(model: GradientModel, clean: Tensor, corrupt: Tensor) -> float:
    at = "blocks.1.hook_resid_post"
    dictionary = random_dictionary(at, at, model.loaded.d_model)
    found = feature_attribution.attribute_features(model, clean, dictionary, METRIC, steps=3)
    return float(found.errors.abs().sum())


def graph(model: GradientModel, clean: Tensor, corrupt: Tensor) -> float:
    point = "ln2.hook_out" if model.has("blocks.0.ln2.hook_out") else "hook_resid_mid"
    transcoders = Transcoders(
        model,
        [
            random_dictionary(
                f"blocks.{layer}.{point}", f"blocks.{layer}.hook_mlp_out", model.loaded.d_model, seed=layer
            )
            for layer in range(model.n_layers)
        ],
    )
    return float(trace_graph(model, transcoders, clean).edges.weights.abs().sum())


CASES: dict[str, Case] = {
    "AttributeTokens": lambda m, a, b: tokens.attribute_tokens(m, a, METRIC, steps=4).scores.abs().sum(),
    "DirectAttribution": lambda m, a, b: abs(direct.attribute_directly(m, a, {5: 1.0}).logit),
    "PatchSweep": sweep,
    "PathPatch": path,
    "AtP": lambda m, a, b: attribution_patching.attribution_patch(m, a, b, METRIC).top(1)[0][1],
    "AtP*": lambda m, a, b: attribution_patching.attribution_patch(
        m, a, b, METRIC, qk_fix=True, grad_drop=True
    ).top(1)[0][1],
    "EAP": edges,
    "EAP-IG": lambda m, a, b: edge_attribution.attribute_edges(m, a, b, METRIC, steps=3).top(1)[0][2],
    "ACDC": lambda m, a, b: len(circuits.discover_circuit(m, a, b, threshold=1e-3).edges),
    "AttributeFeatures": features,
    "CreateAttributionGraph": graph,
}


@pytest.mark.parametrize("method", CASES)
def test_a_method_applies(model: GradientModel, clean: Tensor, corrupt: Tensor, method: str) -> None:
    found = float(CASES[method](model, clean[0], corrupt[0]))
    assert found != 0 and torch.isfinite(torch.tensor(found))


def test_a_parallel_block_has_no_stream_between_attention_and_mlp(model: GradientModel) -> None:
    if model.has("blocks.0.hook_resid_mid"):
        assert nodes.node_grid(model, "hook_resid_mid", n_positions=N_TOKENS)
        return
    with pytest.raises(FailedPrecondition) as caught:
        nodes.node_grid(model, "hook_resid_mid", n_positions=N_TOKENS)
    assert "in parallel" in caught.value.message
    assert caught.value.remedy
