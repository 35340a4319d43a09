"""Features as nodes: one patched is one steered by its change, by hand; a whole dictionary patched is the other run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glasshouse.server.attribution.feature_nodes import feature_nodes
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.metrics import LogitDifference
from glasshouse.server.attribution.nodes import Node
from glasshouse.server.attribution.sweeps import PatchResult, mediate, patch_sweep
from glasshouse.server.dictionaries.linear import LinearDictionary
from glasshouse.server.types.errors import InvalidArgument, NotFound

from .dictionaries import N_FEATURES, random_clt, random_dictionary

METRIC = LogitDifference(targets=(5,), foils=(9,))
STREAM = "blocks.1.hook_resid_post"


def sae(model: GradientModel) -> LinearDictionary:
    return random_dictionary(STREAM, STREAM, model.loaded.d_model)


def sweep(
    model: GradientModel, base: Tensor, nodes: list[Node], dictionary: LinearDictionary, **rest: Any
) -> list[PatchResult]:
    batches = patch_sweep(model, base, nodes, METRIC, dictionaries={"d": dictionary}, **rest)
    return [result for batch in batches for result in batch]


@pytest.mark.parametrize("how", ["interchange", "zero", "mean"])
def test_a_feature_is_steered_by_its_change(
    various: GradientModel, clean: Tensor, corrupt: Tensor, how: str
) -> None:
    dictionary = sae(various)
    nodes = [Node(hook_point=STREAM, position=p, dictionary="d", feature=f) for p in (2, -1) for f in (0, 3)]
    nodes.append(Node(hook_point=STREAM, dictionary="d", feature=3))
    nodes.append(Node(hook_point=STREAM, position=4, dictionary="d"))
    found = sweep(various, clean, nodes, dictionary, replacement=how, others=corrupt, batch_size=4)
    x, y = (various.forward(t, read=[STREAM]).readings[STREAM][0] for t in (clean, corrupt))
    ours, theirs = dictionary.encode(x).to_dense(), dictionary.encode(y).to_dense()
    errors, their_errors = dictionary.error(x), dictionary.error(y)
    if how == "zero":
        theirs, their_errors = torch.zeros_like(theirs), torch.zeros_like(errors)
    if how == "mean":
        theirs = theirs.mean(0).expand_as(theirs)
        their_errors = their_errors.mean(0).expand_as(errors)
    moved = 0
    for result in found:
        node = result.node
        delta = torch.zeros_like(x)
        if node.feature is None:
            delta[node.positions] = (their_errors - errors)[node.positions]
        else:
            row = dictionary.decoder_rows(torch.tensor([node.feature]))[0]
            change = (theirs - ours)[:, node.feature]
            delta[node.positions] = change[node.positions, None] * row
        by_hand = METRIC(various.forward(clean, edits={STREAM: [lambda live, d=delta: live.add_(d)]}))
        assert result.value == pytest.approx(float(by_hand), abs=2e-5)
        moved += abs(result.effect) > 1e-4
    assert moved >= 2


def test_a_cross_layer_feature_writes_everywhere(
    various: GradientModel, clean: Tensor, corrupt: Tensor
) -> None:
    point = "ln2.hook_out" if various.has("blocks.0.ln2.hook_out") else "hook_resid_mid"
    reads = tuple(f"blocks.{layer}.{point}" for layer in range(3))
    writes = tuple(f"blocks.{layer}.hook_mlp_out" for layer in range(3))
    clt = random_clt(reads, writes, various.loaded.d_model)
    nodes = [
        node
        for node in feature_nodes(various, "d", clt, [clean, corrupt], positions=[3], errors=False)
        if node.feature is not None and node.feature < N_FEATURES
    ]
    assert nodes and nodes[0].hook_point == writes[0]
    read = [various.forward(t, read=reads).readings for t in (clean, corrupt)]
    ours, theirs = (clt.encode(torch.stack([r[name][0] for name in reads], 1)).to_dense() for r in read)
    for result in sweep(various, clean, nodes, clt, others=corrupt):
        feature = result.node.feature
        assert feature is not None
        rows = clt.decoder_rows(torch.tensor([feature]))[0] * (theirs - ours)[3, feature]
        edits = {name: [lambda live, row=row: live[:, 3].add_(row)] for name, row in zip(writes, rows)}
        assert result.value == pytest.approx(float(METRIC(various.forward(clean, edits=edits))), abs=2e-5)


def test_mediation_and_a_drawn_replacement(various: GradientModel, clean: Tensor, corrupt: Tensor) -> None:
    dictionary = sae(various)
    nodes = feature_nodes(various, "d", dictionary, [clean, corrupt], positions=[-1])
    assert nodes[-1].feature is None
    total = METRIC(various.forward(corrupt)).item() - METRIC(various.forward(clean)).item()
    found = mediate(various, clean, corrupt, nodes, METRIC, dictionaries={"d": dictionary})
    assert all(each.total == pytest.approx(total, abs=1e-5) for each in found)
    others = torch.cat([clean, corrupt])

    def drawn(seed: int) -> list[PatchResult]:
        return sweep(various, clean, nodes, dictionary, replacement="resample", others=others, seed=seed)

    assert drawn(1) == drawn(1)
    exact = {each.node: each.indirect for each in found}
    for result in drawn(2):
        assert min(abs(result.effect), abs(result.effect - exact[result.node])) < 2e-5


def test_refusals(various: GradientModel, clean: Tensor, corrupt: Tensor) -> None:
    dictionary = sae(various)
    with pytest.raises(NotFound, match="no dictionary"):
        patch = [Node(hook_point=STREAM, dictionary="other", feature=0)]
        sweep(various, clean, patch, dictionary, others=corrupt)
    with pytest.raises(NotFound, match="no feature 99"):
        sweep(
            various, clean, [Node(hook_point=STREAM, dictionary="d", feature=99)], dictionary, others=corrupt
        )
    elsewhere = [Node(hook_point="blocks.0.hook_resid_post", dictionary="d", feature=0)]
    with pytest.raises(InvalidArgument, match="begins to write"):
        sweep(various, clean, elsewhere, dictionary, others=corrupt)
    with pytest.raises(InvalidArgument, match="another input"):
        sweep(various, clean, [Node(hook_point=STREAM, dictionary="d", feature=0)], dictionary)
