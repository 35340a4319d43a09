"""ExtractActivations through a real server, and its two engines: hand-made messages and working ahead."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from glasshouse.server.services.prefetch import ahead
from glasshouse.server.services.tensor_messages import chunk_messages
from glasshouse.v1 import activations_pb2 as pb
from glasshouse.wire.tensors import TensorAssembler, chunks

from ..fake_engine import BOS, FakeEngine
from ..serving import events_of, serving

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]


async def test_every_input_its_tensors_and_the_end() -> None:
    asked = pb.ExtractActivationsRequest(inputs=[{"text": "ab"}, {"token_ids": [7] * 500}], hook_points=HOOKS)
    async with serving() as served:
        events = await events_of(served.activations.ExtractActivations(asked))
        metrics = served.metrics()
    assert [event.WhichOneof("event") for event in events] == [*["input", "chunk", "chunk"] * 2, "finished"]
    assert list(events[0].input.token_ids) == [BOS, 97, 98]
    assert list(events[0].input.tokens) == ["<256>", "a", "b"]
    assert list(events[3].input.positions) == list(range(500))
    places = [(e.chunk.input, e.chunk.hook_point) for e in events if e.WhichOneof("event") == "chunk"]
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assembler = TensorAssembler()
    assert assembler.add(events[5].chunk.piece)
    np.testing.assert_array_equal(assembler.result(), np.arange(4000).reshape(500, 8) + 1000)
    assert (events[-1].finished.tokens, events[-1].finished.bytes) == (503, 2 * 503 * 8 * 4)
    assert metrics["glasshouse_readout_bytes_total"] == 2 * 503 * 8 * 4
    assert metrics["glasshouse_prompt_tokens_total"] == 503


async def test_large_tensors_come_in_pieces() -> None:
    engine = FakeEngine()
    engine.width = 2000
    asked = pb.ExtractActivationsRequest(inputs=[{"token_ids": [7] * 500}], hook_points=HOOKS[:1])
    async with serving(engine) as served:
        events = await events_of(served.activations.ExtractActivations(asked))
    assert max(event.ByteSize() for event in events) < 1.1 * 2**20
    assembler = TensorAssembler()
    done = [assembler.add(event.chunk.piece) for event in events if event.WhichOneof("event") == "chunk"]
    assert done == [False, False, False, True]
    np.testing.assert_array_equal(assembler.result(), np.arange(10**6).reshape(500, 2000))


async def test_the_next_input_is_computed_while_one_is_read() -> None:
    engine = FakeEngine()
    asked = pb.ExtractActivationsRequest(inputs=[{"token_ids": [7] * 500}] * 8, hook_points=HOOKS)
    async with serving(engine) as served:
        stream = served.activations.ExtractActivations(asked)
        events = aiter(stream)
        await anext(events)
        await asyncio.sleep(0.2)
        assert len(engine.extracted) > 1
        assert len([event async for event in events]) == 8 * 3
    assert len(engine.extracted) == 8


@pytest.mark.parametrize(
    "array",
    [
        np.arange(700_000, dtype=np.float32).reshape(700, 1000),
        np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1),
        np.arange(6).astype(ml_dtypes.bfloat16).reshape(3, 2),
        np.zeros((0, 8), np.float32),
        np.arange(4, dtype=np.float16),
    ],
    ids=["pieces", "not contiguous", "bfloat16", "empty", "float16"],
)
@pytest.mark.parametrize("place", [(0, 0), (1, 0), (300, 70_000)])
def test_messages_by_hand_are_protobufs(array: Any, place: tuple[int, int]) -> None:
    def by_protobuf(piece: Any) -> bytes:
        chunk = pb.ExtractedChunk(input=place[0], hook_point=place[1], piece=piece)
        return pb.ExtractActivationsResponse(chunk=chunk).SerializeToString(deterministic=True)

    assert list(chunk_messages(*place, array)) == [by_protobuf(piece) for piece in chunks(array)]


class Source:
    """Counts what was asked of it."""

    def __init__(self, n: int, fail_at: int = -1) -> None:
        self.made = 0
        self.closed = False
        self._n, self._fail_at = n, fail_at

    async def items(self) -> AsyncIterator[int]:
        try:
            for item in range(self._n):
                if item == self._fail_at:
                    raise ValueError("broken")
                self.made += 1
                yield item
        finally:
            self.closed = True


async def test_ahead_keeps_order_and_bound() -> None:
    source = Source(10)
    async with aclosing(ahead(source.items(), 2)) as items:
        assert await anext(items) == 0
        await asyncio.sleep(0.01)
        # One was handed over, two wait, one is held by the maker.
        assert source.made <= 4
        assert [item async for item in items] == list(range(1, 10))
    assert source.closed


async def test_ahead_closes_its_source_when_left() -> None:
    source = Source(10)
    async with aclosing(ahead(source.items(), 2)) as items:
        await anext(items)
    assert source.closed


async def test_ahead_passes_errors_on_after_what_came_before() -> None:
    seen: list[int] = []
    with pytest.raises(ValueError, match="broken"):
        async for item in ahead(Source(10, fail_at=3).items(), 2):
            seen.append(item)
    assert seen == [0, 1, 2]
