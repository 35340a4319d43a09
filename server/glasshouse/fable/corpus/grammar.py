"""Sentence frames and how one becomes a sentence.

A frame is text with slots in braces. A slot is looked up in this order:

1. the scene's bindings (`{name}`, `{she}`, `{place}`, ...), fixed for a whole story;
2. the word lists, drawn once per sentence (`{animal}` twice in one frame is the same animal; `{animal2}` is
   another draw).

All narration is in the past tense, so the only agreement a frame must ask for is `{was}`/`{wasnt}` and the
pronouns.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

from glasshouse.fable.corpus import lexicon
from glasshouse.fable.corpus.lexicon import Gender

_SLOT = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])(?!one\b|unicorn|uniform|useful|used)")
_SENTENCE_START = re.compile(r"(^|[.!?][\"]? +|[.!?]? \"|^\")([a-z])")

_LISTS: dict[str, tuple[str, ...]] = {
    "animal": lexicon.ANIMALS,
    "animals": tuple(lexicon.plural(noun) for noun in lexicon.ANIMALS),
    "person": lexicon.PEOPLE,
    "people": tuple(lexicon.plural(noun) for noun in lexicon.PEOPLE),
    "thing": lexicon.OBJECTS,
    "things": tuple(lexicon.plural(noun) for noun in lexicon.OBJECTS),
    "landmark": lexicon.LANDMARKS,
    "food": lexicon.FOODS,
    "fruits": tuple(lexicon.plural(noun) for noun in lexicon.FRUITS),
    "color": lexicon.COLORS,
    "adj": lexicon.ADJECTIVES,
    "objadj": lexicon.OBJECT_ADJECTIVES,
    "family": lexicon.FAMILY,
    "day": lexicon.DAYS,
    "month": lexicon.MONTHS,
    "time": lexicon.TIMES,
    **{f"feel_{mood}": words for mood, words in lexicon.FEELINGS.items()},
}


@dataclass(frozen=True, kw_only=True)
class Cast:
    """Who a story is about: one named character, or two friends (number: plural)."""

    names: tuple[str, ...]
    kind: str = "child"  # "girl", "boy", or an animal's noun

    @property
    def plural(self) -> bool:
        return len(self.names) > 1

    @property
    def gender(self) -> Gender | None:
        """The gender of a single character; None for two, whose pronoun is "they"."""
        return None if self.plural else lexicon.GENDER_OF[self.names[0]]

    @property
    def subject(self) -> str:
        return {"girl": "she", "boy": "he", None: "they"}[self.gender]

    @property
    def possessive(self) -> str:
        return {"girl": "her", "boy": "his", None: "their"}[self.gender]

    @property
    def bindings(self) -> dict[str, str]:
        """Slots that depend on the characters' gender and number."""
        return {
            "name": " and ".join(self.names),
            "kind": self.kind,
            "she": self.subject,
            "She": self.subject.capitalize(),
            "obj": {"girl": "her", "boy": "him", None: "them"}[self.gender],
            "poss": self.possessive,
            "Poss": self.possessive.capitalize(),
            "self": {"girl": "herself", "boy": "himself", None: "themselves"}[self.gender],
            "was": "were" if self.plural else "was",
            "wasnt": "were not" if self.plural else "was not",
            "face": "faces" if self.plural else "face",
            "heart": "hearts" if self.plural else "heart",
        }


def with_articles(text: str) -> str:
    """`a` before a vowel becomes `an`."""
    return _ARTICLE.sub(lambda match: match.group(1) + "n ", text)


def capitalised(text: str) -> str:
    """Upper case at the start of every sentence."""
    return _SENTENCE_START.sub(lambda match: match.group(1) + match.group(2).upper(), text)


def render(frame: str, bindings: Mapping[str, str], rng: random.Random) -> str:
    """One frame, filled, with articles and capitals in order."""
    drawn: dict[str, str] = {}

    def fill(match: re.Match[str]) -> str:
        slot = match.group(1)
        if slot in bindings:
            return bindings[slot]
        if slot not in drawn:
            drawn[slot] = rng.choice(_LISTS[slot.rstrip("23")])
        return drawn[slot]

    text = with_articles(_SLOT.sub(fill, frame))
    return text[0].upper() + text[1:]
