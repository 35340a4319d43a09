"""Features as values: rows by position, dense, joined, the strongest; and as edits and readouts on the wire."""

from __future__ import annotations

import numpy as np
import pytest

from glasshouse.client import (
    Client,
    FeatureActivations,
    FeatureRows,
    InvalidArgumentError,
    Model,
    NotFoundError,
    ablate_feature,
    builders,
    generated,
    prompt,
    read_features,
    scale_feature,
    set_feature,
)
from glasshouse.client.features import rows_of
from glasshouse.client.parsers import feature_rows
from glasshouse.client.testing import FakeServer
from glasshouse.v1 import readouts_pb2

SAE = "resid-post-1"
HOOK = "blocks.1.hook_resid_post"


def at(*pairs: tuple[int, float]) -> FeatureActivations:
    ids, values = zip(*pairs) if pairs else ((), ())
    return FeatureActivations(np.array(ids, dtype=np.int32), np.array(values, dtype=np.float32))


@pytest.fixture
def rows() -> FeatureRows:
    return rows_of({1: at((5, 2.0), (3, 4.0)), 4: at(), 6: at((3, -9.0), (0, 1.0))})


def test_one_position() -> None:
    here = at((5, 2.0), (3, 4.0), (9, -7.0), (1, 4.0))
    assert list(here)[:2] == [(5, 2.0), (3, 4.0)] and len(here) == 4
    assert list(here.top(3)) == [(9, -7.0), (1, 4.0), (3, 4.0)], "by magnitude, then by id"
    assert (here.get(3), here.get(4), here.get(4, -1)) == (4.0, 0.0, -1)
    assert list(here.joined(at((3, 8.0), (2, 1.0)))) == [*here, (2, 1.0)]
    assert repr(at((5, 2.0))) == "FeatureActivations(5: 2)"
    assert repr(at(*((i, 1.0) for i in range(10)))).endswith("7: 1, and 2 more)")


def test_several_positions(rows: FeatureRows) -> None:
    assert rows.indptr.tolist() == [0, 2, 2, 4] and len(rows) == 3
    assert list(rows.row(6)) == [(3, -9.0), (0, 1.0)] and list(rows.row(4)) == []
    for missing in (0, 5, 7):
        with pytest.raises(KeyError):
            rows.row(missing)
    assert [position for position, _ in rows] == rows.positions.tolist() == [1, 4, 6]
    dense = rows.dense(8)
    assert dense.shape == (3, 8) and dense[0, 3] == 4 and dense[2, 3] == -9 and dense.sum() == -2
    with pytest.raises(ValueError, match="feature 5"):
        rows.dense(5)
    assert rows.column(3).tolist() == dense[:, 3].tolist() and not rows.column(7).any()
    assert list(rows.strongest(2)) == [(3, -9.0), (5, 2.0)]


def test_rows_join_by_position(rows: FeatureRows) -> None:
    joined = rows.joined(rows_of({2: at((7, 1.0)), 6: at((3, 5.0), (8, 2.0))}))
    assert joined.positions.tolist() == [1, 2, 4, 6]
    assert list(joined.row(6)) == [(3, -9.0), (0, 1.0), (8, 2.0)]
    assert rows_of({}).dense(3).shape == (0, 3)


@pytest.mark.parametrize("indptr", [[], [1, 2], [0, 1], [0, 2, 1, 2]], ids=str)
def test_damaged_rows_are_refused(indptr: list[int]) -> None:
    message = readouts_pb2.FeatureRows(indptr=indptr, feature_ids=[1, 2], activations=[1, 2])
    with pytest.raises(Exception, match="do not hold together"):
        feature_rows(message)


def test_edits_on_the_wire(model: Model) -> None:
    sae = model.dictionary(SAE)
    build = builders.intervention
    edit = build(set_feature(sae, 7, 2.5, positions=prompt()), "interventions[0]")
    assert edit.hook_point == "" and edit.HasField("positions")
    assert edit.set_features.dictionary == f"models/fake/dictionaries/{SAE}"
    assert (list(edit.set_features.features), list(edit.set_features.values)) == ([7], [2.5])
    several = build(
        scale_feature(SAE, np.array([1, 2]), np.array([0.5, 2.0])), "interventions[0]"
    ).scale_features
    assert (several.dictionary, list(several.features), list(several.factors)) == (SAE, [1, 2], [0.5, 2.0])
    assert list(build(ablate_feature(sae.info, range(3)), "interventions[0]").set_features.values) == [0]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: set_feature(SAE, "3", 1.0),  # type: ignore[arg-type]
        lambda: set_feature(SAE, 3.5, 1.0),  # type: ignore[arg-type]
        lambda: set_feature(SAE, 3, "much"),  # type: ignore[arg-type]
        lambda: set_feature(None, 3, 1.0),  # type: ignore[arg-type]
        lambda: read_features(3),  # type: ignore[arg-type]
    ],
)
def test_what_makes_no_sense_is_a_type_error(wrong: object) -> None:
    with pytest.raises(TypeError):
        wrong()  # type: ignore[operator]


def test_readouts_on_the_wire() -> None:
    what = builders.readout(read_features(SAE), "readouts[0]").features
    assert not what.HasField("top_k") and not what.features, "the default is the server's"
    named = builders.readout(read_features(SAE, features=[4, 2]), "readouts[0]").features
    assert list(named.features) == [4, 2]
    with pytest.raises(InvalidArgumentError, match="32 bits"):
        builders.readout(read_features(SAE, features=1 << 40), "readouts[0]")


def test_features_stream_with_each_token(model: Model) -> None:
    sae = model.dictionary(SAE)
    with model.generate("abc", max_tokens=4, seed=1, readouts=[read_features(sae, top_k=3)]) as stream:
        tokens = list(stream)
        seen = stream.prompt_readouts.features[sae.name]
    fed = [*stream.prompt, *stream.token_ids]
    every = sae.encode(fed, top_k=3)
    assert seen.positions.tolist() == [0, 1, 2, 3]
    for position, features in seen:
        assert list(features) == list(every.row(position))
    for token in tokens:
        assert list(token.features[sae.name]) == list(every.row(token.position - 1))


def test_readouts_of_one_dictionary_join(model: Model) -> None:
    readouts = [
        read_features(SAE, features=[3, 4], positions=[1]),
        read_features(f"models/fake/dictionaries/{SAE}", top_k=2, positions=[1, 2]),
        read_features(SAE, positions=generated()),
    ]
    with model.generate("abc", max_tokens=2, ignore_eos=True, readouts=readouts) as stream:
        found = stream.prompt_readouts.features[SAE]
        first, second = list(stream)
    assert found.positions.tolist() == [1, 2]
    assert found.row(1).ids.tolist()[:2] == [3, 4] and len(found.row(2)) == 2
    assert not first.features and len(second.features[SAE]) > 2


def test_a_set_feature_reads_back_and_is_in_the_receipt(model: Model) -> None:
    """The readout comes after the edit; the fake's features overlap, so the value moves towards what was set."""
    sae = model.dictionary(SAE)
    edit = set_feature(sae, 3, 9.0, positions=[1])
    plain, edited = sae.encode("abc"), sae.encode("abc", interventions=[edit])
    assert edited.row(1).get(3) > plain.row(1).get(3) + 2
    assert list(edited.row(2)) == list(plain.row(2)), "another position"
    expected = model.activations("abc", hook_points=HOOK)[HOOK][1] + (9.0 - plain.row(1).get(3)) * sae.decode(
        {3: 1.0}, bias=False
    )
    assert np.allclose(
        model.activations("abc", hook_points=HOOK, interventions=[edit])[HOOK][1], expected, atol=1e-5
    )
    result = model.generate("abc", max_tokens=2, interventions=[edit]).result()
    assert (result.receipt[0].edit, result.receipt[0].hook_point) == ("set_features", HOOK)


def test_refusals_name_the_field(model: Model) -> None:
    with pytest.raises(NotFoundError) as caught:
        model.generate("a", max_tokens=1, interventions=[set_feature("resid-post", 1, 1.0)]).result()
    assert caught.value.field == "interventions[0].set_features.dictionary"
    assert SAE in caught.value.closest
    with pytest.raises(NotFoundError) as caught:
        model.generate("a", max_tokens=1, readouts=[read_features(SAE, features=[1, 99])]).result()
    assert caught.value.field == "readouts[0].features.features[1]"
    with pytest.raises(InvalidArgumentError):
        model.score("a", interventions=[set_feature(SAE, [1, 2, 3], [1.0, 2.0])])


def test_prompt_readouts_wait_for_every_piece() -> None:
    with (
        FakeServer(token_delay_s=0.05) as server,
        Client(server.target) as client,
        client.model().generate("abc", max_tokens=2, readouts=[read_features(SAE)]) as stream,
    ):
        assert len(stream.prompt_readouts.features[SAE]) == 4
