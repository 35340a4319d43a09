"""Values of features and probes as metrics: the number itself, and its derivative by finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.metrics import DirectionValue, FeatureValue, Metric, ProbeValue
from glasshouse.server.attribution.nodes import node_grid
from glasshouse.server.attribution.sweeps import patch_sweep
from glasshouse.server.dictionaries.architectures import Gated, JumpReLU, ReLU, TopK
from glasshouse.server.dictionaries.architectures.activation import Activation
from glasshouse.server.dictionaries.formats.build import single_site
from glasshouse.server.dictionaries.linear import LinearDictionary
from glasshouse.server.probes.examples import Task
from glasshouse.server.probes.pooling import Pooling
from glasshouse.server.probes.served import ProbeFacts, ServedProbe, affine

from .dictionaries import N_FEATURES, _drawn

POINT = "blocks.1.hook_resid_post"
ARCHITECTURES: dict[str, Activation] = {
    "relu": ReLU(),
    "jumprelu": JumpReLU(threshold=torch.full((N_FEATURES,), 0.05)),
    "topk": TopK(keep=5),
    "gated": Gated(b_gate=_drawn(5, N_FEATURES), b_mag=_drawn(6, N_FEATURES), r_mag=_drawn(7, N_FEATURES)),
}


def dictionary_of(activation: Activation, d_model: int) -> LinearDictionary:
    parameters = single_site(
        W_enc=_drawn(0, d_model, N_FEATURES),
        W_dec=_drawn(1, N_FEATURES, d_model),
        b_enc=None if isinstance(activation, Gated) else _drawn(2, N_FEATURES),
        b_dec=_drawn(3, d_model),
        activation=activation,
        source_format="test",
        hook_points_in=(POINT,),
        hook_points_out=(POINT,),
    )
    return LinearDictionary("d", parameters)


def derivative(model: GradientModel, tokens: Tensor, metric: Metric) -> tuple[float, float]:
    """Along a fixed direction at an early point: by the gradient, and by a central difference."""
    where = "blocks.1.hook_resid_pre"
    way = torch.randn(model.loaded.d_model, generator=torch.Generator().manual_seed(9))
    run = model.forward(tokens, read=metric.reads, differentiate=[where])
    slope = float((run.gradients(metric(run).sum())[where][0] @ way).sum())
    ends = []
    for step in (1e-3, -1e-3):
        moved = model.forward(tokens, read=metric.reads, edits={where: [lambda x, s=step: x.add_(s * way)]})
        ends.append(float(metric(moved)[0].double()))
    return slope, (ends[0] - ends[1]) / 2e-3


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_a_feature(various: GradientModel, clean: Tensor, architecture: str) -> None:
    dictionary = dictionary_of(ARCHITECTURES[architecture], various.loaded.d_model)
    x = various.forward(clean, read=[POINT]).readings[POINT][0]
    exact = dictionary.encode(x).to_dense()[4]
    n_fire = 0
    for feature in range(N_FEATURES):
        metric = FeatureValue(dictionary=dictionary, feature=feature, position=4)
        assert float(metric(various.forward(clean, read=metric.reads))[0]) == pytest.approx(
            float(exact[feature]), abs=1e-6
        )
        slope, difference = derivative(various, clean, metric)
        if exact[feature] == 0:
            assert slope == 0.0
        elif abs(float(exact[feature])) > 0.06:  # off the threshold on both sides of the difference
            assert slope == pytest.approx(difference, rel=2e-2, abs=2e-3)
            n_fire += 1
    assert n_fire >= 2


def test_a_probe_and_a_direction(various: GradientModel, clean: Tensor, corrupt: Tensor) -> None:
    d_model = various.loaded.d_model
    weights = _drawn(3, d_model, 3)
    facts = ProbeFacts(
        kind="logistic",
        task=Task.MULTI_CLASS,
        label_names=("a", "b", "c"),
        hook_points=(POINT,),
        widths=(d_model,),
        pooling=Pooling("last"),
    )
    probe = ServedProbe(facts=facts, layers=(affine(weights.numpy(), [0.1, 0.2, 0.3]),)).to("cpu")
    metric = ProbeValue(probe=probe, label="b", position=-2)
    x = various.forward(clean, read=[POINT]).readings[POINT][0, -2]
    p = torch.softmax(x @ weights + torch.tensor([0.1, 0.2, 0.3]), -1)[1]
    value = float(metric(various.forward(clean, read=metric.reads))[0])
    assert value == pytest.approx(float(torch.logit(p)), abs=1e-4)
    slope, difference = derivative(various, clean, metric)
    assert slope == pytest.approx(difference, rel=2e-2, abs=2e-3)
    line = DirectionValue(hook_point=POINT, direction=weights[:, 0], position=-2)
    slope, difference = derivative(various, clean, line)
    assert slope == pytest.approx(difference, rel=2e-2, abs=2e-3)
    nodes = node_grid(various, "hook_resid_post", n_positions=clean.shape[1], layers=[1])
    swept = [r for batch in patch_sweep(various, clean, nodes, metric, others=corrupt) for r in batch]
    assert [abs(r.effect) > 1e-4 for r in swept] == [p == clean.shape[1] - 2 for p in range(clean.shape[1])]
