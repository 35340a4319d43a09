"""Edits under conditions in a mixed batch equal plain hooks that ask the condition themselves, one request at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glasshouse.server.dictionaries.architectures.jumprelu import JumpReLU
from glasshouse.server.dictionaries.linear import LinearDictionary
from glasshouse.server.dictionaries.parameters import DecoderBlock, DictionaryParameters, EncoderBlock
from glasshouse.server.dictionaries.store import HeldDictionary
from glasshouse.server.probes.concepts import ConceptShelf
from glasshouse.server.probes.examples import Task
from glasshouse.server.probes.pooling import Pooling
from glasshouse.server.types.conditions import (
    Condition,
    ConditionScope,
    FeatureColumn,
    ProbeColumn,
    ProbeOutput,
    PromptAggregation,
)
from glasshouse.server.types.generation import ExtractionRequest, ScoreRequest
from glasshouse.server.types.interventions import (
    AblateDirection,
    AddVector,
    CapProjection,
    Edit,
    Intervention,
    SetFeatures,
)
from glasshouse.server.types.selectors import EVERYWHERE, NamedPositions, Selector

from ...oracles import formulas
from ...oracles.probes import RandomProbe, random_probe

PROMPTS = [
    "Once upon a time there was a little girl named Lily.",
    "The cats near the tree",
    "One day, a boy named Tom went to the park. It was raining and he was very sad because",
]
N_TOKENS = 16
D = 192
N_FEATURES = 32
GENERATED = Selector(named=NamedPositions.GENERATED)
NO_BOS = Selector(named=NamedPositions.ALL, exclude_bos=True)
Covers = Callable[[int, int], bool]


def post(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_post"


@dataclass
class Asked:
    """A condition for the oracle: what is scored at which points, and how the answer comes about."""

    points: tuple[str, ...]
    score: Callable[[np.ndarray], float]
    scope: ConditionScope = ConditionScope.POSITION
    aggregation: PromptAggregation = PromptAggregation.MAX
    above: float | None = None
    below: float | None = None
    looks: Covers = lambda p, n: True
    lagged: bool = False
    pooled: bool = False
    # What was seen: position -> activations by point, then its score.
    seen: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    scores: dict[int, float] = field(default_factory=dict)

    def recorders(self, n_prompt: int) -> list[Any]:
        """Hooks that read, and change nothing."""
        found = []
        for point in self.points:
            at: list[int] = []

            def selected(p: int, at: list[int] = at) -> bool:
                at[:] = [p]
                return self.looks(p, n_prompt)

            def read(s: Tensor, point: str = point, at: list[int] = at) -> Tensor:
                self.seen.setdefault(at[0], {})[point] = s.double().numpy()
                if len(self.seen[at[0]]) == len(self.points):
                    past = [q for q in sorted(self.seen) if q <= at[0]]
                    rows = np.stack([np.concatenate([self.seen[q][x] for x in self.points]) for q in past])
                    self.scores[at[0]] = self.score(rows)
                return s

            found.append((point, selected, read))
        return found

    def passes(self, score: float) -> bool:
        threshold = self.above if self.above is not None else self.below
        assert threshold is not None
        assert abs(score - threshold) > 2e-5, f"{score} is too near {threshold} to tell"
        return score > threshold if self.above is not None else score < threshold

    def holds(self, p: int, n_prompt: int) -> bool:
        if self.scope is ConditionScope.POSITION:
            return p in self.scores and self.passes(self.scores[p])
        if self.scope is ConditionScope.LATCHED:
            return any(self.passes(s) for q, s in self.scores.items() if q < p + (not self.lagged))
        if p < n_prompt - (not self.lagged):
            return False
        of_prompt = [s for q, s in sorted(self.scores.items()) if q < n_prompt]
        how = {"max": max, "mean": lambda x: float(np.mean(x)), "last": lambda x: x[-1]}
        return self.passes(how[self.aggregation.value](of_prompt))


@dataclass
class Step:
    """One intervention under a condition, for both sides."""

    hook_point: str
    edit: Edit
    formula: Any
    condition: Condition | None
    asked: Asked | None
    positions: Selector = EVERYWHERE
    covers: Covers = lambda p, n: True

    def ours(self) -> Intervention:
        name = "" if isinstance(self.edit, SetFeatures) else self.hook_point
        return Intervention(
            hook_point=name, edit=self.edit, positions=self.positions, condition=self.condition
        )

    def reached(self, p: int, n_prompt: int) -> bool:
        """Whether the edit is decided on at p."""
        first = 0
        if self.asked is not None and self.asked.lagged:
            first = n_prompt
        elif self.asked is not None and self.asked.scope is ConditionScope.PROMPT:
            first = n_prompt - 1
        return p >= first and self.covers(p, n_prompt)


def oracle_hooks(steps: Sequence[Step], n_prompt: int) -> list[Any]:
    hooks: list[Any] = []
    for step in steps:
        asked = step.asked
        if asked is not None:
            hooks += asked.recorders(n_prompt)

        def selected(p: int, step: Step = step, asked: Asked | None = asked) -> bool:
            return step.reached(p, n_prompt) and (asked is None or asked.holds(p, n_prompt))

        hooks.append((step.hook_point, selected, step.formula))
    return hooks


def dictionary() -> tuple[LinearDictionary, Callable[[Tensor], Tensor], Tensor]:
    generator = torch.Generator().manual_seed(5)
    W_enc = torch.randn(D, N_FEATURES, generator=generator) / D**0.5
    b_enc = torch.randn(N_FEATURES, generator=generator) * 0.1
    W_dec = 6 * torch.randn(N_FEATURES, D, generator=generator) / D**0.5
    at = (post(2),)
    made = LinearDictionary(
        "jump",
        DictionaryParameters(
            kind="sae",
            hook_points_in=at,
            hook_points_out=at,
            encoders=(EncoderBlock(W_enc=W_enc, sites=(0,)),),
            decoders=(DecoderBlock(W_dec=W_dec, site=0),),
            activation=JumpReLU(threshold=torch.full((N_FEATURES,), 0.4)),
            b_enc=b_enc,
            b_dec=torch.zeros(1, D),
            source_format="test",
        ),
    )

    def values(x: Tensor) -> Tensor:
        h = x.double() @ W_enc.double() + b_enc.double()
        return h * (h > 0.4)

    return made, values, W_dec.double()


def vector(seed: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(D) * scale).astype(np.float32)


def middle(scores: Sequence[float]) -> float:
    """A threshold in the widest gap of the middle of `scores`."""
    ordered = np.sort(np.asarray(scores))
    low, high = len(ordered) // 4, max(len(ordered) * 3 // 4, len(ordered) // 4 + 2)
    part = ordered[low:high]
    gap = int(np.diff(part).argmax())
    return float((part[gap] + part[gap + 1]) / 2)


PROBES: dict[str, Any] = {
    "plain": lambda: random_probe([post(2)], D, seed=1),
    "platt": lambda: random_probe([post(2)], D, seed=2, platt=(0.7, -0.4)),
    "reversed": lambda: random_probe([post(3)], D, seed=3, platt=(-0.5, 0.2)),
    "classes": lambda: random_probe([post(1)], D, seed=4, task=Task.MULTI_CLASS, n_columns=3, scale=0.03),
    "labels": lambda: random_probe(
        [post(1)], D, seed=5, task=Task.MULTI_LABEL, n_columns=2, platt=(1.2, 0.1)
    ),
    "mlp": lambda: random_probe([post(2)], D, seed=6, hidden=8, scale=0.03, platt=(0.6, 0.1)),
    "isotonic": lambda: random_probe([post(2)], D, seed=7, isotonic=True, scale=0.03),
    "mean": lambda: random_probe([post(2)], D, seed=8, pooling=Pooling.MEAN),
    "max": lambda: random_probe([post(1)], D, seed=9, pooling=Pooling.MAX, scale=0.02),
    "several": lambda: random_probe([post(0), post(2)], D, seed=10, scale=0.03),
    "late": lambda: random_probe([post(5)], D, seed=11, platt=(0.8, 0.0)),
    "early": lambda: random_probe(["hook_embed"], D, seed=12, scale=0.5),
}


@pytest.fixture(scope="module")
def probes() -> dict[str, RandomProbe]:
    return {name: make() for name, make in PROBES.items()}


@pytest.fixture
def concepts(engine: Any, probes: dict[str, RandomProbe]) -> ConceptShelf:
    assert engine.info.d_model == D
    shelf = ConceptShelf("fable")
    for name, random in probes.items():
        shelf.put_probe(name, random.probe)
    shelf.put_direction("joy", post(3), vector(50))
    engine.use_concepts(shelf)
    made, _, _ = dictionary()
    points = {point.name: point for point in engine.hook_points}
    at = (points[post(2)],)
    engine.dictionaries.add(
        HeldDictionary(name="jump", path="", dictionary=made, points_in=at, points_out=at, size_bytes=0)
    )
    return shelf


class Maker:
    """Makes the same condition for both sides, its threshold in the middle of what the plain model's scores are."""

    def __init__(self, probes: dict[str, RandomProbe], oracle: Any, prompt: list[int]) -> None:
        self._probes, self._oracle, self._prompt = probes, oracle, prompt
        self._ids = prompt + oracle.greedy(prompt, N_TOKENS)[0][:-1]

    def on(
        self,
        name: str,
        side: str = "above",
        *,
        column: int = 0,
        output: ProbeOutput = ProbeOutput.SCORE,
        scope: ConditionScope = ConditionScope.POSITION,
        aggregation: PromptAggregation | None = None,
        positions: Selector = EVERYWHERE,
        looks: Covers = lambda p, n: True,
        lagged: bool = False,
        shift: float = 0.0,
    ) -> tuple[Condition, Asked]:
        random = self._probes[name]
        facts = random.probe.facts
        say = random.scores if output is ProbeOutput.SCORE else random.margins
        label = facts.columns[column] if len(facts.columns) > 1 else ""
        source = ProbeColumn(probe=name, label=label, output=output)
        pooled = facts.pooling is not Pooling.TOKEN
        how = aggregation or (PromptAggregation.LAST if pooled else PromptAggregation.MAX)

        def asked(threshold: float) -> Asked:
            return Asked(
                facts.hook_points,
                lambda rows: float(say(rows)[column]),
                scope,
                how,
                threshold if side == "above" else None,
                threshold if side == "below" else None,
                looks,
                lagged,
            )

        plain = asked(0.0)
        self._oracle.forward(self._ids, plain.recorders(len(self._prompt)))
        threshold = middle([plain.scores[p] for p in sorted(plain.scores)]) + shift
        condition = Condition(
            source=source, scope=scope, aggregation=aggregation, positions=positions, **{side: threshold}
        )
        return condition, asked(threshold)

    def feature(self, index: int) -> tuple[Condition, Asked]:
        _, values, _ = dictionary()

        def say(rows: np.ndarray) -> float:
            return float(values(torch.from_numpy(rows[-1]))[index])

        condition = Condition(source=FeatureColumn(dictionary="jump", feature=index), above=0.55)
        return condition, Asked((post(2),), say, above=0.55)


def add(at: str, seed: int, c: float, asked: Any, **rest: Any) -> Step:
    condition, oracle = asked or (None, None)
    v = vector(seed)
    return Step(at, AddVector(vector=v, coefficient=c), formulas.add(v, c), condition, oracle, **rest)


def cases(make: Maker) -> dict[str, list[Step]]:
    latched, over_prompt = ConditionScope.LATCHED, ConditionScope.PROMPT
    generated = {"positions": GENERATED, "covers": lambda p, n: p >= n}
    _, values, W_dec = dictionary()
    v, w = vector(20), vector(21)

    def set_feature(s: Tensor) -> Tensor:
        return (s.double() + (5.0 - values(s)[3]) * W_dec[3]).float()

    reversed_, isotonic, feature = (make.on("reversed", "below"), make.on("isotonic"), make.feature(4))
    return {
        "same point": [add(post(2), 1, 1.5, make.on("plain"))],
        "calibrated": [add(post(2), 2, 1.5, make.on("platt"))],
        "reversed": [Step(post(3), AblateDirection(vector=v), formulas.ablate(v), *reversed_)],
        "earlier point": [add(post(4), 3, 1.5, make.on("plain", "below"), **generated)],
        "a class": [add(post(3), 4, 1.5, make.on("classes", column=1))],
        "a label": [add(post(1), 5, 1.5, make.on("labels", column=1))],
        "two layers": [add(post(2), 6, 1.5, make.on("mlp", "below"))],
        "isotonic": [
            Step(
                post(3),
                CapProjection(vector=w, maximum=0.1, minimum=-0.1),
                formulas.cap(w, -0.1, 0.1),
                *isotonic,
            )
        ],
        "margin": [add(post(2), 7, 1.5, make.on("platt", output=ProbeOutput.MARGIN))],
        "mean so far": [add(post(3), 8, 1.5, make.on("mean"))],
        "max so far, latched": [add(post(3), 9, 1.5, make.on("max", scope=latched))],
        "latched": [add(post(2), 10, 0.7, make.on("plain", scope=latched, shift=0.3))],
        "latched in what is new": [
            add(
                post(2),
                11,
                0.7,
                make.on("platt", scope=latched, positions=GENERATED, looks=lambda p, n: p >= n),
            )
        ],
        "latched, read later": [
            add(post(2), 12, 0.7, make.on("late", scope=latched, lagged=True, shift=0.2))
        ],
        "prompt's maximum": [add(post(2), 13, 1.5, make.on("plain", scope=over_prompt))],
        "prompt's mean": [
            add(post(2), 14, 1.5, make.on("platt", scope=over_prompt, aggregation=PromptAggregation.MEAN))
        ],
        "prompt's mean, not passed": [
            add(
                post(2),
                14,
                1.5,
                make.on("platt", scope=over_prompt, aggregation=PromptAggregation.MEAN, shift=0.5),
            )
        ],
        "prompt's last": [
            add(
                post(4),
                15,
                1.5,
                make.on("reversed", "below", scope=over_prompt, aggregation=PromptAggregation.LAST),
            )
        ],
        "prompt's pool, read later": [add(post(0), 16, 1.5, make.on("mean", scope=over_prompt, lagged=True))],
        "prompt without BOS": [
            add(
                post(3),
                17,
                1.5,
                make.on("reversed", scope=over_prompt, positions=NO_BOS, looks=lambda p, n: p > 0),
            )
        ],
        "several points": [add(post(2), 18, 1.5, make.on("several"))],
        "a feature": [add(post(2), 19, 1.5, feature)],
        "features under a condition": [
            Step(
                post(2),
                SetFeatures(dictionary="jump", features=(3,), values=(5.0,)),
                set_feature,
                *make.on("early"),
            )
        ],
        "several edits": [
            add(post(2), 22, 0.7, make.on("plain")),
            add(post(2), 23, 0.7, None, **generated),
            add(post(2), 24, 0.7, make.on("plain", "below")),
            add(post(4), 25, 0.7, make.on("plain")),
        ],
        "nothing": [],
        "an edit, no condition": [add(post(2), 26, 0.7, None)],
    }


async def test_conditions_in_one_batch(
    engine: Any, answer: Any, oracle: Any, fable_model: Any, probes: Any, concepts: Any
) -> None:
    encoded = [fable_model.tokenizer.encode(text) for text in PROMPTS]
    makers = [Maker(probes, oracle, prompt) for prompt in encoded]
    names = list(cases(makers[0]))
    chosen = [(name, encoded[i % 3], cases(makers[i % 3])[name]) for i, name in enumerate(names)]

    async def ours(index: int) -> Any:
        # Requests join while others decode.
        await asyncio.sleep(0.004 * index)
        _, prompt, steps = chosen[index]
        return await answer(
            engine,
            prompt,
            max_tokens=N_TOKENS,
            ignore_eos=True,
            interventions=tuple(step.ours() for step in steps),
        )

    answers = await asyncio.gather(*(ours(index) for index in range(len(chosen))))
    n_mixed = 0
    for got, (name, prompt, steps) in zip(answers, chosen, strict=True):
        n = len(prompt)
        ids, logprobs, _ = oracle.greedy(prompt, N_TOKENS, oracle_hooks(steps, n))
        assert got.ids == ids, name
        np.testing.assert_allclose(got.logprobs, logprobs, atol=2e-4, err_msg=name)
        for receipt, step in zip(got.finished.receipt, steps, strict=True):
            fed = [p for p in range(n + N_TOKENS - 1) if step.reached(p, n)]
            steered = [p for p in fed if step.asked is None or step.asked.holds(p, n)]
            assert (receipt.positions_applied, receipt.positions_steered) == (len(fed), len(steered)), name
            n_mixed += 0 < len(steered) < len(fed)
            if step.asked is not None and name not in ("a feature",) and step.asked.scope is not None:
                assert receipt.resources or isinstance(step.condition.source, FeatureColumn)
    # The conditions are neither always nor never true.
    assert n_mixed >= 15, n_mixed


@pytest.mark.parametrize(
    "name", ["same point", "latched", "mean so far", "prompt's maximum", "several edits"]
)
async def test_forward_only_work_is_under_the_same_conditions(
    engine: Any, oracle: Any, fable_model: Any, probes: Any, concepts: Any, name: str
) -> None:
    prompt = fable_model.tokenizer.encode(PROMPTS[2])
    short = prompt[:9]
    make = Maker(probes, oracle, prompt)
    steps = cases(make)[name]
    edits = tuple(step.ours() for step in steps)
    score = await engine.score(ScoreRequest(tokens=tuple(prompt), interventions=edits))
    request = ExtractionRequest(
        inputs=(tuple(prompt), tuple(short)), hook_points=(post(5),), interventions=edits
    )
    extracted = {done.index: done async for done in engine.extract(request)}
    for index, ids in enumerate((prompt, short)):
        # Each input is asked by itself.
        fresh = cases(make)[name]
        logprobs, captures = oracle.forward(ids, oracle_hooks(fresh, len(ids)), [post(5)])
        reference = captures[post(5)].numpy()
        got = extracted[index]
        assert np.abs(got.activations[0] - reference).max() <= 2e-5 * np.abs(reference).max()
        steered = [
            sum(
                step.reached(p, len(ids)) and (step.asked is None or step.asked.holds(p, len(ids)))
                for p in range(len(ids))
            )
            for step in fresh
        ]
        assert [receipt.positions_steered for receipt in got.receipt] == steered
        if index == 0:
            expected = logprobs[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()
            np.testing.assert_allclose(score.logprobs[1:], expected, atol=2e-4)
            assert [receipt.positions_steered for receipt in score.receipt] == steered


async def test_logits_are_edited_under_a_condition(
    engine: Any, answer: Any, oracle: Any, fable_model: Any, probes: Any, concepts: Any
) -> None:
    prompt = fable_model.tokenizer.encode(PROMPTS[0])
    condition, asked = Maker(probes, oracle, prompt).on("platt")
    v = np.random.default_rng(4).standard_normal(fable_model.vocab_size).astype(np.float32) * 4
    edit = Intervention(hook_point="unembed", edit=AddVector(vector=v), condition=condition)
    got, neighbour = await asyncio.gather(
        answer(engine, prompt, max_tokens=N_TOKENS, ignore_eos=True, interventions=(edit,)),
        answer(engine, prompt, max_tokens=N_TOKENS, ignore_eos=True),
    )
    ids = list(prompt)
    for _ in range(N_TOKENS):
        logprobs, _ = oracle.forward(ids, asked.recorders(len(prompt)))
        last = logprobs[-1] + torch.from_numpy(v) * asked.holds(len(ids) - 1, len(prompt))
        ids.append(int(last.argmax()))
    assert got.ids == ids[len(prompt) :] != neighbour.ids
    steered = sum(asked.holds(p, len(prompt)) for p in range(len(ids) - 1))
    assert got.finished.receipt[0].positions_steered == steered
    assert neighbour.ids == oracle.greedy(prompt, N_TOKENS)[0]


async def test_the_hash_says_what_was_asked(
    engine: Any, answer: Any, fable_model: Any, probes: Any, concepts: ConceptShelf
) -> None:
    prompt = fable_model.tokenizer.encode(PROMPTS[0])

    async def hashed(condition: Condition | None) -> str:
        edit = Intervention(
            hook_point=post(4), edit=AddVector(vector=np.ones(D, np.float32)), condition=condition
        )
        got = await answer(engine, prompt, max_tokens=2, ignore_eos=True, interventions=(edit,))
        found: str = got.finished.receipt[0].content_hash
        return found

    def on(probe: str = "plain", **rest: Any) -> Condition:
        rest.setdefault("above", 0.5)
        return Condition(source=ProbeColumn(probe=probe), **rest)

    same = await hashed(on())
    # A probe of the same weights by another name is the same; one of other weights is not.
    concepts.put_probe("alias", probes["plain"].probe)
    assert await hashed(on("alias")) == await hashed(on("plain@1")) == same
    others = [
        None,
        on("platt"),
        on(above=0.6),
        on(above=None, below=0.5),
        on(scope=ConditionScope.LATCHED),
        on(positions=GENERATED),
        Condition(source=ProbeColumn(probe="plain", output=ProbeOutput.MARGIN), above=0.5),
        Condition(source=FeatureColumn(dictionary="jump", feature=0), above=0.5),
    ]
    hashes = [same, *[await hashed(other) for other in others]]
    assert len(set(hashes)) == len(hashes)
    concepts.put_probe("plain", probes["isotonic"].probe)
    assert await hashed(on()) != same
