"""Probes read while generating, and generations ended by them, against the formulas over plain hooks' captures."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from glasshouse import fable
from glasshouse.server.engines.concepts import DeviceProbes
from glasshouse.server.probes.concepts import ConceptShelf
from glasshouse.server.probes.examples import Task
from glasshouse.server.probes.pooling import Pooling
from glasshouse.server.readouts import probes as scoring
from glasshouse.server.types.conditions import (
    Condition,
    ConditionScope,
    FeatureColumn,
    ProbeColumn,
    ProbeOutput,
    PromptAggregation,
)
from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument, NotFound
from glasshouse.server.types.generation import FinishReason
from glasshouse.server.types.interventions import AddVector, Intervention, NamedDirection, Rotate
from glasshouse.server.types.readouts import ReadFeatures, ReadProbe
from glasshouse.server.types.selectors import EVERYWHERE, NamedPositions, Selector

from ...oracles import formulas
from ...oracles.probes import RandomProbe, random_probe
from ...oracles.vllm_engines import BOTH

on_both = pytest.mark.parametrize("engine", BOTH, indirect=True)

PROMPTS = [
    "Once upon a time there was a little girl named Lily.",
    "The cats near the tree",
    "One day, a boy named Tom went to the park. It was raining and he was very sad because",
]
N_TOKENS = 14
D = 192
GENERATED = Selector(named=NamedPositions.GENERATED)
EVERY_THIRD = Selector(at=(1, 4, 7, 10, 13, 16))


def post(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_post"


@pytest.fixture(scope="module")
def probes() -> dict[str, RandomProbe]:
    return {
        "plain": random_probe([post(2)], D, seed=1),
        "platt": random_probe([post(2)], D, seed=2, platt=(0.7, -0.4)),
        "isotonic": random_probe([post(2)], D, seed=3, isotonic=True),
        "classes": random_probe([post(4)], D, seed=4, task=Task.MULTI_CLASS, n_columns=3),
        "labels": random_probe([post(4)], D, seed=5, task=Task.MULTI_LABEL, n_columns=2, platt=(1.2, 0.1)),
        "mlp": random_probe([post(2)], D, seed=6, hidden=8, platt=(0.6, 0.1)),
        "mean": random_probe([post(2)], D, seed=7, pooling=Pooling.MEAN),
        "again": random_probe([post(2)], D, seed=8, pooling=Pooling.MEAN),
        "max": random_probe([post(1)], D, seed=9, pooling=Pooling.MAX),
        "last": random_probe([post(1)], D, seed=10, pooling=Pooling.LAST),
        "several": random_probe([post(0), post(5)], D, seed=11),
    }


@pytest.fixture
def shelf(engine: Any, probes: dict[str, RandomProbe]) -> ConceptShelf:
    shelf = ConceptShelf("fable")
    for name, random in probes.items():
        shelf.put_probe(name, random.probe)
    engine.use_concepts(shelf)
    return shelf


def expected(random: RandomProbe, output: ProbeOutput, captures: Any, positions: list[int]) -> np.ndarray:
    """Scores (n, C) at `positions`, each of what is pooled of them so far."""
    x = np.concatenate([captures[point].double().numpy() for point in random.probe.facts.hook_points], axis=1)
    say = random.scores if output is ProbeOutput.SCORE else random.margins
    return np.stack([say(x[positions[: place + 1]]) for place in range(len(positions))])


@on_both
@pytest.mark.parametrize("one_bank", [True, False])
async def test_scores_stream_with_each_token_and_for_the_prompt(
    engine: Any,
    answer: Any,
    oracle: Any,
    fable_model: Any,
    probes: dict[str, RandomProbe],
    shelf: Any,
    monkeypatch: pytest.MonkeyPatch,
    one_bank: bool,
) -> None:
    if not one_bank:
        monkeypatch.setattr(scoring, "_BANK_COLUMNS", 1)
    names = list(probes)
    # Neighbours ask for different probes at different positions, under an edit or none.
    wanted = [
        [(name, ProbeOutput.SCORE, EVERYWHERE) for name in names]
        + [(name, ProbeOutput.MARGIN, EVERYWHERE) for name in ("platt", "classes", "mlp")],
        [(name, ProbeOutput.SCORE, GENERATED) for name in names[::2]]
        + [("mean", ProbeOutput.SCORE, EVERYWHERE)],
        [(name, ProbeOutput.SCORE, EVERY_THIRD) for name in ("mean", "max", "plain")]
        + [("again", ProbeOutput.MARGIN, EVERYWHERE)],
        [],
    ]
    prompts = [fable_model.tokenizer.encode(PROMPTS[i % 3]) for i in range(len(wanted))]
    v = np.random.default_rng(0).standard_normal(D).astype(np.float32)
    edited = (Intervention(hook_point=post(2), edit=AddVector(vector=v, coefficient=0.5)),)

    async def ours(index: int) -> Any:
        await asyncio.sleep(0.006 * index)
        return await answer(
            engine,
            prompts[index],
            max_tokens=N_TOKENS,
            ignore_eos=True,
            readouts=tuple(ReadProbe(probe=n, output=o, positions=p) for n, o, p in wanted[index]),
            interventions=edited if index == 1 else (),
        )

    answers = await asyncio.gather(*(ours(index) for index in range(len(wanted))))
    points = [post(layer) for layer in (0, 1, 2, 4, 5)]
    for index, (prompt, got) in enumerate(zip(prompts, answers, strict=True)):
        edits = [(post(2), lambda p: True, formulas.add(v, 0.5))] if index == 1 else []
        ids, _, captures = oracle.greedy(prompt, N_TOKENS, edits, points)
        assert got.ids == ids
        n, fed = len(prompt), len(prompt) + N_TOKENS - 1
        for place, (name, output, where) in enumerate(wanted[index]):
            chosen = list(where.at or range(n if where is GENERATED else 0, fed))
            reference = expected(probes[name], output, captures, chosen)
            over_prompt = got.prefilled.readouts[place]
            assert over_prompt.positions == tuple(p for p in chosen if p < n)
            assert over_prompt.values.labels == probes[name].probe.facts.columns
            assert over_prompt.values.probe == f"models/fable/probes/{name}@1"
            seen = [(p, row) for p, row in zip(over_prompt.positions, over_prompt.values.scores, strict=True)]
            for token in got.tokens:
                if place in token.readouts and token.position - 1 >= n:
                    seen.append((token.position - 1, token.readouts[place].scores))
            assert [p for p, _ in seen] == chosen
            np.testing.assert_allclose(np.stack([s for _, s in seen]), reference, atol=2e-5, err_msg=name)
            if n - 1 in chosen:
                # The first new token carries the prompt's last position again.
                np.testing.assert_array_equal(
                    got.tokens[0].readouts[place].scores, over_prompt.values.scores[-1]
                )
            else:
                assert place not in got.tokens[0].readouts


async def test_a_long_prompt_in_pieces_pools_as_one(
    fable_model: Any, answer: Any, oracle: Any, probes: dict[str, RandomProbe]
) -> None:
    from glasshouse.server.engines.transformers.engine import TransformersEngine
    from glasshouse.server.engines.transformers.scheduler import SchedulerSettings
    from glasshouse.server.types.limits import Limits

    engine = TransformersEngine(fable_model, limits=Limits(), steps=SchedulerSettings(prefill_tokens=7))
    shelf = ConceptShelf("fable")
    for name in ("mean", "max", "plain"):
        shelf.put_probe(name, probes[name].probe)
    engine.use_concepts(shelf)
    await engine.start()
    prompt = fable_model.tokenizer.encode(PROMPTS[2])
    assert len(prompt) > 14
    random = probes["plain"]
    condition = Condition(source=ProbeColumn(probe="plain"), above=0.0, scope=ConditionScope.PROMPT)
    try:
        got = await answer(
            engine,
            prompt,
            max_tokens=3,
            ignore_eos=True,
            readouts=tuple(ReadProbe(probe=name) for name in ("mean", "max", "plain")),
            interventions=(
                Intervention(
                    hook_point=post(4), edit=AddVector(vector=np.ones(D, np.float32)), condition=condition
                ),
            ),
        )
    finally:
        await engine.stop()
    hooks = [(post(4), lambda p: p >= len(prompt) - 1, formulas.add(np.ones(D, np.float32), 1.0))]
    ids, _, captures = oracle.greedy(prompt, 3, hooks, [post(1), post(2)])
    assert got.ids == ids and got.finished.receipt[0].positions_steered == 3
    for place, name in enumerate(("mean", "max", "plain")):
        reference = expected(probes[name], ProbeOutput.SCORE, captures, list(range(len(prompt))))
        np.testing.assert_allclose(got.prefilled.readouts[place].values.scores, reference, atol=2e-5)
    assert random.probe.facts.columns == ("yes",)


async def test_a_long_prompt_ends_with_the_piece_that_passed(
    fable_model: Any, answer: Any, oracle: Any, probes: dict[str, RandomProbe]
) -> None:
    from glasshouse.server.engines.transformers.engine import TransformersEngine
    from glasshouse.server.engines.transformers.scheduler import SchedulerSettings
    from glasshouse.server.types.limits import Limits

    engine = TransformersEngine(fable_model, limits=Limits(), steps=SchedulerSettings(prefill_tokens=5))
    shelf = ConceptShelf("fable")
    shelf.put_probe("plain", probes["plain"].probe)
    engine.use_concepts(shelf)
    await engine.start()
    prompt = fable_model.tokenizer.encode(PROMPTS[2])
    scores = Ends(oracle, prompt, probes["plain"]).scores[: len(prompt)]
    threshold = float((np.sort(scores[5:10])[-1] + np.sort(scores[5:10])[-2]) / 2)
    at = 5 + int(scores[5:10].argmax())
    on_later = Selector(span=(5, None))
    whole = Condition(source=ProbeColumn(probe="plain"), above=0.0, scope=ConditionScope.PROMPT)
    first = Condition(source=ProbeColumn(probe="plain"), above=threshold, positions=on_later)
    edit = Intervention(hook_point=post(4), edit=AddVector(vector=np.zeros(D, np.float32)))
    try:
        got = await answer(
            engine,
            prompt,
            max_tokens=5,
            abort_when=(whole, first),
            interventions=(edit,),
            readouts=(ReadProbe(probe="plain"),),
        )
        assert (await answer(engine, prompt, max_tokens=2, ignore_eos=True)).finished.abort is None
    finally:
        await engine.stop()
    assert got.ids == [] and got.finished.reason is FinishReason.ABORTED
    assert (got.finished.abort.condition, got.finished.abort.position) == (1, at)
    # Two pieces were fed, and no more.
    assert got.finished.receipt[0].positions_applied == 10 < len(prompt)
    assert got.prefilled.readouts[0].positions == tuple(range(10))


class Ends:
    """A plain generation, with the scores that a probe gives its positions."""

    def __init__(self, oracle: Any, prompt: list[int], random: RandomProbe) -> None:
        self.n = len(prompt)
        self.ids, _, captures = oracle.greedy(prompt, N_TOKENS, (), list(random.probe.facts.hook_points))
        fed = self.n + N_TOKENS - 1
        self.scores = expected(random, ProbeOutput.SCORE, captures, list(range(fed)))[:, 0]

    def first_to_pass(self) -> tuple[int, dict[str, float]]:
        """A generated position whose score is above, or else below, all generated ones before it, and a threshold."""
        for side, sign in (("above", 1.0), ("below", -1.0)):
            scores = sign * self.scores
            for at in range(self.n + 2, len(scores)):
                before = scores[self.n : at].max()
                if scores[at] > before + 1e-4:
                    return at, {side: sign * float(scores[at] + before) / 2}
        raise AssertionError("the scores never move")


@on_both
async def test_abort_within_the_step_and_company_goes_on(
    engine: Any, answer: Any, oracle: Any, fable_model: Any, probes: dict[str, RandomProbe], shelf: Any
) -> None:
    prompts = [fable_model.tokenizer.encode(text) for text in PROMPTS]
    ends = [Ends(oracle, prompt, probes["platt"]) for prompt in prompts]
    aims = [end.first_to_pass() for end in ends]

    async def aborted(index: int) -> Any:
        never = Condition(source=ProbeColumn(probe="plain"), above=1.0)
        source = ProbeColumn(probe="models/fable/probes/platt@1")
        ends_it = Condition(source=source, positions=GENERATED, **aims[index][1])
        return await answer(
            engine,
            prompts[index],
            max_tokens=N_TOKENS,
            ignore_eos=True,
            abort_when=(never, ends_it, ends_it),
            readouts=(ReadProbe(probe="platt"),),
        )

    *found, free = await asyncio.gather(
        *(aborted(index) for index in range(3)),
        answer(engine, prompts[0], max_tokens=N_TOKENS, ignore_eos=True),
    )
    assert free.ids == ends[0].ids and free.finished.abort is None
    for got, end, (at, passing) in zip(found, ends, aims, strict=True):
        finished = got.finished
        assert finished.reason is FinishReason.ABORTED
        assert (finished.abort.condition, finished.abort.position) == (1, at)
        assert finished.abort.threshold in passing.values()
        assert finished.abort.score == pytest.approx(end.scores[at], abs=2e-5)
        # The token at the position that passed was sent; what its pass predicted was not.
        assert got.ids == end.ids[: at - end.n + 1]
        assert finished.usage.generated_tokens == len(got.ids)
        assert list(got.tokens[-1].readouts) == [0] and len(got.prefilled.readouts) == 1
    assert engine.status().running == 0


@on_both
@pytest.mark.parametrize("scope", list(ConditionScope))
async def test_a_prompt_is_refused_before_its_first_token(
    engine: Any, answer: Any, oracle: Any, fable_model: Any, probes: Any, shelf: Any, scope: ConditionScope
) -> None:
    prompt = fable_model.tokenizer.encode(PROMPTS[2])
    end = Ends(oracle, prompt, probes["plain"])
    over = end.scores[: end.n]
    threshold = float(np.sort(over)[-3:-1].mean())
    prompts_mean = scope is ConditionScope.PROMPT
    condition = Condition(
        source=ProbeColumn(probe="plain"),
        above=float(over.mean()) - 1e-3 if prompts_mean else threshold,
        scope=scope,
        aggregation=PromptAggregation.MEAN if prompts_mean else None,
    )
    got = await answer(engine, prompt, max_tokens=5, abort_when=(condition,))
    assert got.ids == [] and got.prefilled.readouts == ()
    assert got.finished.reason is FinishReason.ABORTED and got.finished.usage.time_to_first_token_s == 0.0
    at = end.n - 1 if prompts_mean else int(np.argmax(over > threshold))
    score = over.mean() if prompts_mean else over[at]
    assert got.finished.abort.position == at
    assert got.finished.abort.score == pytest.approx(score, abs=2e-5)


@on_both
async def test_a_prompt_below_its_mean_goes_on(
    engine: Any, answer: Any, oracle: Any, fable_model: Any, probes: Any, shelf: Any
) -> None:
    prompt = fable_model.tokenizer.encode(PROMPTS[2])
    end = Ends(oracle, prompt, probes["plain"])
    condition = Condition(
        source=ProbeColumn(probe="plain"),
        below=float(end.scores[: end.n].max()) - 1e-3,
        scope=ConditionScope.PROMPT,
    )
    got = await answer(engine, prompt, max_tokens=N_TOKENS, ignore_eos=True, abort_when=(condition,))
    assert got.ids == end.ids and got.finished.reason is FinishReason.LENGTH


async def test_a_feature_ends_a_generation(engine: Any, answer: Any, fable_model: Any) -> None:
    await engine.load_dictionary("resid", str(fable.dictionary_path("resid-post-3")))
    prompt = fable_model.tokenizer.encode(PROMPTS[0])
    free = await answer(
        engine,
        prompt,
        max_tokens=N_TOKENS,
        ignore_eos=True,
        readouts=(ReadFeatures(dictionary="resid", top_k=1),),
    )
    feature = int(free.tokens[5].readouts[0].ids[0])
    watch = ReadFeatures(dictionary="resid", features=(feature,))
    read = await answer(engine, prompt, max_tokens=N_TOKENS, ignore_eos=True, readouts=(watch,))
    activations = [float(token.readouts[0].activations[0]) for token in read.tokens]
    threshold = activations[5] * 0.999
    first = next(i for i, a in enumerate(activations) if a > threshold)
    condition = Condition(
        source=FeatureColumn(dictionary="resid", feature=feature), above=threshold, positions=GENERATED
    )
    first = next(i for i, a in enumerate(activations) if i > 0 and a > threshold)
    got = await answer(engine, prompt, max_tokens=N_TOKENS, ignore_eos=True, abort_when=(condition,))
    assert got.ids == free.ids[:first]
    assert got.finished.abort.score == pytest.approx(activations[first], rel=1e-5)


@on_both
async def test_named_directions(engine: Any, answer: Any, fable_model: Any, shelf: ConceptShelf) -> None:
    rng = np.random.default_rng(3)
    v, w = (rng.standard_normal(D).astype(np.float32) for _ in range(2))
    shelf.put_direction("joy", post(3), w)
    shelf.put_direction("joy", post(3), v)
    shelf.put_direction("calm", post(3), w)
    prompt = fable_model.tokenizer.encode(PROMPTS[0])

    async def under(hook_point: str, edit: Any) -> Any:
        return await answer(
            engine, prompt, max_tokens=6, interventions=(Intervention(hook_point=hook_point, edit=edit),)
        )

    joy, calm = NamedDirection("joy"), NamedDirection("models/fable/directions/calm@1")
    pairs = [
        (("", AddVector(vector=joy)), (post(3), AddVector(vector=v)), ["joy@2"]),
        (("", AddVector(vector=NamedDirection("joy@1"))), (post(3), AddVector(vector=w)), ["joy@1"]),
        ((post(1), AddVector(vector=joy)), (post(1), AddVector(vector=v)), ["joy@2"]),
        (("", Rotate(first=joy, second=calm)), (post(3), Rotate(first=v, second=w)), ["joy@2", "calm@1"]),
        (("", Rotate(first=v, second=calm)), (post(3), Rotate(first=v, second=w)), ["calm@1"]),
    ]
    for named, plain, resources in pairs:
        got, reference = await under(*named), await under(*plain)
        assert got.ids == reference.ids and got.logprobs == reference.logprobs
        (receipt,), (other,) = got.finished.receipt, reference.finished.receipt
        assert receipt.content_hash == other.content_hash and receipt.hook_points == other.hook_points
        assert receipt.resources == tuple(f"models/fable/directions/{name}" for name in resources)
        assert other.resources == ()


async def test_what_is_refused(
    engine: Any, answer: Any, fable_model: Any, shelf: ConceptShelf, probes: dict[str, RandomProbe]
) -> None:
    prompt = fable_model.tokenizer.encode(PROMPTS[0])
    n = len(prompt)
    shelf.put_probe("narrow", random_probe([post(1)], 8, seed=0).probe)
    shelf.put_probe("elsewhere", random_probe(["blocks.40.hook_resid_post"], D, seed=0).probe)
    shelf.put_probe("logits", random_probe(["unembed"], fable_model.vocab_size, seed=0).probe)
    shelf.put_direction("narrow", post(1), np.ones(8, np.float32))
    shelf.put_direction("one", post(1), np.eye(D, dtype=np.float32)[0])
    shelf.put_direction("two", post(2), np.eye(D, dtype=np.float32)[1])
    v = np.ones(D, np.float32)

    def when(name: str = "plain", label: str = "", **rest: Any) -> Condition:
        rest.setdefault("above", 0.5)
        return Condition(source=ProbeColumn(probe=name, label=label), **rest)

    def under(condition: Condition, at: str = post(2), **rest: Any) -> dict[str, Any]:
        edit = Intervention(hook_point=at, edit=AddVector(vector=v), condition=condition, **rest)
        return {"interventions": (edit,)}

    def plain(edit: Any, at: str = "") -> dict[str, Any]:
        return {"interventions": (Intervention(hook_point=at, edit=edit),)}

    prompt_scope, latched = ConditionScope.PROMPT, ConditionScope.LATCHED
    beyond = Selector(at=(0, 1))
    cases: list[tuple[dict[str, Any], type[Exception], str, str]] = [
        ({"readouts": (ReadProbe(probe="plein"),)}, NotFound, "readouts[0].probe.probe", "plain"),
        ({"readouts": (ReadProbe(probe="plain@2"),)}, NotFound, "readouts[0].probe.probe", ""),
        ({"readouts": (ReadProbe(probe="not a name"),)}, InvalidArgument, "readouts[0].probe.probe", ""),
        (
            {"readouts": (ReadProbe(probe="narrow"),)},
            FailedPrecondition,
            "readouts[0].probe.probe",
            "8 elements",
        ),
        (
            {"readouts": (ReadProbe(probe="elsewhere"),)},
            FailedPrecondition,
            "readouts[0].probe.probe",
            "lacks",
        ),
        ({"abort_when": (when("nobody"),)}, NotFound, "abort_when[0].probe.probe", ""),
        ({"abort_when": (when("classes"),)}, InvalidArgument, "abort_when[0].probe.label", "label 1"),
        (
            {"abort_when": (when("labels", "label 7"),)},
            InvalidArgument,
            "abort_when[0].probe.label",
            "label 1",
        ),
        (
            {"abort_when": (when(scope=prompt_scope, positions=GENERATED),)},
            InvalidArgument,
            "abort_when[0].positions",
            "no position of the prompt",
        ),
        (
            {"abort_when": (Condition(source=FeatureColumn(dictionary="none", feature=0), above=1.0),)},
            NotFound,
            "abort_when[0].feature.dictionary",
            "",
        ),
        (under(when("missing")), NotFound, "interventions[0].condition.probe.probe", ""),
        (under(when(), post(1)), InvalidArgument, "interventions[0].condition", post(2)),
        (
            under(when(scope=latched), post(1), positions=beyond),
            InvalidArgument,
            "interventions[0].positions",
            f"position {n} on",
        ),
        (
            under(when(scope=prompt_scope), positions=beyond),
            InvalidArgument,
            "interventions[0].positions",
            f"position {n - 1} on",
        ),
        (
            under(when(positions=Selector(at=(n + 400,)))),
            InvalidArgument,
            "interventions[0].condition.positions.at.positions",
            "never fed",
        ),
        (under(when("logits"), post(5)), FailedPrecondition, "interventions[0].condition", "logits"),
        (
            plain(AddVector(vector=NamedDirection("nobody"))),
            NotFound,
            "interventions[0].add_vector.direction",
            "",
        ),
        (
            plain(AddVector(vector=NamedDirection("narrow"))),
            FailedPrecondition,
            "interventions[0].hook_point",
            "8 elements",
        ),
        (
            plain(AddVector(vector=NamedDirection("one")), "blocks.0.mlp.hook_post"),
            FailedPrecondition,
            "interventions[0].hook_point",
            f"{D} elements",
        ),
        (
            plain(Rotate(first=NamedDirection("one"), second=NamedDirection("two"))),
            FailedPrecondition,
            "interventions[0].hook_point",
            post(2),
        ),
    ]
    for request, kind, field, says in cases:
        with pytest.raises(kind) as caught:
            await answer(engine, prompt, max_tokens=4, **request)
        error: Any = caught.value
        assert type(error) is kind and error.field == field, (request, error.field, error.message)
        assert says in error.message + error.remedy, (error.message, error.remedy)
        assert error.remedy
    # Nothing of it reached the engine.
    assert (await answer(engine, prompt, max_tokens=2)).finished.reason is FinishReason.LENGTH


def test_a_probe_is_copied_once_for_those_that_hold_it(engine: Any, shelf: Any, probes: Any) -> None:
    held = shelf.put_probe("same", probes["plain"].probe)
    copies = DeviceProbes(engine._table, engine._loaded.device)
    one = copies.of(held)
    assert copies.of(held) is one and one.layers[0].weights.dtype.itemsize == 4
