"""Generate and Score through a real server: the order of events, their sizes, what they mean."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from time import perf_counter
from typing import Any

import numpy as np
import pytest

from glasshouse.server.types.configuration import Settings, StreamSettings
from glasshouse.server.types.generation import GenerationRequest
from glasshouse.server.types.interventions import AddVector, ScaleFeatures, SetFeatures
from glasshouse.server.types.models import ModelInfo
from glasshouse.server.types.readouts import ReadFeatures
from glasshouse.v1 import generation_pb2 as pb
from glasshouse.wire.tensors import TensorAssembler, pack, unpack

from ..fake_engine import BOS, FakeEngine
from ..serving import events_of, refusal, serving

HOOK = "blocks.1.hook_resid_post"
FOUR_MIB = 4 << 20


def request(text: str = "abc", max_tokens: int = 5, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(input={"text": text}, max_tokens=max_tokens, **fields)


async def test_prompt_then_tokens_then_finished() -> None:
    async with serving() as served:
        events = await events_of(served.generation.Generate(request()))
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["prompt", *["tokens"] * (len(events) - 2), "finished"]
    assert list(events[0].prompt.token_ids) == [BOS, *b"abc"]
    tokens = [token for event in events for token in event.tokens.tokens]
    assert [token.position for token in tokens] == [4, 5, 6, 7, 8]
    assert [token.token_id for token in tokens] == [BOS, 97, 98, 99, BOS]
    assert "".join(token.text for token in tokens) == "abc"
    finished = events[-1].finished
    assert finished.finish_reason == pb.FINISH_REASON_LENGTH
    assert (finished.usage.prompt_tokens, finished.usage.generated_tokens) == (4, 5)


async def test_a_batch_of_tokens_is_one_message() -> None:
    async with serving(FakeEngine(burst=10)) as served:
        events = await events_of(served.generation.Generate(request(max_tokens=20)))
    assert [len(event.tokens.tokens) for event in events] == [0, 10, 10, 0]


@pytest.mark.parametrize("form", ["token_ids", "messages", "text without BOS"])
async def test_forms_of_input(form: str) -> None:
    inputs: dict[str, tuple[dict[str, Any], list[int]]] = {
        "token_ids": ({"token_ids": [5, 6]}, [5, 6]),
        "messages": ({"messages": [{"role": "user", "content": "hi"}]}, list(b"<user>hi\n<assistant>")),
        "text without BOS": ({"text": "hi", "add_special_tokens": False}, list(b"hi")),
    }
    message, ids = inputs[form]
    async with serving() as served:
        events = await events_of(served.generation.Generate(pb.GenerateRequest(input=message, max_tokens=1)))
    assert list(events[0].prompt.token_ids) == ids


async def test_long_text_is_tokenized_like_short_text() -> None:
    async with serving() as served:
        asked = pb.ScoreRequest(input={"text": "y" * 500})
        response = await served.generation.Score(asked)
    assert list(response.token_ids) == [BOS] + [ord("y")] * 500


async def test_a_given_seed_is_used_and_a_missing_one_is_made_and_reported() -> None:
    engine = FakeEngine()
    async with serving(engine) as served:
        given = await events_of(served.generation.Generate(request(sampling={"seed": -7})))
        made = [await events_of(served.generation.Generate(request())) for _ in range(2)]
    seeds = [seen.sampling.seed for seen in engine.seen if isinstance(seen, GenerationRequest)]
    assert seeds == [-7, made[0][-1].finished.seed, made[1][-1].finished.seed]
    assert given[-1].finished.seed == -7
    assert seeds[1] != seeds[2]


async def test_zero_temperature_is_not_a_missing_temperature() -> None:
    engine = FakeEngine()
    async with serving(engine) as served:
        await events_of(served.generation.Generate(request(sampling={"temperature": 0})))
        await events_of(served.generation.Generate(request()))
    temperatures = [seen.sampling.temperature for seen in engine.seen if isinstance(seen, GenerationRequest)]
    assert temperatures == [0.0, 1.0]


async def test_vectors_arrive_as_float32_and_receipts_come_back() -> None:
    engine = FakeEngine()
    bfloat16 = pack(np.arange(8, dtype=np.float32)).SerializeToString()
    edit = {"hook_point": HOOK, "add_vector": {"coefficient": 2.5, "scale": pb_scale_norm()}}
    asked = request(interventions=[edit])
    asked.interventions[0].add_vector.vector.ParseFromString(bfloat16)
    async with serving(engine) as served:
        events = await events_of(served.generation.Generate(asked))
        assert served.metrics()['glasshouse_interventions_total{edit="add_vector"}'] == 1
    seen = engine.seen[0].interventions[0].edit
    assert isinstance(seen, AddVector)
    assert seen.vector.dtype == np.float32
    np.testing.assert_array_equal(seen.vector, np.arange(8))
    assert (seen.coefficient, seen.norm_scaled) == (2.5, True)
    receipt = events[-1].finished.receipt[0]
    assert (receipt.edit, receipt.hook_point, receipt.positions_applied) == ("add_vector", HOOK, 3)


def pb_scale_norm() -> int:
    from glasshouse.v1 import interventions_pb2

    return interventions_pb2.ADD_SCALE_NORM


async def test_readouts_of_prompt_and_tokens() -> None:
    readouts: list[Any] = [
        {"activations": {"hook_point": HOOK}},
        {"logit_lens": {"hook_point": HOOK, "top_k": 3}},
    ]
    async with serving() as served:
        events = await events_of(served.generation.Generate(request(readouts=readouts)))
        n_bytes = served.metrics()["glasshouse_readout_bytes_total"]
    activations, lens = events[0].prompt.readouts
    assembler = TensorAssembler()
    assert assembler.add(activations.activations)
    assert assembler.result().shape == (4, 8)
    assert list(activations.positions) == list(range(4))
    assert [list(top.token_ids) for top in lens.logit_lens.positions] == [[65, 66, 67]] * 4
    assert list(lens.logit_lens.positions[0].tokens) == ["A", "B", "C"]
    token = next(event.tokens.tokens[0] for event in events if event.WhichOneof("event") == "tokens")
    # What was read at the position before.
    np.testing.assert_array_equal(unpack(token.readouts[0].activations), np.full(8, token.position - 1))
    assert list(token.readouts[1].logit_lens.token_ids) == [65, 66, 67]
    assert n_bytes == 4 * 8 * 4 + 4 * 3 * 8 + 5 * (8 * 4 + 3 * 8)


async def test_feature_edits_and_readouts() -> None:
    engine = FakeEngine()
    asked = request(
        interventions=[
            {"set_features": {"dictionary": "d", "features": [4, 5], "values": [1.5, 2]}},
            {"scale_features": {"dictionary": "d", "features": [6], "factors": [0]}},
        ],
        readouts=[{"features": {"dictionary": "d"}}, {"features": {"dictionary": "d", "features": [7, 3]}}],
    )
    async with serving(engine) as served:
        events = await events_of(served.generation.Generate(asked))
    seen = engine.seen[0]
    assert isinstance(seen, GenerationRequest)
    edits = [intervention.edit for intervention in seen.interventions]
    assert edits == [
        SetFeatures(dictionary="d", features=(4, 5), values=(1.5, 2.0)),
        ScaleFeatures(dictionary="d", features=(6,), factors=(0.0,)),
    ]
    assert [(r.top_k, r.features) for r in seen.readouts if isinstance(r, ReadFeatures)] == [
        (8, ()),
        (0, (7, 3)),
    ]
    rows = events[0].prompt.readouts[1].features
    assert list(rows.indptr) == [0, 2, 4, 6, 8]
    assert list(rows.activations) == list(range(8))
    value = events[1].tokens.tokens[0].readouts[1].features
    assert (list(value.feature_ids), list(value.activations)) == ([7, 3], [2.0, 3.0])


async def test_many_features_of_a_prompt_come_in_pieces_that_join() -> None:
    engine = FakeEngine()
    asked = request("z" * 399, max_tokens=1, readouts=[{"features": {"dictionary": "d", "top_k": 1024}}])
    async with serving(engine) as served:
        events = await events_of(served.generation.Generate(asked))
    assert max(event.ByteSize() for event in events) < FOUR_MIB // 2
    pieces = [r for event in events if event.WhichOneof("event") == "prompt" for r in event.prompt.readouts]
    assert len(pieces) > 2
    assert all(piece.features.indptr[0] == 0 for piece in pieces)
    assert all(piece.features.indptr[-1] == len(piece.features.feature_ids) for piece in pieces)
    assert sum(len(piece.features.indptr) - 1 for piece in pieces) == 400
    values = [value for piece in pieces for value in piece.features.activations]
    assert values == list(range(400 * 1024))
    assert [len(piece.positions) for piece in pieces] == [400] + [0] * (len(pieces) - 1)


async def test_large_prompt_readouts_come_in_pieces() -> None:
    engine = FakeEngine()
    engine.width = 3000  # 400 positions of it are 4.8 MB
    readouts = [{"activations": {"hook_point": HOOK}}, {"activations": {"hook_point": HOOK}}]
    async with serving(engine) as served:
        asked = request("z" * 399, max_tokens=1, readouts=readouts)
        events = await events_of(served.generation.Generate(asked))
    prompts = [event.prompt for event in events if event.WhichOneof("event") == "prompt"]
    assert max(event.ByteSize() for event in events) < FOUR_MIB // 2
    assert len(prompts) >= 8
    assert list(prompts[0].token_ids)
    assert not any(list(prompt.token_ids) for prompt in prompts[1:])
    arrays = {}
    for index in (0, 1):
        assembler = TensorAssembler()
        pieces = [r for prompt in prompts for r in prompt.readouts if r.readout == index]
        for piece in pieces:
            assembler.add(piece.activations)
        arrays[index] = assembler.result()
        assert [bool(list(piece.positions)) for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    np.testing.assert_array_equal(arrays[0], arrays[1])
    assert arrays[0].shape == (400, 3000)


async def test_large_token_readouts_are_split_between_messages() -> None:
    engine = FakeEngine(burst=20)
    engine.width = 50_000
    readouts = [{"activations": {"hook_point": HOOK}}]
    async with serving(engine) as served:
        asked = request(max_tokens=20, readouts=readouts)
        events = await events_of(served.generation.Generate(asked))
    tokens = [event.tokens.tokens for event in events if event.WhichOneof("event") == "tokens"]
    assert len(tokens) >= 4
    assert sum(len(batch) for batch in tokens) == 20
    assert max(event.ByteSize() for event in events) < FOUR_MIB // 2


async def test_readouts_that_no_message_holds_are_refused() -> None:
    engine = FakeEngine()
    engine.width = 1_100_000
    async with serving(engine) as served:
        asked = request(readouts=[{"activations": {"hook_point": HOOK}}])
        refused = await refusal(lambda: served.generation.Generate(asked))
        assert (refused.code, refused.reason) == ("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE")
        assert engine.running == 0


async def test_busy_streams_gather_their_tokens_and_lose_none() -> None:
    engine = BufferedEngine(step_s=0.002)
    streams = StreamSettings(gather_ms_per_stream=10, max_gather_ms=40)
    async with serving(engine, settings=Settings(streams=streams)) as served:
        start = perf_counter()
        both = await asyncio.gather(
            *(events_of(served.generation.Generate(request(max_tokens=100))) for _ in range(4))
        )
        assert perf_counter() - start < 5
    for events in both:
        tokens = [token for event in events for token in event.tokens.tokens]
        assert [token.position for token in tokens] == list(range(4, 104))
        assert len(events) < 60


class BufferedEngine(FakeEngine):
    """As real ones do, it goes on while its reader is busy, and hands over what has gathered."""

    async def generate(self, request: GenerationRequest) -> Any:
        queue: asyncio.Queue[Any] = asyncio.Queue()

        async def run() -> None:
            async for batch in FakeEngine.generate(self, request):
                await queue.put(batch)
            await queue.put(None)

        task = asyncio.create_task(run())
        try:
            while True:
                batches = [await queue.get()]
                while not queue.empty():
                    batches.append(queue.get_nowait())
                events = [event for batch in batches if batch for event in batch]
                if events:
                    yield events
                if batches[-1] is None:
                    return
        finally:
            task.cancel()


async def test_token_strings_are_looked_up_once() -> None:
    engine = FakeEngine()
    async with serving(engine) as served:
        for _ in range(3):
            await events_of(served.generation.Generate(request(max_tokens=50, top_logprobs=4)))
    assert engine.codec.calls == 4


async def test_score() -> None:
    async with serving() as served:
        response = await served.generation.Score(pb.ScoreRequest(input={"text": "abc"}, top_k=2))
        bare = await served.generation.Score(pb.ScoreRequest(input={"text": "abc"}))
    np.testing.assert_array_equal(unpack(response.logprobs), [np.nan, -1, -2, -3])
    assert [list(top.token_ids) for top in response.top] == [[], [65, 66], [65, 66], [65, 66]]
    assert list(response.tokens) == ["<256>", "a", "b", "c"]
    assert not bare.top


@pytest.mark.parametrize("n_tokens", [120, 500, 2000])
async def test_a_score_too_large_for_a_message_is_refused_before_it_runs(n_tokens: int) -> None:
    """What is said to fit does; what is refused has cost nothing."""
    engine = long_engine(4096)
    async with serving(engine, settings=small_messages()) as served:
        asked = pb.ScoreRequest(input={"text": "x" * (n_tokens - 1)}, top_k=100)
        refused = await refusal(lambda: served.generation.Score(asked))
        assert (refused.code, refused.reason) == ("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE")
        assert (refused.field, refused.metadata["value"]) == ("top_k", "100")
        assert not engine.seen, "nothing ran"
        fits = int(refused.metadata["top_k_that_fits"])
        assert (f"top_k of at most {fits}," in refused.metadata["remedy"]) == (fits > 0)
        asked.top_k = fits
        response = await served.generation.Score(asked)
        assert len(engine.seen) == 1 and response.ByteSize() <= SMALL
        assert response.ByteSize() > SMALL / 3 or not fits, "not much less than would fit"


async def test_a_score_of_a_text_too_long_for_a_message_names_the_input() -> None:
    engine = long_engine(8192)
    async with serving(engine, settings=small_messages()) as served:
        asked = pb.ScoreRequest(input={"text": "x" * 8000})
        refused = await refusal(lambda: served.generation.Score(asked))
        assert (refused.reason, refused.field) == ("MESSAGE_TOO_LARGE", "input")
        n_fit = int(re.search(r"at most about (\d+) tokens", refused.metadata["remedy"])[1])  # type: ignore[index]
        asked.input.text = "x" * (n_fit - 10)
        assert (await served.generation.Score(asked)).ByteSize() <= SMALL


async def test_alternatives_longer_than_the_vocabularys_are_measured() -> None:
    """Strings that no sample of the vocabulary foretells: refused in the same words, once they are known."""
    engine = FakeEngine()
    engine.codec.token_strings = lambda ids: ["y" * 300 if i == 65 else "y" for i in ids]  # type: ignore[method-assign]
    async with serving(engine, settings=small_messages()) as served:
        asked = pb.ScoreRequest(input={"text": "x" * 199}, top_k=10)
        refused = await refusal(lambda: served.generation.Score(asked))
        assert (refused.reason, refused.field) == ("MESSAGE_TOO_LARGE", "top_k")
        assert len(engine.seen) == 1
        assert 0 < int(refused.metadata["top_k_that_fits"]) < 10


SMALL = 50_000


def long_engine(context_length: int) -> FakeEngine:
    class Long(FakeEngine):
        @property
        def info(self) -> ModelInfo:
            return replace(super().info, context_length=context_length)

    return Long()


def small_messages() -> Settings:
    from glasshouse.server.types.limits import Limits

    return Settings(limits=Limits(max_message_bytes=SMALL))
