"""Features read and edited in a batch equal the formulas written out, one request at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glasshouse.server.dictionaries.formats.glasshouse import Recipe, save_dictionary
from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument, NotFound, ServingError
from glasshouse.server.types.interventions import AddVector, Intervention, ScaleFeatures, SetFeatures
from glasshouse.server.types.readouts import ReadFeatures
from glasshouse.server.types.selectors import NamedPositions, Selector
from glasshouse.wire import reasons

from ...oracles.vllm_engines import BOTH, EVERY_ENGINE

on_both = pytest.mark.parametrize("engine", BOTH, indirect=True)

PROMPTS = [
    "Once upon a time there was a little girl named Lily.",
    "The cats near the tree",
    "One day, a boy named Tom went to the park. It was raining and he was very sad because",
]
N_TOKENS = 16
N_FEATURES = 64
Values = Callable[[Tensor], Tensor]


@dataclass
class Random:
    """A random dictionary of each kind, with its formulas written out in float64."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor

    @staticmethod
    def of(d_in: int, d_out: int, seed: int) -> Random:
        generator = torch.Generator().manual_seed(seed)
        W_enc = torch.randn(d_in, N_FEATURES, generator=generator) / d_in**0.5
        b_enc = torch.randn(N_FEATURES, generator=generator) * 0.1
        W_dec = 6 * torch.randn(N_FEATURES, d_out, generator=generator) / d_out**0.5
        return Random(W_enc, b_enc, W_dec)

    def h(self, x: Tensor) -> Tensor:
        return x.double() @ self.W_enc.double() + self.b_enc.double()


def jumprelu(parts: Random, threshold: float) -> Values:
    return lambda x: (h := parts.h(x)).clamp_min(0) * (h > threshold)


def relu(parts: Random) -> Values:
    return lambda x: parts.h(x).clamp_min(0)


def topk(parts: Random, k: int) -> Values:
    def values(x: Tensor) -> Tensor:
        h = parts.h(x)
        kept = torch.zeros_like(h)
        best = h.topk(k, dim=-1)
        return kept.scatter(-1, best.indices, best.values).clamp_min(0)

    return values


def _saved(folder: Path, parts: Random, kind: str, architecture: str, **rest: Any) -> None:
    """One with a single encoder and decoder a site, in our own format."""
    points_in, points_out = rest["hook_points_in"], rest["hook_points_out"]
    W_enc, W_dec = parts.W_enc.T, parts.W_dec
    b_dec = torch.randn(len(points_out), W_dec.shape[1]) * 0.1
    if kind == "crosscoder":
        W_enc = W_enc.reshape(N_FEATURES, len(points_in), -1)
        W_dec = W_dec[:, None].expand(-1, len(points_out), -1)
    else:
        b_dec = b_dec[0]
    tensors = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": parts.b_enc, "b_dec": b_dec}
    tensors |= rest.pop("tensors", {})
    save_dictionary(Recipe(kind=kind, architecture=architecture, tensors=tensors, **rest), folder)


def _write_all(folder: Path, d: int) -> dict[str, Random]:
    """Every dictionary of these tests as a folder of its name; what they were made of."""

    def points(*layers: int, at: str = "hook_resid_post") -> tuple[str, ...]:
        return tuple(f"blocks.{layer}.{at}" for layer in layers)

    def both(*names: str) -> dict[str, Any]:
        return {"hook_points_in": names, "hook_points_out": names}

    parts = {"jump": Random.of(d, d, 1), "top": Random.of(d, d, 2), "trans": Random.of(d, d, 3)}
    threshold = {"threshold": torch.full((N_FEATURES,), 0.4)}
    _saved(folder / "jump", parts["jump"], "sae", "jumprelu", tensors=threshold, **both(*points(2)))
    _saved(folder / "top", parts["top"], "sae", "topk", k=6, **both(*points(4)))
    inside = {"hook_points_in": points(3, at="ln2.hook_out"), "hook_points_out": points(3, at="hook_mlp_out")}
    _saved(folder / "trans", parts["trans"], "transcoder", "standard", **inside)
    parts["cross"] = Random.of(3 * d, d, 4)
    _saved(folder / "cross", parts["cross"], "crosscoder", "standard", **both(*points(0, 2, 4)))
    layers = (1, 2, 3)
    sources = [Random.of(d, d, 10 + layer) for layer in layers]
    parts.update({f"clt{layer}": source for layer, source in zip(layers, sources, strict=True)})
    tensors = {"b_dec": torch.zeros(len(layers), d)}
    for i, source in enumerate(sources):
        # Each layer further on is written once more.
        strength = torch.arange(1, len(layers) - i + 1)[None, :, None]
        tensors[f"W_enc.{i}"] = source.W_enc.T
        tensors[f"W_dec.{i}"] = source.W_dec[:, None] * strength
        tensors[f"b_enc.{i}"] = source.b_enc
    recipe = Recipe(
        kind="cross_layer_transcoder",
        architecture="standard",
        hook_points_in=points(*layers, at="ln2.hook_out"),
        hook_points_out=points(*layers, at="hook_mlp_out"),
        tensors=tensors,
    )
    save_dictionary(recipe, folder / "clt")
    return parts


@pytest.fixture
async def held(engine: Any, tmp_path: Path) -> dict[str, Random]:
    parts = _write_all(tmp_path, engine.info.d_model)
    present = {held.name for held in engine.dictionaries.all()}
    for name in ("jump", "top", "trans", "cross", "clt"):
        # A vLLM engine is shared by the tests, and so are the dictionaries that it holds.
        if name not in present:
            await engine.load_dictionary(name, str(tmp_path / name))
    return parts


class Case:
    """A treatment: our interventions, and the same as plain hooks (made anew for each oracle pass)."""

    def __init__(self, ours: tuple[Intervention, ...], hooks: Callable[[], list[Any]]) -> None:
        self.ours, self.hooks = ours, hooks


def change(parts: Random, values: Values, features: list[int], new: Callable[[Tensor], Tensor]) -> Any:
    """s + sum_i (new_i - f_i) d_i, for an SAE."""

    def edit(s: Tensor) -> Tensor:
        f = values(s)[features]
        return (s.double() + (new(f) - f) @ parts.W_dec.double()[features]).float()

    return edit


def through(
    parts: Random, features: list[int], new: Callable[[Tensor], Tensor]
) -> tuple[Any, Callable[[float], Any]]:
    """The two halves of a transcoder's edit: what reads, and what writes (times a factor)."""
    deltas: list[Tensor] = []

    def read(x: Tensor) -> Tensor:
        f = relu(parts)(x)[features]
        deltas.append((new(f) - f) @ parts.W_dec.double()[features])
        return x

    def write(factor: float) -> Any:
        place = iter(range(10_000))
        return lambda s: (s.double() + factor * deltas[next(place)]).float()

    return read, write


def everywhere(p: int) -> bool:
    return True


def cases(parts: dict[str, Random], d_model: int) -> list[Case]:
    jump, top = jumprelu(parts["jump"], 0.4), topk(parts["top"], 6)
    at2, at4 = "blocks.2.hook_resid_post", "blocks.4.hook_resid_post"
    v = np.random.default_rng(0).standard_normal(d_model).astype(np.float32)

    def set_(dictionary: str, features: tuple[int, ...], *values: float, where: Any = None) -> Intervention:
        edit = SetFeatures(dictionary=dictionary, features=features, values=values)
        return Intervention(hook_point="", edit=edit, **({"positions": where} if where else {}))

    def scale(dictionary: str, features: tuple[int, ...], *factors: float) -> Intervention:
        return Intervention(
            hook_point="", edit=ScaleFeatures(dictionary=dictionary, features=features, factors=factors)
        )

    generated = Selector(span=(11, None))

    def transcoder(
        layer: int, part: str, features: list[int], new: Any, sinks: dict[int, float]
    ) -> Callable[[], Any]:
        def hooks() -> list[Any]:
            read, write = through(parts[part], features, new)
            found = [(f"blocks.{layer}.ln2.hook_out", everywhere, read)]
            return found + [(f"blocks.{m}.hook_mlp_out", everywhere, write(c)) for m, c in sinks.items()]

        return hooks

    return [
        Case(
            (set_("jump", (5,), 6.0),),
            lambda: [(at2, everywhere, change(parts["jump"], jump, [5], lambda f: f * 0 + 6))],
        ),
        Case(
            (set_("jump", (7, 9, 11), 4.0, 0.0, -3.0, where=generated),),
            lambda: [
                (
                    at2,
                    lambda p: p >= 11,
                    change(
                        parts["jump"], jump, [7, 9, 11], lambda f: torch.tensor([4.0, 0.0, -3.0]).double()
                    ),
                )
            ],
        ),
        Case(
            (scale("jump", tuple(range(30)), -2.0),),
            lambda: [(at2, everywhere, change(parts["jump"], jump, list(range(30)), lambda f: -2 * f))],
        ),
        Case(
            (scale("top", tuple(range(40)), 30.0),),
            lambda: [(at4, everywhere, change(parts["top"], top, list(range(40)), lambda f: 30 * f))],
        ),
        Case((set_("trans", (3,), 9.0),), transcoder(3, "trans", [3], lambda f: f * 0 + 9, {3: 1.0})),
        Case(
            (set_("clt", (N_FEATURES + 2,), 5.0),),
            transcoder(2, "clt2", [2], lambda f: f * 0 + 5, {2: 1.0, 3: 2.0}),
        ),
        Case(
            (
                set_("jump", (5,), 3.0),
                Intervention(hook_point=at2, edit=AddVector(vector=v, coefficient=0.7)),
                scale("jump", (6, 8), 4.0),
                scale("top", (4, 5), 0.0),
            ),
            lambda: [
                (at2, everywhere, change(parts["jump"], jump, [5], lambda f: f * 0 + 3)),
                (at2, everywhere, lambda s: s + 0.7 * torch.from_numpy(v)),
                (at2, everywhere, change(parts["jump"], jump, [6, 8], lambda f: 4 * f)),
                (at4, everywhere, change(parts["top"], top, [4, 5], lambda f: 0 * f)),
            ],
        ),
    ]


def oracle_greedy(oracle: Any, prompt: list[int], case: Case) -> tuple[list[int], list[float]]:
    ids, chosen = list(prompt), []
    for _ in range(N_TOKENS):
        logprobs, _ = oracle.forward(ids, case.hooks())
        token = int(logprobs[-1].argmax())
        ids.append(token)
        chosen.append(float(logprobs[-1, token]))
    return ids[len(prompt) :], chosen


@pytest.mark.parametrize("engine", EVERY_ENGINE, indirect=True)
async def test_feature_edits_in_one_batch(
    engine: Any, answer: Any, oracle: Any, fable_model: Any, held: dict[str, Random]
) -> None:
    treatments = cases(held, fable_model.d_model)
    prompts = [fable_model.tokenizer.encode(PROMPTS[i % 3]) for i in range(len(treatments))]
    answers = await asyncio.gather(
        *(
            answer(engine, prompt, max_tokens=N_TOKENS, ignore_eos=True, interventions=case.ours)
            for prompt, case in zip(prompts, treatments, strict=True)
        )
    )
    for index, (got, prompt, case) in enumerate(zip(answers, prompts, treatments, strict=True)):
        ids, logprobs = oracle_greedy(oracle, prompt, case)
        assert got.ids == ids, f"case {index}"
        np.testing.assert_allclose(got.logprobs, logprobs, atol=1e-4, err_msg=f"case {index}")
        fed = len(prompt) + N_TOKENS - 1
        assert [r.positions_applied for r in got.finished.receipt] == [
            fed - 11 if index == 1 else fed for _ in case.ours
        ]
        # The edit is not idle.
        assert abs(logprobs[0] - oracle.greedy(prompt, 1)[1][0]) > 1e-3 or index == 1
    assert answers[5].finished.receipt[0].hook_points == ("blocks.2.hook_mlp_out", "blocks.3.hook_mlp_out")


@pytest.mark.parametrize("engine", EVERY_ENGINE, indirect=True)
async def test_features_stream_with_each_token_and_for_the_prompt(
    engine: Any, answer: Any, oracle: Any, fable_model: Any, held: dict[str, Random]
) -> None:
    at = {
        "jump": ["blocks.2.hook_resid_post"],
        "top": ["blocks.4.hook_resid_post"],
        "trans": ["blocks.3.ln2.hook_out"],
    }
    at["cross"] = [f"blocks.{layer}.hook_resid_post" for layer in (0, 2, 4)]
    values = {
        "jump": jumprelu(held["jump"], 0.4),
        "top": topk(held["top"], 6),
        "trans": relu(held["trans"]),
        "cross": relu(held["cross"]),
    }
    names = list(values)
    readouts = tuple(
        [ReadFeatures(dictionary=name, top_k=5) for name in names]
        + [ReadFeatures(dictionary=name, features=(40, 3, 11)) for name in names]
    )
    prompts = [fable_model.tokenizer.encode(text) for text in PROMPTS]
    answers = await asyncio.gather(
        *(
            answer(engine, prompt, max_tokens=N_TOKENS, ignore_eos=True, readouts=readouts)
            for prompt in prompts
        )
    )
    points = sorted({point for several in at.values() for point in several})
    for prompt, got in zip(prompts, answers, strict=True):
        ids, _, captures = oracle.greedy(prompt, N_TOKENS, capture=points)
        assert got.ids == ids
        for index, name in enumerate(names):
            expected = values[name](torch.cat([captures[point] for point in at[name]], dim=-1)).numpy()
            top_rows, named_rows = got.prefilled.readouts[index], got.prefilled.readouts[index + len(names)]
            assert top_rows.positions == tuple(range(len(prompt)))
            seen = [top_rows.values.row(p) for p in range(len(prompt))]
            seen += [token.readouts[index] for token in got.tokens[1:]]
            named = [named_rows.values.row(p) for p in range(len(prompt))]
            named += [token.readouts[index + len(names)] for token in got.tokens[1:]]
            assert len(seen) == len(expected)
            for row, top, chosen in zip(expected, seen, named, strict=True):
                strongest = np.sort(row)[::-1][:5]
                np.testing.assert_allclose(top.activations, strongest[strongest > 0], atol=2e-5, rtol=1e-5)
                np.testing.assert_allclose(row[top.ids], top.activations, atol=2e-5, rtol=1e-5)
                assert chosen.ids.tolist() == [40, 3, 11]
                np.testing.assert_allclose(chosen.activations, row[[40, 3, 11]], atol=2e-5, rtol=1e-5)


@on_both
@pytest.mark.parametrize(
    ("edit", "error_class", "reason", "field"),
    [
        (
            SetFeatures(dictionary="jmp", features=(1,), values=(1.0,)),
            NotFound,
            reasons.DICTIONARY_NOT_FOUND,
            "set_features.dictionary",
        ),
        (
            SetFeatures(dictionary="jump", features=(64,), values=(1.0,)),
            NotFound,
            reasons.FEATURE_OUT_OF_RANGE,
            "set_features.features",
        ),
        (
            SetFeatures(dictionary="jump", features=(1, 1), values=(1.0,)),
            InvalidArgument,
            reasons.FIELD_CONFLICT,
            "set_features.features",
        ),
        (
            SetFeatures(dictionary="jump", features=(1, 2, 3), values=(1.0, 2.0)),
            InvalidArgument,
            reasons.FIELD_CONFLICT,
            "set_features.values",
        ),
        (
            ScaleFeatures(dictionary="jump", features=(1,), factors=(float("inf"),)),
            InvalidArgument,
            reasons.VALUE_NOT_FINITE,
            "scale_features.factors",
        ),
        (
            SetFeatures(dictionary="cross", features=(1,), values=(1.0,)),
            FailedPrecondition,
            reasons.CAPABILITY_MISSING,
            "set_features.dictionary",
        ),
    ],
)
async def test_refusals(
    engine: Any,
    answer: Any,
    fable_model: Any,
    held: dict[str, Random],
    edit: Any,
    error_class: type[ServingError],
    reason: str,
    field: str,
) -> None:
    with pytest.raises(error_class) as caught:
        await answer(
            engine,
            fable_model.tokenizer.encode(PROMPTS[0]),
            max_tokens=2,
            interventions=(Intervention(hook_point="", edit=edit),),
        )
    assert (caught.value.reason, caught.value.field) == (reason, f"interventions[0].{field}")
    assert caught.value.remedy


async def test_unloaded_while_in_use(
    engine: Any, answer: Any, fable_model: Any, held: dict[str, Random]
) -> None:
    prompt = fable_model.tokenizer.encode(PROMPTS[0])
    steer = Intervention(hook_point="", edit=SetFeatures(dictionary="jump", features=(5,), values=(6.0,)))
    running = asyncio.create_task(
        answer(
            engine,
            prompt,
            max_tokens=200,
            ignore_eos=True,
            interventions=(steer,),
            readouts=(ReadFeatures(dictionary="jump", top_k=2),),
        )
    )
    await asyncio.sleep(0.05)
    engine.dictionaries.remove("models/fable/dictionaries/jump")
    with pytest.raises(NotFound) as caught:
        await answer(engine, prompt, max_tokens=2, interventions=(steer,))
    assert caught.value.reason == reasons.DICTIONARY_NOT_FOUND
    assert len((await running).ids) == 200


@on_both
async def test_generated_positions_only(
    engine: Any, answer: Any, fable_model: Any, held: dict[str, Random]
) -> None:
    prompt = fable_model.tokenizer.encode(PROMPTS[0])
    where = Selector(named=NamedPositions.GENERATED)
    steer = Intervention(
        hook_point="", edit=SetFeatures(dictionary="trans", features=(5,), values=(6.0,)), positions=where
    )
    got = await answer(engine, prompt, max_tokens=10, ignore_eos=True, interventions=(steer,))
    assert got.finished.receipt[0].positions_applied == 9
