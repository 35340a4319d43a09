"""On every engine a batch of differently treated requests equals transformers with forward hooks, one at a time."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from glasshouse.server.types.errors import FailedPrecondition
from glasshouse.server.types.generation import ExtractionRequest, ScoreRequest
from glasshouse.server.types.interventions import AddVector, Intervention
from glasshouse.server.types.readouts import ReadActivations, ReadLogitLens
from glasshouse.wire import reasons

from ...oracles import formulas
from ...oracles.treatments import N_TOKENS, PROMPTS, READ, hooked, treatments
from ...oracles.vllm_engines import BOTH, EVERY_ENGINE

on_both = pytest.mark.parametrize("engine", BOTH, indirect=True)


def reached(engine: Any) -> set[str]:
    """The hook points that an engine reads and edits."""
    return {point.name for point in engine.hook_points if point.writable}


@pytest.mark.parametrize("engine", EVERY_ENGINE, indirect=True)
async def test_sixteen_treatments_in_one_batch(
    engine: Any, answer: Any, oracle: Any, fable_model: Any
) -> None:
    all_treatments = treatments(fable_model.d_model, fable_model.d_mlp, reached(engine))
    prompts = [fable_model.tokenizer.encode(PROMPTS[i % len(PROMPTS)]) for i in range(len(all_treatments))]

    async def ours(index: int) -> Any:
        # Requests join while others decode.
        await asyncio.sleep(0.004 * index)
        return await answer(
            engine,
            prompts[index],
            max_tokens=N_TOKENS,
            ignore_eos=True,
            interventions=tuple(part.ours for part in all_treatments[index]),
            readouts=(
                ReadActivations(hook_point=READ),
                ReadLogitLens(hook_point="blocks.3.hook_resid_mid", top_k=3),
            ),
        )

    answers = await asyncio.gather(*(ours(index) for index in range(len(all_treatments))))
    untreated = [oracle.greedy(prompt, N_TOKENS)[1] for prompt in prompts[: len(PROMPTS)]]
    for index, got in enumerate(answers):
        prompt = prompts[index]
        edits = hooked(all_treatments[index], len(prompt))
        ids, logprobs, captures = oracle.greedy(prompt, N_TOKENS, edits, [READ])
        assert got.ids == ids, f"treatment {index}"
        np.testing.assert_allclose(got.logprobs, logprobs, atol=1e-4)
        reference = captures[READ].numpy()
        prompt_part = got.prefilled.readouts[0]
        assert prompt_part.positions == tuple(range(len(prompt)))
        # The token at p carries the activation at p - 1; the first repeats the prompt's last.
        generated_part = np.stack([token.readouts[0] for token in got.tokens])
        np.testing.assert_array_equal(generated_part[0], prompt_part.values[-1])
        ours_all = np.concatenate([prompt_part.values, generated_part[1:]])
        error = np.abs(ours_all - reference).max() / np.abs(reference).max()
        assert error <= 1e-5, f"treatment {index}: relative error {error}"
        assert np.abs(ours_all - reference).max() <= 1e-4 * max(1.0, np.abs(reference).max())
        assert [token.position for token in got.tokens] == list(range(len(prompt), len(prompt) + N_TOKENS))
        fed = len(prompt) + N_TOKENS - 1
        for receipt, part in zip(got.finished.receipt, all_treatments[index], strict=True):
            expected = sum(part.covers(p, len(prompt)) for p in range(fed))
            assert receipt.positions_applied == expected
            assert receipt.hook_points == (part.ours.hook_point,)
        # The treatment is not idle.
        if all_treatments[index]:
            difference = np.subtract(logprobs, untreated[index % len(PROMPTS)])
            assert np.abs(difference).max() > 1e-3, f"treatment {index}"


@on_both
async def test_plain_greedy_equals_generate(engine: Any, answer: Any, oracle: Any, fable_model: Any) -> None:
    prompts = [fable_model.tokenizer.encode(text) for text in PROMPTS]
    answers = await asyncio.gather(*(answer(engine, prompt, max_tokens=40) for prompt in prompts))
    for prompt, got in zip(prompts, answers, strict=True):
        expected = oracle.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=40,
            do_sample=False,
        )
        assert got.ids == expected[0, len(prompt) :].tolist()


@on_both
@pytest.mark.parametrize("hook_point", ["blocks.3.hook_resid_post", "unembed"])
async def test_score_under_an_edit(engine: Any, oracle: Any, fable_model: Any, hook_point: str) -> None:
    ids = fable_model.tokenizer.encode(PROMPTS[2])
    width = fable_model.d_model if hook_point != "unembed" else fable_model.vocab_size
    v = np.random.default_rng(3).standard_normal(width).astype(np.float32)
    request = ScoreRequest(
        tokens=tuple(ids),
        top_k=4,
        interventions=(Intervention(hook_point=hook_point, edit=AddVector(vector=v)),),
    )
    if hook_point not in reached(engine):
        with pytest.raises(FailedPrecondition) as refused:
            await engine.score(request)
        assert refused.value.reason == reasons.HOOK_POINT_NOT_WRITABLE
        return
    result = await engine.score(request)
    if hook_point == "unembed":
        plain, _ = oracle.forward(ids)
        logprobs = (plain + torch.from_numpy(v)).log_softmax(-1)
    else:
        logprobs, _ = oracle.forward(ids, [(hook_point, lambda p: True, formulas.add(v, 1.0))])
    assert np.isnan(result.logprobs[0])
    expected = logprobs[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()
    np.testing.assert_allclose(result.logprobs[1:], expected, atol=1e-4)
    assert len(result.top) == len(ids) - 1
    for row, top in zip(logprobs[:-1], result.top, strict=True):
        values, _ = row.topk(4)
        np.testing.assert_allclose(top.logprobs, values.numpy(), atol=1e-4)
    assert result.receipt[0].positions_applied == len(ids)


@on_both
async def test_extraction_equals_one_forward_each(engine: Any, oracle: Any, fable_model: Any) -> None:
    points = (
        "blocks.0.hook_resid_pre",
        "blocks.2.hook_attn_out",
        "blocks.5.hook_resid_post",
        "blocks.1.attn.hook_z",
        "blocks.3.hook_resid_mid",
    )
    points = tuple(point for point in points if point in reached(engine))
    assert len(points) >= 4
    inputs = tuple(tuple(fable_model.tokenizer.encode(text)) for text in PROMPTS)
    seen = {}
    async for done in engine.extract(ExtractionRequest(inputs=inputs, hook_points=points)):
        seen[done.index] = done
    assert sorted(seen) == list(range(len(inputs)))
    for index, ids in enumerate(inputs):
        _, captures = oracle.forward(ids, capture=points)
        for name, values in zip(points, seen[index].activations, strict=True):
            reference = captures[name].numpy()
            assert values.shape == reference.shape
            assert np.abs(values - reference).max() <= 1e-5 * np.abs(reference).max()


@on_both
async def test_logit_lens_at_the_last_layer_is_the_prediction(
    engine: Any, answer: Any, fable_model: Any
) -> None:
    ids = fable_model.tokenizer.encode(PROMPTS[0])
    last = f"blocks.{fable_model.n_layers - 1}.hook_resid_post"
    got = await answer(
        engine, ids, max_tokens=6, top_logprobs=3, readouts=(ReadLogitLens(hook_point=last, top_k=3),)
    )
    for token in got.tokens:
        assert token.readouts[0].token_ids[0] == token.token_id
        np.testing.assert_allclose(token.readouts[0].logprobs, token.top_logprobs.logprobs, atol=1e-4)
        assert token.top_logprobs.logprobs[0] == pytest.approx(token.logprob, abs=1e-5)
