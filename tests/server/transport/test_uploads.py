"""Requests that are streams of messages pass through the same gate."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest

from glasshouse.server.types.configuration import KeySettings, Settings
from glasshouse.server.types.limits import Limits
from glasshouse.v1 import directions_pb2, examples_pb2, inputs_pb2

from ..serving import Served, refusal, serving, until

COMPUTE = "/glasshouse.v1.DirectionService/ComputeDirections"


def upload(served: Served, messages: Any, **options: Any) -> Any:
    """A call with whatever bytes."""
    return served.channel.stream_unary(COMPUTE)(messages, **options)


def message(n: int, **fields: Any) -> bytes:
    examples = [
        examples_pb2.LabelledExample(input=inputs_pb2.Input(text=f"text {i}"), labels=[str(i % 2)])
        for i in range(n)
    ]
    return directions_pb2.ComputeDirectionsRequest(examples=examples, **fields).SerializeToString()


async def test_bytes_that_are_no_message_are_found_wherever_they_come() -> None:
    async with serving() as served:
        for messages in ([b"\xff" * 40], [message(2), b"\xff" * 40], [message(2), message(2)[:-3]]):
            refused = await refusal(lambda messages=messages: upload(served, iter(messages)))  # type: ignore[misc]
            assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", "MESSAGE_MALFORMED")
        assert served.metrics()["glasshouse_active_requests"] == 0


async def test_a_refused_caller_is_told_of_the_refusal_though_it_was_still_sending() -> None:
    digest = hashlib.sha256(b"secret").hexdigest()
    settings = replace(Settings(), keys=KeySettings(entries=(f"ann user {digest}",)))
    async with serving(settings=settings) as served:
        for _ in range(10):
            refused = await refusal(lambda: upload(served, iter([message(50)] * 20)))
            assert refused.code == "UNAUTHENTICATED"


async def test_who_does_not_come_to_an_end_is_cut_off() -> None:
    digest = hashlib.sha256(b"secret").hexdigest()
    settings = replace(Settings(), keys=KeySettings(entries=(f"ann user {digest}",)))
    sent = 0

    def messages() -> Iterator[bytes]:
        nonlocal sent
        while sent < 10_000:
            sent += 1
            yield message(50)

    async with serving(settings=settings) as served:
        with pytest.raises(grpc.aio.AioRpcError):
            await upload(served, messages())
        await until(lambda: served.metrics()["glasshouse_active_requests"] == 0)
    assert sent < 10_000


async def test_more_examples_than_the_bound_end_the_upload() -> None:
    settings = replace(Settings(), limits=Limits(max_inputs=100))
    async with serving(settings=settings) as served:

        def messages() -> Iterator[bytes]:
            yield message(0, positive_label="1")
            for _ in range(30):
                yield message(40)

        refused = await refusal(lambda: upload(served, messages()))
        assert (refused.code, refused.reason, refused.field) == (
            "RESOURCE_EXHAUSTED",
            "LIMIT_EXCEEDED",
            "examples",
        )
        assert refused.metadata["setting"] == "limits.max_inputs"
        few = replace(Settings(), limits=Limits(max_input_tokens_total=100))
    async with serving(settings=few) as served:
        refused = await refusal(lambda: upload(served, iter([message(40)])))
        assert refused.metadata["setting"] == "limits.max_input_tokens_total"


async def test_a_caller_that_leaves_or_dawdles_frees_its_place() -> None:
    async with serving() as served:
        waiting = asyncio.Event()

        async def messages() -> AsyncIterator[bytes]:
            yield message(4)
            await waiting.wait()

        call = upload(served, messages())
        await until(lambda: served.metrics()["glasshouse_active_requests"] == 1)
        call.cancel()
        await until(lambda: served.metrics()["glasshouse_active_requests"] == 0)
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await upload(served, messages(), timeout=0.3)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: served.metrics()["glasshouse_active_requests"] == 0)
        waiting.set()
