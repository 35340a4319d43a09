"""Integrated gradients are complete; gradient x input is exact where the model is linear."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glasshouse.server.attribution.freezing import Freeze
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.metrics import KLDivergence, LogitDifference, LogProbability
from glasshouse.server.attribution.tokens import attribute_tokens
from glasshouse.server.types.errors import InvalidArgument

METRIC = LogitDifference(targets=(5,), foils=(9,))


def test_completeness_and_its_residual_falls_with_steps(
    model: GradientModel, clean: Tensor, corrupt: Tensor
) -> None:
    """From zero; between two inputs for sandwich norms, which blow up a stream of any size, however small."""
    baseline = None
    if model.has("blocks.0.ln2_post.hook_normalized") and model.has("blocks.0.ln1.hook_normalized"):
        baseline = model.forward(corrupt, read=["hook_embed"]).readings["hook_embed"][0]
    residuals = [
        abs(attribute_tokens(model, clean, METRIC, steps=steps, baseline=baseline).residual)
        for steps in (16, 256)
    ]
    print(model.loaded.name, residuals)
    assert residuals[1] < 1e-3
    assert residuals[1] < residuals[0]


@pytest.mark.parametrize(
    "hook_point", ["blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.2.ln1.hook_out"]
)
def test_completeness_inside_the_model(
    various: GradientModel, clean: Tensor, corrupt: Tensor, hook_point: str
) -> None:
    if not various.has(hook_point):
        pytest.skip("this architecture has no such point")
    baseline = various.forward(corrupt, read=[hook_point]).readings[hook_point][0]
    found = attribute_tokens(
        various, clean, LogProbability(targets=(5,)), hook_point=hook_point, steps=256, baseline=baseline
    )
    assert abs(found.residual) < 1e-3
    assert found.attributions.shape == (clean.shape[1], various.loaded.d_model)


def test_between_two_inputs_the_attributions_sum_to_the_divergence(
    various: GradientModel, clean: Tensor, corrupt: Tensor
) -> None:
    reference = KLDivergence.reference_of(various.forward(clean))
    baseline = various.forward(clean, read=["hook_embed"]).readings["hook_embed"][0]
    found = attribute_tokens(
        various, corrupt, KLDivergence(reference=reference), baseline=baseline, steps=256
    )
    assert found.baseline_value == pytest.approx(0.0, abs=1e-5)
    assert abs(found.residual) < 1e-3
    same = (clean == corrupt)[0]
    assert found.scores[same].abs().max() == 0 if same.any() else True


def test_gradient_x_input_is_complete_where_the_model_is_linear(
    various: GradientModel, clean: Tensor
) -> None:
    """From the last block's MLP on, with the final norm's scale held, logits are linear in the contribution."""
    held = various.forward(clean, record=True).held
    metric = LogitDifference(targets=(5,), foils=(9,), capped=False)
    found = attribute_tokens(
        various,
        clean,
        metric,
        hook_point="blocks.2.hook_mlp_out",
        method="gradient_x_input",
        freeze=Freeze(norms=True, held=held),
    )
    assert abs(found.residual) < 1e-4
    assert torch.equal(found.scores.nonzero()[:, 0], torch.tensor([clean.shape[1] - 1]))


def test_refusals(clean: Tensor, various: GradientModel) -> None:
    with pytest.raises(InvalidArgument, match="baseline"):
        attribute_tokens(various, clean, METRIC, baseline=torch.zeros(3))
    with pytest.raises(InvalidArgument, match="steps"):
        attribute_tokens(various, clean, METRIC, steps=0)
