"""Bytes that are no message, messages too large, methods that are not there, and the standard services."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from glasshouse.server.transport.methods import METHODS, SERVICES
from glasshouse.v1 import generation_pb2

from ..fake_engine import FakeEngine
from ..serving import refusal, serving

WHOLE = generation_pb2.GenerateRequest(input={"text": "abc"}, max_tokens=5).SerializeToString()
# A length that runs past the end; wire types that do not exist; a group left open.
BROKEN = {"truncated": WHOLE[:-4], "nonsense": b"\xff" * 40, "open group": b"\x0b"}


def raw(channel: grpc.aio.Channel, method: str, *, streams: bool) -> Any:
    make = channel.unary_stream if streams else channel.unary_unary
    return make(method)


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
async def test_bytes_that_are_no_message(method: Any, data: bytes) -> None:
    async with serving() as served:
        call = raw(served.channel, f"/{method.service}/{method.method}", streams=method.streams)
        refused = await refusal(lambda: call(data))
        assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", "MESSAGE_MALFORMED")


def first_text(method: Any) -> int | None:
    """The number of a request's first string field."""
    fields = method.request_class.DESCRIPTOR.fields
    return next((field.number for field in fields if field.type == field.TYPE_STRING), None)


@pytest.mark.parametrize("method", list(filter(first_text, METHODS)), ids=lambda method: method.name)
async def test_text_that_is_not_utf_8(method: Any) -> None:
    number = first_text(method)
    assert number is not None
    async with serving() as served:
        call = raw(served.channel, f"/{method.service}/{method.method}", streams=method.streams)
        refused = await refusal(lambda: call(bytes([number << 3 | 2, 2]) + b"\xff\xfe"))
        assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", "MESSAGE_MALFORMED")


async def test_every_truncation_of_a_request_is_answered() -> None:
    async with serving() as served:
        call = raw(served.channel, "/glasshouse.v1.GenerationService/Generate", streams=True)
        for end in range(len(WHOLE)):
            refused = await refusal(lambda end=end: call(WHOLE[:end]))  # type: ignore[misc]
            assert refused.code == "INVALID_ARGUMENT"
        assert served.metrics()["glasshouse_active_requests"] == 0


async def test_oversize_messages_are_refused_by_grpc_itself() -> None:
    async with serving() as served:
        call = raw(served.channel, "/glasshouse.v1.GenerationService/Generate", streams=True)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call(b"\x0a" + b"x" * (4 << 20)):
                pass
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in (caught.value.details() or "")


async def test_unknown_methods() -> None:
    async with serving() as served:
        for path in ("/glasshouse.v1.GenerationService/Nope", "/nope.Service/Generate"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await raw(served.channel, path, streams=False)(b"")
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert not [name for name in served.metrics() if name.startswith("glasshouse_requests_total")]


async def test_health_by_service_and_in_all() -> None:
    engine = FakeEngine()
    async with serving(engine) as served:
        stub = health_pb2_grpc.HealthStub(served.channel)
        for service in ("", *SERVICES):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="nope"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        engine.healthy = False
        async with asyncio.timeout(3):
            watch = stub.Watch(health_pb2.HealthCheckRequest())
            async for change in watch:
                if change.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                    break


@pytest.mark.parametrize("method", ["Check", "Watch"])
async def test_malformed_health_requests(method: str) -> None:
    async with serving() as served:
        call = raw(served.channel, f"/grpc.health.v1.Health/{method}", streams=method == "Watch")
        assert (await refusal(lambda: call(b"\x0a\x02\xff\xfe"))).reason == "MESSAGE_MALFORMED"


async def test_reflection_lists_the_services_and_survives_malformed_requests() -> None:
    async with serving() as served:
        stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        answers = [answer async for answer in stub.ServerReflectionInfo(iter([request]))]
        names = {service.name for service in answers[0].list_services_response.service}
        assert names == {*SERVICES, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
        call = served.channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        assert (await refusal(lambda: call(iter([b"\xff\xff"])))).reason == "MESSAGE_MALFORMED"
