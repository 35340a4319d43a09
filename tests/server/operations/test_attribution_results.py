"""Stored results: whole or not there, found again, expired, bounded."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from glasshouse.server.operations.attribution.results import ResultStore
from glasshouse.server.types.configuration import AttributionSettings
from glasshouse.server.types.errors import InvalidArgument, NotFound, ResourceExhausted

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2], dtype=torch.int32)}


def store(folder: Path | str, **settings: float) -> ResultStore:
    return ResultStore(AttributionSettings(folder=str(folder), **settings))  # type: ignore[arg-type]


def test_a_result_is_found_again_by_the_next_server(tmp_path: Path) -> None:
    put = store(tmp_path).put("attributionGraphs", {"title": "x"}, TENSORS)
    again = store(tmp_path)
    assert again.get(put.name).facts == {"title": "x"}
    assert again.get(put.name).expires_s == put.expires_s
    for name, tensor in again.tensors(put.name).items():
        assert torch.equal(tensor, TENSORS[name])
    assert again.update(put.name, {"title": "y"}).created_s == put.created_s
    assert store(tmp_path).get(put.name).facts == {"title": "y"}


def test_half_a_result_is_no_result(tmp_path: Path) -> None:
    first = store(tmp_path)
    kept, halved, damaged = (first.put("circuits", {"n": n}, TENSORS) for n in range(3))
    (tmp_path / f"{halved.name}.json").unlink()
    (tmp_path / f"{damaged.name}.json").write_text("{")
    (tmp_path / "circuits" / "notes.txt").write_text("not ours")
    again = store(tmp_path)
    assert [result.name for result in again.all("circuits")] == [kept.name]
    assert not (tmp_path / f"{halved.name}.safetensors").exists()
    assert (tmp_path / "circuits" / "notes.txt").exists()


def test_results_expire(tmp_path: Path) -> None:
    results = store(tmp_path, keep_s=0.2)
    name = results.put("circuits", {}, {}).name
    assert json.loads((tmp_path / f"{name}.json").read_text())["facts"] == {}
    time.sleep(0.25)
    with pytest.raises(NotFound):
        results.get(name)
    assert list((tmp_path / "circuits").iterdir()) == []


def test_room_is_checked_beforehand(tmp_path: Path) -> None:
    results = store(tmp_path, max_stored_bytes=2000)
    results.put("circuits", {}, {"a": torch.zeros(256)})
    with pytest.raises(ResourceExhausted) as caught:
        results.put("circuits", {}, {"a": torch.zeros(256)})
    assert caught.value.metadata["setting"] == "attribution.max_stored_bytes"
    assert len(list((tmp_path / "circuits").glob("*.safetensors"))) == 1


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("", InvalidArgument),
        ("circuits", InvalidArgument),
        ("elsewhere/1", InvalidArgument),
        ("circuits/../../x", NotFound),
        ("circuits/" + "f" * 32, NotFound),
    ],
)
def test_names_that_are_none(tmp_path: Path, name: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        store(tmp_path).get(name)


def test_a_store_without_a_folder_leaves_nothing() -> None:
    results = store("")
    name = results.put("circuits", {}, TENSORS).name
    folder = results._path(name, "json").parent.parent
    assert folder.exists()
    results.close()
    assert not folder.exists()
