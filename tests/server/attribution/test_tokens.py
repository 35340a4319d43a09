"""Integrated gradients are complete from the default baseline; gradient x input is exact where the model is linear."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glasshouse import fable
from glasshouse.server.attribution.baselines import average_input
from glasshouse.server.attribution.editing import setting
from glasshouse.server.attribution.freezing import Freeze
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.metrics import KLDivergence, LogitDifference, LogProbability
from glasshouse.server.attribution.tokens import attribute_tokens
from glasshouse.server.models.loading import load_model
from glasshouse.server.types.errors import InvalidArgument

METRIC = LogitDifference(targets=(5,), foils=(9,))


@pytest.fixture(scope="module")
def trained() -> GradientModel:
    torch.set_num_threads(1)
    return GradientModel(load_model(fable.model_path(), dtype="float32", device="cpu", name="fable"))


def test_the_default_baseline_is_complete_at_any_hook_point(model: GradientModel, clean: Tensor) -> None:
    places = ["hook_embed", "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_post"]
    for hook_point in places:
        found = attribute_tokens(model, clean, METRIC, hook_point=hook_point)
        whole = found.value - found.baseline_value
        print(model.loaded.name, hook_point, whole, found.residual)
        assert abs(found.residual) < 1e-3
        assert abs(whole) > 0.02, "there is something to attribute"


def test_the_residual_falls_with_steps(model: GradientModel, clean: Tensor) -> None:
    residuals = [abs(attribute_tokens(model, clean, METRIC, steps=steps).residual) for steps in (4, 32, 128)]
    print(model.loaded.name, residuals)
    assert residuals[0] > residuals[2]
    assert residuals[1] > residuals[2] or residuals[1] < 1e-5
    assert residuals[2] < 1e-4


def test_from_zeros(model: GradientModel, clean: Tensor) -> None:
    """Still to be had where asked for: not of sandwich norms, which blow up a stream of any size, however small."""
    if model.has("blocks.0.ln2_post.hook_normalized") and model.has("blocks.0.ln1.hook_normalized"):
        pytest.skip("sandwich norms")
    zeros = torch.zeros(model.loaded.d_model)
    found = attribute_tokens(model, clean, METRIC, steps=256, baseline=zeros)
    nothing = model.forward(clean, edits={"hook_embed": [setting(zeros)]})
    assert found.baseline_value == pytest.approx(METRIC(nothing).item(), abs=1e-5)
    assert abs(found.residual) < 1e-3


def test_the_average_token(model: GradientModel, clean: Tensor) -> None:
    """By plain passes of every token, and a pass with that edited in."""
    every = torch.arange(model.loaded.vocab_size)[:, None]
    mean = model.forward(every, read=["hook_embed"]).readings["hook_embed"].mean((0, 1))
    assert torch.allclose(model.mean_embedding, mean, atol=1e-6)
    assert torch.allclose(
        average_input(model, clean, "hook_embed"), mean.expand(clean.shape[1], -1), atol=1e-6
    )
    place = "blocks.1.hook_resid_pre"
    run = model.forward(clean, read=[place], edits={"hook_embed": [setting(mean)]})
    assert torch.allclose(average_input(model, clean, place), run.readings[place][0], atol=1e-5)
    found = attribute_tokens(model, clean, METRIC, hook_point=place)
    assert found.baseline_value == pytest.approx(METRIC(run).item(), abs=1e-4), "that input's own value"


def test_gradient_x_input_is_of_the_input_itself(various: GradientModel, clean: Tensor) -> None:
    found = attribute_tokens(various, clean, METRIC, method="gradient_x_input")
    run = various.forward(clean, read=["hook_embed"], differentiate=["hook_embed"])
    product = run.gradients(METRIC(run).sum())["hook_embed"] * run.readings["hook_embed"]
    assert torch.allclose(found.attributions, product[0].detach(), atol=1e-5)


QUESTIONS = [
    ("Once upon a time there was a girl named Lily. Lily was happy because", " she", " he"),
    ("Tom was tired after the walk, so", " he", " she"),
    ("The capital of Norway is called", " Oslo", " Paris"),
]


@pytest.mark.parametrize("hook_point", ["hook_embed", "blocks.1.hook_resid_pre", "blocks.3.hook_resid_pre"])
def test_a_trained_model_is_complete_by_default_and_was_not_from_zeros(
    trained: GradientModel, hook_point: str
) -> None:
    codec = trained.loaded.tokenizer
    from_zeros = []
    for text, right, wrong in QUESTIONS:
        ids = torch.tensor(codec.encode(text))
        metric = LogitDifference(
            targets=(codec.encode(right, False)[0],), foils=(codec.encode(wrong, False)[0],)
        )
        found = attribute_tokens(trained, ids, metric, hook_point=hook_point)
        assert abs(found.residual) < 1e-3 < 1 < abs(found.value - found.baseline_value)
        zeros = torch.zeros(trained.loaded.d_model)
        missed = attribute_tokens(trained, ids, metric, hook_point=hook_point, baseline=zeros).residual
        from_zeros.append(abs(missed))
    assert max(from_zeros) > 0.1, "zeros would do: the default needs no reason"


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
