"""What every call passes through: ids, keys, bounds, deadlines, defects, callers that go away."""

from __future__ import annotations

import asyncio
import gc
import hashlib
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from glasshouse.server.types.configuration import KeySettings, Settings
from glasshouse.server.types.limits import Limits
from glasshouse.v1 import generation_pb2 as pb
from glasshouse.v1 import models_pb2

from ..fake_engine import FakeEngine
from ..serving import Served, events_of, parse_refusal, refusal, serving, until

GENERATE = "/glasshouse.v1.GenerationService/Generate"
LIST_MODELS = models_pb2.ListModelsRequest()


def request(max_tokens: int = 5) -> pb.GenerateRequest:
    return pb.GenerateRequest(input={"text": "abc"}, max_tokens=max_tokens)


async def sent_id(served: Served, *metadata: tuple[str, str]) -> str:
    call = served.models.ListModels(LIST_MODELS, metadata=metadata)
    await call
    return str((await call.initial_metadata())["x-request-id"])


async def settled(engine: FakeEngine) -> None:
    """Waits for the engine to be free; a place has to be free within a second."""
    await until(lambda: not engine.running, 1.0)


async def test_request_ids_are_echoed_or_made() -> None:
    async with serving() as served:
        assert await sent_id(served, ("x-request-id", "my-id.1")) == "my-id.1"
        made = {
            await sent_id(served),
            await sent_id(served),
            await sent_id(served, ("x-request-id", "no good!")),
        }
        assert len(made) == 3
        assert all(len(one) == 32 for one in made)
        assert len(await sent_id(served, ("x-request-id", "x" * 129))) == 32
        refused = await refusal(
            lambda: served.generation.Generate(request(0), metadata=(("x-request-id", "mine"),))
        )
        assert refused.metadata["request_id"] == "mine"


async def test_each_request_is_one_line_of_the_log() -> None:
    async with serving() as served:
        await events_of(served.generation.Generate(request(), metadata=(("x-request-id", "one"),)))
        await refusal(lambda: served.generation.Generate(request(-1)))
        good, bad = (line for line in served.log_lines() if line["event"] == "request")
    assert good["method"] == "GenerationService/Generate"
    assert (good["code"], good["request_id"]) == ("OK", "one")
    assert (good["prompt_tokens"], good["generated_tokens"]) == (4, 5)
    assert good["duration_ms"] > 0
    assert good["peer"].startswith("ipv4:127.0.0.1:")
    assert (bad["code"], bad["reason"], bad["field"]) == (
        "INVALID_ARGUMENT",
        "VALUE_OUT_OF_RANGE",
        "max_tokens",
    )


async def test_a_defect_is_logged_in_full_and_told_in_nothing() -> None:
    engine = FakeEngine()
    engine.fail_after = 2
    async with serving(engine) as served:
        refused = await refusal(lambda: served.generation.Generate(request()))
        assert (refused.code, refused.reason) == ("INTERNAL", "DEFECT")
        assert "secret" not in refused.message + str(refused.metadata)
        assert refused.metadata["request_id"] in refused.message
        line = next(line for line in served.log_lines() if line["event"] == "defect")
        assert "secret inside" in line["exception"]
        assert "Traceback" in line["exception"]
        assert line["request_id"] == refused.metadata["request_id"]
        assert engine.running == 0


async def test_a_timeout_inside_the_engine_is_a_defect_and_no_deadline() -> None:
    engine = FakeEngine()
    engine.fail_after, engine.failure = 1, TimeoutError()
    async with serving(engine) as served:
        assert (await refusal(lambda: served.generation.Generate(request()))).reason == "DEFECT"


async def test_the_servers_deadline_ends_a_generation_with_a_status() -> None:
    engine = FakeEngine(step_s=0.01)
    limits = Limits(default_deadline_s=0.2, max_deadline_s=0.4)
    async with serving(engine, settings=Settings(limits=limits)) as served:
        start = perf_counter()
        tokens = 0
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for event in served.generation.Generate(request(500)):
                tokens += len(event.tokens.tokens)
        refused = parse_refusal(caught.value)
        assert (refused.code, refused.reason) == ("DEADLINE_EXCEEDED", "DEADLINE")
        # Left alone it would take five seconds.
        assert 0.15 < perf_counter() - start < 4
        assert tokens > 3
        await settled(engine)
        # A longer one is capped.
        start = perf_counter()
        assert (
            await refusal(lambda: served.generation.Generate(request(500), timeout=50))
        ).reason == "DEADLINE"
        assert 0.35 < perf_counter() - start < 4


async def test_the_callers_deadline_frees_the_engine_and_is_logged_as_one() -> None:
    engine = FakeEngine(step_s=0.01)
    async with serving(engine) as served:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await events_of(served.generation.Generate(request(500), timeout=0.15))
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await settled(engine)
        await asyncio.sleep(0.05)
        assert served.log_lines()[-1]["code"] == "DEADLINE_EXCEEDED"


async def test_a_cancelled_call_frees_the_engine() -> None:
    engine = FakeEngine(step_s=0.005)
    async with serving(engine) as served:
        call = served.generation.Generate(request(500))
        async for event in call:
            if event.WhichOneof("event") == "tokens":
                break
        assert engine.running == 1
        call.cancel()
        await settled(engine)
        await asyncio.sleep(0.05)
        assert served.log_lines()[-1]["code"] == "CANCELLED"
        assert served.metrics()["glasshouse_active_requests"] == 0


async def test_200_clients_that_vanish_leave_nothing() -> None:
    engine = FakeEngine(step_s=0.001)
    async with serving(engine) as served:
        for _ in range(20):
            await vanish(served)
        await settled(engine)
        gc.collect()
        before = resident_bytes()
        for _ in range(10):
            await asyncio.gather(*(vanish(served) for _ in range(20)))
        await settled(engine)
        gc.collect()
        assert resident_bytes() - before < 8 << 20
        assert engine.most_running > 1
        metrics = served.metrics()
        assert metrics["glasshouse_active_requests"] == 0
        assert (
            metrics['glasshouse_requests_total{code="CANCELLED",method="GenerationService/Generate"}'] == 220
        )
        assert len(await events_of(served.generation.Generate(request()))) > 3


async def vanish(served: Served) -> None:
    """A client whose connection is cut, without a word, after two events."""
    open_ends: list[asyncio.StreamWriter] = []

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward, back = await asyncio.open_connection("127.0.0.1", served.server.address.port)
        open_ends.extend((writer, back))
        await asyncio.gather(carry(reader, back), carry(onward, writer))

    wire = await asyncio.start_server(connect, "127.0.0.1", 0)
    async with wire, grpc.aio.insecure_channel(f"127.0.0.1:{wire.sockets[0].getsockname()[1]}") as channel:
        call = channel.unary_stream(
            GENERATE,
            request_serializer=pb.GenerateRequest.SerializeToString,
            response_deserializer=pb.GenerateResponse.FromString,
        )(request(500))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for event in call:
                if event.WhichOneof("event") == "tokens":
                    for end in open_ends:
                        end.transport.abort()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


async def test_more_than_the_bound_is_refused_at_once_with_a_delay() -> None:
    engine = FakeEngine(step_s=0.005)
    async with serving(engine, settings=Settings(limits=Limits(max_concurrent_requests=3))) as served:
        running = [
            asyncio.ensure_future(events_of(served.generation.Generate(request(100)))) for _ in range(3)
        ]
        await until(lambda: engine.running == 3)
        refused = await refusal(lambda: served.generation.Generate(request()))
        assert engine.running == 3, "it did not wait for room"
        assert (refused.code, refused.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
        assert refused.retry_after_s > 0
        refused.detail(error_details_pb2.QuotaFailure)
        # The neighbours go on, and when they are done there is room again.
        assert all(len(events) > 3 for events in await asyncio.gather(*running))
        assert len(await events_of(served.generation.Generate(request()))) > 3


async def test_an_engines_full_queue_keeps_its_delay() -> None:
    engine = FakeEngine()
    engine.max_running = 0
    async with serving(engine) as served:
        refused = await refusal(lambda: served.generation.Generate(request()))
    assert (refused.code, refused.reason, refused.retry_after_s) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL", 0.25)


def keyed(tmp_path: Path) -> Settings:
    digest = hashlib.sha256(b"right").hexdigest()
    file = tmp_path / "keys"
    file.write_text(f"# name role digest\n\nalice user {hashlib.sha256(b'filed').hexdigest()}\n")
    return Settings(keys=KeySettings(file=str(file), entries=(f"bob admin {digest}",)))


async def test_keys(tmp_path: Path) -> None:
    def bearer(key: str) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {key}"),)

    async with serving(settings=keyed(tmp_path)) as served:
        none = await refusal(lambda: served.models.ListModels(LIST_MODELS))
        wrong = await refusal(lambda: served.models.ListModels(LIST_MODELS, metadata=bearer("wrong")))
        for key in ("right", "filed"):
            await served.models.ListModels(LIST_MODELS, metadata=bearer(key))
        # Without a key nobody learns what exists, or that a request is malformed.
        unknown = await refusal(lambda: served.models.GetModel(models_pb2.GetModelRequest(name="x")))
        raw = served.channel.unary_unary("/glasshouse.v1.ModelService/GetModel")
        malformed = await refusal(lambda: raw(b"\xff\xff"))
        names = [line.get("key") for line in served.log_lines()]
        assert "right" not in served.log.getvalue()
    assert (none.code, none.reason) == ("UNAUTHENTICATED", "KEY_MISSING")
    assert (wrong.code, wrong.reason) == ("UNAUTHENTICATED", "KEY_UNKNOWN")
    assert {unknown.reason, malformed.reason} == {"KEY_MISSING"}
    assert names == [None, None, "bob", "alice", None, None]


async def test_admin_methods_take_admin_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from glasshouse.server.transport import methods

    monkeypatch.setattr(methods, "ADMIN_METHODS", frozenset({"ModelService/ListModels"}))
    async with serving(settings=keyed(tmp_path)) as served:

        def listed(key: str) -> Any:
            return served.models.ListModels(LIST_MODELS, metadata=(("authorization", f"bearer {key}"),))

        await listed("right")
        refused = await refusal(lambda: listed("filed"))
    assert (refused.code, refused.reason) == ("PERMISSION_DENIED", "ADMIN_REQUIRED")
