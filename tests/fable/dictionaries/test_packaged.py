"""The packaged dictionaries: they open as the server opens them, and are what their card says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from glasshouse.fable import dictionary_names, dictionary_path, model_path
from glasshouse.fable.dictionaries.activations import encode
from glasshouse.fable.dictionaries.evaluation import PACKAGED, Measurement, held_out_texts, measure
from glasshouse.fable.dictionaries.recipes import RECIPES
from glasshouse.server.dictionaries.open import open_dictionary
from glasshouse.server.hooks.table import HookTable
from glasshouse.server.models.loading import load_model

_ALL = [recipe.name for recipe in RECIPES]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """So small a model only loses time to a second thread, the more so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def measurements() -> dict[str, Measurement]:
    """Figures on a small sample of the generator's held-out text: some 10,000 positions, 1,500 for the loss."""
    loaded = load_model(model_path(), dtype="float32", device="cpu")
    rows = encode(loaded, held_out_texts(None, 10_000, seed=1))
    paths = [dictionary_path(name) for name in _ALL]
    return {found.name: found for found in measure(HookTable(loaded), paths, rows, 1_500)}


def test_there_is_one_of_each() -> None:
    assert dictionary_names() == sorted(_ALL)
    with pytest.raises(KeyError, match="resid-post-0"):
        dictionary_path("resid-post-9")


def test_finding_them_needs_no_torch() -> None:
    code = "import sys, glasshouse.fable as f; f.dictionary_path('clt'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_they_are_small() -> None:
    assert sum(path.stat().st_size for path in PACKAGED.rglob("*") if path.is_file()) <= 25 * 2**20


@pytest.mark.parametrize("recipe", RECIPES, ids=_ALL)
def test_they_are_what_their_recipes_say(recipe: Any) -> None:
    dictionary = open_dictionary(recipe.name, dictionary_path(recipe.name))
    facts = dictionary.facts
    assert (facts.kind, facts.hook_points_in, facts.hook_points_out) == (
        recipe.kind,
        recipe.hook_points_in,
        recipe.hook_points_out,
    )
    assert (facts.d_sae, facts.model_name) == (recipe.d_sae, "fable")
    assert dictionary.first_not_finite() == ""
    norms = dictionary.decoder_norms
    torch.testing.assert_close(norms, torch.ones_like(norms), atol=5e-3, rtol=0)


def test_the_architectures_asked_for_are_there() -> None:
    found = {open_dictionary(name, dictionary_path(name)).facts.architecture for name in _ALL}
    assert {"standard", "gated", "jumprelu", "topk", "batchtopk"} <= found


@pytest.mark.parametrize("name", _ALL)
def test_they_meet_their_gates_on_unseen_text(name: str, measurements: dict[str, Measurement]) -> None:
    found = measurements[name]
    assert 9 <= found.l0 <= 44
    assert found.explained_variance >= 0.83
    assert found.loss_recovered >= 0.87
    assert found.dead < 0.25  # so few positions leave rare features silent; the card counts far more


def test_the_measurements_belong_to_these_files(measurements: dict[str, Measurement]) -> None:
    report = json.loads((PACKAGED / "measurements.json").read_text(encoding="utf-8"))
    published = {entry["name"]: entry for entry in report["dictionaries"]}
    assert sorted(published) == sorted(_ALL)
    for name, entry in published.items():
        assert entry["l0"] == pytest.approx(measurements[name].l0, rel=0.15)
        assert entry["explained_variance"] == pytest.approx(measurements[name].explained_variance, abs=0.04)
        assert entry["n_bytes"] == sum(path.stat().st_size for path in Path(dictionary_path(name)).iterdir())
        assert entry["gates_hold"]
