"""The trainer: a run cut in two equals the run in one piece."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from glasshouse.fable.dataset import PackedCorpus
from glasshouse.fable.muon import orthogonalised
from glasshouse.fable.training import Recipe, train

_TINY = Recipe(
    d_model=32,
    d_ff=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    context_length=32,
    batch_size=4,
    total_steps=8,
    warmup_steps=2,
)


@pytest.fixture
def corpus() -> PackedCorpus:
    return PackedCorpus(tokens=np.random.default_rng(0).integers(0, 4096, 2000, dtype=np.uint16))


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path, corpus: PackedCorpus) -> None:
    whole = train(_TINY, corpus, tmp_path / "whole.pt")
    assert train(_TINY, corpus, tmp_path / "cut.pt", stop_after=3) is None
    resumed = train(_TINY, corpus, tmp_path / "cut.pt")
    assert whole is not None
    assert resumed is not None
    for (name, one), (_, other) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_batches_depend_on_the_step_alone_and_go_round(corpus: PackedCorpus) -> None:
    rows = len(corpus.tokens) // 32
    assert torch.equal(corpus.batch(3, 4, 32), corpus.batch(3, 4, 32))
    assert torch.equal(corpus.batch(0, 1, 32), corpus.batch(rows, 1, 32))
    assert corpus.batch(0, 4, 32).flatten().tolist() == corpus.tokens[:128].tolist()


def test_the_rate_warms_up_stays_and_falls_to_zero() -> None:
    recipe = Recipe(total_steps=1000, warmup_steps=10, decay_fraction=0.2)
    assert recipe.rate(0) == pytest.approx(0.1)
    assert recipe.rate(10) == recipe.rate(799) == 1.0
    assert recipe.rate(900) == pytest.approx(0.5)
    assert recipe.rate(1000) == 0.0


def test_the_stable_phase_does_not_depend_on_the_budget() -> None:
    short, long = Recipe(total_steps=1000), Recipe(total_steps=2000)
    assert [short.rate(step) for step in range(600)] == [long.rate(step) for step in range(600)]


@pytest.mark.parametrize("shape", [(3, 16, 48), (2, 48, 16), (1, 24, 24)])
def test_orthogonalised_pushes_singular_values_towards_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    update = orthogonalised(matrices)
    assert update.shape == matrices.shape
    values = torch.linalg.svdvals(update)
    assert float(values.min()) > 0.3
    assert float(values.max()) < 1.4
