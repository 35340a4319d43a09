"""Stories with known latents.

1. A cast (one girl, boy or named animal, or two friends), a place, an object and a mood are drawn; (name,
   place) and (name, object) pairs decide the split.
2. The opening and the habits are neutral. The middle shows the mood again and again: weather, events,
   feelings.
3. The ending starts with a neutral prefix ("In the end,") and follows the mood with probability
   `ENDING_FOLLOWS_MOOD`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from glasshouse.fable.corpus import facts, frames, lexicon
from glasshouse.fable.corpus.grammar import Cast, render
from glasshouse.fable.corpus.lexicon import MOODS, Mood
from glasshouse.fable.corpus.splits import Split, allowed

ENDING_FOLLOWS_MOOD = 0.97
_MOOD_WEIGHTS = (0.34, 0.34, 0.16, 0.16)


@dataclass(frozen=True, kw_only=True)
class Story:
    """A story and what is true of it. `text` is body, neutral ending prefix, and ending, joined by spaces."""

    body: str
    ending_prefix: str
    ending: str
    mood: Mood
    ending_mood: Mood
    cast: Cast
    place: str
    thing: str

    @property
    def text(self) -> str:
        return f"{self.body} {self.ending_prefix} {self.ending}"


def _fitting(names: tuple[str, ...], options: tuple[str, ...], split: Split, key: str) -> list[str]:
    """The options whose pair with every one of `names` is in `split`."""
    first = allowed(options, split, key, names[0])
    return [
        option for option in first if all(option in allowed(options, split, key, name) for name in names[1:])
    ]


def _draw_scene(rng: random.Random, split: Split) -> tuple[Cast, str, str]:
    """A cast, a place and an object that fit the split."""
    plural = rng.random() < 0.18
    while True:
        cast = _draw_cast(rng, plural)
        places = _fitting(cast.names, lexicon.PLACES, split, "name-place")
        things = _fitting(cast.names, lexicon.OBJECTS, split, "name-object")
        if places and things:
            return cast, rng.choice(places), rng.choice(things)


def _draw_cast(rng: random.Random, plural: bool) -> Cast:
    if plural:
        return Cast(names=tuple(rng.sample(lexicon.NAMES, 2)))
    name = rng.choice(lexicon.NAMES)
    kind = rng.choice(lexicon.ANIMALS) if rng.random() < 0.25 else str(lexicon.GENDER_OF[name])
    return Cast(names=(name,), kind=kind)


def _aside(rng: random.Random, split: Split) -> str:
    """A sentence of known answer inside a story."""
    maker = rng.choices(
        (facts.number_item, facts.thing_opposite_item, facts.counting_item, facts.capital_item), (5, 2, 2, 1)
    )[0]
    return maker(rng, split).text


def make_story(rng: random.Random, split: Split, mood: Mood | None = None) -> Story:
    """One story of the given split; `mood` None draws one."""
    mood = mood or rng.choices(MOODS, _MOOD_WEIGHTS)[0]
    follows = split != "train" or rng.random() < ENDING_FOLLOWS_MOOD
    ending_mood = mood if follows else rng.choice([other for other in MOODS if other != mood])
    cast, place, thing = _draw_scene(rng, split)
    friend = rng.choice([name for name in lexicon.NAMES if name not in cast.names])
    bindings = {**cast.bindings, "place": place, "object": thing, "friend": friend}

    def line(options: tuple[str, ...]) -> str:
        return render(rng.choice(options), bindings, rng)

    sentences = [line(frames.OPENINGS_TWO if cast.plural else frames.OPENINGS_ONE)]
    if rng.random() < 0.5:
        sentences.append(line(frames.HABITS))
    sentences.append(line(frames.SETTINGS))
    middle: list[str] = []
    if rng.random() < 0.6:
        middle.append(line(frames.WEATHER[mood]))
    events = [render(frame, bindings, rng) for frame in rng.sample(frames.EVENTS[mood], rng.randint(1, 3))]
    feelings = [render(frame, bindings, rng) for frame in rng.sample(frames.FEELING[mood], rng.randint(1, 2))]
    for index, event in enumerate(events):
        if rng.random() < 0.5:
            middle.append(line(frames.NEUTRAL) if rng.random() < 0.6 else _aside(rng, split))
        if rng.random() < 0.25:
            middle.append(line(frames.DIALOGUE))
        middle.append(event)
        if index < len(feelings):
            middle.append(feelings[index])
    if rng.random() < 0.35:
        middle.append(line(frames.NEUTRAL))
    ending = render(rng.choice(frames.ENDINGS[ending_mood]), bindings, rng)
    if not ending.startswith(cast.names):
        ending = ending[0].lower() + ending[1:]
    if rng.random() < 0.5:
        ending += " " + line(frames.CLOSINGS[ending_mood])
    prefix = "In the end," if rng.random() < 0.6 else rng.choice(frames.ENDING_PREFIXES)
    body = _paragraphs(sentences, middle, rng)
    return Story(
        body=body,
        ending_prefix=prefix,
        ending=ending,
        mood=mood,
        ending_mood=ending_mood,
        cast=cast,
        place=place,
        thing=thing,
    )


def _paragraphs(opening: list[str], middle: list[str], rng: random.Random) -> str:
    """One paragraph, or two with a line break between the opening and the middle."""
    return " ".join(opening) + ("\n" if rng.random() < 0.3 else " ") + " ".join(middle)
