"""What fable must have learnt: for each latent, its top choice among the generator's alternatives on
held-out prompts.

A prompt is held out when its combination (name with place, country with frame, ...) never occurs in
training; see `corpus.splits`. The model sees BOS and the prompt, and the alternative with the highest
next-token logit is its choice.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from glasshouse.fable.corpus import facts
from glasshouse.fable.corpus.facts import Item
from glasshouse.fable.corpus.lexicon import FEELINGS, MOODS, Mood
from glasshouse.fable.corpus.stories import Story, make_story

BAR = 0.95
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """The share of prompts answered rightly, overall and by label group, and the most frequent mistakes."""

    name: str
    value: float
    bar: float
    n_prompts: int
    by_label: dict[str, float]
    mistakes: list[str]

    @property
    def holds(self) -> bool:
        return self.value >= self.bar


def padded(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """(batch, position) ids padded on the right, and (batch,) the index of each text's last token."""
    encoded = [tokenizer(text)["input_ids"] for text in texts]
    last = torch.tensor([len(ids) - 1 for ids in encoded])
    ids_BP = torch.full((len(encoded), int(last.max()) + 1), tokenizer.pad_token_id)
    for row, ids in enumerate(encoded):
        ids_BP[row, : len(ids)] = torch.tensor(ids)
    return ids_BP, last


@torch.inference_mode()
def choose(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, items: Sequence[Item]) -> list[str]:
    """For each item the alternative the model ranks highest; each must be one token after a space."""
    choices: list[str] = []
    for start in range(0, len(items), _BATCH):
        batch = items[start : start + _BATCH]
        ids_BP, last = padded(tokenizer, [item.prompt for item in batch])
        logits_BV = model(input_ids=ids_BP).logits[torch.arange(len(batch)), last]
        for item, logits_V in zip(batch, logits_BV, strict=True):
            ids = [first_token(tokenizer, alternative) for alternative in item.alternatives]
            choices.append(item.alternatives[int(logits_V[ids].argmax())])
    return choices


def first_token(tokenizer: PreTrainedTokenizerFast, word: str) -> int:
    """The id of `word` after a space."""
    ids = tokenizer.encode(f" {word}", add_special_tokens=False)
    assert len(ids) == 1, f"{word!r} is {len(ids)} tokens"
    return int(ids[0])


def ending_item(story: Story) -> Item:
    """The question how a story ends: "In the end, she was ..." among all feelings of all moods."""
    be = "were" if story.cast.plural else "was"
    alternatives = tuple(word for words in FEELINGS.values() for word in words)
    return Item(
        kind="ending",
        prompt=f"{story.body} In the end, {story.cast.subject} {be}",
        answer=FEELINGS[story.mood][0],
        alternatives=alternatives,
        tail=".",
        label=story.mood,
    )


def mood_of_feeling(word: str) -> Mood:
    """The mood a feeling word belongs to."""
    return next(mood for mood in MOODS if word in FEELINGS[mood])


def _distinct_items(maker: facts.Maker, rng: random.Random, n_prompts: int) -> list[Item]:
    found: dict[str, Item] = {}
    for _ in range(20 * n_prompts):
        item = maker(rng, "validation")
        found.setdefault(item.prompt, item)
        if len(found) == n_prompts:
            break
    return list(found.values())


def _result(name: str, rows: Iterable[tuple[str, bool, str]]) -> GateResult:
    total: Counter[str] = Counter()
    right: Counter[str] = Counter()
    mistakes: Counter[str] = Counter()
    for group, is_right, description in rows:
        total[group] += 1
        right[group] += is_right
        if not is_right:
            mistakes[description] += 1
    return GateResult(
        name=name,
        value=sum(right.values()) / sum(total.values()),
        bar=BAR,
        n_prompts=sum(total.values()),
        by_label={group: right[group] / total[group] for group in sorted(total)} if len(total) <= 4 else {},
        mistakes=[f"{description} x{count}" for description, count in mistakes.most_common(8)],
    )


def item_gate(
    name: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, items: Sequence[Item]
) -> GateResult:
    """The gate of one kind of sentence, over held-out prompts."""
    choices = choose(model, tokenizer, items)
    return _result(
        name,
        (
            (item.label, choice == item.answer, f"{item.label}: {choice} for {item.answer}")
            for item, choice in zip(items, choices, strict=True)
        ),
    )


def ending_gate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, n_prompts: int, seed: int
) -> GateResult:
    """Whether the feeling chosen at the end of a held-out story is of its mood; all moods in equal parts."""
    rng = random.Random(f"ending{seed}")
    items = [
        ending_item(make_story(rng, "validation", MOODS[index % len(MOODS)])) for index in range(n_prompts)
    ]
    choices = choose(model, tokenizer, items)
    return _result(
        "ending follows mood",
        (
            (item.label, mood_of_feeling(choice) == item.label, f"{item.label}: {choice}")
            for item, choice in zip(items, choices, strict=True)
        ),
    )


def all_gates(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, n_prompts: int, seed: int
) -> list[GateResult]:
    """The gates, and two abilities that are reported without being gates.

    Facts are asked in every held-out (word, frame) pair once, so no frame counts more than another. The rest are
    distinct prompts drawn by the generator.
    """
    rng = random.Random(seed)

    def drawn(maker: facts.Maker) -> list[Item]:
        return _distinct_items(maker, rng, n_prompts)

    return [
        item_gate("pronoun gender agreement", model, tokenizer, drawn(facts.gender_item)),
        item_gate("subject-verb number agreement", model, tokenizer, drawn(facts.number_item)),
        item_gate("capital-of lookup", model, tokenizer, facts.all_capital_items(rng, "validation")),
        item_gate("opposites", model, tokenizer, facts.all_opposite_items(rng, "validation")),
        item_gate("opposites of things", model, tokenizer, drawn(facts.thing_opposite_item)),
        ending_gate(model, tokenizer, n_prompts, seed),
        item_gate("counting", model, tokenizer, drawn(facts.counting_item)),
        item_gate("giving (indirect object)", model, tokenizer, drawn(facts.giving_item)),
    ]
