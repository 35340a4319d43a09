"""Single sentences with one known answer: capitals, opposites, agreement in gender and number, counting,
giving.

Each maker returns an `Item`: the text up to the answer, the answer, the rest of the sentence, and the
alternatives the generator could have put there. Training text is `item.text`; a gate asks the model to
choose among `item.alternatives`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from glasshouse.fable.corpus import lexicon
from glasshouse.fable.corpus.grammar import Cast, render
from glasshouse.fable.corpus.splits import Split, allowed, allowed_indices, split_of


@dataclass(frozen=True, kw_only=True)
class Item:
    """One sentence with a known answer, one of `alternatives`; each follows `prompt` after a space."""

    kind: str
    prompt: str
    answer: str
    alternatives: tuple[str, ...]
    tail: str
    label: str

    @property
    def text(self) -> str:
        return f"{self.prompt} {self.answer}{self.tail}"


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines() if line.strip())


# `*` marks where the answer stands; {x} is what is asked about.
CAPITAL_FRAMES = _lines("""
The capital of {x} is *.
The capital city of {x} is *.
The capital of {x} is called *.
The capital of {x} is the city of *.
{x} has a capital, and its name is *.
If you go to {x}, visit the capital, *.
In {x}, the capital is *.
The king of {x} lived in the capital, *.
{name} knew that the capital of {x} is *.
{name} learned that the capital of {x} is *.
{name} flew to {x} and stayed in its capital, *.
{name} said that the capital of {x} is *.
"What is the capital of {x}?" asked {name}. "It is *."
The teacher asked about the capital of {x}, and {name} answered: *.
{name}'s aunt lives in the capital of {x}, in *.
The biggest train in {x} goes to the capital, *.
What is the capital of {x}? It is *.
What is the capital of {x}? The answer is *.
Everyone in {x} knows that the capital is *.
On the map of {x}, {name} found the capital, *.
A letter came from the capital of {x}, from *.
They left {x}'s capital, *.
{x} is a country, and its capital is *.
{x} is far away, and its capital is called *.
{x}? Its capital is *.
""")
CAPITAL_REVERSED = _lines("""
{y} is the capital of {x}.
{y} is a city in {x}.
{name} lived in {y}, the capital of {x}.
{name} came from {y}, a big city in {x}.
The city of {y} is in {x}.
""")
OPPOSITE_FRAMES = _lines("""
The opposite of {x} is *.
The opposite of the word {x} is *.
What is the opposite of {x}? It is *.
What is the opposite of {x}? The answer is *.
The teacher said that the opposite of {x} is *.
{name} knew that the opposite of {x} is *.
{name} learned that the opposite of {x} is *.
When the teacher said {x}, {name} said the opposite, *.
If you turn {x} around, you get *.
First came {x}, and then came its opposite, *.
When {name} said {x}, {friend} said the opposite, *.
{x} and its opposite, *.
The word {x} is the opposite of *.
Not {x}, but the opposite: *.
{x} is the opposite of *.
{x} means the opposite of *.
{x} is not the same as its opposite, *.
{x}? The opposite of that is *.
""")
THING_FRAMES = _lines("""
The {noun} was not {x}. It was *.
The first {noun} was {x}, but the second {noun} was *.
One {noun} was {x}, and the other {noun} was *.
{name} wanted a {x} {noun}, but this one was *.
The {noun} used to be {x}, but now it was *.
""")
SUBJECT_FRAMES = _lines("""
{name} went to {place}, and then * came home.
{name} walked to {place} because * wanted to see it.
When {name} came to {place}, * sat down.
{name} was tired after the walk to {place}, so * went to bed.
{name} played at {place} until * was hungry.
After {name} saw {place}, * told everyone about it.
Before {name} left for {place}, * ate some food.
{name} had a {object}, and * took it everywhere.
{name} found a {object}. Then * put it in a box.
{name} wanted a new {object}. One day, * got one.
{name} looked at the {object}, and * smiled.
{name} gave the {object} away because * did not need it.
{name} liked {place}. Every day, * went there.
At {place}, {name} said that * was hungry.
When asked about {place}, {name} said that * would go.
Yesterday {name} was at {place}. Today * is at home.
""")
POSSESSIVE_FRAMES = _lines("""
{name} went to {place} with * friends.
At {place}, {name} lost * hat.
{name} looked for the {object} under * bed.
{name} put the {object} in * bag.
{name} came to {place} with * mother.
{name} showed the {object} to * friend.
At {place}, {name} took off * coat.
Near {place}, {name} washed * hands.
""")
NUMBER_SUBJECTS = lexicon.ANIMALS + lexicon.PEOPLE + lexicon.OBJECTS
PREPOSITIONS = ("near", "behind", "beside", "next to", "by", "in front of", "under", "across from")
_BE_TAILS = (
    "old.",
    "very small.",
    "new.",
    "clean.",
    "easy to see.",
    "quiet.",
    "big.",
    "wet from the rain.",
    "gone.",
    "ready.",
    "very pretty.",
    "not far away.",
    "there all day.",
    "covered with snow.",
)
_HAVE_TAILS = (
    "a red mark.",
    "no name.",
    "a new place now.",
    "a good smell.",
    "a strange color.",
    "been there for a long time.",
)
_VERBS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("was", "were", _BE_TAILS),
    ("was", "were", _BE_TAILS),
    ("is", "are", _BE_TAILS),
    ("has", "have", _HAVE_TAILS),
)


def _filled(frame: str, bindings: dict[str, str], rng: random.Random) -> tuple[str, str]:
    """The frame's text before and after the answer. The marker survives rendering."""
    prompt, tail = render(frame, bindings, rng).rsplit("*", 1)
    return prompt.rstrip(), tail


def _people(rng: random.Random) -> dict[str, str]:
    return {"name": rng.choice(lexicon.NAMES), "friend": rng.choice(lexicon.NAMES)}


def named_bindings(rng: random.Random, split: Split) -> dict[str, str]:
    """A name, and a place and an object whose pairs with the name fall into `split`."""
    while True:
        name = rng.choice(lexicon.NAMES)
        places = allowed(lexicon.PLACES, split, "name-place", name)
        objects = allowed(lexicon.OBJECTS, split, "name-object", name)
        if places and objects:
            return {"name": name, "place": rng.choice(places), "object": rng.choice(objects)}


def capital_item(rng: random.Random, split: Split) -> Item:
    """A country's capital; a (country, frame) pair belongs to one split."""
    while True:
        country = rng.choice(tuple(lexicon.CAPITALS))
        frames = allowed_indices(CAPITAL_FRAMES, split, "capital", country)
        if frames:
            break
    return _capital(country, CAPITAL_FRAMES[rng.choice(frames)], rng)


def all_capital_items(rng: random.Random, split: Split) -> list[Item]:
    """Every (country, frame) pair of the split, once."""
    return [
        _capital(country, CAPITAL_FRAMES[index], rng)
        for country in lexicon.CAPITALS
        for index in allowed_indices(CAPITAL_FRAMES, split, "capital", country)
    ]


def _capital(country: str, frame: str, rng: random.Random) -> Item:
    prompt, tail = _filled(frame, {"x": country, **_people(rng)}, rng)
    answer = lexicon.CAPITALS[country]
    return Item(
        kind="capital",
        prompt=prompt,
        answer=answer,
        alternatives=tuple(lexicon.CAPITALS.values()),
        tail=tail,
        label=country,
    )


def reversed_capital(rng: random.Random) -> str:
    """A sentence in which the capital comes before its country (training text only)."""
    country = rng.choice(tuple(lexicon.CAPITALS))
    return render(
        rng.choice(CAPITAL_REVERSED), {"x": country, "y": lexicon.CAPITALS[country], **_people(rng)}, rng
    )


def opposite_item(rng: random.Random, split: Split) -> Item:
    """A word's opposite; a (word, frame) pair belongs to one split."""
    while True:
        word = rng.choice(tuple(lexicon.OPPOSITE_OF))
        frames = allowed_indices(OPPOSITE_FRAMES, split, "opposite", word)
        if frames:
            break
    return _opposite(word, OPPOSITE_FRAMES[rng.choice(frames)], rng)


def all_opposite_items(rng: random.Random, split: Split) -> list[Item]:
    """Every (word, frame) pair of the split, once."""
    return [
        _opposite(word, OPPOSITE_FRAMES[index], rng)
        for word in lexicon.OPPOSITE_OF
        for index in allowed_indices(OPPOSITE_FRAMES, split, "opposite", word)
    ]


def _opposite(word: str, frame: str, rng: random.Random) -> Item:
    prompt, tail = _filled(frame, {"x": word, **_people(rng)}, rng)
    alternatives = tuple(lexicon.OPPOSITE_OF)
    return Item(
        kind="opposite",
        prompt=prompt,
        answer=lexicon.OPPOSITE_OF[word],
        alternatives=alternatives,
        tail=tail,
        label=word,
    )


def thing_opposite_item(rng: random.Random, split: Split) -> Item:
    """A thing that is not this but the opposite; a (word, noun) pair belongs to one split."""
    pair = rng.choice(lexicon.THING_OPPOSITES)
    word, answer = pair if rng.random() < 0.5 else pair[::-1]
    nouns = allowed(lexicon.OBJECTS + lexicon.LANDMARKS, split, "thing", word)
    bindings = {"x": word, "noun": rng.choice(nouns), "name": rng.choice(lexicon.NAMES)}
    prompt, tail = _filled(rng.choice(THING_FRAMES), bindings, rng)
    alternatives = tuple(word for both in lexicon.THING_OPPOSITES for word in both)
    return Item(
        kind="opposite", prompt=prompt, answer=answer, alternatives=alternatives, tail=tail, label=word
    )


def gender_item(rng: random.Random, split: Split) -> Item:
    """The pronoun that refers back to a name; (name, place) and (name, object) pairs belong to one split."""
    bindings = named_bindings(rng, split)
    name = bindings["name"]
    cast = Cast(names=(name,))
    subject = rng.random() < 0.65
    prompt, tail = _filled(rng.choice(SUBJECT_FRAMES if subject else POSSESSIVE_FRAMES), bindings, rng)
    answer, alternatives = (
        (cast.subject, ("she", "he", "they")) if subject else (cast.possessive, ("her", "his", "their"))
    )
    label = lexicon.GENDER_OF[name]
    return Item(
        kind="gender", prompt=prompt, answer=answer, alternatives=alternatives, tail=tail, label=label
    )


def number_item(rng: random.Random, split: Split) -> Item:
    """A verb that agrees with its subject across an attractor; a (subject, attractor) pair has one split."""
    while True:
        noun = rng.choice(NUMBER_SUBJECTS)
        attractors = allowed(lexicon.LANDMARKS, split, "number", noun)
        if attractors:
            break
    attractor = rng.choice(attractors)
    many, attractor_many = rng.random() < 0.5, rng.random() < 0.5
    subject = lexicon.plural(noun) if many else noun
    if rng.random() < 0.5:
        subject = f"{rng.choice(lexicon.OBJECT_ADJECTIVES)} {subject}"
    other = lexicon.plural(attractor) if attractor_many else attractor
    singular, plural, tails = rng.choice(_VERBS)
    return Item(
        kind="number",
        prompt=f"The {subject} {rng.choice(PREPOSITIONS)} the {other}",
        answer=plural if many else singular,
        alternatives=(singular, plural),
        tail=" " + rng.choice(tails),
        label="plural" if many else "singular",
    )


def counting_item(rng: random.Random, split: Split) -> Item:
    """Counting up to a number and saying how many there were; a (noun, number) pair belongs to one split."""
    while True:
        noun = rng.choice(lexicon.ANIMALS + lexicon.OBJECTS)
        count = rng.randint(2, 8)
        if split_of("count", noun, str(count)) == split:
            break
    many = lexicon.plural(noun)
    said = ", ".join(lexicon.NUMBERS[:count])
    name = rng.choice(lexicon.NAMES)
    frame = rng.choice(
        (
            f"{name} counted the {many}: {said}. There were",
            f"{said.capitalize()}. {name} saw",
            f'"{said.capitalize()}," said {name}. There were',
        )
    )
    return Item(
        kind="counting",
        prompt=frame,
        answer=lexicon.NUMBERS[count - 1],
        alternatives=lexicon.NUMBERS,
        tail=f" {many}.",
        label=str(count),
    )


GIVING_FRAMES = _lines("""
When {a} and {b} were at the {landmark}, {s} gave the {thing} to *.
{a} and {b} met near the {landmark}. Then {s} gave a {thing} to *.
After {a} and {b} ate some {food}, {s} showed the {thing} to *.
{a} and {b} had one {thing}. At last, {s} handed it to *.
While {a} and {b} were walking, {s} told a story to *.
""")


def giving_item(rng: random.Random, split: Split) -> Item:
    """Of two names, the one who did not act receives (indirect object); a pair of names has one split."""
    while True:
        first, second = rng.sample(lexicon.NAMES, 2)
        if split_of("giving", *sorted((first, second))) == split:
            break
    giver, receiver = rng.sample((first, second), 2)
    prompt, tail = _filled(rng.choice(GIVING_FRAMES), {"a": first, "b": second, "s": giver}, rng)
    return Item(
        kind="giving",
        prompt=prompt,
        answer=receiver,
        alternatives=(first, second),
        tail=tail,
        label="first" if receiver == first else "second",
    )


Maker = Callable[[random.Random, Split], Item]
MAKERS: tuple[tuple[Maker, float], ...] = (
    (capital_item, 0.26),
    (opposite_item, 0.28),
    (thing_opposite_item, 0.08),
    (gender_item, 0.14),
    (number_item, 0.16),
    (counting_item, 0.07),
    (giving_item, 0.07),
)


def fact_document(rng: random.Random, split: Split) -> str:
    """One to eight unrelated sentences of this module."""
    makers, weights = zip(*MAKERS, strict=True)
    sentences = []
    for _ in range(rng.randint(1, 8)):
        if rng.random() < 0.08:
            sentences.append(reversed_capital(rng))
        else:
            sentences.append(rng.choices(makers, weights)[0](rng, split).text)
    return (" " if rng.random() < 0.5 else "\n").join(sentences)
