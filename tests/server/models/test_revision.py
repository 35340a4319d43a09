"""A revision changes where the weights do, and nowhere else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from glasshouse import fable
from glasshouse.server.models import revision
from glasshouse.server.models.loading import load_model, outline_model
from glasshouse.server.models.revision import revision_of


def test_of_a_folder(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(fable.model_path(), copy)
    found = revision_of(str(copy))
    assert len(found) == 64 and found == revision_of(str(fable.model_path())), "the content, not the place"
    (copy / "README.md").write_text("something else")
    assert revision_of(str(copy)) == found
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert revision_of(str(copy)) != found


@pytest.mark.parametrize("place", [0, 0.37, 1])
def test_of_a_file_too_large_to_be_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: float
) -> None:
    monkeypatch.setattr(revision, "WHOLE_FILE_BYTES", 1000)
    monkeypatch.setattr(revision, "_PIECE_BYTES", 64)
    data = bytearray(range(256)) * 256
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    found = revision_of(str(tmp_path))
    # Training moves every weight: some piece is among those that are read.
    start = int(place * (len(data) - 2048))
    data[start : start + 2048] = bytes(2048)
    file.write_bytes(data)
    assert revision_of(str(tmp_path)) != found
    file.write_bytes(data[:-1])
    assert revision_of(str(tmp_path)) != revision_of(str(fable.model_path()))


def test_of_a_hub_it_is_the_commit_and_of_nothing_it_is_empty(tmp_path: Path) -> None:
    assert revision_of(str(fable.model_path()), "abc123") == "abc123"
    assert revision_of(str(tmp_path)) == revision_of("") == revision_of("org/model") == ""


def test_of_a_model_it_is_the_same_with_and_without_its_weights() -> None:
    whole = load_model(fable.model_path(), name="fable")
    outlined = outline_model(fable.model_path(), name="fable")
    assert revision.revision_of_model(whole) == revision.revision_of_model(outlined) != ""
