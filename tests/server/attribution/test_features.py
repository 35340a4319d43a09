"""Feature attribution is complete and exact where it must be; connections are decoder . encoder."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glasshouse.server.attribution.connections import incoming, outgoing
from glasshouse.server.attribution.feature_attribution import attribute_features
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.metrics import DirectionValue, LogitDifference
from glasshouse.server.types.errors import FailedPrecondition, NotFound

from .conftest import load
from .dictionaries import N_FEATURES, random_clt, random_dictionary
from .test_graphs import transcoders_for

METRIC = LogitDifference(targets=(5,), foils=(9,))
POINT = "blocks.1.hook_resid_post"


def test_features_and_errors_sum_to_the_change(
    various: GradientModel, clean: Tensor, corrupt: Tensor
) -> None:
    """Against another input, integrated gradients; the residual falls with steps."""
    dictionary = random_dictionary(POINT, POINT, various.loaded.d_model)
    residuals = []
    for steps in (2, 128):
        found = attribute_features(various, clean, dictionary, METRIC, steps=steps, baseline_T=corrupt)
        residuals.append(abs(found.residual))
    assert residuals[1] < 2e-3 and residuals[1] < residuals[0]
    assert found.value == pytest.approx(METRIC(various.forward(clean)).item(), abs=1e-4)
    assert found.baseline_value == pytest.approx(METRIC(various.forward(corrupt)).item(), abs=1e-4)


@pytest.mark.parametrize("steps", [0, 10])
def test_a_linear_metric_gives_each_feature_what_it_writes(
    various: GradientModel, clean: Tensor, steps: int
) -> None:
    d_model = various.loaded.d_model
    dictionary = random_dictionary(POINT, POINT, d_model)
    direction = torch.randn(d_model, generator=torch.Generator().manual_seed(0))
    metric = DirectionValue(hook_point=POINT, direction=direction, position=3)
    found = attribute_features(various, clean, dictionary, metric, steps=steps)
    x = various.forward(clean, read=[POINT]).readings[POINT][0]
    fired = dictionary.encode(x).to_dense()
    expected = torch.zeros_like(fired)
    expected[3] = fired[3] * (dictionary.decoder_rows(torch.arange(N_FEATURES)) @ direction)
    torch.testing.assert_close(found.features.to_dense(), expected, rtol=1e-4, atol=1e-5)
    error = (x - dictionary.reconstruct(x))[3] @ direction
    torch.testing.assert_close(found.errors[3], error, rtol=1e-4, atol=1e-5)
    assert abs(found.residual) < 1e-4
    assert dictionary.parameters.b_dec is not None
    assert found.baseline_value == pytest.approx(float(dictionary.parameters.b_dec[0] @ direction), abs=1e-4)


def test_several_outputs_are_refused(clean: Tensor) -> None:
    model = GradientModel(load("llama"))
    points = ("blocks.0.ln2.hook_out", "blocks.1.ln2.hook_out")
    clt = random_clt(points, ("blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"), model.loaded.d_model)
    with pytest.raises(FailedPrecondition, match="2 hook points"):
        attribute_features(model, clean, clt, METRIC)


@pytest.mark.parametrize("kind", ["per_layer", "clt"])
def test_connections_are_decoder_times_encoder(kind: str) -> None:
    model = GradientModel(load("llama"))
    transcoders = transcoders_for(model, kind)

    def weight(source: tuple[int, int], target: tuple[int, int]) -> float:
        s, t = (transcoders.named(layer, torch.tensor([index])) for layer, index in (source, target))
        rows = [rows[0] for layer, (_, rows) in transcoders.decoder_rows(s).items() if layer < target[0]]
        return float(torch.stack(rows).sum(0) @ transcoders.encoder_rows(t)[0])

    into = incoming(transcoders, 2, 4, top=5)
    every = sorted(
        (abs(weight((layer, index), (2, 4))) for layer in (0, 1) for index in range(N_FEATURES)), reverse=True
    )
    assert [abs(c.weight) for c in into] == pytest.approx(every[:5], rel=1e-4)
    assert into[0].weight == pytest.approx(weight((into[0].layer, into[0].index), (2, 4)), rel=1e-4)
    out = outgoing(transcoders, 0, 4, top=5)
    every = sorted(
        (abs(weight((0, 4), (layer, index))) for layer in (1, 2) for index in range(N_FEATURES)), reverse=True
    )
    assert [abs(c.weight) for c in out] == pytest.approx(every[:5], rel=1e-4)
    assert incoming(transcoders, 0, 4) == [] and outgoing(transcoders, 2, 4) == []
    with pytest.raises(NotFound, match="no feature 99"):
        incoming(transcoders, 2, 99)
