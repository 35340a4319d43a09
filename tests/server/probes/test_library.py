"""The library: what is held, how much of it, and what becomes of it when others publish."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from glasshouse.server.probes import built_in
from glasshouse.server.probes.discrimination import Discrimination, Interval
from glasshouse.server.probes.json_values import from_json, to_json
from glasshouse.server.probes.library import ConceptLibrary
from glasshouse.server.probes.model_concepts import ModelConcepts
from glasshouse.server.probes.saved import (
    DirectionAt,
    Origin,
    SavedDirection,
    SavedProbe,
    direction_draft,
    probe_draft,
)
from glasshouse.server.probes.training import ProbeSpec, train_probe
from glasshouse.server.registry.names import Kind, Reference
from glasshouse.server.registry.registry import Registry
from glasshouse.server.types.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from glasshouse.server.types.selectors import NamedPositions, Selector

from . import planted

WIDTH = 16
HELD = Discrimination(
    auroc=Interval(value=0.9, low=0.8, high=1.0),
    accuracy=Interval(value=0.8, low=0.7, high=0.9),
    effect_size=float("inf"),
    n_positive=3,
    n_negative=4,
)


def direction(*points: str, value: float = 1.0, width: int = WIDTH) -> SavedDirection:
    return SavedDirection(
        method="raw",
        at=tuple(
            DirectionAt(
                hook_point=point, width=width, norm=1.0, threshold=0.5, held_out=HELD,
                vector=np.full(width, value + index),
            )
            for index, point in enumerate(points or ("blocks.0.hook_resid_post",))
        ),
        best=points[-1] if points else "blocks.0.hook_resid_post",
        positions=Selector(named=NamedPositions.LAST),
        origin=Origin(description="for tests"),
    )  # fmt: skip


def named(name: str, version: int | None = None, kind: Kind = Kind.DIRECTION) -> Reference:
    return Reference(kind=kind, model="m", name=name, version=version)


def put(library: ConceptLibrary, name: str, value: float = 1.0, **options: int) -> None:
    library.publish(
        direction_draft(direction(value=value, **options), model="m", name=name, version=None)  # type: ignore[arg-type]
    )


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    opened = Registry.at(tmp_path)
    yield opened
    opened.close()


def test_a_direction_is_kept_with_all_that_is_known_of_it(registry: Registry) -> None:
    library = ConceptLibrary(registry)
    made = direction("blocks.0.hook_resid_post", "blocks.3.hook_resid_post")
    library.publish(direction_draft(made, model="m", name="d", version=1))
    found = library.direction(named("d"))
    assert found.origin.name == "models/m/directions/d@1" and found.origin.description == "for tests"
    assert found.best == "blocks.3.hook_resid_post" and found.positions.named is NamedPositions.LAST
    for at, other in zip(found.at, made.at, strict=True):
        assert at.held_out == other.held_out and at.threshold == 0.5
        assert at.vector is not None and other.vector is not None
        assert at.vector.dtype == np.float64 and np.array_equal(at.vector, other.vector)


def test_a_probe_is_kept_with_its_report_and_what_drift_is_measured_against(registry: Registry) -> None:
    trained = train_probe(planted.examples(400), (planted.POINTS[1],), ProbeSpec())
    from glasshouse.server.probes.saved import ProbeSummary, SplitSummary

    saved = SavedProbe(
        facts=trained.probe.facts,
        calibration="platt",
        report=ProbeSummary.of(trained.report, SplitSummary(n_train=300, n_held_out=100), ("A note.",)),
        served=trained.probe,
        calibration_scores=trained.calibration_scores,
    )
    library = ConceptLibrary(registry)
    library.publish(probe_draft(saved, model="m", name="p", version=1))
    found = library.probe(named("p", kind=Kind.PROBE))
    assert found.report == saved.report and found.facts == saved.facts
    assert found.calibration_scores is not None
    assert np.array_equal(found.calibration_scores, trained.calibration_scores)
    assert library.probe(named("p", kind=Kind.PROBE)) is found, "the same version is the same object"


def test_what_is_held_is_bounded(registry: Registry) -> None:
    library = ConceptLibrary(registry, max_cache_bytes=3 * (4096 + 8 * WIDTH))
    for index in range(6):
        put(library, f"d{index}", float(index))
        library.direction(named(f"d{index}"))
    assert [library.held(named(f"d{index}", 1)) is not None for index in range(6)] == [False] * 3 + [True] * 3
    library.direction(named("d3"))
    put(library, "d6")
    library.direction(named("d6"))
    assert library.held(named("d3", 1)) is not None, "used last, dropped last"
    assert library.held(named("d4", 1)) is None


def test_a_name_means_its_latest_version_whoever_published_it(registry: Registry) -> None:
    mine, theirs = ConceptLibrary(registry), ConceptLibrary(registry)
    put(mine, "d", 1.0)
    assert theirs.direction(named("d")).origin.name.endswith("@1")
    put(mine, "d", 2.0)
    assert mine.direction(named("d")).origin.name.endswith("@2"), "seen at once by who published it"
    assert theirs.direction(named("d")).origin.name.endswith("@1"), "nobody has told it yet"
    _, records = registry.changes_since(0)
    theirs._take(records)
    assert theirs.direction(named("d")).origin.name.endswith("@2")
    mine.delete(named("d", 2))
    theirs._take(registry.changes_since(0)[1])
    assert theirs.held(named("d", 2)) is None
    assert theirs.direction(named("d")).origin.name.endswith("@1")


def test_late_news_of_a_known_version_lets_nothing_go(registry: Registry) -> None:
    library = ConceptLibrary(registry)
    put(library, "d", 1.0)
    put(library, "d", 2.0)
    library.direction(named("d"))
    _, records = registry.changes_since(0)
    library._take(records)
    assert library.held(named("d")) is not None, "it is still known which version is the latest"
    library._take(registry.delete(named("d", 1)))
    assert library.held(named("d")) is not None
    library._take(registry.delete(named("d", 2)))
    assert library.held(named("d")) is None


def test_a_change_during_a_look_up_is_not_missed(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    library = ConceptLibrary(registry)
    put(library, "d", 1.0)
    tensors = registry.tensors

    def meanwhile(record: object) -> object:
        put(library, "d", 2.0)
        monkeypatch.setattr(registry, "tensors", tensors)
        return tensors(record)  # type: ignore[arg-type]

    monkeypatch.setattr(registry, "tensors", meanwhile)
    assert library.direction(named("d")).origin.name.endswith("@1"), "what was asked for when it was asked"
    assert library.direction(named("d")).origin.name.endswith("@2")


def test_while_the_database_is_away(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    library = ConceptLibrary(registry)
    put(library, "held")
    put(library, "unread")
    library.direction(named("held"))

    def away(*_: object, **__: object) -> None:
        raise Unavailable("away", reason="REGISTRY_UNAVAILABLE")

    for method in ("get", "tensors", "publish", "delete", "list", "counter", "next_version"):
        monkeypatch.setattr(registry, method, away)
    assert library.direction(named("held")).at[0].vector is not None
    assert library.direction(named("held", 1)) is library.direction(named("held"))
    for call in (
        lambda: library.direction(named("unread")),
        lambda: put(library, "new"),
        lambda: library.delete(named("held")),
        lambda: library.check_free(Kind.DIRECTION, model="m", name="new", version=1),
    ):
        with pytest.raises(Unavailable):
            call()


async def test_an_engine_finds_them(registry: Registry) -> None:
    library = ConceptLibrary(registry)
    made = direction("blocks.0.hook_resid_post", "blocks.3.hook_resid_post")
    library.publish(direction_draft(made, model="m", name="d", version=1))
    store = ModelConcepts(library, model="m")
    held = await store.direction("d", field="f")
    assert held.hook_point == "blocks.3.hook_resid_post" and held.vector.dtype == np.float32
    assert held.at("blocks.0.hook_resid_post")[0] == 1.0
    assert held.at("blocks.3.hook_resid_post")[0] == held.at("blocks.1.hook_resid_post")[0] == 2.0
    assert await store.direction("d@1", field="f") is held, "made once, as long as it is held"
    with pytest.raises(FailedPrecondition, match="the request is for m"):
        await store.direction("models/other/directions/d", field="f")
    with pytest.raises(NotFound) as missing:
        await store.direction("e", field="f")
    assert missing.value.field == "f"
    with pytest.raises(InvalidArgument):
        await store.probe("models/m/directions/d", field="f")


def test_what_comes_with_a_model(registry: Registry, tmp_path: Path) -> None:
    folder = tmp_path / "built-in"
    draft = direction_draft(direction(), model="m", name="joy", version=1)
    built_in.write(draft, folder, datetime(2026, 1, 1, tzinfo=UTC))
    library = ConceptLibrary(registry)
    library.add_built_in(folder, "m")
    found = library.direction(named("joy"))
    assert found.origin.built_in and found is library.direction(named("joy", 1))
    assert [each.origin.name for each in library.built_in(Kind.DIRECTION, model="m")] == [
        "models/m/directions/joy@1"
    ]
    assert not library.built_in(Kind.DIRECTION, model="other") and not library.built_in(Kind.PROBE, model="m")
    with pytest.raises(AlreadyExists):
        library.publish(draft)
    with pytest.raises(FailedPrecondition):
        library.delete(named("joy"))
    with pytest.raises(NotFound) as missing:
        library.direction(named("joys"))
    assert "joy" in missing.value.closest
    with pytest.raises(FailedPrecondition, match="no registry"):
        ConceptLibrary().direction(named("joy"))


def test_json_of_values() -> None:
    body = to_json(HELD)
    assert body["effect_size"] == "inf" and from_json(Discrimination, body) == HELD
    with pytest.raises((TypeError, KeyError, ValueError)):
        from_json(Discrimination, {"auroc": 3})


def test_a_record_that_cannot_be_read_says_so(registry: Registry) -> None:
    library = ConceptLibrary(registry)
    draft = direction_draft(direction(), model="m", name="d", version=1)
    from dataclasses import replace

    for index, body in enumerate(({**draft.body, "format": 9}, {**draft.body, "best": "elsewhere"}, {})):
        library.publish(replace(draft, name=f"d{index}", body=body))
        with pytest.raises(FailedPrecondition, match="cannot be read"):
            library.direction(named(f"d{index}"))
