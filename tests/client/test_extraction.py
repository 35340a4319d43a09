"""Activations arrive whole, in order, in the dtype asked for, and as they complete."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from glasshouse.client import (
    Client,
    GlasshouseError,
    InvalidArgumentError,
    Model,
    Progress,
    add_vector,
    cap_projection,
    positions,
    replace,
    rotate,
)
from glasshouse.client.extraction import ExtractionState
from glasshouse.client.testing import Failure, FakeServer
from glasshouse.v1 import activations_pb2
from glasshouse.wire.tensors import TensorError, chunks

HOOK = "blocks.1.hook_resid_pre"
ATTENTION = "blocks.0.attn.hook_pattern"


def test_one_input_is_a_mapping(model: Model) -> None:
    acts = model.activations("abc", hook_points=[HOOK, ATTENTION])
    assert list(acts) == [HOOK, ATTENTION] and len(acts) == 2
    assert acts[HOOK].shape == (4, 8) and acts[ATTENTION].shape == (2, 4, 4)
    assert acts[HOOK].dtype == np.float32
    assert acts.tokens == ["<bos>", "a", "b", "c"] and acts.positions == [0, 1, 2, 3]
    assert np.allclose(acts[ATTENTION].sum(-1), 1)
    with pytest.raises(KeyError):
        acts["nope"]
    acts[HOOK][:] = 0  # The caller's own.


def test_pieces_of_any_size_make_the_same_arrays(model: Model) -> None:
    whole = model.activations(["abc", "d"], hook_points=[HOOK, ATTENTION])
    with FakeServer(chunk_bytes=7) as server, Client(server.target) as client:
        pieces = client.model().activations(["abc", "d"], hook_points=[HOOK, ATTENTION])
    for one, other in zip(whole, pieces, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in (HOOK, ATTENTION))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_on_the_wire_and_in_torch(model: Model, dtype: str) -> None:
    exact = model.activations("abc", hook_points=HOOK)[HOOK]
    acts = model.activations("abc", hook_points=HOOK, dtype=dtype)  # type: ignore[call-overload]
    assert acts[HOOK].dtype == np.dtype(dtype if dtype != "bfloat16" else ml_dtypes.bfloat16)
    assert np.array_equal(acts[HOOK], exact.astype(acts[HOOK].dtype))
    tensor = acts.torch(HOOK)
    assert tensor.dtype == getattr(torch, dtype) and tensor.shape == (4, 8)
    assert np.array_equal(tensor.float().numpy(), acts[HOOK].astype(np.float32))


def test_positions_choose_rows(model: Model) -> None:
    everything = model.activations("abcdef", hook_points=HOOK)[HOOK]
    for where, rows in [
        ([1, 4], [1, 4]),
        (slice(2, 5), [2, 3, 4]),
        (positions.last(), [6]),
        (positions.all().excluding_bos(), [1, 2, 3, 4, 5, 6]),
    ]:
        acts = model.activations("abcdef", hook_points=HOOK, positions=where)
        assert acts.positions == rows
        assert np.array_equal(acts[HOOK], everything[rows])


def test_edits_are_arithmetic(model: Model) -> None:
    s = model.activations("ab", hook_points=HOOK)[HOOK]
    v, w = np.eye(8)[0] * 2, np.eye(8)[1]

    def after(edit: object) -> np.ndarray:
        return model.activations("ab", hook_points=HOOK, interventions=[edit])[HOOK]  # type: ignore[list-item]

    assert np.allclose(after(add_vector(HOOK, v, 3)), s + 3 * v)
    assert np.allclose(
        np.linalg.norm(after(add_vector(HOOK, v, 3, preserve_norm=True)), axis=1), np.linalg.norm(s, axis=1)
    )
    assert after(cap_projection(HOOK, v, max=-0.25))[:, 0].max() <= -0.25 + 1e-6
    turned = after(rotate(HOOK, v, w, 0.0))
    assert np.allclose(turned[:, 1], 0, atol=1e-6)
    assert np.allclose(turned[:, 0], np.hypot(s[:, 0], s[:, 1]))
    given = np.arange(8.0)
    assert np.allclose(after(replace(HOOK, given, [1])), np.vstack([s[0], given, s[2]]))


def test_progress_counts_up_to_the_whole(model: Model) -> None:
    seen: list[Progress] = []
    acts = model.activations(["a", "bb", "c"], hook_points=[HOOK], progress=seen.append)
    assert seen[-1] == Progress(sum(each[HOOK].nbytes for each in acts), 3, 3)
    received = [progress.bytes_received for progress in seen]
    assert received == sorted(received)


def test_no_inputs_is_the_servers_to_refuse(model: Model) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        model.activations([], hook_points=HOOK)
    assert caught.value.field == "inputs"


def test_leaving_the_iterator_ends_the_call() -> None:
    with FakeServer(token_delay_s=0.05) as server, Client(server.target) as client:
        found = client.model().iter_activations(["a"] * 50, hook_points=HOOK)
        next(found)
        found.close()  # type: ignore[attr-defined]
        server.wait_cancelled(1)


def test_an_extraction_that_breaks_off_is_an_error(server: FakeServer, model: Model) -> None:
    server.fail("ExtractActivations", Failure("INTERNAL", "oops", reason="DEFECT"), after_events=2)
    with pytest.raises(GlasshouseError, match="oops"):
        model.activations(["a", "b"], hook_points=HOOK)


def test_streams_out_of_protocol_are_errors() -> None:
    response, header = activations_pb2.ExtractActivationsResponse, activations_pb2.ExtractedInput
    state = ExtractionState([HOOK], 1)
    piece = next(chunks(np.zeros((1, 8), np.float32), 16))
    chunk = activations_pb2.ExtractedChunk(input=0, hook_point=0, piece=piece)
    with pytest.raises(GlasshouseError, match="unannounced"):
        state.feed(response(chunk=chunk))
    with pytest.raises(GlasshouseError, match="twice or unasked"):
        state.feed(response(input=header(index=1)))
    state.feed(response(input=header(index=0)))
    assert state.feed(response(chunk=chunk)) is None
    with pytest.raises(TensorError, match="where the last piece ended"):
        state.feed(response(chunk=chunk))
    with pytest.raises(GlasshouseError, match="after 0 of 1 inputs"):
        state.end()
