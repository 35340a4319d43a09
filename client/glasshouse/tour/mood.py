"""Steering: a direction from labelled texts, added to the residual stream both ways.

1. Direction: the mean activation over happy texts minus that over sad ones (BOS left out), at the middle layer.
2. Texts that it was not made from lie on their own side of it.
3. Added to the stream of a sad story it makes a happy ending, and the other way round. What is counted is the
   words of the generator's own endings, on stories that the direction was not made from.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from glasshouse import fable
from glasshouse.client import Intervention, add_vector, positions
from glasshouse.tour.guide import Guide, expect
from glasshouse.tour.mood_words import WORDS, mood_of

COEFFICIENT = 3.5
N_STORIES = 24
N_SHOWN = 2
MAX_TOKENS = 32
STYLES = {"happy": "yellow", "sad": "blue", None: ""}


@dataclass(frozen=True)
class Direction:
    """A steering vector (d_model,) at a hook point, and where texts of either mood lie along it."""

    hook_point: str
    vector: NDArray[np.float32]
    threshold: float

    def added(self, coefficient: float) -> list[Intervention]:
        """The edit, at every position but BOS; none for 0."""
        if not coefficient:
            return []
        where = positions.all().excluding_bos()
        return [add_vector(self.hook_point, self.vector, coefficient, where)]


def compute_direction(guide: Guide) -> Direction:
    """Steps 1 and 2."""
    screen, model = guide.screen, guide.model
    screen.stage("A mood direction: happy minus sad")
    screen.code(
        f"acts = model.activations(texts, hook_points={guide.middle!r})",
        "direction = mean(happy) - mean(sad)",
    )
    records = fable.labelled("mood")
    begun = time.perf_counter()
    acts = model.activations(
        [record["text"] for record in records],
        hook_points=guide.middle,
        positions=positions.all().excluding_bos(),
    )
    seconds = time.perf_counter() - begun
    means = np.stack([each[guide.middle].mean(axis=0) for each in acts])
    happy = np.array([record["label"] == "happy" for record in records])
    made_from = np.array([record["split"] == "train" for record in records])
    happy_mean, sad_mean = means[made_from & happy].mean(axis=0), means[made_from & ~happy].mean(axis=0)
    vector = happy_mean - sad_mean
    threshold = float((happy_mean + sad_mean) @ vector / 2)
    right = ((means @ vector > threshold) == happy)[~made_from].mean()
    n_tokens = sum(len(each.token_ids) for each in acts)
    screen.note(f"{len(records)} texts of {n_tokens} tokens read in {seconds:.1f} s.")
    screen.note(
        f"From {made_from.sum()} of them, |direction| = {np.linalg.norm(vector):.1f}. "
        f"{right:.0%} of the {(~made_from).sum()} others lie on their own side of it."
    )
    expect(bool(right > 0.7), "held-out texts on their own side of the direction")
    return Direction(guide.middle, vector, threshold)


def steer_both_ways(guide: Guide, direction: Direction) -> None:
    """Step 3: some endings side by side, and how many of all were turned."""
    screen = guide.screen
    screen.stage("Steering: the same stories, pushed either way")
    screen.code(
        f"model.generate(story, ..., interventions=[add_vector({direction.hook_point!r}, direction, ±{COEFFICIENT:g})])"
    )
    told = stories()
    n_each = len(told) // 2
    prompts = [story for _, story in told]
    plain, happier, sadder = (
        endings_under(guide, prompts, direction.added(c)) for c in (0.0, COEFFICIENT, -COEFFICIENT)
    )
    shown = [*range(N_SHOWN), *range(n_each, n_each + N_SHOWN)]
    screen.table(
        ["the story so far", "as it is", f"+ {COEFFICIENT:g} x direction", f"- {COEFFICIENT:g} x direction"],
        [(tail(prompts[i]), *(coloured(endings[i]) for endings in (plain, happier, sadder))) for i in shown],
        lines=True,
        shares=(4, 3, 3, 3),
    )
    sad, happy = range(n_each), range(n_each, 2 * n_each)
    turned_happy = count(happier, sad, "happy")
    turned_sad = count(sadder, happy, "sad")
    screen.table(
        ["endings, counted by their words", "as it is", "+", "-"],
        [
            (
                f"happy, of {n_each} sad stories",
                *(str(count(e, sad, "happy")) for e in (plain, happier, sadder)),
            ),
            (
                f"sad, of {n_each} happy stories",
                *(str(count(e, happy, "sad")) for e in (plain, happier, sadder)),
            ),
        ],
        right=[1, 2, 3],
    )
    turned = turned_happy + turned_sad
    before = count(plain, sad, "happy") + count(plain, happy, "sad")
    screen.note(f"{turned} of {2 * n_each} endings turned by the direction; {before} are so without it.")
    expect(turned >= n_each, f"half of the endings turned, not {turned} of {2 * n_each}")
    expect(turned > before, "more of them turned than are so without it")


def stories() -> list[tuple[str, str]]:
    """(mood, prompt): first sad stories, then as many happy ones, none of which the direction was made from."""
    found: list[tuple[str, str]] = []
    for mood in ("sad", "happy"):
        records = [
            r
            for r in fable.labelled("mood")
            if (r["split"], r["kind"], r["label"]) == ("test", "story", mood)
        ]
        found += [(mood, record["text"] + " In the end,") for record in records[: N_STORIES // 2]]
    return found


def endings_under(guide: Guide, prompts: Sequence[str], edits: Sequence[Intervention]) -> list[str]:
    """The likeliest ending of each story under edits of every position but BOS, all generated at once."""

    def ending(prompt: str) -> str:
        result = guide.model.generate(
            prompt, max_tokens=MAX_TOKENS, temperature=0.0, stop=["\n"], interventions=edits
        ).result()
        n_fed = len(result.prompt) - 1 + len(result.token_ids) - 1
        for receipt in result.receipt:
            expect(receipt.positions_applied == n_fed, f"the edit applied at all {n_fed} positions")
        return result.text

    with ThreadPoolExecutor(max_workers=len(prompts)) as pool:
        return list(pool.map(ending, prompts))


def count(endings: Sequence[str], among: range, mood: str) -> int:
    return sum(mood_of(endings[index]) == mood for index in among)


def tail(prompt: str) -> str:
    return "..." + prompt[-76:].partition(" ")[2]


def coloured(ending: str) -> Text:
    """The ending's first sentence, its mood's words in colour."""
    text = Text(ending.strip().partition(".")[0] + ".")
    for mood, words in WORDS.items():
        text.highlight_words(sorted(words), style=f"bold {STYLES[mood]}", case_sensitive=False)
    return text
