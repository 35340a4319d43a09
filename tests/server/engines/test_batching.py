"""Requests join, leave, are cancelled and fail without their neighbours noticing."""

from __future__ import annotations

import asyncio
import gc
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from glasshouse.server.engines.transformers.engine import TransformersEngine
from glasshouse.server.engines.transformers.scheduler import SchedulerSettings
from glasshouse.server.types.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    ServingError,
    Unavailable,
)
from glasshouse.server.types.generation import (
    ExtractionRequest,
    FinishReason,
    GenerationRequest,
    Sampling,
    ScoreRequest,
)
from glasshouse.server.types.interventions import AddVector, Intervention, Replace
from glasshouse.server.types.limits import Limits
from glasshouse.server.types.readouts import ReadActivations
from glasshouse.server.types.selectors import NamedPositions, Selector
from glasshouse.wire import reasons

from ...oracles.vllm_engines import BOTH

on_both = pytest.mark.parametrize("engine", BOTH, indirect=True)

PROMPT = "Once upon a time there was a"
RESID = "blocks.3.hook_resid_post"


def encode(model: Any, text: str = PROMPT) -> tuple[int, ...]:
    return tuple(model.tokenizer.encode(text))


def add(model: Any, coefficient: float, *, hook_point: str = RESID, seed: int = 0) -> Intervention:
    v = np.random.default_rng(seed).standard_normal(model.d_model).astype(np.float32)
    return Intervention(hook_point=hook_point, edit=AddVector(vector=v, coefficient=coefficient))


@on_both
@pytest.mark.parametrize(
    "sampling", [{}, {"top_k": 20}, {"top_p": 0.8}, {"temperature": 1.7, "top_k": 50, "top_p": 0.9}]
)
async def test_a_seed_gives_the_same_tokens_in_any_company(
    engine: Any, answer: Any, fable_model: Any, sampling: dict[str, Any]
) -> None:
    prompt = encode(fable_model)
    chosen = Sampling(seed=11, **sampling)
    alone = await answer(engine, prompt, max_tokens=30, sampling=chosen, ignore_eos=True)
    company = [
        answer(
            engine,
            encode(fable_model, PROMPT + " dog and" * (i % 4)),
            max_tokens=10 + 3 * i,
            sampling=Sampling(seed=i, temperature=0.5 * (i % 3)),
            interventions=(add(fable_model, 0.5 * i, seed=i),),
        )
        for i in range(9)
    ]
    crowded, *_ = await asyncio.gather(
        answer(engine, prompt, max_tokens=30, sampling=chosen, ignore_eos=True), *company
    )
    other = await answer(
        engine, prompt, max_tokens=30, sampling=Sampling(seed=12, **sampling), ignore_eos=True
    )
    assert crowded.ids == alone.ids
    assert other.ids != alone.ids
    assert crowded.finished.seed == 11


@on_both
async def test_samples_follow_the_model_distribution(
    engine: Any, answer: Any, oracle: Any, fable_model: Any
) -> None:
    """Chi-square over the ten likeliest first tokens, 600 seeds, against the oracle's probabilities."""
    prompt = encode(fable_model)
    answers = await asyncio.gather(
        *(answer(engine, prompt, max_tokens=1, sampling=Sampling(seed=seed)) for seed in range(60))
    )
    for start in range(60, 600, 60):
        answers += await asyncio.gather(
            *(
                answer(engine, prompt, max_tokens=1, sampling=Sampling(seed=s))
                for s in range(start, start + 60)
            )
        )
    logprobs, _ = oracle.forward(prompt)
    probabilities, ids = logprobs[-1].exp().topk(10)
    counts = np.array([sum(a.ids[0] == int(i) for a in answers) for i in ids])
    expected = probabilities.numpy() * len(answers)
    counts = np.append(counts, len(answers) - counts.sum())
    expected = np.append(expected, len(answers) - expected.sum())
    chi_square = ((counts - expected) ** 2 / np.maximum(expected, 1e-9))[expected > 1].sum()
    assert chi_square < 35  # 10 degrees of freedom: p < 1e-4


@on_both
async def test_top_k_one_is_greedy(engine: Any, answer: Any, fable_model: Any) -> None:
    prompt = encode(fable_model)
    greedy = await answer(engine, prompt, max_tokens=12)
    narrowed = await answer(engine, prompt, max_tokens=12, sampling=Sampling(top_k=1, seed=3))
    nucleus = await answer(engine, prompt, max_tokens=12, sampling=Sampling(top_p=1e-9, seed=3))
    assert greedy.ids == narrowed.ids == nucleus.ids


@on_both
async def test_stop_string_ends_before_it_and_is_never_shown(
    engine: Any, answer: Any, fable_model: Any
) -> None:
    prompt = encode(fable_model)
    plain = await answer(engine, prompt, max_tokens=40, ignore_eos=True)
    assert plain.text == fable_model.tokenizer.decode(plain.ids)
    stop = plain.text[20:27]
    stopped = await answer(engine, prompt, max_tokens=40, ignore_eos=True, stop=(stop, "never said"))
    assert stopped.text == plain.text[: plain.text.index(stop)]
    assert stopped.finished.reason is FinishReason.STOP_STRING
    assert stopped.finished.stop_string == stop
    # Text that only looks like the beginning of a stop string comes out in the end.
    almost = await answer(engine, prompt, max_tokens=40, ignore_eos=True, stop=(plain.text[-4:] + "~",))
    assert almost.text == plain.text
    assert almost.finished.reason is FinishReason.LENGTH


@on_both
async def test_stop_tokens(engine: Any, answer: Any, fable_model: Any) -> None:
    prompt = encode(fable_model)
    plain = await answer(engine, prompt, max_tokens=20, ignore_eos=True)
    stopped = await answer(engine, prompt, max_tokens=20, ignore_eos=True, stop_token_ids=(plain.ids[7],))
    cut = plain.ids.index(plain.ids[7])
    assert stopped.ids == plain.ids[: cut + 1]
    assert stopped.finished.reason is FinishReason.STOP_TOKEN
    assert stopped.text == fable_model.tokenizer.decode(plain.ids[:cut])


@on_both
async def test_leaving_frees_the_place_within_a_step(engine: Any, answer: Any, fable_model: Any) -> None:
    request = GenerationRequest(prompt=encode(fable_model), max_tokens=400, ignore_eos=True)
    for _ in range(50):
        async with aclosing(engine.generate(request)) as events:
            async for _ in events:
                break
    for _ in range(200):
        if engine.status().running == 0:
            break
        await asyncio.sleep(0.005)
    assert engine.status().running == 0
    assert engine.status().queued == 0
    gc.collect()
    assert not [row for row in gc.get_objects() if type(row).__name__ == "GenerationRow"]


async def test_the_queue_is_bounded_and_says_when_to_return(fable_model: Any, answer: Any) -> None:
    engine = TransformersEngine(fable_model, limits=Limits(max_running=2, max_queued=3))
    await engine.start()
    try:
        prompt = encode(fable_model)
        tasks = [
            asyncio.create_task(answer(engine, prompt, max_tokens=60, ignore_eos=True)) for _ in range(12)
        ]
        done = await asyncio.gather(*tasks, return_exceptions=True)
        refused = [error for error in done if isinstance(error, ResourceExhausted)]
        served = [got for got in done if not isinstance(got, BaseException)]
        assert len(refused) + len(served) == 12
        assert 3 <= len(served) <= 6
        assert all(error.reason == reasons.QUEUE_FULL and error.retry_after_s for error in refused)
        assert len({tuple(got.ids) for got in served}) == 1
    finally:
        await engine.stop()


@on_both
async def test_a_row_driven_to_infinity_fails_alone(engine: Any, answer: Any, fable_model: Any) -> None:
    prompt = encode(fable_model)
    alone = await answer(engine, prompt, max_tokens=25, ignore_eos=True)
    late = Intervention(
        hook_point=RESID,
        edit=AddVector(vector=np.full(fable_model.d_model, 3e38, np.float32), coefficient=1e30),
        positions=Selector(named=NamedPositions.GENERATED),
    )
    for _ in range(3):
        bad, *good = await asyncio.gather(
            answer(engine, prompt, max_tokens=25, ignore_eos=True, interventions=(late,)),
            *(answer(engine, prompt, max_tokens=25, ignore_eos=True) for _ in range(4)),
            return_exceptions=True,
        )
        assert isinstance(bad, FailedPrecondition)
        assert bad.reason == reasons.LOGITS_NOT_FINITE
        assert all(got.ids == alone.ids for got in good)
    # Nor does what it left in the cache reach a later, longer row in its place.
    later = await asyncio.gather(*(answer(engine, prompt, max_tokens=60, ignore_eos=True) for _ in range(6)))
    assert all(got.ids[:25] == alone.ids and np.isfinite(got.logprobs).all() for got in later)


async def test_a_long_prompt_in_pieces_equals_one_pass(fable_model: Any, answer: Any) -> None:
    pieces = TransformersEngine(
        fable_model,
        limits=Limits(),
        steps=SchedulerSettings(prefill_tokens=16, bulk_tokens=16, bulk_tokens_shared=8),
    )
    whole = TransformersEngine(fable_model, limits=Limits())
    await pieces.start()
    await whole.start()
    try:
        prompt = encode(fable_model, "The dog ran to the park and the girl was happy. " * 6)
        assert len(prompt) > 60
        treatment = {
            "interventions": (
                add(fable_model, 0.7),
                Intervention(
                    hook_point="blocks.1.hook_resid_post",
                    edit=Replace(activations=np.ones((2, fable_model.d_model), np.float32)),
                    positions=Selector(at=(15, 16)),
                ),
            ),
            "readouts": (
                ReadActivations(hook_point="blocks.5.hook_resid_post"),
                ReadActivations(hook_point="blocks.2.attn.hook_pattern"),
                ReadActivations(hook_point="unembed", positions=Selector(at=(3, 40))),
            ),
        }
        # A short neighbour runs between the pieces.
        one, neighbour = await asyncio.gather(
            answer(pieces, prompt, max_tokens=12, ignore_eos=True, **treatment),
            answer(pieces, encode(fable_model), max_tokens=30, ignore_eos=True),
        )
        other = await answer(whole, prompt, max_tokens=12, ignore_eos=True, **treatment)
        assert one.ids == other.ids
        assert neighbour.ids == (await answer(whole, encode(fable_model), max_tokens=30, ignore_eos=True)).ids
        for mine, theirs in zip(one.prefilled.readouts, other.prefilled.readouts, strict=True):
            assert mine.positions == theirs.positions
            np.testing.assert_allclose(mine.values, theirs.values, atol=1e-5 * np.abs(theirs.values).max())
        assert one.prefilled.readouts[1].values.shape == (fable_model.n_heads, len(prompt), len(prompt))
        # Attention maps while decoding: one row of keys a token, each summing to one.
        for token in one.tokens:
            assert token.readouts[1].shape == (fable_model.n_heads, token.position)
            np.testing.assert_allclose(token.readouts[1].sum(-1), 1.0, atol=1e-5)
        mine_score = await pieces.score(ScoreRequest(tokens=prompt, interventions=treatment["interventions"]))
        their_score = await whole.score(ScoreRequest(tokens=prompt, interventions=treatment["interventions"]))
        np.testing.assert_allclose(mine_score.logprobs, their_score.logprobs, atol=1e-4)
        assert [r.positions_applied for r in mine_score.receipt] == [len(prompt), 2]
    finally:
        await pieces.stop()
        await whole.stop()


async def test_extraction_goes_no_faster_than_its_reader(fable_model: Any, answer: Any) -> None:
    limits = Limits(max_buffered_bytes=1 << 20)
    engine = TransformersEngine(fable_model, limits=limits)
    await engine.start()
    try:
        inputs = tuple(encode(fable_model, PROMPT + " dog" * 60) for _ in range(200))
        request = ExtractionRequest(inputs=inputs, hook_points=(RESID, "blocks.4.hook_resid_post"))
        indices = []
        async with aclosing(engine.extract(request)) as results:
            async for extracted in results:
                indices.append(extracted.index)
                if len(indices) == 1:
                    # Not reading: the engine stops computing, generations go on.
                    await asyncio.sleep(0.3)
                    job = engine._scheduler.jobs[0]
                    per_input = sum(a.nbytes for a in extracted.activations)
                    assert job.stream.backlog_bytes < limits.max_buffered_bytes + 70 * per_input
                    assert len(job._waiting) > 50
                    assert (await answer(engine, encode(fable_model), max_tokens=5)).ids
        assert sorted(indices) == list(range(200))
    finally:
        await engine.stop()


async def test_stopping_ends_what_runs(fable_model: Any, answer: Any) -> None:
    engine = TransformersEngine(fable_model, limits=Limits(max_running=2))
    await engine.start()
    running = [
        asyncio.create_task(answer(engine, encode(fable_model), max_tokens=400, ignore_eos=True))
        for _ in range(4)
    ]
    await asyncio.sleep(0.1)
    await engine.stop()
    assert all(
        isinstance(error, Unavailable) for error in await asyncio.gather(*running, return_exceptions=True)
    )
    with pytest.raises(Unavailable):
        await answer(engine, encode(fable_model), max_tokens=1)
    assert not engine.status().healthy


def _bad(model: Any) -> list[tuple[dict[str, Any], type[ServingError], str, str]]:
    width = model.d_model

    def steer(vector: np.ndarray, hook_point: str = RESID, **rest: Any) -> dict[str, Any]:
        edit = AddVector(vector=vector, **rest)
        return {"interventions": (Intervention(hook_point=hook_point, edit=edit),)}

    def at(selector: Selector) -> dict[str, Any]:
        edit = AddVector(vector=np.ones(width, np.float32))
        return {"interventions": (Intervention(hook_point=RESID, edit=edit, positions=selector),)}

    v = np.ones(width, np.float32)
    nan, inf = v.copy(), v.copy()
    nan[3], inf[0] = np.nan, np.inf
    vector = "interventions[0].add_vector.vector"
    where = "interventions[0].hook_point"
    listed = "interventions[0].positions.at.positions"
    return [
        (steer(v[:-1]), InvalidArgument, reasons.WRONG_WIDTH, vector),
        (steer(v[None]), InvalidArgument, reasons.WRONG_WIDTH, vector),
        (steer(nan), InvalidArgument, reasons.VALUE_NOT_FINITE, vector),
        (steer(inf), InvalidArgument, reasons.VALUE_NOT_FINITE, vector),
        (steer(v * 0, norm_scaled=True), InvalidArgument, reasons.VALUE_OUT_OF_RANGE, vector),
        (
            steer(v, coefficient=float("nan")),
            InvalidArgument,
            reasons.VALUE_NOT_FINITE,
            "interventions[0].add_vector.coefficient",
        ),
        (steer(v, "blocks.3.hook_resid_pots"), NotFound, reasons.HOOK_POINT_NOT_FOUND, where),
        (steer(v, "blocks.99.hook_resid_post"), InvalidArgument, reasons.LAYER_OUT_OF_RANGE, where),
        (steer(v, "blocks.1.attn.hook_pattern"), FailedPrecondition, reasons.HOOK_POINT_NOT_WRITABLE, where),
        (at(Selector(at=(-1,))), InvalidArgument, reasons.VALUE_OUT_OF_RANGE, listed),
        (at(Selector(at=(10_000,))), InvalidArgument, reasons.POSITION_UNREACHABLE, listed),
        (at(Selector(at=(1, 1))), InvalidArgument, reasons.FIELD_CONFLICT, listed),
        (at(Selector(at=())), InvalidArgument, reasons.FIELD_REQUIRED, listed),
        (
            at(Selector(span=(5, 5))),
            InvalidArgument,
            reasons.VALUE_OUT_OF_RANGE,
            "interventions[0].positions.span",
        ),
        ({"prompt": ()}, InvalidArgument, reasons.EMPTY_INPUT, "input"),
        ({"prompt": (5, 999_999)}, InvalidArgument, reasons.TOKEN_OUT_OF_RANGE, "input.token_ids"),
        ({"prompt": (-1,)}, InvalidArgument, reasons.TOKEN_OUT_OF_RANGE, "input.token_ids"),
        ({"max_tokens": 100_000}, InvalidArgument, reasons.CONTEXT_EXCEEDED, "max_tokens"),
    ]


@on_both
@pytest.mark.parametrize("case", range(18))
async def test_refusals_name_the_field(engine: Any, answer: Any, fable_model: Any, case: int) -> None:
    cases = _bad(fable_model)
    assert len(cases) == 18
    request, error_class, reason, field = cases[case]
    request = {"prompt": encode(fable_model), "max_tokens": 5} | request
    with pytest.raises(error_class) as caught:
        await answer(engine, request.pop("prompt"), **request)
    assert caught.value.reason == reason
    assert caught.value.field == field
    assert caught.value.remedy


async def test_readouts_are_bounded_before_anything_runs(fable_model: Any, answer: Any) -> None:
    engine = TransformersEngine(fable_model, limits=Limits(max_readout_bytes=100_000))
    await engine.start()
    try:
        every = tuple(
            ReadActivations(hook_point=point.name) for point in engine.hook_points if point.kind == "residual"
        )
        with pytest.raises(ResourceExhausted) as caught:
            await answer(engine, encode(fable_model), max_tokens=200, readouts=every)
        assert (caught.value.reason, caught.value.field) == (reasons.LIMIT_EXCEEDED, "readouts")
        few = await answer(engine, encode(fable_model), max_tokens=20, readouts=every[:2], ignore_eos=True)
        assert len(few.tokens) == 20
    finally:
        await engine.stop()
