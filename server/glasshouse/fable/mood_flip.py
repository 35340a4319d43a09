"""Flipping the mood of an ending with one vector.

1. Direction: mean of `blocks.L.hook_resid_post` over the positions (BOS excluded) of happy texts, minus
   that of sad texts; the texts come from the labelled split.
2. Held-out stories of either mood are cut after "In the end,"; the direction, times a coefficient (negative
   to turn a happy story sad), is added at every position but BOS, in the prompt and in what is generated;
   decoding is greedy.
3. A story is flipped when the first sentence of the ending has words of the opposite mood's endings and of
   no other mood.
4. Grammaticality: the mean loss per generated token under the unsteered model (its own prompt, no edit),
   minus that of the unsteered endings. It includes what it costs to end a sad story happily at all.
5. Layer and coefficient are chosen on stories of the labelled split, and measured on the validation split.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from glasshouse.fable.corpus.labelled import Record
from glasshouse.fable.corpus.lexicon import FEELINGS, MOODS, Mood
from glasshouse.fable.corpus.splits import Split
from glasshouse.fable.corpus.stories import Story, make_story
from glasshouse.fable.gates import padded

BAR_FLIPPED = 0.80
BAR_LOSS_RISE = 1.0
OPPOSITE_MOOD: dict[Mood, Mood] = {"happy": "sad", "sad": "happy"}
_MAX_NEW_TOKENS = 40
_BATCH = 50
# The words of each mood's endings that are not feelings; see `corpus.frames.ENDINGS`.
ENDING_WORDS: dict[Mood, frozenset[str]] = {
    "happy": frozenset({*FEELINGS["happy"], "smiled", "smile", "laughed", "danced", "wonderful", "happily"}),
    "sad": frozenset({*FEELINGS["sad"], "cried", "tears", "sobbed", "wept", "awful"}),
    "calm": frozenset({*FEELINGS["calm"], "slowly"}),
    "afraid": frozenset({*FEELINGS["afraid"], "terrible"}),
}


@dataclass(frozen=True, kw_only=True)
class FlipResult:
    """One layer and coefficient on a set of stories; losses in nats per generated token, unsteered model."""

    layer: int
    coefficient: float
    flipped: float
    flipped_to_happy: float
    flipped_to_sad: float
    loss_plain: float
    loss_steered: float
    n_stories: int
    examples: list[str]

    @property
    def loss_rise(self) -> float:
        return self.loss_steered - self.loss_plain

    @property
    def holds(self) -> bool:
        return self.flipped >= BAR_FLIPPED and self.loss_rise < BAR_LOSS_RISE


def mood_of_ending(ending: str) -> Mood | None:
    """The one mood whose words the ending's first sentence contains; None for no mood or several."""
    words = set(re.findall(r"[a-z]+", re.split(r"[.!?]", ending)[0].lower()))
    found = [mood for mood in MOODS if words & ENDING_WORDS[mood]]
    return found[0] if len(found) == 1 else None


@torch.inference_mode()
def mood_direction(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: Sequence[Record], layer: int
) -> torch.Tensor:
    """(d_model,) float32: mean residual after block `layer` on happy texts minus on sad ones."""
    means: dict[str, list[torch.Tensor]] = {"happy": [], "sad": []}
    for record in records:
        ids_BP, _ = padded(tokenizer, [record["text"]])
        resid_BPD = resid_post(model, ids_BP, layer)
        means[record["label"]].append(resid_BPD[0, 1:].mean(dim=0))
    return torch.stack(means["happy"]).mean(dim=0) - torch.stack(means["sad"]).mean(dim=0)


@torch.inference_mode()
def resid_post(model: LlamaForCausalLM, ids_BP: torch.Tensor, layer: int) -> torch.Tensor:
    """(batch, position, d_model): the residual stream after block `layer`."""
    caught: list[torch.Tensor] = []
    handle = model.model.layers[layer].register_forward_hook(
        lambda _module, _args, output: caught.append(_hidden(output))
    )
    try:
        model.model(input_ids=ids_BP, use_cache=False)
    finally:
        handle.remove()
    return caught[0]


def _hidden(output: Any) -> torch.Tensor:
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, torch.Tensor)
    return hidden


@contextmanager
def steered(
    model: LlamaForCausalLM, layer: int, vectors_BD: torch.Tensor, keep_BP: torch.Tensor
) -> Iterator[None]:
    """Adds row b's vector after block `layer`: in the prompt where `keep_BP` says, then at every position."""

    def add(_module: torch.nn.Module, _args: Any, output: Any) -> Any:
        hidden_BPD = _hidden(output)
        keep = keep_BP if hidden_BPD.shape[1] == keep_BP.shape[1] else torch.ones(hidden_BPD.shape[:2])
        edited = hidden_BPD + keep[..., None] * vectors_BD[:, None]
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    handle = model.model.layers[layer].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def endings(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    layer: int,
    vectors_ND: torch.Tensor,
) -> list[list[int]]:
    """Greedy continuations (ids, without EOS) of each prompt with its own vector added."""
    found: list[list[int]] = []
    for start in range(0, len(prompts), _BATCH):
        encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts[start : start + _BATCH]]
        width = max(map(len, encoded))
        ids_BP = torch.tensor([[tokenizer.pad_token_id] * (width - len(ids)) + ids for ids in encoded])
        attended = (ids_BP != tokenizer.pad_token_id).long()
        keep_BP = (attended.bool() & (ids_BP != tokenizer.bos_token_id)).float()
        with steered(model, layer, vectors_ND[start : start + _BATCH], keep_BP):
            out = model.generate(
                ids_BP,
                attention_mask=attended,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                max_new_tokens=_MAX_NEW_TOKENS,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        specials = {tokenizer.eos_token_id, tokenizer.pad_token_id}
        found += [[token for token in row if token not in specials] for row in out[:, width:].tolist()]
    return found


@torch.inference_mode()
def loss_of_endings(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    continuations: Sequence[list[int]],
) -> float:
    """Mean loss per continuation token, in nats, under the model as it is."""
    total, count = 0.0, 0
    for prompt, continuation in zip(prompts, continuations, strict=True):
        prompt_ids = tokenizer(prompt)["input_ids"]
        ids_P = torch.tensor(prompt_ids + continuation)
        logits_PV = model(input_ids=ids_P[None]).logits[0]
        losses = torch.nn.functional.cross_entropy(logits_PV[:-1].float(), ids_P[1:], reduction="none")
        total += float(losses[len(prompt_ids) - 1 :].sum())
        count += len(continuation)
    return total / max(count, 1)


def flip_stories(split: Split, n_stories: int, seed: int) -> list[Story]:
    """Happy and sad stories in turn."""
    rng = random.Random(f"flip{split}{seed}")
    return [make_story(rng, split, ("happy", "sad")[index % 2]) for index in range(n_stories)]


def measure_flip(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    stories: Sequence[Story],
    layer: int,
    direction: torch.Tensor,
    coefficient: float,
) -> FlipResult:
    """Steps 2 to 4 for one layer and coefficient."""
    prompts = [f"{story.body} In the end," for story in stories]
    signs = torch.tensor([1.0 if story.mood == "sad" else -1.0 for story in stories])
    vectors_ND = coefficient * signs[:, None] * direction
    plain = endings(model, tokenizer, prompts, layer, torch.zeros_like(vectors_ND))
    edited = endings(model, tokenizer, prompts, layer, vectors_ND)
    texts = [tokenizer.decode(ids) for ids in edited]
    flips = [
        mood_of_ending(text) == OPPOSITE_MOOD[story.mood] for text, story in zip(texts, stories, strict=True)
    ]
    to_happy = [flip for flip, story in zip(flips, stories, strict=True) if story.mood == "sad"]
    to_sad = [flip for flip, story in zip(flips, stories, strict=True) if story.mood == "happy"]
    return FlipResult(
        layer=layer,
        coefficient=coefficient,
        flipped=sum(flips) / len(flips),
        flipped_to_happy=sum(to_happy) / len(to_happy),
        flipped_to_sad=sum(to_sad) / len(to_sad),
        loss_plain=loss_of_endings(model, tokenizer, prompts, plain),
        loss_steered=loss_of_endings(model, tokenizer, prompts, edited),
        n_stories=len(stories),
        examples=[
            f"[{story.mood}] ...{story.body[-90:]} In the end,{text}"
            for story, text in zip(stories[:6], texts, strict=False)
        ],
    )


def sweep(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    records: Sequence[Record],
    layers: Sequence[int],
    coefficients: Sequence[float],
    n_stories: int,
    seed: int,
) -> list[FlipResult]:
    """Every layer and coefficient on stories of the labelled split."""
    stories = flip_stories("labelled", n_stories, seed)
    return [
        measure_flip(model, tokenizer, stories, layer, direction, coefficient)
        for layer in layers
        for direction in [mood_direction(model, tokenizer, records, layer)]
        for coefficient in coefficients
    ]


def best(results: Sequence[FlipResult]) -> FlipResult:
    """The most flips within the loss bar; among those within two points of it, the smallest loss rise."""
    within = [result for result in results if result.loss_rise < 0.9 * BAR_LOSS_RISE] or list(results)
    most = max(result.flipped for result in within)
    return min(
        (result for result in within if result.flipped >= most - 0.02), key=lambda result: result.loss_rise
    )
