"""A generation stream: what it shows when, and how it ends."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest

from glasshouse.client import (
    AsyncClient,
    CancelledError,
    Client,
    DeadlineExceededError,
    GlasshouseError,
    Model,
    UnavailableError,
    ablate_direction,
    add_vector,
    generated,
    prompt,
    read_activations,
    read_logit_lens,
)
from glasshouse.client.generation import GenerationState
from glasshouse.client.testing import Failure, FakeServer
from glasshouse.v1 import generation_pb2

HOOK = "blocks.0.hook_resid_post"
ATTENTION = "blocks.1.attn.hook_pattern"


def test_tokens_join_to_the_text(model: Model) -> None:
    with model.generate("Once", max_tokens=12, seed=4) as stream:
        tokens = list(stream)
        assert stream.prompt == model.tokenize("Once").ids
    assert "".join(token.text for token in tokens) == stream.text
    assert [token.token_id for token in tokens] == stream.token_ids
    assert [token.position for token in tokens] == list(range(5, 17))
    assert (stream.finish_reason, stream.seed) == ("length", 4)
    assert stream.usage is not None and stream.usage.generated_tokens == 12
    assert model.generate("Once", max_tokens=12, seed=4).result().text == stream.text


def test_before_the_end_the_end_is_not_known(model: Model) -> None:
    with model.generate("Once", max_tokens=3) as stream:
        next(stream)
        assert not stream.finished
        assert stream.finish_reason is None and stream.usage is None and stream.seed is None
        assert stream.receipt == []
        assert len(stream.token_ids) >= 1


def test_characters_of_several_bytes_and_text_held_back() -> None:
    with FakeServer(reply="né… END of it") as server, Client(server.target) as client:
        model = client.model()
        result = model.generate("x", max_tokens=50, stop="END").result()
        assert (result.text, result.finish_reason, result.stop_string) == ("né… ", "stop_string", "END")
        result = model.generate("x", max_tokens=50, stop=["nowhere to be found"]).result()
        assert (result.text, result.finish_reason) == ("né… END of it", "stop_token")
        assert "".join(token.text for token in result.tokens) != result.text, "some text trails the tokens"
        short = model.generate("x", max_tokens=3).result()
        assert (short.text, short.finish_reason) == ("né", "length")


@pytest.mark.parametrize("tokens_per_event", [1, 4])
def test_result_drains_what_was_not_iterated(tokens_per_event: int) -> None:
    with FakeServer(tokens_per_event=tokens_per_event) as server, Client(server.target) as client:
        stream = client.model().generate("x", max_tokens=10, temperature=0)
        first = next(stream)
        result = stream.result()
    assert len(result.token_ids) == 10 and result.token_ids[0] == first.token_id
    assert [token.position for token in result.tokens] == list(range(3, 12))
    assert list(stream) == []


@pytest.mark.parametrize("chunk_bytes", [20, 1 << 20])
def test_readouts_of_prompt_and_tokens(chunk_bytes: int) -> None:
    """Each token's readout is what a whole-sequence extraction has at the position before it."""
    edit = add_vector(HOOK, np.ones(8), 0.5, positions=generated())
    readouts = [read_activations(HOOK), read_activations(ATTENTION), read_logit_lens(HOOK, top_k=3)]
    with FakeServer(chunk_bytes=chunk_bytes) as server, Client(server.target) as client:
        model = client.model()
        with model.generate("abc", max_tokens=4, seed=0, readouts=readouts, interventions=[edit]) as stream:
            before = stream.prompt_readouts
            assert before[HOOK].shape == (4, 8) and before[ATTENTION].shape == (2, 4, 4)
            assert before.positions[HOOK] == [0, 1, 2, 3]
            assert before.logit_lens[HOOK].positions == [0, 1, 2, 3]
            tokens = list(stream)
        ids = stream.prompt + stream.token_ids
        unedited = model.activations(ids, hook_points=HOOK)[HOOK]
    assert np.array_equal(before[HOOK], unedited[:4])
    assert np.array_equal(tokens[0].activations[HOOK], unedited[3]), "read at the prompt's last position"
    for token in tokens[1:]:
        assert np.allclose(token.activations[HOOK], unedited[token.position - 1] + 0.5)
        assert token.activations[ATTENTION].shape == (2, token.position)
        assert len(token.logit_lens[HOOK]) == 3
    assert tokens[0].features == {} and tokens[0].probes == {}
    assert stream.receipt[0].positions_applied == 3, "the last token is never fed"
    assert (stream.receipt[0].edit, stream.receipt[0].hook_point) == ("add_vector", HOOK)
    assert len(stream.receipt[0].content_hash) == 64


def test_readouts_of_one_hook_point_merge_by_position(model: Model) -> None:
    readouts = [
        read_activations(HOOK, [3]),
        read_activations(HOOK, [0, 3]),
        read_activations(HOOK, generated()),
    ]
    with model.generate("abc", max_tokens=2, readouts=readouts) as stream:
        assert stream.prompt_readouts.positions[HOOK] == [0, 3]
        everything = model.activations("abc", hook_points=HOOK)[HOOK]
        assert np.array_equal(stream.prompt_readouts[HOOK], everything[[0, 3]])


def test_prompt_readouts_wait_for_no_token() -> None:
    """The first token is far off; the prompt is read all the same."""
    with FakeServer(token_delay_s=2.0) as server, Client(server.target) as client:
        model = client.model()
        start = time.monotonic()
        with model.generate("abc", max_tokens=5, readouts=[read_activations(HOOK, prompt())]) as stream:
            assert stream.prompt_readouts[HOOK].shape == (4, 8)
            assert time.monotonic() - start < 3.8, "one event's delay, not two"


def test_top_logprobs_only_where_asked(model: Model) -> None:
    plain, asked = (model.generate("a", max_tokens=1, logprobs=k).result().tokens[0] for k in (0, 3))
    assert plain.top_logprobs is None
    assert asked.top_logprobs is not None and len(asked.top_logprobs) == 3


def test_leaving_the_block_cancels_at_the_server() -> None:
    with FakeServer(token_delay_s=0.02) as server, Client(server.target) as client:
        with client.model().generate("x", max_tokens=400) as stream:
            next(stream)
        server.wait_cancelled(1)
        assert server.active_calls == 0
        with pytest.raises(CancelledError):
            list(stream)


def test_an_exception_in_the_block_cancels_too() -> None:
    with FakeServer(token_delay_s=0.02) as server, Client(server.target) as client:
        with pytest.raises(ZeroDivisionError), client.model().generate("x", max_tokens=400) as stream:
            next(stream)
            raise ZeroDivisionError
        server.wait_cancelled(1)


def test_finishing_is_not_cancelling(server: FakeServer, model: Model) -> None:
    with model.generate("x", max_tokens=3) as stream:
        stream.result()
    with pytest.raises(TimeoutError):
        server.wait_cancelled(1, timeout=0.2)


def test_cancel_from_another_thread_wakes_the_reader() -> None:
    with FakeServer(token_delay_s=30) as server, Client(server.target) as client:
        stream = client.model().generate("x", max_tokens=5)
        threading.Timer(0.2, stream.cancel).start()
        start = time.monotonic()
        with pytest.raises(CancelledError) as caught:
            next(stream)
        assert time.monotonic() - start < 5
        assert caught.value.request_id == stream.request_id
        server.wait_cancelled(1)


def test_the_deadline_covers_the_whole_stream() -> None:
    with FakeServer(token_delay_s=0.05) as server, Client(server.target, timeout=0.5) as client:
        model = client.model()
        with pytest.raises(DeadlineExceededError, match=r"within 0\.5 s") as caught:
            model.generate("x", max_tokens=100).result()
        assert caught.value.remedy and caught.value.reason == "DEADLINE"
        assert len(model.generate("x", max_tokens=20, timeout=10).result().token_ids) == 20
        budget = server.calls[-1].timeout_s
        assert budget is not None and 8 < budget < 11


def test_a_stream_that_breaks_off_is_an_error(server: FakeServer, model: Model) -> None:
    server.fail("Generate", Failure("UNAVAILABLE", "the server went away"), after_events=3)
    with model.generate("x", max_tokens=10) as stream, pytest.raises(UnavailableError):
        list(stream)
    assert len(stream.token_ids) == 2 and not stream.finished
    assert sum(call.method == "Generate" for call in server.calls) == 1, "never again after the first event"


def test_events_out_of_protocol_are_errors() -> None:
    state = GenerationState()
    with pytest.raises(GlasshouseError, match="before the prompt"):
        state.feed(generation_pb2.GenerateResponse(tokens=generation_pb2.TokensEvent()))
    state.feed(generation_pb2.GenerateResponse(prompt=generation_pb2.PromptEvent(token_ids=[1])))
    assert state.prompt_complete, "nothing was asked for"
    with pytest.raises(GlasshouseError, match="without its last event"):
        state.end()


async def test_async_stream() -> None:
    async with _served(token_delay_s=0.01) as (server, client):
        model = await client.model()
        async with model.generate("abc", max_tokens=5, seed=1, readouts=[read_activations(HOOK)]) as stream:
            assert stream.prompt_readouts[HOOK].shape == (4, 8) and len(stream.prompt) == 4
            tokens = [token async for token in stream]
        assert [token.token_id for token in tokens] == stream.token_ids and stream.finished
        result = await model.generate("abc", max_tokens=5, seed=1).result()
        assert result.text == stream.text
        async with model.generate("abc", max_tokens=300) as left:
            await anext(left)
        await asyncio.to_thread(server.wait_cancelled, 1)
        with pytest.raises(CancelledError):
            await anext(left)


async def test_async_prompt_is_not_there_before_the_first_event() -> None:
    async with _served() as (_, client):
        model = await client.model()
        stream = model.generate("abc", max_tokens=2)
        with pytest.raises(RuntimeError, match="async with"):
            _ = stream.prompt
        await stream
        assert len(stream.prompt) == 4
        await stream.result()


async def test_cancelling_the_task_cancels_the_call() -> None:
    async with _served(token_delay_s=0.05) as (server, client):
        model = await client.model()

        async def consume() -> None:
            async with model.generate("abc", max_tokens=300) as stream:
                async for _ in stream:
                    pass

        task = asyncio.create_task(consume())
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(server.wait_cancelled, 1)


async def test_many_streams_at_once() -> None:
    async with _served(token_delay_s=0.002) as (_, client):
        model = await client.model()
        edits = [ablate_direction(HOOK, np.eye(8)[i % 8]) for i in range(32)]
        streams = [
            model.generate("abc", max_tokens=10, temperature=0, interventions=[edit]).result()
            for edit in edits
        ]
        results = await asyncio.gather(*streams)
    assert len({result.text for result in results}) == 8
    assert all(len(result.token_ids) == 10 for result in results)


class _served:  # noqa: N801
    """A fake server and an async client, for `async with`."""

    def __init__(self, **options: float) -> None:
        self.server = FakeServer(**options)  # type: ignore[arg-type]

    async def __aenter__(self) -> tuple[FakeServer, AsyncClient]:
        self.server.start()
        self.client = AsyncClient(self.server.target)
        return self.server, self.client

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()
        self.server.stop()
