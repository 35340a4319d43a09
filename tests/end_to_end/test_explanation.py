"""The tour's explanation says what is so."""

from __future__ import annotations

import pytest

from glasshouse.client import Model
from glasshouse.tour.explanation import N_FEATURES, explain


def test_an_answer_is_explained_and_the_explanation_tested(model: Model) -> None:
    found = explain(model)
    assert abs(found.tokens.residual) < 0.01
    assert {token for _, token, _ in found.tokens.top(3)} <= {" Lily", " girl"}
    assert found.heads[0].patched < -2 and found.heads[0].direct > 0
    assert len(found.features) == N_FEATURES
    assert found.circuit.faithfulness > 0.9 and found.circuit.completeness > 0.9
    assert len(found.circuit.edges) < 40
    assert found.share_without < 0.3, "the features carry the answer"
    assert found.share_control == pytest.approx(1.0, abs=0.3), "as many others do not"
    assert len(found.lines()) == 5
