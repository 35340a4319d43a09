"""UNAVAILABLE is tried again, before the first event and within the deadline; nothing else is."""

from __future__ import annotations

import time

import pytest

from glasshouse.client import AsyncClient, Client, ResourceExhaustedError, UnavailableError
from glasshouse.client.exceptions import GlasshouseError
from glasshouse.client.retry import FIRST_DELAY_S, MAX_DELAY_S, Attempts
from glasshouse.client.testing import Failure, FakeServer


def test_unary_and_streams_are_tried_again() -> None:
    with FakeServer(unavailable_first=2) as server, Client(server.target) as client:
        model = client.model()
        assert [call.method for call in server.calls] == ["GetModel"] * 3
        assert len({call.metadata["x-request-id"] for call in server.calls}) == 1
        server.fail("Generate", Failure("UNAVAILABLE", "not yet"), times=2)
        assert len(model.generate("x", max_tokens=3).result().token_ids) == 3
        server.fail("ExtractActivations", Failure("UNAVAILABLE", "not yet"))
        assert model.activations("x", hook_points="hook_embed")
    methods = [call.method for call in server.calls]
    assert methods.count("Generate") == 3 and methods.count("ExtractActivations") == 2


async def test_async_calls_too() -> None:
    with FakeServer(unavailable_first=2) as server:
        async with AsyncClient(server.target) as client:
            model = await client.model()
            server.fail("Generate", Failure("UNAVAILABLE", "not yet"), times=2)
            result = await model.generate("x", max_tokens=3).result()
            assert len(result.token_ids) == 3
            server.fail("Generate", Failure("UNAVAILABLE", "gone"), after_events=2)
            with pytest.raises(UnavailableError, match=r"gone|no server"):
                await model.generate("x", max_tokens=3).result()
    assert [call.method for call in server.calls].count("Generate") == 4


def test_attempts_are_bounded() -> None:
    with FakeServer(unavailable_first=100) as server, Client(server.target, max_attempts=3) as client:
        with pytest.raises(UnavailableError):
            client.models()
        assert len(server.calls) == 3


def test_the_deadline_bounds_retries() -> None:
    with FakeServer(unavailable_first=100) as server, Client(server.target, max_attempts=50) as client:
        start = time.monotonic()
        with pytest.raises(UnavailableError):
            client.models(timeout=0.5)
        assert time.monotonic() - start < 2
        assert 2 <= len(server.calls) < 20


def test_other_codes_are_final(server: FakeServer, client: Client) -> None:
    full = Failure("RESOURCE_EXHAUSTED", "queue full", reason="QUEUE_FULL", retry_after_s=0.01)
    server.fail("ListModels", full)
    with pytest.raises(ResourceExhaustedError):
        client.models()
    assert len(server.calls) == 1


def test_the_server_may_ask_for_patience(server: FakeServer, client: Client) -> None:
    draining = Failure("UNAVAILABLE", "draining", reason="SERVER_DRAINING", retry_after_s=0.5)
    server.fail("ListModels", draining)
    start = time.monotonic()
    client.models()
    assert time.monotonic() - start >= 0.5
    server.fail("ListModels", Failure("UNAVAILABLE", "draining", reason="SERVER_DRAINING", retry_after_s=60))
    with pytest.raises(UnavailableError):
        client.models(timeout=1)


def test_delays_double_with_jitter() -> None:
    attempts = Attempts(1000, 20)
    error = UnavailableError("x")
    delays = [attempts.delay_after(error) for _ in range(19)]
    for n, delay in enumerate(delays):
        longest = min(FIRST_DELAY_S * 2**n, MAX_DELAY_S)
        assert delay is not None and longest / 2 <= delay <= longest
    assert attempts.delay_after(error) is None
    assert Attempts(1000, 20).delay_after(GlasshouseError("x")) is None
