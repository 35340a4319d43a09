"""Examples that cannot be learnt from are refused, saying why; splits keep groups whole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.server.probes import planted

from glasshouse.server.probes.directions import DirectionMethod, compute_directions
from glasshouse.server.probes.examples import LabelledActivations, Task
from glasshouse.server.probes.splitting import find_duplicates, split, split_as_given
from glasshouse.server.probes.training import train_probe
from glasshouse.server.types.errors import InvalidArgument


def broken(**changes: object) -> LabelledActivations:
    return replace(planted.examples(20), **changes)  # type: ignore[arg-type]


POINT = planted.POINTS[0]
NAN = np.ones((20, 4))
NAN[7, 2] = np.nan

CASES = {
    "one class": (
        broken(labels=np.ones(20, np.int64)),
        "ONE_CLASS_ONLY",
        "examples.labels",
        "one class only",
    ),
    "too few": (
        broken(labels=np.array([1] * 3 + [0] * 17)),
        "TOO_FEW_EXAMPLES",
        "examples.labels",
        "3 examples of 'happy', at least 4",
    ),
    "nan": (
        broken(activations={POINT: NAN}),
        "VALUE_NOT_FINITE",
        f"examples.activations[{POINT}]",
        r"\[7, 2\] is nan",
    ),
    "rows differ": (
        broken(activations={POINT: np.ones((19, 4))}),
        "WRONG_WIDTH",
        f"examples.activations[{POINT}]",
        r"shape \(19, 4\), expected \(20, width\)",
    ),
    "not rows": (
        broken(activations={POINT: np.ones(20)}),
        "WRONG_WIDTH",
        f"examples.activations[{POINT}]",
        "shape",
    ),
    "no hook point": (broken(activations={}), "FIELD_REQUIRED", "examples.activations", "no hook point"),
    "label of no class": (
        broken(labels=np.arange(20) % 3),
        "VALUE_OUT_OF_RANGE",
        "examples.labels",
        r"label \[2\] is 2, not in 0 to 1",
    ),
    "labels are not labels": (
        broken(labels=np.linspace(0, 1, 20)),
        "VALUE_MALFORMED",
        "examples.labels",
        "float64",
    ),
    "three names": (
        broken(label_names=("a", "b", "c")),
        "VALUE_MALFORMED",
        "examples.labels_names",
        "binary",
    ),
    "two classes as several": (
        broken(task=Task.MULTI_CLASS),
        "VALUE_MALFORMED",
        "examples.labels_names",
        "multi_class",
    ),
    "a label all have": (
        broken(task=Task.MULTI_LABEL, labels=np.ones((20, 2), np.int64)),
        "ONE_CLASS_ONLY",
        "examples.labels",
        "with 'sad'",
    ),
    "groups": (broken(groups=np.arange(5)), "WRONG_WIDTH", "examples.groups", "for 20 examples"),
}


@pytest.mark.parametrize("case", CASES)
def test_refusals(case: str) -> None:
    examples, reason, field, message = CASES[case]
    with pytest.raises(InvalidArgument, match=message) as caught:
        examples.check()
    assert (caught.value.reason, caught.value.field) == (reason, field)
    assert caught.value.remedy


def test_split_is_stratified_whole_in_groups_and_repeatable() -> None:
    examples = replace(planted.examples(400), groups=np.arange(400) // 4)
    one, again, other = (split(examples, held_out_share=0.3, seed=seed) for seed in (1, 1, 2))
    assert one.train.tolist() == again.train.tolist() != other.train.tolist()
    assert sorted([*one.train.tolist(), *one.held_out.tolist()]) == list(range(400))
    assert not set((one.train // 4).tolist()) & set((one.held_out // 4).tolist())
    assert len(one.held_out) == 120
    plain = split(planted.examples(400))
    assert planted.examples(400).labels[plain.held_out].mean() == 0.5


def test_split_refuses_what_leaves_a_class_out() -> None:
    with pytest.raises(InvalidArgument, match="hold one side of 'happy' only"):
        split(replace(planted.examples(20), groups=np.arange(20) % 2))
    with pytest.raises(InvalidArgument, match="not between 0 and 1"):
        split(planted.examples(20), held_out_share=1.0)


def test_a_split_of_the_callers_own_leaves_copies_out_and_says_so() -> None:
    examples = replace(planted.examples(40), groups=np.concatenate([np.arange(38), [0, 1]]))
    held_out = np.arange(40) >= 30
    found = split_as_given(examples, held_out)
    assert found.train.tolist() == list(range(30))
    assert (found.held_out.tolist(), found.n_left_out) == (list(range(30, 38)), 2)
    report = train_probe(examples, planted.POINTS[:1], sides=found).report
    assert (report.n_train, report.n_held_out) == (30, 8)
    assert report.notes == ("2 held-out examples were left out: copies of them are learnt from.",)
    directions = compute_directions(examples, DirectionMethod.DIFFERENCE_IN_MEANS, sides=found)
    assert directions.held_out[planted.POINTS[0]].n_positive == 4
    with pytest.raises(InvalidArgument, match="the 10 training examples hold one side"):
        split_as_given(replace(examples, labels=(held_out * 1).astype(np.int64)), ~held_out)
    with pytest.raises(InvalidArgument, match="for 40 examples"):
        split_as_given(examples, held_out[:9])


def test_duplicates() -> None:
    found = find_duplicates(["a", "b", "a", "c", "b"], [0, 1, 1, 0, 1])
    assert found.groups.tolist() == [0, 1, 0, 2, 1]
    assert (found.n_copies, found.conflicting) == (2, ("a",))
