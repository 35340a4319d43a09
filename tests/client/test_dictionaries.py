"""A dictionary's handle: encode and decode agree with its formula, in pieces and in batches; features by page."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from glasshouse.client import (
    Dictionary,
    FeatureActivations,
    GlasshouseError,
    InvalidArgumentError,
    Model,
    NotFoundError,
)
from glasshouse.client.dictionaries import builders
from glasshouse.client.dictionaries.encoding import EncodingState
from glasshouse.client.features import rows_of
from glasshouse.client.testing import FakeServer
from glasshouse.client.testing.fake_dictionary import FakeDictionary
from glasshouse.v1.dictionaries_pb2 import EncodedInput, EncodedRows, EncodeFeaturesResponse, EncodingFinished
from glasshouse.wire.tensors import pack, unpack

HOOK = "blocks.1.hook_resid_post"
FORMULA = FakeDictionary("resid-post-1", 1)


@pytest.fixture
def sae(model: Model) -> Dictionary:
    return model.dictionary("resid-post-1")


def test_handles_and_infos(model: Model, sae: Dictionary) -> None:
    assert [info.name for info in model.dictionaries()] == ["resid-post-0", "resid-post-1"]
    assert sae.info == model.dictionaries()[1] == model.dictionary(sae.resource_name).info
    assert (sae.name, sae.resource_name) == ("resid-post-1", "models/fake/dictionaries/resid-post-1")
    assert (sae.info.d_sae, sae.info.hook_points_in, sae.info.kind) == (24, [HOOK], "sae")
    assert sae.info.check is not None and sae.info.check.l0 == 6.5 and not sae.info.check.warning
    with pytest.raises(NotFoundError) as caught:
        model.dictionary("resid-post-9")
    assert "resid-post-1" in caught.value.closest


def test_encode_is_the_formula(model: Model, sae: Dictionary) -> None:
    encoded = sae.encode("hello")
    acts = model.activations("hello", hook_points=HOOK)
    expected = FORMULA.encode(acts[HOOK])
    assert np.array_equal(encoded.dense(24), expected)
    assert (encoded.tokens, encoded.token_ids) == (acts.tokens, acts.token_ids)
    given = sae.encode(activations=acts[HOOK])
    assert np.array_equal(given.dense(24), expected)
    assert given.tokens == [] and given.positions.tolist() == list(range(6))
    top = sae.encode("hello", top_k=2, positions=slice(2, 4))
    assert top.positions.tolist() == [2, 3]
    assert list(top.row(3)) == list(encoded.row(3).top(2))
    named = sae.encode("hello", features=[7, 0])
    assert named.ids.tolist() == [7, 0] * 6 and np.array_equal(named.column(7), expected[:, 7])


def test_many_inputs_keep_their_order(sae: Dictionary) -> None:
    many = sae.encode(["a", "bcd", [104]])
    assert [len(each) for each in many] == [2, 4, 1]
    assert np.array_equal(many[1].dense(24), sae.encode("bcd").dense(24))


def test_decode_is_the_formula(sae: Dictionary) -> None:
    encoded = sae.encode("hello")
    assert np.allclose(sae.decode(encoded), FORMULA.decode(encoded.dense(24), True), atol=1e-6)
    assert np.allclose(sae.decode({3: 2.0}, bias=False), 2 * FORMULA.W_dec[3])
    assert np.allclose(sae.decode(encoded.row(1)), sae.decode(encoded)[1])
    assert sae.decode(rows_of({})).shape == (0, 8)
    with pytest.raises(TypeError, match="encode"):
        sae.decode([1.0, 2.0])  # type: ignore[arg-type]


def test_decode_in_batches(sae: Dictionary, monkeypatch: pytest.MonkeyPatch, server: FakeServer) -> None:
    encoded = sae.encode("a longer text")
    whole = sae.decode(encoded)
    monkeypatch.setattr(builders, "DECODE_BYTES", 150)
    n_before = len(server.calls)
    assert np.array_equal(sae.decode(encoded), whole)
    assert len(server.calls) - n_before > 3
    requests = list(builders.decode(sae.info, encoded, True))
    lengths = [np.diff(unpack(request.indptr)).tolist() for request in requests]
    assert [length for rows in lengths for length in rows] == np.diff(encoded.indptr).tolist()
    assert all(8 * sum(rows) <= 150 or len(rows) == 1 for rows in lengths)


def test_features_by_index_and_page(sae: Dictionary, server: FakeServer) -> None:
    info = sae.feature(3, n_tokens=4, n_nearest=2)
    assert (info.index, info.label, len(info.nearest)) == (3, "a vowel", 2)
    assert info.promoted is not None and len(info.promoted) == 4
    listed = sae.features(order="density", page_size=10)
    assert next(listed).index == 23
    assert sum(call.method == "ListFeatures" for call in server.calls) == 1, "pages come as they are used up"
    assert [feature.index for feature in listed] == list(range(22, -1, -1))
    with pytest.raises(InvalidArgumentError, match="decoder_norm"):
        list(sae.features(order="size"))  # type: ignore[arg-type]


def test_load_and_unload(model: Model) -> None:
    (made,) = model.load_dictionary("mine", "folder/layer0")
    assert made.name == "mine" and len(model.dictionaries()) == 3
    made.unload()
    with pytest.raises(NotFoundError):
        made.encode("a")
    with pytest.raises(NotFoundError) as caught:
        model.load_dictionary("mine", "nowhere")
    assert caught.value.field == "path"


def test_encode_refusals(sae: Dictionary) -> None:
    with pytest.raises(InvalidArgumentError):
        sae.encode()
    with pytest.raises(InvalidArgumentError) as caught:
        sae.encode(activations=np.ones((2, 5)))
    assert caught.value.field == "activations"
    with pytest.raises(NotFoundError):
        sae.encode("a", features=[24])


def rows_event(first_row: int, indptr: list[int], n: int) -> EncodeFeaturesResponse:
    return EncodeFeaturesResponse(
        rows=EncodedRows(
            input=0,
            first_row=first_row,
            indptr=pack(np.array(indptr, dtype=np.int64)),
            feature_ids=pack(np.zeros(n, dtype=np.int32)),
            activations=pack(np.zeros(n, dtype=np.float32)),
        )
    )


HEADER = EncodeFeaturesResponse(input=EncodedInput(index=0, positions=[0, 1]))
END = EncodeFeaturesResponse(finished=EncodingFinished())


@pytest.mark.parametrize(
    "events",
    [
        [rows_event(0, [0], 0)],
        [HEADER, HEADER],
        [EncodeFeaturesResponse(input=EncodedInput(index=1))],
        [HEADER, rows_event(1, [0, 1], 1)],
        [HEADER, rows_event(0, [0, 2], 1)],
        [HEADER, rows_event(0, [0, 1, 2], 2)],
        [HEADER, rows_event(0, [0, 1], 1), END],
    ],
    ids=["unannounced", "twice", "unasked", "a gap", "short", "no end", "a row missing"],
)
def test_streams_out_of_protocol(events: list[EncodeFeaturesResponse]) -> None:
    state = EncodingState("sae", 1)
    with pytest.raises(GlasshouseError) as caught:
        for event in events:
            state.feed(event)
        state.result()
    assert caught.value.code in ("INTERNAL", "DATA_LOSS")


def test_the_table_reads_well(sae: Dictionary) -> None:
    table = sae.encode("hi there").top(k=3)
    assert len(table) == 9 and all(len(row.features) <= 3 for row in table)
    lines = str(table).splitlines()
    assert lines[0].split() == ["pos", "token", "strongest", "features", "of", "resid-post-1"]
    assert lines[4].split()[:2] == ["3", "␣"] and "█" in str(table)
    width = max(map(len, lines))
    assert width < 60 and all(line == line.rstrip() for line in lines)
    out = io.StringIO()
    Console(file=out, force_terminal=True, color_system="truecolor", width=100).print(table)
    assert "48;2;255;212;122" in out.getvalue(), "the largest has the strongest tint"
    given = sae.encode(activations=np.ones((1, 8))).top(1)
    assert given.rows[0].token == ""


def test_a_single_position_encodes_what_decode_takes(sae: Dictionary) -> None:
    features = sae.encode("hello").row(2)
    assert isinstance(features, FeatureActivations)
    assert sae.decode(features).shape == (8,)
