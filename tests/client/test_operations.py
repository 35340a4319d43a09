"""A long operation: progress as it is polled, its end, its failure, its cancellation."""

from __future__ import annotations

import time

import numpy as np
import pytest
from google.longrunning import operations_pb2

from glasshouse.client import (
    AsyncClient,
    CancelledError,
    Client,
    DeadlineExceededError,
    Dictionary,
    GlasshouseError,
    NotFoundError,
    OperationProgress,
    ResourceExhaustedError,
)
from glasshouse.client.dictionaries.calls import EVALUATION
from glasshouse.client.operations import OperationState, Polls
from glasshouse.client.testing import Failure, FakeServer
from glasshouse.v1 import dictionaries_pb2


@pytest.fixture
def sae(client: Client) -> Dictionary:
    return client.model().dictionary("resid-post-1")


def test_result_and_progress(sae: Dictionary, server: FakeServer) -> None:
    heard: list[OperationProgress] = []
    operation = sae.evaluate(["abc", "d"], max_tokens=5)
    assert operation.name.startswith("operations/")
    assert (operation.progress.phase, operation.progress.fraction) == ("queued", 0)
    found = operation.result(timeout=20, on_progress=heard.append)
    assert found.metrics["l0"] == 6.5 and found.tokens == 5
    assert found.density is not None and found.density.shape == (24,) and found.density.dtype == np.float32
    assert [round(progress.fraction, 2) for progress in heard] == [0.33, 0.67, 1.0]
    assert heard[0].counts == {"tokens_done": 1, "tokens_total": 5}
    assert str(heard[0]) == "measuring 33% (tokens_done 1, tokens_total 5)"
    n_calls = len(server.calls)
    assert operation.result().tokens == 5 and operation.done(), "what is known is not asked again"
    assert len(server.calls) == n_calls


def test_done_asks_and_moves_progress(sae: Dictionary) -> None:
    operation = sae.evaluate()
    assert not operation.done() and operation.progress.phase == "measuring"
    assert not operation.done()
    assert operation.done()
    assert operation.result().tokens == 16384


def test_timeout_leaves_the_work_going() -> None:
    with FakeServer(operation_polls=1000) as server, Client(server.target) as client:
        operation = client.model().dictionary("resid-post-0").evaluate()
        start = time.monotonic()
        with pytest.raises(DeadlineExceededError, match=r"not done within 0\.3 s") as caught:
            operation.result(timeout=0.3)
        assert time.monotonic() - start < 2 and "goes on" in caught.value.remedy
        assert len(server.calls) < 12, "polls that come back at once are spaced"
        operation.cancel()
        with pytest.raises(CancelledError):
            operation.result()


def test_failures_are_those_of_a_call(sae: Dictionary, server: FakeServer) -> None:
    server.fail_operation(
        Failure(
            "RESOURCE_EXHAUSTED",
            "out of memory",
            reason="MEMORY_BUDGET",
            remedy="Ask for less",
            retry_after_s=3,
        )
    )
    operation = sae.evaluate()
    with pytest.raises(ResourceExhaustedError, match="out of memory") as caught:
        operation.result()
    assert (caught.value.reason, caught.value.remedy) == ("MEMORY_BUDGET", "Ask for less")
    assert caught.value.retry_after_s == 3
    server.fail("GetOperation", Failure("NOT_FOUND", "expired", reason="RESOURCE_NOT_FOUND"))
    with pytest.raises(NotFoundError):
        sae.evaluate().done()


async def test_async_twin() -> None:
    heard: list[OperationProgress] = []
    with FakeServer() as server:
        async with AsyncClient(server.target) as client:
            sae = await (await client.model()).dictionary("resid-post-1")
            operation = await sae.evaluate(["abc"])
            assert (await operation.result(on_progress=heard.append)).tokens == 4
            assert len(heard) == 3 and await operation.done()
            cancelled = await sae.evaluate()
            await cancelled.cancel()
            with pytest.raises(CancelledError):
                await cancelled.result()


def test_an_end_without_a_result_is_an_error() -> None:
    operation = operations_pb2.Operation(name="operations/1", done=True)
    with pytest.raises(GlasshouseError, match="ended with nothing"):
        OperationState(EVALUATION, operation).result()
    operation.response.Pack(dictionaries_pb2.Dictionary())
    with pytest.raises(GlasshouseError, match=r"v1\.Dictionary"):
        OperationState(EVALUATION, operation).result()


def test_polls_stay_within_the_timeout() -> None:
    assert Polls("x", None, watched=True).wait_s() == 0.5
    assert Polls("x", None, watched=False).wait_s() == 10
    assert Polls("x", 0.2, watched=False).wait_s() <= 0.2
