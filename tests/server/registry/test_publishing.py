"""Publishing and finding again, on both databases: versions, immutability, names, pages, deletion, sweeping."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import exc, text
from tests.server.registry import drafts

from glasshouse.server.registry.names import Kind, Reference, parse
from glasshouse.server.registry.records import Draft, FeatureLabel, Provenance
from glasshouse.server.registry.registry import Registry
from glasshouse.server.types.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound

MOOD = Reference(kind=Kind.DIRECTION, model="fable", name="mood")


def test_what_is_published_is_found_again(registry: Registry, open_registry: Callable[[], Registry]) -> None:
    draft = drafts.direction()
    published = registry.publish(draft)
    assert str(published.reference) == "models/fable/directions/mood@1"
    for reader in (registry, open_registry()):
        found = reader.get(MOOD)
        assert found.provenance == drafts.PROVENANCE
        assert found.body == draft.body
        assert found.content_hash == published.content_hash
        np.testing.assert_array_equal(reader.tensors(found)["vector"], draft.tensors["vector"])
        assert abs(found.created.timestamp() - published.created.timestamp()) < 1e-3
        assert found.deleted is None


def test_versions(registry: Registry) -> None:
    registry.publish(drafts.direction())
    with pytest.raises(AlreadyExists) as caught:
        registry.publish(drafts.direction(seed=1))
    assert (caught.value.reason, caught.value.metadata["next_version"]) == ("NAME_TAKEN", "2")
    assert registry.publish(drafts.direction(seed=1, version=2)).version == 2
    assert registry.publish(drafts.direction(seed=2, version=None)).version == 3
    with pytest.raises(InvalidArgument, match="would leave a gap: the next is 4"):
        registry.publish(drafts.direction(version=9))
    assert registry.get(MOOD).version == 3
    assert registry.get(replace(MOOD, version=1)).version == 1
    # Another model, another kind: another name.
    assert registry.publish(drafts.direction(model="other")).version == 1
    assert registry.publish(drafts.probe()).version == 1


def test_publishing_the_same_again_is_answered_with_what_is_there(registry: Registry) -> None:
    once, again = registry.publish(drafts.direction()), registry.publish(drafts.direction())
    assert once == again or once.id == again.id
    assert len(registry.list(Kind.DIRECTION, every_version=True).records) == 1


def test_what_is_published_does_not_change(registry: Registry) -> None:
    registry.publish(drafts.direction())
    for statement in (
        "UPDATE entries SET body = '{}'",
        "UPDATE entries SET version = 7",
        "DELETE FROM entries",
    ):
        with (
            pytest.raises(exc.DBAPIError, match="does not change"),
            registry._database.writing() as connection,
        ):
            connection.execute(text(statement))
    assert registry.get(MOOD).body["threshold"] == 0.5
    labels = (FeatureLabel(feature=1, label="cats"),)
    registry.publish(Draft(kind=Kind.FEATURE_LABELS, model="fable", name="auto", labels=labels))
    with pytest.raises(exc.DBAPIError, match="does not change"), registry._database.writing() as connection:
        connection.execute(text("UPDATE feature_labels SET label = 'dogs'"))


def test_deletion(registry: Registry) -> None:
    for version in (1, 2):
        registry.publish(drafts.direction(seed=version, version=version))
    (gone,) = registry.delete(replace(MOOD, version=2))
    assert gone.deleted is not None
    assert registry.get(MOOD).version == 1
    with pytest.raises(NotFound) as caught:
        registry.get(replace(MOOD, version=2))
    assert caught.value.closest == ("mood@1",)
    # A version is never used twice.
    with pytest.raises(AlreadyExists):
        registry.publish(drafts.direction(seed=2, version=2))
    assert registry.publish(drafts.direction(seed=3, version=None)).version == 3
    assert [record.version for record in registry.delete(MOOD)] == [1, 3]
    assert registry.list(Kind.DIRECTION).records == ()
    with pytest.raises(NotFound):
        registry.delete(MOOD)


def test_what_is_used_stays(registry: Registry) -> None:
    used = registry.publish(drafts.probe()).reference
    monitor = Draft(kind=Kind.MONITOR, model="fable", name="watch", uses=(used, replace(used, version=None)))
    watching = registry.publish(monitor)
    assert [r.reference for r in registry.used_by(registry.get(used))] == [watching.reference]
    with pytest.raises(FailedPrecondition, match="is used by models/fable/monitors/watch@1") as caught:
        registry.delete(used)
    assert caught.value.reason == "IN_USE"
    registry.delete(watching.reference)
    registry.delete(used)
    with pytest.raises(NotFound) as missing:
        registry.publish(replace(monitor, version=None))
    assert missing.value.field == "uses"


def test_feature_labels(registry: Registry) -> None:
    labels = tuple(
        FeatureLabel(feature=i, label=f"label {i}", score=i / 10 if i % 2 else None) for i in range(30)
    )
    draft = Draft(kind=Kind.FEATURE_LABELS, model="fable", name="auto", subject="resid-post-3", labels=labels)
    record = registry.publish(draft)
    assert registry.labels(record, limit=10) == labels[:10]
    assert registry.labels(record, after=9) == labels[10:]
    assert registry.labels(record, features=(3, 28, 99)) == (labels[3], labels[28])
    assert registry.list(Kind.FEATURE_LABELS, subject="resid-post-3").records[0].id == record.id
    assert registry.list(Kind.FEATURE_LABELS, subject="resid-post-4").records == ()
    assert registry.tensors(record) == {}
    registry.delete(record.reference)
    registry.sweep()
    assert registry.labels(record) == ()


def test_pages(registry: Registry) -> None:
    names = ["Zeta", "a.b", "a_b", "alpha", "alpha-2", "beta"]
    for index, name in enumerate(names[::-1]):
        registry.publish(drafts.direction(name, seed=index))
    registry.publish(drafts.direction("alpha", seed=9, version=2))
    registry.publish(drafts.direction("alpha", model="other"))
    seen, token = [], ""
    while True:
        page = registry.list(Kind.DIRECTION, model="fable", page_size=4, page_token=token)
        seen += [(record.reference.name, record.version) for record in page.records]
        token = page.next_page_token
        if not token:
            break
        # Published meanwhile, before the place reached: nothing appears twice.
        registry.publish(drafts.direction("AAA", version=None, seed=len(seen)))
    assert seen == [(name, 2 if name == "alpha" else 1) for name in names]
    by_prefix = registry.list(Kind.DIRECTION, model="fable", name_prefix="alpha", every_version=True).records
    assert [(r.reference.name, r.version) for r in by_prefix] == [("alpha", 1), ("alpha", 2), ("alpha-2", 1)]
    assert len(registry.list(Kind.DIRECTION, page_size=10**9).records) == 8
    with pytest.raises(InvalidArgument, match="page_size -1"):
        registry.list(Kind.DIRECTION, page_size=-1)
    token = registry.list(Kind.DIRECTION, page_size=1).next_page_token
    for kind, wrong in ((Kind.PROBE, token), (Kind.DIRECTION, "x"), (Kind.DIRECTION, token[:-4])):
        with pytest.raises(InvalidArgument, match="page_token"):
            registry.list(kind, page_token=wrong)


def test_sweep_takes_orphans_only(registry: Registry, blobs: str) -> None:
    kept = registry.publish(drafts.direction())
    gone = registry.publish(drafts.direction("other", seed=5))
    shared = registry.publish(drafts.direction("third", seed=0))
    registry.delete(gone.reference)
    registry.delete(shared.reference)
    orphan = registry._blobs.put(b"never named")
    half = Path(blobs) / "ab" / ("ab" * 32 + ".safetensors.writing-1")
    half.parent.mkdir(exist_ok=True)
    half.write_bytes(b"half")
    (Path(blobs) / "README").write_text("not ours")
    assert registry.sweep() == 0
    assert registry.sweep(grace_s=-1) == 3
    assert registry.sweep(grace_s=-1) == 0
    assert registry.tensors(kept).keys() == {"vector"}
    assert not registry._blobs.holds(orphan)
    assert (Path(blobs) / "README").exists()


def test_damaged_and_missing_blobs_are_refused(registry: Registry, blobs: str) -> None:
    record = registry.publish(drafts.direction())
    path = Path(blobs) / record.blob[:2] / f"{record.blob}.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(FailedPrecondition, match="is not what was written") as caught:
        registry.tensors(record)
    assert caught.value.reason == "BLOB_DAMAGED"
    path.unlink()
    with pytest.raises(FailedPrecondition, match="is missing"):
        registry.tensors(record)


def test_an_object_store_by_url(url: str) -> None:
    registry = Registry.open(url, f"memory://blobs-{abs(hash(url))}")
    record = registry.publish(drafts.direction())
    np.testing.assert_array_equal(registry.tensors(record)["vector"], drafts.direction().tensors["vector"])
    registry.delete(record.reference)
    assert registry.sweep(grace_s=-1) == 1
    registry.close()


BAD_DRAFTS = {
    "name": ({"name": "no/slash"}, "name", "is not a name"),
    "empty name": ({"name": ""}, "name", "is not a name"),
    "long name": ({"name": "x" * 101}, "name", "is not a name"),
    "model": ({"model": "a/b"}, "model", "is not the name of a model"),
    "version": ({"version": 0}, "version", "is not 1 or more"),
    "metric": (
        {"provenance": Provenance(metrics={"auroc": math.nan})},
        "provenance.metrics[auroc]",
        "holds nan",
    ),
    "body": ({"body": {"x": math.inf}}, "body", "is not JSON"),
    "object": ({"body": {"x": object()}}, "body", "is not JSON"),
    "nul": ({"body": {"x": "\x00"}}, "body", "holds a NUL"),
    "tensor": ({"tensors": {"v": np.array([1.0, np.nan])}}, "tensors[v]", "holds nan"),
    "dtype": ({"tensors": {"v": np.array(["a"])}}, "tensors[v]", "is not a dtype"),
    "labels": ({"labels": (FeatureLabel(feature=1, label="x"),)}, "labels", "do not belong"),
    "label twice": (
        {"kind": Kind.FEATURE_LABELS, "labels": (FeatureLabel(feature=1, label="x"),) * 2},
        "labels[1].feature",
        "labelled twice",
    ),
}


@pytest.mark.parametrize("case", BAD_DRAFTS)
def test_bad_drafts(case: str) -> None:
    changes, field, message = BAD_DRAFTS[case]
    with pytest.raises(InvalidArgument, match=message) as caught:
        drafts.direction(**changes).check()
    assert caught.value.field == field
    assert caught.value.remedy


def test_names() -> None:
    def read(name: str) -> Reference:
        return parse(name, kind=Kind.PROBE, model="fable")

    assert read("mood") == Reference(kind=Kind.PROBE, model="fable", name="mood")
    assert read("mood@3").version == 3
    whole = read("models/tiny/probes/mood.v2@12")
    assert (whole.model, whole.name, whole.version) == ("tiny", "mood.v2", 12)
    assert read(str(whole)) == whole
    for wrong in (
        "mood@",
        "mood@0",
        "mood@01",
        "mood@x",
        "@1",
        "models/fable/directions/mood",
        "models/fable/probes",
        ".a",
    ):
        with pytest.raises(InvalidArgument):
            read(wrong)
