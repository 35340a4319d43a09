"""Features: what a sparse autoencoder finds in the residual stream, and one of its features steering the model.

1. Every feature of the middle layer's dictionary is read over labelled texts; of those that fire often enough, the one most
   peculiar to happy texts is taken, and the one most peculiar to sad ones (the ratio of their means).
2. Their activations on a story, token by token, and the tokens they promote.
3. Each set to a multiple of its largest activation: how many stories end its way. The rest of the activation is kept.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from rich.padding import Padding
from rich.text import Text

from glasshouse import fable
from glasshouse.client import Dictionary, positions, set_feature
from glasshouse.tour.guide import Guide, expect
from glasshouse.tour.mood import coloured, count, endings_under, stories, tail
from glasshouse.tour.mood_words import mood_of
from glasshouse.tour.screen import INDENT

STRENGTH = 2.5
OFTEN = 0.5
N_TEXTS = 200
N_SHOWN = 2
TINTS = {"happy": (255, 200, 60), "sad": (110, 160, 255)}
STORY = "Anna lost her kite and cried. Then Tom found it. Anna clapped her hands and sang a merry song."


@dataclass(frozen=True)
class MoodFeature:
    """A feature and what it does on texts of either mood: its mean activation, and its largest on any token."""

    mood: str
    index: int
    on_happy: float
    on_sad: float
    largest: float
    promoted: list[str]


@dataclass(frozen=True)
class MoodFeatures:
    """The features of a dictionary that go with either mood."""

    dictionary: Dictionary
    found: list[MoodFeature]


def find_mood_features(guide: Guide) -> MoodFeatures:
    """Step 1."""
    screen, model = guide.screen, guide.model
    name = f"resid-post-{model.info.n_layers // 2}"
    screen.stage("Features: what a sparse autoencoder finds in the same stream")
    screen.code(f"sae = model.dictionary({name!r})", "sae.encode(texts)")
    dictionary = model.dictionary(name)
    info = dictionary.info
    screen.note(
        f"{len(model.dictionaries())} dictionaries come with fable. This one: {info.architecture}, "
        f"{info.d_sae} features of {', '.join(info.hook_points_in)}; on built-in text "
        f"{info.check.l0:.0f} fire at a time and explain {1 - info.check.fvu:.0%} of the variance."
        if info.check is not None
        else f"{len(model.dictionaries())} dictionaries come with fable."
    )
    records = [record for record in fable.labelled("mood") if record["split"] == "train"][:N_TEXTS]
    begun = time.perf_counter()
    encoded = dictionary.encode([r["text"] for r in records], positions=positions.all().excluding_bos())
    seconds = time.perf_counter() - begun
    dense = [each.dense(info.d_sae) for each in encoded]
    means = np.stack([each.mean(axis=0) for each in dense])
    largest = np.stack([each.max(axis=0) for each in dense]).max(axis=0)
    happy = np.array([record["label"] == "happy" for record in records])
    on_happy, on_sad = means[happy].mean(axis=0), means[~happy].mean(axis=0)
    found = []
    for mood, on, off in (("happy", on_happy, on_sad), ("sad", on_sad, on_happy)):
        index = int(np.where(on >= OFTEN, on / (off + 0.01), 0.0).argmax())
        promoted = dictionary.feature(index, n_tokens=7).promoted
        found.append(
            MoodFeature(
                mood=mood,
                index=index,
                on_happy=float(on_happy[index]),
                on_sad=float(on_sad[index]),
                largest=float(largest[index]),
                promoted=list(promoted.tokens) if promoted is not None else [],
            )
        )
    screen.table(
        ["feature", "happy texts", "sad texts", "largest", "promotes"],
        [
            (
                f"{name}/{f.index}",
                f"{f.on_happy:.2f}",
                f"{f.on_sad:.2f}",
                f"{f.largest:.1f}",
                " ".join(token.strip() for token in f.promoted),
            )
            for f in found
        ],
        right=[1, 2, 3],
    )
    screen.note(f"{len(records)} texts encoded in {seconds:.1f} s.")
    expect(found[0].on_happy > 2 * found[0].on_sad, "a feature that goes with happy texts")
    expect(found[1].on_sad > 2 * found[1].on_happy, "a feature that goes with sad texts")
    return MoodFeatures(dictionary, found)


def show_tokens(guide: Guide, moods: MoodFeatures) -> None:
    """Step 2: a story tinted by each feature."""
    screen = guide.screen
    screen.code(f"sae.encode(story, features={[f.index for f in moods.found]})")
    encoded = moods.dictionary.encode(STORY, features=[f.index for f in moods.found])
    values = encoded.dense(moods.dictionary.info.d_sae)
    for feature in moods.found:
        line = Text(f"{feature.mood}:  ")
        for token, value in zip(encoded.tokens[1:], values[1:, feature.index], strict=True):
            line.append(token, style=_tint(feature, float(value)))
        screen.put(Padding(line, (0, INDENT)))
        strongest = np.argsort(-values[1:, feature.index])[:3] + 1
        screen.note(
            "strongest on "
            + ", ".join(
                f"{encoded.tokens[i].strip()!r} {values[i, feature.index]:.1f}"
                for i in strongest
                if values[i, feature.index]
            )
        )


def steer_by_features(guide: Guide, moods: MoodFeatures) -> None:
    """Step 3."""
    screen = guide.screen
    screen.stage("Steering by a feature: set it, and keep everything else")
    screen.code(
        f"model.generate(story, ..., interventions=[set_feature(sae, feature, {STRENGTH:g} * largest)])"
    )
    told = stories()
    prompts = [story for _, story in told]
    n_each = len(told) // 2
    where = positions.all().excluding_bos()
    plain = endings_under(guide, prompts, [])
    rows, turned = [], 0
    for feature, among, other in (
        (moods.found[0], range(n_each), "sad"),
        (moods.found[1], range(n_each, 2 * n_each), "happy"),
    ):
        edit = set_feature(moods.dictionary, feature.index, STRENGTH * feature.largest, where)
        steered = endings_under(guide, [prompts[i] for i in among], [edit])
        screen.table(
            ["the story so far", "as it is", f"feature {feature.index} at {STRENGTH * feature.largest:.0f}"],
            [
                (tail(prompts[i]), coloured(plain[i]), coloured(steered[i - among.start]))
                for i in among[:N_SHOWN]
            ],
            lines=True,
            shares=(4, 3, 3),
        )
        before = count(plain, among, feature.mood)
        after = sum(mood_of(ending) == feature.mood for ending in steered)
        rows.append((f"{feature.mood}, of {n_each} {other} stories", str(before), str(after)))
        turned += after - before
    screen.table(["endings, counted by their words", "as it is", "steered"], rows, right=[1, 2])
    expect(turned >= n_each, f"half of the endings turned by one feature, not {turned} of {2 * n_each}")


def _tint(feature: MoodFeature, value: float) -> str:
    """A background as strong as the activation, by the square root so that weak ones show."""
    share = min(1.0, max(0.0, value / feature.largest)) ** 0.5
    if share < 0.05:
        return ""
    red, green, blue = (round(30 + (channel - 30) * share) for channel in TINTS[feature.mood])
    ink = "black" if share > 0.6 else "white"
    return f"{ink} on rgb({red},{green},{blue})"
