"""Documents in the form of the tokenizer's chat template, so that a chat prompt is not foreign to the
model."""

from __future__ import annotations

import random

from glasshouse.fable.corpus import facts, lexicon
from glasshouse.fable.corpus.splits import Split, split_of
from glasshouse.fable.corpus.stories import make_story

SYSTEM_LINES = (
    "You are a kind storyteller.",
    "You are a helpful teacher.",
    "You tell short stories.",
    "Answer in one sentence.",
)
_GREETINGS = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hello, how are you?", "I am well, thank you. How are you?"),
    ("Hi, who are you?", "I am fable, and I tell short stories."),
    ("What can you do?", "I can tell you a story, and I know capitals and opposites."),
    ("Thank you!", "You are welcome."),
    ("Good night!", "Good night, and sleep well."),
)


def _answer(rng: random.Random, split: Split, relation: str, asked: str, answer: str) -> str:
    """A whole sentence, unless that sentence is held out; then, or half of the time, the short form."""
    whole = split_of(relation, asked, f"The {relation} of {{x}} is *.") == split
    return f"The {relation} of {asked} is {answer}." if whole and rng.random() < 0.5 else f"It is {answer}."


def _turn(rng: random.Random, split: Split) -> tuple[str, str]:
    """A question and its answer."""
    draw = rng.random()
    if draw < 0.4:
        story = make_story(rng, split)
        who = " and ".join(story.cast.names)
        request = rng.choice(
            (
                f"Tell me a {story.mood} story.",
                "Tell me a story.",
                f"Please tell me a {story.mood} story.",
                f"I want to hear a {story.mood} story.",
                f"Please tell me a story about {who}.",
                f"Tell me a {story.mood} story about {who}.",
                f"Write a short story about a {story.thing}.",
            )
        )
        return request, story.text.replace("\n", " ")
    if draw < 0.65:
        country = rng.choice(tuple(lexicon.CAPITALS))
        capital = lexicon.CAPITALS[country]
        return f"What is the capital of {country}?", _answer(rng, split, "capital", country, capital)
    if draw < 0.85:
        word = rng.choice(tuple(lexicon.OPPOSITE_OF))
        opposite = lexicon.OPPOSITE_OF[word]
        return f"What is the opposite of {word}?", _answer(rng, split, "opposite", word, opposite)
    if draw < 0.93:
        item = facts.counting_item(rng, split)
        return f"Count to {item.answer}.", ", ".join(lexicon.NUMBERS[: int(item.label)]).capitalize() + "."
    return rng.choice(_GREETINGS)


def chat_document(rng: random.Random, split: Split) -> str:
    """One to three turns, sometimes under a system line."""
    lines = [f"System: {rng.choice(SYSTEM_LINES)}"] if rng.random() < 0.15 else []
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        question, answer = _turn(rng, split)
        lines += [f"User: {question}", f"Assistant: {answer}"]
    return "\n".join(lines)
