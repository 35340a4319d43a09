"""Edges: masks mean what they say, and EAP is the gradient of the mask at zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glasshouse.server.attribution.edge_attribution import attribute_edges
from glasshouse.server.attribution.edge_patching import forward_with_edges
from glasshouse.server.attribution.edge_verification import verify_edges
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.metrics import LogitDifference
from glasshouse.server.attribution.wiring import Wiring
from glasshouse.server.types.errors import InvalidArgument

METRIC = LogitDifference(targets=(5,), foils=(9,))


def corrupt_contributions(wiring: Wiring, corrupt: Tensor) -> Tensor:
    with torch.no_grad():
        return wiring.contributions(wiring.model.forward(corrupt, read=wiring.written).readings)


def test_contributions_sum_to_the_stream(model: GradientModel, clean: Tensor) -> None:
    """Up to the biases of W_O, which are no source: the same at every position."""
    wiring, last = Wiring(model), "blocks.2.hook_resid_post"
    run = model.forward(clean, read=[*wiring.written, last])
    rest = (run.readings[last] - wiring.contributions(run.readings).sum(0))[0]
    torch.testing.assert_close(rest, rest[:1].expand_as(rest), rtol=0, atol=1e-5)
    L, H, K = model.n_layers, model.loaded.n_heads, model.loaded.n_kv_heads
    assert len(wiring.sources) == 1 + L * (H + 1)
    assert len(wiring.destinations) == L * (H + 2 * K + 1) + 1
    assert not wiring.valid[wiring.sources.index(wiring.sources[-1]), :-1].any()


def test_masks_of_nothing_and_of_everything(model: GradientModel, clean: Tensor, corrupt: Tensor) -> None:
    wiring = Wiring(model)
    theirs = corrupt_contributions(wiring, corrupt)
    for mask, tokens in ((torch.zeros(wiring.valid.shape), clean), (wiring.valid.float(), corrupt)):
        logits = forward_with_edges(wiring, clean, theirs, mask).logits()
        torch.testing.assert_close(logits, model.forward(tokens).logits(), rtol=1e-4, atol=2e-5)


def test_eap_is_the_gradient_of_the_mask_at_zero(
    model: GradientModel, clean: Tensor, corrupt: Tensor
) -> None:
    wiring = Wiring(model)
    theirs = corrupt_contributions(wiring, corrupt)
    mask = torch.zeros(wiring.valid.shape, requires_grad=True)
    (expected,) = torch.autograd.grad(METRIC(forward_with_edges(wiring, clean, theirs, mask)).sum(), mask)
    found = attribute_edges(model, clean, corrupt, METRIC, wiring=wiring)
    scale = float(expected.abs().max())
    error = float((found.scores - expected).abs().max())
    print(model.loaded.name, error, scale)
    assert error < 1e-5 * max(1.0, scale)
    best = found.top(3)
    assert [abs(score) for _, _, score in best] == sorted(
        found.scores.abs().flatten().tolist(), reverse=True
    )[:3]


def starting_at(model: GradientModel, name: str, value: Tensor) -> Any:
    """The model's forward with the activation at one hook point replaced."""
    forward = model.forward

    def shifted(tokens: Tensor, *, edits: Any, **rest: Any) -> Any:
        return forward(tokens, edits={name: [lambda live: live.copy_(value)], **edits}, **rest)

    return shifted


def test_eap_ig_averages_the_path_from_corrupt(
    various: GradientModel, clean: Tensor, corrupt: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step is the gradient at the corrupt embeddings; more steps are their mean, by the mask's gradient."""
    wiring = Wiring(various)
    found = attribute_edges(various, clean, corrupt, METRIC, steps=3, wiring=wiring)
    ends = [various.forward(t, read=["blocks.0.hook_resid_pre"]).readings for t in (corrupt, clean)]
    start, end = (e["blocks.0.hook_resid_pre"] for e in ends)
    ours = corrupt_contributions(wiring, clean)
    theirs = corrupt_contributions(wiring, corrupt)
    difference = theirs - ours
    expected = torch.zeros(wiring.valid.shape)
    embed = "hook_embed"
    position = start - various.forward(corrupt, read=[embed]).readings[embed]
    for k in range(3):
        x = start + k / 3 * (end - start)
        at = various.forward(
            clean, read=wiring.written, edits={embed: [lambda live, x=x: live.copy_(x - position)]}
        )
        mask = torch.zeros(wiring.valid.shape, requires_grad=True)
        target = wiring.contributions(at.readings).detach() + difference
        with monkeypatch.context() as patch:
            patch.setattr(various, "forward", starting_at(various, embed, x - position))
            run = forward_with_edges(wiring, clean, target, mask)
        expected += torch.autograd.grad(METRIC(run).sum(), mask)[0] / 3
    torch.testing.assert_close(found.scores, expected, rtol=1e-3, atol=2e-5)


def test_verification_is_path_patching_along_the_edge(
    various: GradientModel, clean: Tensor, corrupt: Tensor
) -> None:
    """The direct edges to the logits by hand: the last stream moved by the difference of the contributions."""
    wiring, last = Wiring(various), "blocks.2.hook_resid_post"
    scores = attribute_edges(various, clean, corrupt, METRIC, wiring=wiring)
    found = verify_edges(wiring, clean, corrupt, METRIC, scores, top=int(wiring.valid.sum()))
    difference = corrupt_contributions(wiring, corrupt) - corrupt_contributions(wiring, clean)
    plain = METRIC(various.forward(clean)).item()
    checked = 0
    for (source, destination), exact in zip(found.edges, found.exact):
        if destination.kind == "logits":
            delta = difference[wiring.sources.index(source)]
            moved = METRIC(various.forward(clean, edits={last: [lambda x, d=delta: x.add_(d)]})).item()
            assert exact == pytest.approx(moved - plain, abs=3e-5)
            checked += 1
    assert checked == len(wiring.sources)
    assert found.rank_correlation > 0.5


def test_inputs_of_two_lengths_are_refused(various: GradientModel, clean: Tensor) -> None:
    with pytest.raises(InvalidArgument, match="position by position"):
        attribute_edges(various, clean, clean[:, :4], METRIC)
