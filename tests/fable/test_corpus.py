"""The generator says what it knows: same seed same text, splits never meet, latents agree with the words."""

from __future__ import annotations

import random
import re

import pytest

from glasshouse.fable.corpus import facts, frames, lexicon
from glasshouse.fable.corpus.grammar import render
from glasshouse.fable.corpus.lexicon import MOODS
from glasshouse.fable.corpus.mixture import SHARES, documents
from glasshouse.fable.corpus.splits import SPLITS, allowed, split_of
from glasshouse.fable.corpus.stories import make_story
from glasshouse.fable.mood_flip import mood_of_ending


def test_the_same_seed_gives_the_same_documents() -> None:
    first = list(documents(7, 50_000, None))
    assert first == list(documents(7, 50_000, None))
    assert first != list(documents(8, 50_000, None))


def test_the_mix_keeps_its_shares() -> None:
    texts = list(documents(0, 400_000, None))
    generated = {kind: share for kind, share in SHARES.items() if kind in {kind for kind, _ in texts}}
    for kind, share in generated.items():
        chars = sum(len(text) for name, text in texts if name == kind)
        assert chars / 400_000 == pytest.approx(share / sum(generated.values()), abs=0.02)


def test_names_are_half_girls_half_boys_and_distinct() -> None:
    assert len(lexicon.GIRLS) == len(lexicon.BOYS) >= 75
    assert len(set(lexicon.NAMES)) == len(lexicon.NAMES)
    assert not set(lexicon.NAMES) & {*lexicon.CAPITALS, *lexicon.CAPITALS.values()}


def test_there_are_many_frames_countries_and_opposites() -> None:
    lists = [value for name, value in vars(frames).items() if name.isupper() and isinstance(value, tuple)]
    lists += [
        lines
        for name, value in vars(frames).items()
        if name.isupper() and isinstance(value, dict)
        for lines in value.values()
    ]
    assert sum(map(len, lists)) >= 200
    assert len(lexicon.CAPITALS) >= 40
    assert all(lexicon.OPPOSITE_OF[lexicon.OPPOSITE_OF[word]] == word for word in lexicon.OPPOSITE_OF)


def test_the_splits_of_a_name_cover_all_places_and_do_not_overlap() -> None:
    for name in lexicon.NAMES:
        parts = [set(allowed(lexicon.PLACES, split, "name-place", name)) for split in SPLITS]
        assert set.union(*parts) == set(lexicon.PLACES)
        assert sum(map(len, parts)) == len(lexicon.PLACES)


@pytest.mark.parametrize("split", SPLITS)
def test_a_story_uses_combinations_of_its_split_only(split: str) -> None:
    rng = random.Random(0)
    for _ in range(300):
        story = make_story(rng, split)  # type: ignore[arg-type]
        for name in story.cast.names:
            assert split_of("name-place", name, story.place) == split
            assert split_of("name-object", name, story.thing) == split


@pytest.mark.parametrize(
    "maker", [facts.capital_item, facts.opposite_item, facts.gender_item, facts.number_item]
)
def test_held_out_sentences_do_not_occur_in_training(maker: facts.Maker) -> None:
    rng = random.Random(0)
    training = {maker(rng, "train").prompt for _ in range(20_000)}
    held_out = {maker(rng, "validation").prompt for _ in range(500)}
    assert sorted(training & held_out) == []


def test_no_gate_prompt_occurs_in_the_training_text() -> None:
    text = "\n".join(text for _, text in documents(0, 2_000_000, None))
    rng = random.Random(1)
    makers = (
        facts.capital_item,
        facts.opposite_item,
        facts.gender_item,
        facts.number_item,
        facts.thing_opposite_item,
    )
    found = [
        item.text
        for maker in makers
        for item in (maker(rng, "validation") for _ in range(100))
        if item.text in text
    ]
    assert found == []


@pytest.mark.parametrize("maker", [maker for maker, _ in facts.MAKERS])
def test_an_items_answer_is_among_its_alternatives(maker: facts.Maker) -> None:
    rng = random.Random(0)
    for _ in range(200):
        item = maker(rng, "validation")
        assert item.answer in item.alternatives
        assert not item.prompt.endswith(" ")
        assert "{" not in item.text


def test_number_items_agree_with_their_label() -> None:
    rng = random.Random(0)
    for _ in range(200):
        item = facts.number_item(rng, "train")
        assert (item.answer in {"were", "are", "have"}) == (item.label == "plural")


def test_pronouns_agree_with_the_cast() -> None:
    rng = random.Random(0)
    for _ in range(300):
        story = make_story(rng, "train")
        if story.cast.gender is None:
            assert story.cast.subject == "they"
        own = {"girl": "she", "boy": "he"}.get(str(story.cast.gender), "they")
        assert story.cast.subject == own


def test_an_ending_shows_its_mood_only() -> None:
    rng = random.Random(0)
    for index in range(400):
        story = make_story(rng, "validation", MOODS[index % 4])
        assert story.ending_mood == story.mood
        assert mood_of_ending(story.ending) in {story.mood, None}


def test_happy_and_sad_endings_are_always_recognised() -> None:
    for mood in ("happy", "sad"):
        for frame in frames.ENDINGS[mood]:
            bindings = {"name": "Lily", "she": "she", "was": "was", "poss": "her", "family": "mother"}
            assert mood_of_ending(render(frame, bindings, random.Random(0))) == mood


def test_training_endings_follow_the_mood_most_of_the_time() -> None:
    rng = random.Random(0)
    follows = [story.mood == story.ending_mood for story in (make_story(rng, "train") for _ in range(3000))]
    assert sum(follows) / len(follows) == pytest.approx(0.97, abs=0.012)


def test_articles_and_capitals() -> None:
    rng = random.Random(0)
    assert (
        render("a {adj} came. {She} saw a apple.", {"adj": "old", "She": "He"}, rng)
        == "An old came. He saw an apple."
    )


def test_stories_are_clean_text() -> None:
    rng = random.Random(0)
    for _ in range(500):
        text = make_story(rng, "train").text
        assert text.isascii()
        assert not re.search(r"[{}]|  |\ba [aeio]|\ban [^aeiou]", text), text
