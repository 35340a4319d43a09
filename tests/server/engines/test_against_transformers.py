"""A batch of differently treated requests equals Hugging Face transformers with forward hooks, one at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from glasshouse.server.types.generation import ExtractionRequest, ScoreRequest
from glasshouse.server.types.interventions import (
    AblateDirection,
    AddVector,
    CapProjection,
    Intervention,
    Replace,
    Rotate,
)
from glasshouse.server.types.readouts import ReadActivations, ReadLogitLens
from glasshouse.server.types.selectors import NamedPositions, Selector

PROMPTS = [
    "Once upon a time there was a little girl named Lily.",
    "The cats near the tree",
    "One day, a boy named Tom went to the park. It was raining and he was very sad because",
    "The capital of France is",
    "In the end,",
]
N_TOKENS = 20
READ = "blocks.4.hook_resid_post"

GENERATED = Selector(named=NamedPositions.GENERATED)
PROMPT = Selector(named=NamedPositions.PROMPT)
LAST = Selector(named=NamedPositions.LAST)


def treatments(d: int, d_mlp: int, formulas: Any) -> list[list[tuple[Intervention, str, Callable[..., Any], Any]]]:
    """Sixteen sets of interventions: (ours, hook point, selected(position, n_prompt), the formula)."""
    rng = np.random.default_rng(7)

    def vector(scale: float = 1.0, width: int = d) -> np.ndarray:
        return (rng.standard_normal(width) * scale).astype(np.float32)

    def one(name: str, edit: Any, formula: Any, positions: Selector, selected: Any, keep: bool = False) -> Any:
        ours = Intervention(hook_point=name, edit=edit, positions=positions, preserve_norm=keep)
        return ours, name, selected, formula

    def everywhere(p: int, n: int) -> bool:
        return True

    v = [vector(1.0) for _ in range(20)]
    wide = vector(0.5, d_mlp)
    patch = vector(1.0)
    rows = np.stack([vector(1.0) for _ in range(3)])
    every = Selector.all()
    resid = "blocks.{}.hook_resid_{}".format
    return [
        [],
        [one(resid(2, "post"), AddVector(vector=v[0], coefficient=1.5), formulas.add(v[0], 1.5), every, everywhere)],
        [
            one(
                resid(3, "pre"),
                AddVector(vector=v[1], coefficient=0.4, norm_scaled=True),
                formulas.add_norm(v[1], 0.4),
                every,
                everywhere,
            )
        ],
        [
            one(
                resid(1, "mid"),
                AddVector(vector=v[2], coefficient=-2.0),
                formulas.add_kept(v[2], -2.0),
                every,
                everywhere,
                keep=True,
            )
        ],
        [one(resid(4, "post"), AblateDirection(vector=v[3]), formulas.ablate(v[3]), every, everywhere)],
        [
            one(
                resid(3, "post"),
                CapProjection(vector=v[4], maximum=0.1, minimum=-0.1),
                formulas.cap(v[4], -0.1, 0.1),
                every,
                everywhere,
            )
        ],
        [
            one(
                resid(2, "mid"),
                Rotate(first=v[5], second=v[6], angle_radians=2.0),
                formulas.rotate(v[5], v[6], 2.0),
                every,
                everywhere,
            )
        ],
        [
            one(
                resid(2, "post"),
                Replace(activations=patch),
                formulas.constant(patch),
                LAST,
                lambda p, n: p == n - 1,
            )
        ],
        [
            one(
                resid(1, "post"),
                AddVector(vector=v[7], coefficient=2.0),
                formulas.add(v[7], 2.0),
                GENERATED,
                lambda p, n: p >= n,
            )
        ],
        [
            one(
                resid(1, "post"),
                AddVector(vector=v[8], coefficient=2.0),
                formulas.add(v[8], 2.0),
                PROMPT,
                lambda p, n: p < n,
            )
        ],
        [
            one(
                "blocks.2.hook_attn_out",
                AddVector(vector=v[9], coefficient=1.0),
                formulas.add(v[9], 1.0),
                Selector(at=(0, 2, 9)),
                lambda p, n: p in (0, 2, 9),
            ),
            one("blocks.3.hook_mlp_out", AblateDirection(vector=v[10]), formulas.ablate(v[10]), every, everywhere),
        ],
        [
            one(
                "blocks.1.mlp.hook_post",
                AddVector(vector=wide, coefficient=1.0),
                formulas.add(wide, 1.0),
                Selector(span=(3, 11)),
                lambda p, n: 3 <= p < 11,
            )
        ],
        [
            one(
                "hook_embed",
                AddVector(vector=v[11], coefficient=0.5),
                formulas.add(v[11], 0.5),
                Selector(named=NamedPositions.ALL, exclude_bos=True),
                lambda p, n: p != 0,
            )
        ],
        [
            one(resid(3, "post"), AddVector(vector=v[12]), formulas.add(v[12], 1.0), every, everywhere),
            one(resid(3, "post"), AblateDirection(vector=v[12]), formulas.ablate(v[12]), every, everywhere),
            one(resid(3, "post"), AddVector(vector=v[13]), formulas.add(v[13], 1.0), GENERATED, lambda p, n: p >= n),
        ],
        [
            one("blocks.0.attn.hook_z", AddVector(vector=v[14]), formulas.add(v[14], 1.0), every, everywhere),
            one("blocks.5.attn.hook_q", AblateDirection(vector=v[15]), formulas.ablate(v[15]), every, everywhere),
        ],
        [
            one(
                resid(2, "post"),
                Replace(activations=rows),
                None,
                Selector(at=(1, 2, 3)),
                lambda p, n: p in (1, 2, 3),
            ),
        ],
    ], rows  # type: ignore[return-value]


def oracle_edits(treatment: Any, n_prompt: int, rows: np.ndarray, formulas: Any) -> list[Any]:
    edits: list[Any] = []
    for _, name, selected, formula in treatment:
        if formula is None:
            for offset, row in enumerate(rows):
                edits.append((name, lambda p, at=offset + 1: p == at, formulas.constant(row)))
        else:
            edits.append((name, lambda p, selected=selected: selected(p, n_prompt), formula))
    return edits


async def test_sixteen_treatments_in_one_batch(
    engine: Any, answer: Any, oracle: Any, formulas: Any, fable_model: Any
) -> None:
    all_treatments, rows = treatments(fable_model.d_model, fable_model.d_mlp, formulas)
    prompts = [fable_model.tokenizer.encode(PROMPTS[i % len(PROMPTS)]) for i in range(len(all_treatments))]

    async def ours(index: int) -> Any:
        # Requests join while others decode.
        await asyncio.sleep(0.004 * index)
        return await answer(
            engine,
            prompts[index],
            max_tokens=N_TOKENS,
            ignore_eos=True,
            interventions=tuple(item[0] for item in all_treatments[index]),
            readouts=(ReadActivations(hook_point=READ), ReadLogitLens(hook_point="blocks.3.hook_resid_mid", top_k=3)),
        )

    answers = await asyncio.gather(*(ours(index) for index in range(len(all_treatments))))
    plain_ids = []
    for index, got in enumerate(answers):
        prompt = prompts[index]
        edits = oracle_edits(all_treatments[index], len(prompt), rows, formulas)
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
        assert [token.position for token in got.tokens] == list(range(len(prompt), len(prompt) + N_TOKENS))
        plain_ids.append(tuple(ids))
        fed = len(prompt) + N_TOKENS - 1
        for receipt, item in zip(got.finished.receipt, all_treatments[index], strict=True):
            expected = sum(item[2](p, len(prompt)) for p in range(fed))
            assert receipt.positions_applied == expected
            assert receipt.hook_points == (item[1],)
    # The treatments are not idle: they change what is said.
    changed = sum(plain_ids[i] != tuple(oracle.greedy(prompts[i], N_TOKENS)[0]) for i in range(1, 16))
    assert changed >= 8


async def test_plain_greedy_equals_generate(engine: Any, answer: Any, oracle: Any, fable_model: Any) -> None:
    prompts = [fable_model.tokenizer.encode(text) for text in PROMPTS]
    answers = await asyncio.gather(*(answer(engine, prompt, max_tokens=40) for prompt in prompts))
    for prompt, got in zip(prompts, answers, strict=True):
        expected = oracle.model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=40, do_sample=False
        )
        assert got.ids == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("hook_point", ["blocks.3.hook_resid_post", "unembed"])
async def test_score_under_an_edit(
    engine: Any, oracle: Any, formulas: Any, fable_model: Any, hook_point: str
) -> None:
    ids = fable_model.tokenizer.encode(PROMPTS[2])
    width = fable_model.d_model if hook_point != "unembed" else fable_model.vocab_size
    v = np.random.default_rng(3).standard_normal(width).astype(np.float32)
    request = ScoreRequest(
        tokens=tuple(ids),
        top_k=4,
        interventions=(Intervention(hook_point=hook_point, edit=AddVector(vector=v)),),
    )
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


async def test_extraction_equals_one_forward_each(engine: Any, oracle: Any, fable_model: Any) -> None:
    points = ("blocks.0.hook_resid_pre", "blocks.2.hook_attn_out", "blocks.5.hook_resid_post", "blocks.1.attn.hook_z")
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


async def test_logit_lens_at_the_last_layer_is_the_prediction(engine: Any, answer: Any, fable_model: Any) -> None:
    ids = fable_model.tokenizer.encode(PROMPTS[0])
    last = f"blocks.{fable_model.n_layers - 1}.hook_resid_post"
    got = await answer(engine, ids, max_tokens=6, top_logprobs=3, readouts=(ReadLogitLens(hook_point=last, top_k=3),))
    for token in got.tokens:
        assert token.readouts[0].token_ids[0] == token.token_id
        np.testing.assert_allclose(token.readouts[0].logprobs, token.top_logprobs.logprobs, atol=1e-4)
        assert token.top_logprobs.logprobs[0] == pytest.approx(token.logprob, abs=1e-5)
