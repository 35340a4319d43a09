"""What was planted is found, through the real engine; what was not is not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from glasshouse.server.engines.transformers.engine import TransformersEngine
from glasshouse.server.operations.compute_directions import DirectionsRequest, compute
from glasshouse.server.operations.examples import Example, labelling
from glasshouse.server.operations.gathering import GatherOptions
from glasshouse.server.operations.manager import Progress
from glasshouse.server.operations.train_probe import ProbeRequest, train
from glasshouse.server.probes.directions import DirectionMethod
from glasshouse.server.probes.library import ConceptLibrary
from glasshouse.server.probes.pooling import Pooling
from glasshouse.server.probes.training import ProbeSpec
from glasshouse.server.types.errors import ResourceExhausted
from glasshouse.server.types.limits import Limits

from . import planted_model

OPTIONS = GatherOptions(pooling=Pooling.LAST, held_out_share=0.25, seed=0, max_bytes=1 << 28)


@pytest.fixture(scope="module")
def planted() -> Any:
    return planted_model.load()


@pytest.fixture
async def engine(planted: Any) -> AsyncIterator[TransformersEngine]:
    made = TransformersEngine(planted, limits=Limits(), threads=1)
    await made.start()
    yield made
    await made.stop()


def wanted(engine: Any, examples: tuple[Example, ...], method: DirectionMethod) -> DirectionsRequest:
    return DirectionsRequest(
        hook_points=tuple(p for p in engine.hook_points if p.name.endswith("hook_resid_post")),
        options=OPTIONS,
        method=method,
        made_by=method.value,
        examples=examples,
        labelling=labelling(examples, must_say_positive=True),
    )


@pytest.mark.parametrize(
    "method", [DirectionMethod.DIFFERENCE_IN_MEANS, DirectionMethod.MASS_MEAN, DirectionMethod.K_MEANS]
)
async def test_the_planted_direction_is_found_after_every_layer(
    engine: TransformersEngine, method: DirectionMethod
) -> None:
    request = wanted(engine, planted_model.examples(), method)
    progress = Progress()
    found = await compute(engine, ConceptLibrary(), request, progress)
    assert len(found.direction.at) == planted_model.N_LAYERS
    for at in found.direction.at:
        assert at.vector is not None and at.held_out is not None
        cosine = at.vector @ planted_model.direction() / np.linalg.norm(at.vector)
        assert cosine >= 0.99, (at.hook_point, cosine)
        assert at.held_out.auroc.value >= 0.99
    assert progress.done == progress.total == planted_model.N_LAYERS


async def test_shuffled_labels_find_nothing(engine: TransformersEngine) -> None:
    request = wanted(engine, planted_model.examples(shuffled=True), DirectionMethod.DIFFERENCE_IN_MEANS)
    found = await compute(engine, ConceptLibrary(), request, Progress())
    for at in found.direction.at:
        assert at.held_out is not None
        auroc = at.held_out.auroc
        assert auroc.low <= 0.5 <= auroc.high, (at.hook_point, auroc)


async def test_the_control_task_of_a_probe_is_at_chance(engine: TransformersEngine) -> None:
    examples = planted_model.examples()
    request = ProbeRequest(
        hook_points=tuple(p for p in engine.hook_points if p.name == "blocks.1.hook_resid_post"),
        options=OPTIONS,
        spec=ProbeSpec(),
        examples=examples,
        labelling=labelling(examples),
    )
    found = await train(engine, ConceptLibrary(), request, Progress())
    report = found.probe.report
    assert report is not None
    assert report.columns[0].discrimination.auroc.value >= 0.99
    control = report.columns[0].control_auroc
    assert control.low <= 0.5 <= control.high and report.selectivity > 0.35
    assert found.probe.calibration_scores is not None
    assert found.probe.calibration_scores.shape == (report.split.n_train, 1)


async def test_more_activations_than_the_budget_are_refused_before_they_are_read(
    engine: TransformersEngine,
) -> None:
    request = wanted(engine, planted_model.examples(), DirectionMethod.DIFFERENCE_IN_MEANS)
    small = DirectionsRequest(
        **{**vars(request), "options": GatherOptions(**{**vars(OPTIONS), "max_bytes": 1000})}
    )
    with pytest.raises(ResourceExhausted, match="a request may take 1,000"):
        await compute(engine, ConceptLibrary(), small, Progress())
