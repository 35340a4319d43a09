"""The dictionaries' trainer: resuming, learning, invariants, and what is saved equals what was trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from glasshouse.fable.dictionaries.activations import ActivationStore
from glasshouse.fable.dictionaries.coder import SparseCoder
from glasshouse.fable.dictionaries.export import export
from glasshouse.fable.dictionaries.recipes import DictionaryRecipe
from glasshouse.fable.dictionaries.sparsity import Controller
from glasshouse.fable.dictionaries.training import Trainer, train
from glasshouse.server.dictionaries.open import open_dictionary

_WIDTH, _ROWS = 16, 512
_IN = tuple(f"blocks.{layer}.in" for layer in range(3))
_OUT = tuple(f"blocks.{layer}.out" for layer in range(3))
_SAE = DictionaryRecipe(
    name="sae",
    kind="sae",
    architecture="jumprelu",
    hook_points_in=_IN[:1],
    hook_points_out=_IN[:1],
    d_sae=48,
    target_l0=6.0,
    n_tokens=64 * 60,
    batch_size=64,
    lr=1e-2,
    warmup_steps=5,
)
_RECIPES = {
    **{
        architecture: dataclasses.replace(_SAE, architecture=architecture)
        for architecture in ("standard", "gated", "jumprelu", "topk", "batchtopk")
    },
    "transcoder": dataclasses.replace(
        _SAE, kind="transcoder", architecture="batchtopk", hook_points_out=_OUT[:1]
    ),
    "crosscoder": dataclasses.replace(
        _SAE, kind="crosscoder", architecture="batchtopk", hook_points_in=_IN, hook_points_out=_IN
    ),
    "clt": dataclasses.replace(
        _SAE,
        kind="cross_layer_transcoder",
        architecture="batchtopk",
        hook_points_in=_IN,
        hook_points_out=_OUT,
    ),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """So small a coder only loses time to a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Two shards of sparse combinations of 24 directions, off centre and of different lengths a hook point."""
    folder = tmp_path_factory.mktemp("activations")
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(24, 6, _WIDTH))
    for shard in range(2):
        codes = rng.exponential(size=(_ROWS, 24)) * (rng.random((_ROWS, 24)) < 0.15)
        values = np.einsum("nk,ksd->nsd", codes, directions) * np.array([1, 3, 9, 2, 6, 0.5])[:, None] + 2.0
        target = folder / f"shard-{shard:03}"
        target.mkdir()
        for site, point in enumerate((*_IN, *_OUT)):
            np.save(target / f"{point}.npy", values[:, site].astype(np.float16))
    return ActivationStore(folder=folder, n_shards=2)


@pytest.mark.parametrize("name", ["jumprelu", "clt"])
def test_an_interrupted_run_ends_with_the_same_weights(
    name: str, tmp_path: Path, store: ActivationStore
) -> None:
    recipe = _RECIPES[name]
    whole = train(recipe, store, tmp_path / "whole.pt", log=False)
    assert train(recipe, store, tmp_path / "cut.pt", stop_after=23, log=False) is None
    resumed = train(recipe, store, tmp_path / "cut.pt", log=False)
    assert whole is not None
    assert resumed is not None
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path, store: ActivationStore) -> None:
    train(_SAE, store, tmp_path / "sae.pt", stop_after=1, log=False)
    with pytest.raises(ValueError, match="another recipe"):
        train(dataclasses.replace(_SAE, lr=1e-3), store, tmp_path / "sae.pt", log=False)


@pytest.mark.parametrize("name", _RECIPES)
def test_training_explains_more_and_keeps_decoder_rows_at_unit_norm(
    name: str, store: ActivationStore
) -> None:
    trainer = Trainer(_RECIPES[name], store)
    measured = [trainer.advance() for _ in range(60)]
    first, last = (sum(m["unexplained"] for m in part) / 10 for part in (measured[:10], measured[-10:]))
    assert last < 0.6 * first
    norms = trainer.coder.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_a_cross_layer_feature_never_writes_an_earlier_layer(store: ActivationStore) -> None:
    trainer = Trainer(_RECIPES["clt"], store)
    for _ in range(20):
        trainer.advance()
    rows_LFMD = trainer.coder.W_dec.detach().view(3, 16, 3, _WIDTH)
    for source in range(3):
        assert not rows_LFMD[source, :, :source].any()
        assert rows_LFMD[source, :, source:].any(-1).all()


def test_silent_features_start_again_where_the_error_is(store: ActivationStore) -> None:
    trainer = Trainer(_RECIPES["topk"], store)
    for _ in range(10):
        trainer.advance()
    trainer.silent_steps[:] = 0
    trainer.silent_steps[4] = 1_000
    x_BSD = trainer.coder.units_in.enter(trainer._read(0, _IN[:1]))
    error_BMD = torch.zeros_like(x_BSD)
    error_BMD[7, 0, 3] = 2.0
    error_BMD += 1e-3 * torch.randn(error_BMD.shape, generator=torch.Generator().manual_seed(0))
    trainer._reset_silent(x_BSD, error_BMD)
    assert trainer.coder.W_dec[4, 3].item() == pytest.approx(1.0, abs=1e-3)
    assert not trainer.optimizer.state[trainer.coder.W_dec]["exp_avg"][4].any()
    assert not trainer.silent_steps.any()


@pytest.mark.parametrize("target", [4.0, 30.0])
def test_the_controller_finds_the_target(target: float) -> None:
    controller, l0 = Controller(target), 100.0
    for _ in range(3000):
        l0 += 0.02 * (min(200.0, 0.05 / controller.coefficient) - l0)  # follows the coefficient late
        controller.update(l0)
    assert l0 == pytest.approx(target, rel=0.1)


@pytest.mark.parametrize("name", _RECIPES)
def test_the_saved_dictionary_computes_what_was_trained(
    name: str, tmp_path: Path, store: ActivationStore
) -> None:
    recipe = _RECIPES[name]
    coder = train(recipe, store, tmp_path / "checkpoint.pt", log=False)
    assert isinstance(coder, SparseCoder)
    coder.eval()
    export(coder, tmp_path / "dictionary")
    dictionary = open_dictionary(name, tmp_path / "dictionary")
    x_BSD, y_BMD = (store.batch(1, 256, points) for points in (recipe.hook_points_in, recipe.hook_points_out))
    with torch.no_grad():
        units = coder.units_out
        trained = coder.decode(coder.sparsifier(coder.encode_linear(coder.units_in.enter(x_BSD))).features)
        expected = trained / units.scale + units.mean
    saved = dictionary.reconstruct(x_BSD if len(recipe.hook_points_in) > 1 else x_BSD[:, 0]).view(
        expected.shape
    )
    variance = (y_BMD - y_BMD.mean(0)).square().sum((0, 2))
    difference = (saved - expected).square().sum((0, 2)) / variance
    assert difference.max() < 0.005
    norms = dictionary.decoder_norms
    torch.testing.assert_close(norms, torch.ones_like(norms), atol=5e-3, rtol=0)
