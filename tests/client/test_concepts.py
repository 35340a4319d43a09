"""Directions and probes through the client: what goes out, what comes back, and what is refused before it is sent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from glasshouse.client import (
    AlreadyExistsError,
    Client,
    Example,
    GlasshouseError,
    InvalidArgumentError,
    Model,
    NotFoundError,
    OperationProgress,
    Pair,
    ProbeWeights,
)
from glasshouse.client.concepts import builders
from glasshouse.client.testing import FakeServer

HOOK = "blocks.1.hook_resid_post"
MOODS = {"happy": ["it laughed", "it sang"], "sad": ["it wept", "it sighed"]}


def test_a_direction_from_examples(model: Model) -> None:
    heard: list[OperationProgress] = []
    operation = model.compute_directions(MOODS, positive="sad", name="mood", description="how it feels")
    direction = operation.result(timeout=20, on_progress=heard.append)
    assert (direction.name, direction.info.version) == ("mood", 1)
    assert direction.resource_name == "models/fake/directions/mood@1"
    assert list(direction.at) == ["blocks.0.hook_resid_post", HOOK] and direction.best_hook_point == HOOK
    assert direction.vector.shape == (8,) and direction.vector.dtype == np.float32
    assert direction.held_out is not None and direction.held_out.auroc.low < direction.held_out.auroc.value
    assert direction.info.positive_label == "sad" and direction.info.negative_label == "happy"
    assert direction.info.split is not None and direction.info.split.n_train == 3
    assert heard[-1].counts == {"examples_done": 4, "examples_total": 4}
    again = model.direction("mood")
    assert np.array_equal(again.vector, direction.vector) and again.info.description == "how it feels"
    (listed,) = model.directions()
    assert listed.name == "mood" and listed.best.vector is None and listed.best.held_out is not None
    direction.delete()
    with pytest.raises(NotFoundError):
        model.direction("mood")


def test_publishing_over_a_name_offers_the_next_version(model: Model) -> None:
    model.create_direction("d", {HOOK: np.ones(8)})
    with pytest.raises(AlreadyExistsError) as caught:
        model.create_direction("d", {HOOK: np.ones(8)})
    assert caught.value.next_version == 2
    assert model.create_direction("d", {HOOK: np.ones(8)}, next_version=True).info.version == 2
    assert [info.version for info in model.directions(every_version=True)] == [1, 2]


def test_examples_in_every_form_say_the_same(model: Model, server: FakeServer) -> None:
    listed = [(text, label) for label, texts in MOODS.items() for text in texts]
    for examples in (MOODS, listed, [Example(text, label) for text, label in listed]):
        model.train_probe(examples, hook_points=HOOK)
    sent = [call.request.examples for call in server.calls if call.method == "TrainProbe"]
    assert sent[0] == sent[1] == sent[2] and len(sent[0]) == 4
    model.train_probe(
        [Example("a", ["x", "y"], positions=[1], held_out=True), ([5, 6], "x")], hook_points=HOOK
    )
    last = server.calls[-1].request.examples
    assert list(last[0].labels) == ["x", "y"] and last[0].held_out and last[0].positions.at.positions == [1]
    assert list(last[1].input.token_ids) == [5, 6] and not last[1].HasField("positions")


def test_pairs(model: Model, server: FakeServer) -> None:
    model.compute_directions(pairs=[("good", "bad"), Pair("up", "down", held_out=True)])
    pairs = server.calls[-1].request.pairs
    assert [(pair.positive.text, pair.negative.text) for pair in pairs] == [("good", "bad"), ("up", "down")]
    assert [pair.held_out for pair in pairs] == [False, True]


def test_many_examples_are_sent_in_several_messages(model: Model, server: FakeServer) -> None:
    texts = [f"{n} " + "x" * 20_000 for n in range(200)]
    requests = builders.train_probe(
        "models/fake", {"a": texts[:100], "b": texts[100:]}, hook_points=HOOK, kind="logistic", task=None,
        labels=(), positive=None, best=False, positions=None, pooling="last", calibration="platt",
        false_positive_rates=(), held_out_share=0.25, inverse_l2=1.0, hidden_width=64, weight_decay=0.01, seed=0,
        published=None,
    )  # fmt: skip
    assert len(requests) == 4 and all(each.ByteSize() <= builders.MESSAGE_BYTES for each in requests)
    assert requests[0].model and not requests[1].model, "all but the examples goes first"  # type: ignore[attr-defined]
    model.train_probe({"a": texts[:100], "b": texts[100:]}, hook_points=HOOK).result()
    (call,) = [call for call in server.calls if call.method == "TrainProbe"]
    assert [example.input.text for example in call.request.examples] == texts


def test_a_probe_and_its_scores(model: Model) -> None:
    probe = model.train_probe(MOODS, hook_points=[HOOK], positive="sad", name="mood").result(timeout=20)
    assert probe.info.columns == ["sad"] and probe.report is not None and probe.report.n_folds == 5
    assert probe.report.threshold(0.01) == 0.8
    with pytest.raises(KeyError, match=r"there are 0\.01"):
        probe.report.threshold(0.2)
    scored = probe.score(["aeiou", "xyz"])
    assert [round(float(each), 3) for each in scored] == [0.833, 0.0]
    assert scored[0].positions == [5] and scored[0].columns == ["sad"]
    every = probe.score("ax", every_position=True)
    assert every.scores.shape == (3, 1) and every.tokens[1] == "a"
    with pytest.raises(TypeError, match="not one score"):
        float(every)
    assert model.probe("mood@1").info.labels == ["happy", "sad"]


def test_what_was_not_published_has_no_name(model: Model) -> None:
    probe = model.train_probe(MOODS, hook_points=HOOK).result()
    assert (probe.name, probe.resource_name) == ("", "")
    with pytest.raises(GlasshouseError, match="was not published"):
        probe.score("a")


def test_a_probe_trained_elsewhere_comes_back_as_it_was_sent(model: Model) -> None:
    weights = ProbeWeights(
        layers=[(np.arange(8, dtype=np.float32)[:, None], np.zeros(1, np.float32))], platt=([2.0], [0.5])
    )
    model.create_probe("mine", weights, labels=["no", "yes"], hook_points=HOOK)
    assert model.probe("mine").info.weights is None
    back = model.probe("mine", with_weights=True).info.weights
    assert back is not None and back.platt == ([2.0], [0.5])
    assert np.array_equal(back.layers[0][0], weights.layers[0][0])


def test_labels_of_features(client: Client) -> None:
    sae = client.model().dictionary("resid-post-1")
    made = sae.publish_labels("by-hand", {3: "a vowel", 5: "a stop", 7: "z", 9: "q"}, method="by hand")
    assert (made.name, made.version, made.count, made.dictionary) == ("by-hand", 1, 4, "resid-post-1")
    assert [(each.feature, each.label) for each in sae.labels("by-hand")][:2] == [
        (3, "a vowel"),
        (5, "a stop"),
    ]
    assert [each.label for each in sae.labels("by-hand", features=[9])] == ["q"]
    assert [each.name for each in sae.label_sets()] == ["by-hand"]


@pytest.mark.parametrize(
    ("examples", "field"),
    [
        ("abc", "examples"),
        (["abc"], "examples[0]"),
        ([("a", "x"), ("b",)], "examples[1]"),
        ({"x": "abc"}, "examples['x']"),
        ([(3.5, "x")], "examples[0].input"),
        ([("a", ["\ud800"])], "examples[0].labels[0]"),
    ],
)
def test_what_is_no_example_is_not_sent(
    model: Model, server: FakeServer, examples: object, field: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        model.train_probe(examples, hook_points=HOOK)  # type: ignore[arg-type]
    assert caught.value.field == field
    assert "TrainProbe" not in [call.method for call in server.calls]


def test_a_picture(model: Model, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    direction = model.compute_directions(MOODS, positive="sad").result()
    direction.plot(tmp_path / "moods.png")
    assert (tmp_path / "moods.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to draw"):
        model.create_direction("raw", {HOOK: np.ones(8)}).plot(tmp_path / "raw.png")
