"""The figures mean what the card says: a perfect dictionary recovers the whole loss, an empty one none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glasshouse.fable import model_path
from glasshouse.fable.dictionaries.activations import encode, harvest
from glasshouse.fable.dictionaries.evaluation import held_out_texts
from glasshouse.fable.dictionaries.fit import Fit
from glasshouse.fable.dictionaries.latents import area_under_curve
from glasshouse.fable.dictionaries.splicing import LossMeter
from glasshouse.server.dictionaries.dictionary import Dictionary
from glasshouse.server.dictionaries.formats.glasshouse import Recipe, save_dictionary
from glasshouse.server.dictionaries.open import open_dictionary
from glasshouse.server.hooks.table import HookTable
from glasshouse.server.models.loading import load_model

_STREAMS = tuple(f"blocks.{layer}.hook_resid_post" for layer in range(6))
_MLP_IN = tuple(f"blocks.{layer}.ln2.hook_out" for layer in range(6))
_MLP_OUT = tuple(f"blocks.{layer}.hook_mlp_out" for layer in range(6))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def table() -> HookTable:
    return HookTable(load_model(model_path(), dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def rows(table: HookTable) -> list[list[int]]:
    return encode(table.loaded, held_out_texts(None, 800, seed=2))


def _identity(width: int) -> tuple[Tensor, Tensor]:
    """W_enc and W_dec (2 D, D) whose ReLU features are the positive and the negative parts of x."""
    both = torch.cat([torch.eye(width), -torch.eye(width)])
    return both, both.clone()


def _save(path: Path, **what: object) -> Dictionary:
    save_dictionary(Recipe(architecture="standard", **what), path)  # type: ignore[arg-type]
    return open_dictionary("test", path)


def test_a_perfect_sae_recovers_all_the_loss_and_an_empty_one_little(
    tmp_path: Path, table: HookTable, rows: list[list[int]]
) -> None:
    width = table.loaded.d_model
    W_enc, W_dec = _identity(width)
    sae = {"kind": "sae", "hook_points_in": _STREAMS[2:3], "hook_points_out": _STREAMS[2:3]}
    biases = {"b_enc": torch.zeros(2 * width), "b_dec": torch.zeros(width)}
    perfect = _save(tmp_path / "perfect", **sae, tensors={"W_enc": W_enc, "W_dec": W_dec, **biases})
    empty = _save(tmp_path / "empty", **sae, tensors={"W_enc": W_enc, "W_dec": 0 * W_dec, **biases})
    meter = LossMeter(table, rows)
    assert meter.measure(perfect).recovered == pytest.approx(1.0, abs=1e-4)
    assert meter.measure(empty).recovered < 0.3  # BOS keeps its stream, so not quite zero


def test_a_perfect_crosscoder_recovers_all_the_loss_at_every_layer(
    tmp_path: Path, table: HookTable, rows: list[list[int]]
) -> None:
    width = table.loaded.d_model
    W = torch.zeros(6, 2 * width, 6, width)
    for layer in range(6):
        W[layer, :, layer] = _identity(width)[0]
    W = W.flatten(0, 1)
    tensors = {"W_enc": W, "W_dec": W.clone(), "b_enc": torch.zeros(len(W)), "b_dec": torch.zeros(6, width)}
    crosscoder = _save(
        tmp_path, kind="crosscoder", hook_points_in=_STREAMS, hook_points_out=_STREAMS, tensors=tensors
    )
    losses = LossMeter(table, rows[:3]).measure(crosscoder)
    assert losses.recovered_each == pytest.approx([1.0] * 6, abs=1e-4)


def test_a_cross_layer_transcoder_replaces_every_mlp(
    tmp_path: Path, table: HookTable, rows: list[list[int]]
) -> None:
    """Features that write nothing and a bias of zero are the model without MLPs (but for BOS)."""
    width = table.loaded.d_model
    tensors = {"b_dec": torch.zeros(6, width)}
    for layer in range(6):
        tensors |= {
            f"W_enc.{layer}": torch.ones(2, width),
            f"b_enc.{layer}": torch.zeros(2),
            f"W_dec.{layer}": torch.zeros(2, 6 - layer, width),
        }
    clt = _save(
        tmp_path,
        kind="cross_layer_transcoder",
        hook_points_in=_MLP_IN,
        hook_points_out=_MLP_OUT,
        tensors=tensors,
    )
    losses = LossMeter(table, rows).measure(clt)
    assert losses.clean < 2.5 < losses.spliced[0]
    assert losses.recovered < 0.3


def test_the_sums_are_the_formulas(tmp_path: Path, table: HookTable, rows: list[list[int]]) -> None:
    width = table.loaded.d_model
    x_ND = harvest(table, rows, _STREAMS[1:2])[_STREAMS[1]]
    assert len(x_ND) == sum(len(row) - 1 for row in rows)
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(64, width, generator=generator) / width
    sae = _save(
        tmp_path,
        kind="sae",
        hook_points_in=_STREAMS[1:2],
        hook_points_out=_STREAMS[1:2],
        tensors={"W_enc": W, "W_dec": W.clone(), "b_enc": torch.full((64,), -8.0), "b_dec": x_ND.mean(0)},
    )
    fit = Fit(dictionary=sae)
    for part in x_ND.split(100):
        fit.add(part, part)
    features_NF = torch.relu(x_ND @ W.T - 8.0)
    made_ND = features_NF @ W + x_ND.mean(0)
    fvu = (x_ND - made_ND).square().sum() / (x_ND - x_ND.mean(0)).square().sum()
    assert fit.l0 == pytest.approx(float((features_NF > 0).sum(1).float().mean()), rel=1e-3)
    assert fit.dead == pytest.approx(float((features_NF == 0).all(0).float().mean()), abs=0.02)
    assert fit.explained_variance == pytest.approx(1 - float(fvu), abs=1e-4)
    assert fit.shrinkage == pytest.approx(float(made_ND.square().sum() / (made_ND * x_ND).sum()), rel=1e-4)


def test_the_area_under_the_curve_counts_pairs_and_halves_ties() -> None:
    values_NF = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0], [5.0, 0.0]])
    positive_N = torch.tensor([False, True, False, True])
    assert area_under_curve(values_NF, positive_N).tolist() == pytest.approx([0.75, 0.25])
