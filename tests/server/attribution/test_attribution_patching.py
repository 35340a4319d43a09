"""AtP is patching where the model is linear; the QK fix is exact through one softmax; GradDrop by definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glasshouse.server.attribution.attribution_patching import ATP_COMPONENTS, attribution_patch, verify
from glasshouse.server.attribution.freezing import Freeze, stop_gradient
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.metrics import LogitDifference
from glasshouse.server.attribution.ranking import rank_correlation
from glasshouse.server.attribution.sweeps import patch_sweep
from glasshouse.server.types.errors import InvalidArgument

from .conftest import load

METRIC = LogitDifference(targets=(5,), foils=(9,), capped=False)


@pytest.fixture(params=["gpt2", "gpt_neox"])
def linear(request: pytest.FixtureRequest) -> GradientModel:
    """MLPs without a nonlinearity; with norms (and patterns) held the model is linear."""

    def identity(model: Any) -> None:
        for module in list(model.modules()):
            if hasattr(module, "act"):
                module.act = nn.Identity()

    return GradientModel(load(str(request.param), identity))


def exact(model: GradientModel, clean: Tensor, corrupt: Tensor, nodes: Any, **kwargs: Any) -> list[float]:
    swept = patch_sweep(model, clean, nodes, METRIC, others=corrupt, **kwargs)
    return [result.effect for batch in swept for result in batch]


def test_atp_is_patching_on_a_linear_model(linear: GradientModel, clean: Tensor, corrupt: Tensor) -> None:
    held = linear.forward(clean, record=True).held
    freeze = Freeze(patterns=True, norms=True, held=held)
    components = (
        "hook_resid_pre",
        "attn.hook_v",
        "attn.hook_z",
        "hook_attn_out",
        "mlp.hook_post",
        "hook_mlp_out",
    )
    found = attribution_patch(linear, clean, corrupt, METRIC, components=components, freeze=freeze)
    pairs = list(found.nodes())
    effects = exact(linear, clean, corrupt, [node for node, _ in pairs], freeze=freeze)
    error = max(abs(score - effect) for (_, score), effect in zip(pairs, effects))
    print(error, max(map(abs, effects)))
    assert error < 1e-4


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma2", "qwen3", "mistral"])
def test_the_qk_fix_is_exact_through_one_softmax(arch: str, clean: Tensor, corrupt: Tensor) -> None:
    """In the last layer, with no MLP and held norms behind it, nothing but the softmax is nonlinear."""

    def silence(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if "2.mlp.down_proj" in name or "2.mlp.c_proj" in name:
                parameter.zero_()

    model = GradientModel(load(arch, silence))
    freeze = Freeze(norms=True, held=model.forward(clean, record=True).held)
    components = ("attn.hook_q", "attn.hook_k", "attn.hook_v")
    fixed = attribution_patch(
        model, clean, corrupt, METRIC, components=components, qk_fix=True, freeze=freeze
    )
    plain = attribution_patch(model, clean, corrupt, METRIC, components=components, freeze=freeze)
    pairs = [(node, score) for node, score in fixed.nodes() if node.hook_point.startswith("blocks.2")]
    effects = exact(model, clean, corrupt, [node for node, _ in pairs], freeze=freeze)
    for (node, score), effect in zip(pairs, effects):
        assert score == pytest.approx(effect, abs=2e-5), node
    assert (fixed.scores["attn.hook_q"] - plain.scores["attn.hook_q"]).abs().max() > 1e-4
    torch.testing.assert_close(fixed.scores["attn.hook_v"], plain.scores["attn.hook_v"], rtol=1e-4, atol=1e-5)


def test_grad_drop_by_definition(various: GradientModel, clean: Tensor, corrupt: Tensor) -> None:
    found = attribution_patch(various, clean, corrupt, METRIC, grad_drop=True)
    names = [f"blocks.{layer}.{c}" for layer in range(3) for c in ATP_COMPONENTS]
    theirs = various.forward(corrupt, read=names).readings
    total = dict.fromkeys(names, 0.0)
    for dropped in range(3):
        stops = {f"blocks.{dropped}.{c}": [stop_gradient] for c in ("hook_attn_out", "hook_mlp_out")}
        run = various.forward(clean, read=names, differentiate=names, after=stops)
        gradients = run.gradients(METRIC(run).sum())
        for name in names:
            moved = ((theirs[name] - run.readings[name]) * gradients[name])[0].detach()
            heads = various.table.resolve(name).n_heads
            if heads:
                total[name] = total[name] + moved.view(-1, heads, moved.shape[-1] // heads).sum(-1).T.abs()
            else:
                total[name] = total[name] + moved.sum(-1).abs()
    for name, value in total.items():
        layer, component = int(name.split(".")[1]), name.split(".", 2)[2]
        torch.testing.assert_close(found.scores[component][layer], value / 2, rtol=1e-4, atol=1e-6)
    assert found.magnitudes


def test_verification_re_does_the_best_exactly(model: GradientModel, clean: Tensor, corrupt: Tensor) -> None:
    """A close input, so that the approximation has a chance on a random model."""
    near = clean.clone()
    near[0, 3] = corrupt[0, 3]
    scores = attribution_patch(model, clean, near, METRIC, qk_fix=True)
    found = verify(model, clean, near, METRIC, scores, top=12)
    assert list(found.exact) == pytest.approx(exact(model, clean, near, found.nodes), abs=1e-5)
    assert [abs(a) for a in found.approximate] == sorted((abs(a) for a in found.approximate), reverse=True)
    print(model.loaded.name, found.rank_correlation)


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert rank_correlation([1, 1, 2, 3], [1, 2, 3, 3]) == pytest.approx(8 / 9)
    assert rank_correlation([1, 1], [1, 2]) != rank_correlation([1, 1], [1, 2])  # nan


def test_inputs_of_two_lengths_are_refused(various: GradientModel, clean: Tensor) -> None:
    with pytest.raises(InvalidArgument, match="position by position"):
        attribution_patch(various, clean, clean[:, :4], METRIC)
