"""The tour's explanation says what is so."""

from __future__ import annotations

import pytest

from glasshouse.client import Model
from glasshouse.tour.explanation import N_SET, explain


def test_an_answer_is_explained_and_the_explanation_tested(model: Model) -> None:
    found = explain(model)
    carriers, circuit, voices, swap = found.carriers, found.circuit, found.voices, found.swap
    assert abs(carriers.tokens.residual) < 0.01
    assert carriers.tokens.top(1)[0][1] == "Anna"
    assert carriers.carried > carriers.change / 2
    assert circuit.faithfulness > 0.9 and circuit.completeness > 0.9
    assert len(circuit.edges) < 40
    assert len(voices.for_she) == len(voices.for_he) == N_SET
    assert min(more for _, more in voices.for_she) > 0 > max(more for _, more in voices.for_he)
    before, after = swap.sentences
    assert before.startswith(" she") and after.startswith(" he")
    assert swap.left < 0.3, "the features carry the answer"
    assert swap.left_by_control == pytest.approx(1.0, abs=0.3), "as many others do not"
    print(swap.left, swap.left_by_control)
    assert len(found.lines()) == 5
