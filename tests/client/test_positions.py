"""Whatever a `positions=` argument takes means one selector."""

from __future__ import annotations

import numpy as np
import pytest

from glasshouse.client import InvalidArgumentError, positions
from glasshouse.client.builders import selector
from glasshouse.client.positions import PositionsLike, as_positions


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (positions.prompt(), positions.prompt()),
        (3, positions.at([3])),
        ([0, 2], positions.at([0, 2])),
        ((np.int64(1), 4), positions.at([1, 4])),
        (np.array([5, 6]), positions.at([5, 6])),
        (np.int64(7), positions.at([7])),
        (slice(None), positions.span(0, None)),
        (slice(2, None), positions.span(2, None)),
        (slice(2, 9, 3), positions.at([2, 5, 8])),
        (range(4), positions.span(0, 4)),
        (range(0, 6, 2), positions.at([0, 2, 4])),
        (range(3, 0, -1), positions.at([3, 2, 1])),
        (range(0), positions.at([])),
    ],
    ids=str,
)
def test_forms(given: PositionsLike, meant: positions.Positions) -> None:
    assert as_positions(given) == meant


def test_none_stays_absent() -> None:
    assert as_positions(None) is None
    assert selector(None, "positions") is None


@pytest.mark.parametrize("wrong", ["prompt", 1.5, object(), ["a"], [1.5]])
def test_other_types_are_refused(wrong: PositionsLike) -> None:
    with pytest.raises(TypeError):
        as_positions(wrong)


def test_a_stepping_slice_needs_an_end() -> None:
    with pytest.raises(InvalidArgumentError, match="stop") as caught:
        as_positions(slice(0, None, 2))
    assert caught.value.field == "positions"


def test_selectors_on_the_wire() -> None:
    message = selector(positions.generated().excluding_special(), "positions")
    assert message is not None
    assert message.WhichOneof("select") == "named" and message.named == 3
    assert message.exclude_special and not message.exclude_bos
    message = selector(positions.span(2), "positions")
    assert message is not None and message.span.start == 2 and not message.span.HasField("stop")
    message = selector(positions.at([]), "positions")
    assert message is not None and message.WhichOneof("select") == "at"
    message = selector(positions.last().excluding_bos(), "positions")
    assert message is not None and message.exclude_bos


def test_a_position_beyond_64_bits_is_named() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        selector(positions.at([0, 1 << 70]), "interventions[0].positions")
    assert caught.value.field == "interventions[0].positions.at.positions[1]"
