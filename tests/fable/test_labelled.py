"""The labelled sets in the package are those the generator makes."""

from __future__ import annotations

import pytest

from glasshouse.fable import labelled, labelled_names
from glasshouse.fable.corpus.labelled import labelled_sets

_SETS = ["capital", "gender", "giving", "mood", "number", "opposite"]


def test_the_names_of_the_sets() -> None:
    assert labelled_names() == _SETS


def test_an_unknown_set_names_the_known_ones() -> None:
    with pytest.raises(KeyError, match="mood"):
        labelled("moods")


@pytest.mark.parametrize("name", _SETS)
def test_the_packaged_records_are_regenerated_exactly(name: str) -> None:
    assert labelled(name) == labelled_sets(0, 800)[name]


@pytest.mark.parametrize(
    ("name", "labels"),
    [("mood", {"happy", "sad"}), ("gender", {"girl", "boy"}), ("number", {"singular", "plural"})],
)
def test_labels_are_balanced_and_both_splits_are_there(name: str, labels: set[str]) -> None:
    records = labelled(name)
    assert {record["label"] for record in records} == labels
    assert {record["split"] for record in records} == {"train", "test"}
    for label in labels:
        assert 0.4 < sum(record["label"] == label for record in records) / len(records) < 0.6
    assert len({record["text"] for record in records}) == len(records)
