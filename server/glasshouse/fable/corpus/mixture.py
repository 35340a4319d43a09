"""The training text: generated documents of every kind mixed with two public collections.

`documents` always emits the kind whose share of the characters lags furthest behind, so any prefix of the
stream has the same mix and no random draw decides it. The last `_HELD_OUT` of each collection is never
emitted: it is validation text.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

from glasshouse.fable.corpus.dialogue import chat_document
from glasshouse.fable.corpus.facts import fact_document
from glasshouse.fable.corpus.stories import make_story

SHARES: dict[str, float] = {"stories": 0.54, "facts": 0.20, "chat": 0.08, "tinystories": 0.15, "tales": 0.03}
_HELD_OUT = 0.03
_TALE_CHUNK_CHARS = 1600
_WRAPPED_BELOW_CHARS = 90
_PLAIN = str.maketrans(
    {
        "\u201c": '"',
        "\u201d": '"',
        "\u2018": "'",
        "\u2019": "'",
        "\u2014": "--",
        "\u2013": "-",
        "\u2026": "...",
    }
)


def read_tinystories(corpora: Path) -> list[str]:
    """The stories of the TinyStories sample that are plain ASCII, without the cut ones at its two ends."""
    parts = (
        (corpora / "tinystories_sample.txt")
        .read_text(encoding="utf-8", errors="ignore")
        .split("<|endoftext|>")
    )
    stories = [" ".join(part.translate(_PLAIN).split()) for part in parts[1:-1]]
    return [story for story in stories if story and story.isascii()]


def read_tales(corpora: Path) -> list[str]:
    """The fairy tales, cut at paragraph ends into pieces of about `_TALE_CHUNK_CHARS`."""
    pieces: list[str] = []
    text = (corpora / "fairytales.txt").read_text(encoding="utf-8", errors="ignore").translate(_PLAIN)
    for tale in text.split("\n\n"):
        piece: list[str] = []
        for paragraph in _paragraphs(tale):
            piece.append(paragraph)
            if sum(map(len, piece)) > _TALE_CHUNK_CHARS:
                pieces.append("\n".join(piece))
                piece = []
        if piece:
            pieces.append("\n".join(piece))
    return [piece for piece in pieces if len(piece) > 80]


def _paragraphs(tale: str) -> list[str]:
    """The paragraphs of a block of lines: each line one, unless the block is wrapped at a fixed width."""
    lines = [" ".join(line.split()) for line in tale.splitlines() if line.strip()]
    wrapped = bool(lines) and statistics.median(map(len, lines)) < _WRAPPED_BELOW_CHARS
    return [" ".join(lines)] if wrapped else lines


def _split_tail(items: list[str]) -> tuple[list[str], list[str]]:
    cut = int(len(items) * (1 - _HELD_OUT))
    return items[:cut], items[cut:]


def _cycle(items: list[str], rng: random.Random) -> Iterator[str]:
    while True:
        yield from rng.sample(items, len(items))


def documents(seed: int, n_chars: int, corpora: Path | None) -> Iterator[tuple[str, str]]:
    """(kind, text) of training documents, `n_chars` characters in all; no collections without `corpora`."""
    rng = random.Random(seed)
    makers: dict[str, Callable[[], str]] = {
        "stories": lambda: make_story(rng, "train").text,
        "facts": lambda: fact_document(rng, "train"),
        "chat": lambda: chat_document(rng, "train"),
    }
    if corpora is not None:
        tiny = _cycle(_split_tail(read_tinystories(corpora))[0], rng)
        tales = _cycle(_split_tail(read_tales(corpora))[0], rng)
        makers |= {"tinystories": lambda: next(tiny), "tales": lambda: next(tales)}
    emitted = dict.fromkeys(makers, 0)
    while sum(emitted.values()) < n_chars:
        kind = min(emitted, key=lambda name: emitted[name] / SHARES[name])
        text = makers[kind]()
        emitted[kind] += len(text)
        yield kind, text


def validation_documents(seed: int, n_each: int, corpora: Path | None) -> dict[str, list[str]]:
    """Held-out documents by kind: the generator's validation split, and the unseen end of the collections."""
    rng = random.Random(seed)
    held: dict[str, list[str]] = {
        "stories": [make_story(rng, "validation").text for _ in range(n_each)],
        "facts": [fact_document(rng, "validation") for _ in range(n_each)],
        "chat": [chat_document(rng, "validation") for _ in range(n_each)],
    }
    if corpora is not None:
        held["tinystories"] = _split_tail(read_tinystories(corpora))[1][:n_each]
        held["tales"] = _split_tail(read_tales(corpora))[1][:n_each]
    return held
