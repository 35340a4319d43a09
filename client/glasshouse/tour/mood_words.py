"""Whether an ending is happy or sad, by the words that fable's generator ends stories with."""

from __future__ import annotations

import re
from typing import Final, Literal

from glasshouse.fable.corpus.lexicon import FEELINGS

Mood = Literal["happy", "sad"]

WORDS: Final[dict[Mood, frozenset[str]]] = {
    "happy": frozenset({*FEELINGS["happy"], "smile", "smiled", "laughed", "danced", "wonderful", "happily"}),
    "sad": frozenset({*FEELINGS["sad"], "cried", "tears", "sobbed", "wept", "awful", "worst"}),
}


def mood_of(ending: str) -> Mood | None:
    """The mood whose words its first sentence has; None for neither, or both."""
    first = re.split(r"[.!?]", ending, maxsplit=1)[0]
    words = set(re.findall(r"[a-z]+", first.lower()))
    found = [mood for mood, known in WORDS.items() if words & known]
    return found[0] if len(found) == 1 else None
