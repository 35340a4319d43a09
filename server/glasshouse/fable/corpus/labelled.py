"""The labelled sets: `python -m glasshouse.fable.corpus.labelled` writes them beside the weights.

They come from the generator's own `labelled` split: neither training nor the evaluation's held-out stories
contain their combinations. A text ends where the label is known and not yet said, so its last position is
the one to probe.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict, cast

from glasshouse.fable import labelled
from glasshouse.fable.corpus import facts, frames, lexicon
from glasshouse.fable.corpus.grammar import Cast, render
from glasshouse.fable.corpus.lexicon import Mood
from glasshouse.fable.corpus.splits import Split
from glasshouse.fable.corpus.stories import make_story

_TEST_EVERY = 4


class Record(TypedDict):
    """One line of a labelled set."""

    text: str
    label: str
    kind: str
    split: str


def read_labelled(name: str) -> list[Record]:
    """The packaged records of one set, typed."""
    return cast("list[Record]", labelled(name))


def mood_sentence(rng: random.Random, split: Split, mood: Mood) -> str:
    """One or two sentences that show a mood."""
    scene = facts.named_bindings(rng, split)
    friend = rng.choice([name for name in lexicon.NAMES if name != scene["name"]])
    bindings = {**Cast(names=(scene["name"],)).bindings, **scene, "friend": friend}
    lines = [rng.choice(frames.EVENTS[mood]), rng.choice((*frames.FEELING[mood], *frames.WEATHER[mood]))]
    return " ".join(render(line, bindings, rng) for line in lines[: rng.randint(1, 2)])


def _distinct(make: Iterator[tuple[str, str, str]], n_records: int) -> list[Record]:
    seen: dict[str, Record] = {}
    for text, label, kind in make:
        split = "test" if len(seen) % _TEST_EVERY == 0 else "train"
        seen.setdefault(text, Record(text=text, label=label, kind=kind, split=split))
        if len(seen) == n_records:
            break
    return list(seen.values())


def _moods(rng: random.Random) -> Iterator[tuple[str, str, str]]:
    while True:
        mood: Mood = rng.choice(("happy", "sad"))
        if rng.random() < 0.5:
            yield mood_sentence(rng, "labelled", mood), mood, "sentence"
        else:
            yield make_story(rng, "labelled", mood).body, mood, "story"


def _items(rng: random.Random, maker: facts.Maker, by_answer: bool) -> Iterator[tuple[str, str, str]]:
    while True:
        item = maker(rng, "labelled")
        yield item.prompt, item.answer if by_answer else item.label, item.kind


def labelled_sets(seed: int, n_records: int) -> dict[str, list[Record]]:
    """Every labelled set by name."""
    return {
        "mood": _distinct(_moods(random.Random(f"mood{seed}")), n_records),
        "gender": _distinct(_items(random.Random(f"gender{seed}"), facts.gender_item, False), n_records),
        "number": _distinct(_items(random.Random(f"number{seed}"), facts.number_item, False), n_records),
        "giving": _distinct(_items(random.Random(f"giving{seed}"), facts.giving_item, True), n_records // 2),
        "capital": _distinct(
            _items(random.Random(f"capital{seed}"), facts.capital_item, True), n_records // 2
        ),
        "opposite": _distinct(
            _items(random.Random(f"opposite{seed}"), facts.opposite_item, True), n_records // 2
        ),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write fable's labelled sets.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "labelled")
    parser.add_argument("--records", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, records in labelled_sets(args.seed, args.records).items():
        text = "".join(json.dumps(record) + "\n" for record in records)
        (args.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}: {len(records)} records")


if __name__ == "__main__":
    main()
