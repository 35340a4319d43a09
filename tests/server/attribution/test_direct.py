"""Direct attribution: its parts sum to the logit, and each is what its weights write."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glasshouse.server.attribution.direct import attribute_directly, attribute_features_directly
from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument

from .dictionaries import random_dictionary

TARGETS = {5: 1.0, 9: -0.5}


def test_parts_sum_to_the_logit(model: GradientModel, clean: Tensor) -> None:
    for position in (-1, 2):
        found = attribute_directly(model, clean, TARGETS, position=position)
        logits = model.forward(clean).logits(position, capped=False)[0]
        assert found.logit == pytest.approx(float(logits[5] - 0.5 * logits[9]), abs=1e-5)
        print(model.loaded.name, found.remainder)
        assert abs(found.remainder) < 1e-4
        layers = sum(value for name, value in found.contributions.items() if name.startswith("blocks"))
        assert float(found.layers.sum()) == pytest.approx(layers, abs=1e-4)


def test_heads_neurons_and_their_biases_by_hand(model: GradientModel, clean: Tensor) -> None:
    """From the weights: z_h W_O . d where nothing stands between W_O and the stream."""
    found = attribute_directly(model, clean, TARGETS)
    state = dict(model.loaded.model.named_modules())
    if model.has("blocks.0.ln1_post.hook_normalized"):
        assert found.head_bias.abs().max() < 1e-4  # no biases, and the post-norm is frozen
        assert found.neuron_bias.abs().max() < 1e-4
        return
    for layer in range(model.n_layers):
        for point, parts, bias in (
            ("attn.hook_z", found.heads[layer], found.head_bias[layer]),
            ("mlp.hook_post", found.neurons[layer], found.neuron_bias[layer]),
        ):
            name = f"blocks.{layer}.{point}"
            tap = model.table.tap(name)
            module = state[tap.path]
            x = model.forward(clean, read=[name]).readings[name][0, -1]
            with torch.no_grad():
                nothing = module(torch.zeros_like(x)[None])[0]
                n = parts.shape[0]
                rows = torch.diag_embed(torch.ones(n)).repeat_interleave(x.numel() // n, dim=1) * x
                written = module(rows) - nothing
            torch.testing.assert_close(parts, written @ found.direction, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(bias, nothing @ found.direction, rtol=1e-4, atol=2e-4)


def test_features_bias_and_error_sum_to_the_activation(various: GradientModel, clean: Tensor) -> None:
    found = attribute_directly(various, clean, TARGETS)
    d_model = various.loaded.d_model
    for point in ("blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"):
        dictionary = random_dictionary(point, point, d_model)
        parts = attribute_features_directly(various, clean, found, dictionary)
        assert float(parts.parts.sum()) + parts.bias + parts.error == pytest.approx(parts.total, abs=1e-4)
        x = various.forward(clean, read=[point]).readings[point][0, -1:]
        dense = dictionary.encode(x).to_dense()[0]
        assert dictionary.parameters.b_dec is not None
        expected = dense * (dictionary.decoder_rows(torch.arange(dense.numel())) @ found.direction)
        torch.testing.assert_close(parts.parts, expected[parts.ids], rtol=1e-4, atol=1e-5)
        bias = float(dictionary.parameters.b_dec[0] @ found.direction)
        assert parts.bias == pytest.approx(bias, abs=1e-4)
    assert parts.total == pytest.approx(found.contributions[point], abs=1e-4)


def test_refusals(various: GradientModel, clean: Tensor) -> None:
    with pytest.raises(InvalidArgument, match="vocabulary"):
        attribute_directly(various, clean, {61: 1.0})
    found = attribute_directly(various, clean, TARGETS)
    point = "blocks.1.mlp.hook_post"
    dictionary = random_dictionary(point, point, 40)
    with pytest.raises(FailedPrecondition, match="residual stream"):
        attribute_features_directly(various, clean, found, dictionary)
