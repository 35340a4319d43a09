"""Which latents are made into directions and probes, and the labelled sets they are made from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from glasshouse.fable import labelled
from glasshouse.fable.corpus.labelled import Record
from glasshouse.fable.corpus.lexicon import MOODS
from glasshouse.fable.corpus.stories import make_story

_TEST_EVERY = 4
_STORIES = 1200


@dataclass(frozen=True, kw_only=True)
class Latent:
    """A latent. `positive`: of two labels, the one that the direction points to; empty where there are more. `what`: for
    people.
    """

    name: str
    labels: tuple[str, ...]
    what: str

    @property
    def positive(self) -> str:
        """The last of two labels; "" of more."""
        return self.labels[-1] if len(self.labels) == 2 else ""


LATENTS: Sequence[Latent] = (
    Latent(name="mood", labels=("happy", "sad"), what="Whether a text is sad rather than happy so far."),
    Latent(
        name="gender",
        labels=("boy", "girl"),
        what="Whether the pronoun that comes next is a girl's rather than a boy's.",
    ),
    Latent(
        name="number",
        labels=("singular", "plural"),
        what="Whether the verb that comes next is in the plural rather than in the singular.",
    ),
    Latent(name="moods", labels=MOODS, what="A story's mood so far: happy, sad, calm or afraid."),
)


def records(latent: Latent) -> list[Record]:
    """Its labelled texts: a packaged set, or of `moods` stories made here from the generator's own labelled split."""
    if latent.name != "moods":
        return cast("list[Record]", labelled(latent.name))
    rng = random.Random("moods")
    found: dict[str, Record] = {}
    while len(found) < _STORIES:
        mood = MOODS[len(found) % len(MOODS)]
        text = make_story(rng, "labelled", mood).body
        split = "test" if (len(found) // len(MOODS)) % _TEST_EVERY == 0 else "train"
        found.setdefault(text, Record(text=text, label=mood, kind="story", split=split))
    return list(found.values())
