"""fable's directions and probes: current, as good as they claim, and what the generator meant."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from glasshouse.fable import concepts_path, model_path
from glasshouse.fable.concepts.latents import LATENTS, records
from glasshouse.fable.concepts.making import examples_of, is_current, make_direction
from glasshouse.server.engines.engine import Engine
from glasshouse.server.engines.probe_scoring import score_inputs
from glasshouse.server.engines.transformers.engine import TransformersEngine
from glasshouse.server.models.loading import load_model
from glasshouse.server.probes import built_in
from glasshouse.server.probes.saved import SavedDirection, SavedProbe
from glasshouse.server.registry.names import Kind
from glasshouse.server.types.limits import Limits

LEAST_AUROC = 0.98
NAMES = {latent.name: latent for latent in LATENTS}
PACKAGED = built_in.read(concepts_path(), "fable")


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load_model(model_path(), name="fable")


@pytest.fixture
async def engine(loaded: Any) -> AsyncIterator[Engine]:
    made = TransformersEngine(loaded, limits=Limits(), threads=1)
    await made.start()
    yield made
    await made.stop()


def direction(name: str) -> SavedDirection:
    found = PACKAGED[Kind.DIRECTION, name].saved
    assert isinstance(found, SavedDirection)
    return found


def probe(name: str) -> SavedProbe:
    found = PACKAGED[Kind.PROBE, name].saved
    assert isinstance(found, SavedProbe)
    return found


def test_what_is_packaged() -> None:
    assert {name for kind, name in PACKAGED if kind is Kind.DIRECTION} == {"mood", "gender", "number"}
    assert {name for kind, name in PACKAGED if kind is Kind.PROBE} == NAMES.keys()
    for item in PACKAGED.values():
        assert item.saved.origin.built_in and item.saved.origin.description
        assert item.record.version == 1


@pytest.mark.parametrize("name", ["mood", "gender", "number"])
def test_held_out_figures_pass_the_gate_at_the_best_layer(name: str) -> None:
    found = direction(name)
    best = next(at for at in found.at if at.hook_point == found.best)
    assert best.held_out is not None and best.held_out.auroc.value >= LEAST_AUROC
    assert found.positive_label == NAMES[name].positive and len(found.at) == 6
    assert found.split is not None and found.split.n_left_out == 0


@pytest.mark.parametrize("name", sorted(NAMES))
def test_probes_pass_the_gate_and_their_controls_do_not(name: str) -> None:
    report = probe(name).report
    assert report is not None
    assert min(column.discrimination.auroc.value for column in report.columns) >= LEAST_AUROC
    for column in report.columns:
        assert column.ece <= 0.03
        assert column.control_auroc.low <= 0.5 <= column.control_auroc.high
    chance = 1 / len(NAMES[name].labels)
    assert abs(report.control_accuracy.value - chance) < 0.12, "shuffled labels teach nothing"


@pytest.mark.parametrize("name", ["mood", "gender", "number"])
async def test_they_are_of_these_weights_and_made_again_are_the_same(engine: Engine, name: str) -> None:
    latent = NAMES[name]
    examples = examples_of(latent, engine)
    for kind in ("direction", "probe"):
        assert is_current(concepts_path() / f"{kind}-{name}.json", engine.info.revision, examples), (
            "run: python -m glasshouse.fable.concepts.making"
        )
    draft = await make_direction(latent, engine, examples)
    for index, at in enumerate(direction(name).at):
        made = draft.tensors[f"vectors.{index}"]
        assert at.vector is not None
        assert np.linalg.norm(made - at.vector) <= 1e-4 * np.linalg.norm(at.vector)


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("mood", {"sad": "The dog was sad. It cried all day.", "happy": "The dog was happy. It laughed all day."}),
        ("gender", {"girl": "Lily found a boat. Then", "boy": "Tom found a boat. Then"}),
        ("number", {"plural": "The dogs near the house", "singular": "The dog near the houses"}),
    ],
)  # fmt: skip
async def test_a_probe_reads_what_nobody_trained_it_on(
    engine: Engine, name: str, texts: dict[str, str]
) -> None:
    found = probe(name)
    assert found.served is not None
    inputs = [tuple(engine.codec.encode(text)) for text in texts.values()]
    scores = {
        done.index: float(done.scores[0, 0])
        async for done in score_inputs(engine, found.served, inputs, found.positions)
    }
    assert scores[0] > 0.9 and scores[1] < 0.1, scores


def test_the_set_of_moods_is_balanced_and_split() -> None:
    found = records(NAMES["moods"])
    labels = [record["label"] for record in found]
    assert {label: labels.count(label) for label in set(labels)} == dict.fromkeys(
        NAMES["moods"].labels, len(found) // 4
    )
    assert sum(record["split"] == "test" for record in found) == len(found) // 4
    assert len({record["text"] for record in found}) == len(found)
