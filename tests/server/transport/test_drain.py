"""An orderly end: health first, then no new requests, then those in flight, then nothing."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from time import perf_counter

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from glasshouse.server.types.configuration import ListenSettings, Settings
from glasshouse.v1 import generation_pb2 as pb

from ..fake_engine import FakeEngine
from ..serving import events_of, refusal, serving, until

LISTEN = ListenSettings(listen="127.0.0.1:0", drain_timeout_s=5.0)


def request(max_tokens: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(input={"text": "abc"}, max_tokens=max_tokens)


async def test_what_is_in_flight_finishes_and_nothing_new_begins() -> None:
    engine = FakeEngine(step_s=0.005)
    async with serving(engine, settings=Settings(server=LISTEN)) as served:
        running = asyncio.ensure_future(events_of(served.generation.Generate(request(60))))
        await until(lambda: engine.running)
        draining = asyncio.ensure_future(served.server.drain())
        await asyncio.sleep(0.05)
        health = health_pb2_grpc.HealthStub(served.channel)
        answer = await health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        refused = await refusal(lambda: served.generation.Generate(request(5)))
        assert (refused.code, refused.reason) == ("UNAVAILABLE", "SERVER_DRAINING")
        assert refused.retry_after_s > 0
        assert not draining.done()
        events = await running
        assert events[-1].finished.usage.generated_tokens == 60
        assert await draining


async def test_the_limit_ends_the_wait() -> None:
    engine = FakeEngine(step_s=0.01)
    settings = Settings(server=replace(LISTEN, drain_timeout_s=0.1))
    async with serving(engine, settings=settings) as served:
        running = asyncio.ensure_future(events_of(served.generation.Generate(request(500))))
        await until(lambda: engine.running)
        start = perf_counter()
        assert not await served.server.drain()
        await served.server.stop()
        assert perf_counter() - start < 3
        with pytest.raises(grpc.aio.AioRpcError):
            await running
        assert engine.running == 0


async def test_draining_an_idle_server_takes_no_time() -> None:
    async with serving() as served:
        start = perf_counter()
        assert await served.server.drain()
        assert perf_counter() - start < 5, "not the 30 seconds that requests would have"
