"""Probes, conditions, aborting and named directions: on the wire, in the stream, against the fake server."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from glasshouse.client import (
    AsyncClient,
    Client,
    Condition,
    InvalidArgumentError,
    Model,
    NotFoundError,
    ProbeReading,
    ProbeReadings,
    ablate_direction,
    add_vector,
    builders,
    cap_projection,
    generated,
    read_activations,
    read_probe,
    rotate,
    set_feature,
    when,
)
from glasshouse.client.generation import GenerationState
from glasshouse.client.testing import FakeServer
from glasshouse.v1 import conditions_pb2, generation_pb2
from glasshouse.wire.tensors import unpack

HOOK = "blocks.1.hook_resid_post"
V = np.arange(8, dtype=np.float32)


@dataclass
class Handle:
    """What a handle of a direction or probe shows."""

    resource_name: str
    vector: Any = None
    best_hook_point: str = ""
    at: dict[str, Any] = field(default_factory=dict)


@pytest.fixture
def server() -> Any:
    with FakeServer(reply="xyz and then a") as server:
        yield server


@pytest.fixture
def model(server: FakeServer) -> Any:
    with Client(server.target) as client:
        yield client.model()


def test_conditions_on_the_wire() -> None:
    plain = builders.condition(when("p", above=0.5), "f")
    assert plain == conditions_pb2.Condition(
        probe={"probe": "p", "output": "PROBE_OUTPUT_SCORE"}, above=0.5, scope="CONDITION_SCOPE_POSITION"
    )
    full = when(
        Handle("models/m/probes/p@3"),
        below=-1.5,
        over="prompt",
        label="sad",
        output="margin",
        aggregate="mean",
        positions=[1, 2],
    )
    assert builders.condition(full, "f") == conditions_pb2.Condition(
        probe={"probe": "models/m/probes/p@3", "label": "sad", "output": "PROBE_OUTPUT_MARGIN"},
        below=-1.5,
        scope="CONDITION_SCOPE_PROMPT",
        prompt_aggregation="PROMPT_AGGREGATION_MEAN",
        positions={"at": {"positions": [1, 2]}},
    )
    feature = builders.condition(when(("sae", np.int64(7)), above=2, over="latched"), "f")
    assert feature == conditions_pb2.Condition(
        feature={"dictionary": "sae", "feature": 7}, above=2.0, scope="CONDITION_SCOPE_LATCHED"
    )
    # A threshold of 0 is one.
    assert builders.condition(when("p", below=0), "f").WhichOneof("threshold") == "below"


def test_edits_and_generations_take_conditions() -> None:
    condition = when("p", above=0.5)
    edit = add_vector(HOOK, V, 2.0)
    assert edit.condition is None
    under = edit.when("p", above=0.5)
    assert under == edit or under.condition == condition
    assert under.condition == condition and under.coefficient == 2.0 and edit.condition is None
    assert set_feature("sae", 3, 1.0).when(condition).condition is condition
    assert add_vector(HOOK, V, condition=condition).condition is condition
    message = builders.intervention(under, "f")
    assert message.condition == builders.condition(condition, "f")
    assert not builders.intervention(edit, "f").HasField("condition")
    for abort_when in (condition, [condition]):
        request = builders.generate("m", "x", max_tokens=1, abort_when=abort_when)
        assert list(request.abort_when) == [builders.condition(condition, "f")]


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (lambda: when("p"), TypeError),
        (lambda: when("p", above=1, below=0), TypeError),
        (lambda: when(7, above=1), TypeError),  # type: ignore[arg-type]
        (lambda: when(("sae", 1.5), above=1), TypeError),  # type: ignore[arg-type]
        (lambda: when(Handle(""), above=1), ValueError),
        (lambda: builders.condition(when("p", above=1, over="always"), "f"), InvalidArgumentError),  # type: ignore[arg-type]
        (lambda: builders.condition("p", "abort_when[0]"), TypeError),  # type: ignore[arg-type]
        (lambda: read_probe(3), TypeError),  # type: ignore[arg-type]
        (lambda: add_vector(3, V), TypeError),  # type: ignore[call-overload]
        (
            lambda: builders.generate("m", "x", max_tokens=1, readouts=[read_probe("p"), read_probe("p@2")]),
            ValueError,
        ),
    ],
)
def test_what_makes_no_sense_is_refused_here(wrong: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        wrong()


def test_directions_by_name_by_handle_and_unpublished() -> None:
    handle = Handle("models/m/directions/joy@2", vector=V, best_hook_point=HOOK)
    loose = Handle(
        "", vector=V, best_hook_point=HOOK, at={"blocks.0.hook_resid_post": Handle("", vector=2 * V)}
    )

    def wire(edit: Any) -> Any:
        return builders.intervention(edit, "f")

    alone = wire(add_vector("joy", 4.0))
    assert (alone.hook_point, alone.add_vector.direction, alone.add_vector.coefficient) == ("", "joy", 4.0)
    assert not alone.add_vector.HasField("vector")
    assert wire(add_vector("joy")).add_vector.coefficient == 1.0
    assert wire(add_vector("joy", coefficient=3.0)).add_vector.coefficient == 3.0
    assert wire(add_vector(handle, 4.0)).add_vector.direction == handle.resource_name
    placed = wire(add_vector(HOOK, handle, 4.0))
    assert (placed.hook_point, placed.add_vector.direction) == (HOOK, handle.resource_name)
    assert wire(ablate_direction("joy")).ablate_direction.direction == "joy"
    assert wire(ablate_direction(HOOK, "joy")).hook_point == HOOK
    assert wire(cap_projection(handle, max=1.0)).cap_projection.direction == handle.resource_name
    turned = wire(rotate("", "joy", V, 1.0))
    assert turned.rotate.first_direction == "joy" and not turned.rotate.HasField("first")
    np.testing.assert_array_equal(unpack(turned.rotate.second), V)
    # One that is not published goes as its numbers, where it is best or as it was made elsewhere.
    own = wire(add_vector(loose, 4.0))
    assert own.hook_point == HOOK and not own.add_vector.direction
    np.testing.assert_array_equal(unpack(own.add_vector.vector), V)
    elsewhere = wire(add_vector("blocks.0.hook_resid_post", loose))
    np.testing.assert_array_equal(unpack(elsewhere.add_vector.vector), 2 * V)
    assert wire(rotate("", loose, V, 1.0)).hook_point == HOOK


def test_readings() -> None:
    one = ProbeReading(("yes",), np.array([0.25], np.float32))
    assert float(one) == 0.25 and one["yes"] == 0.25 and one.label == "yes" and dict(one) == {"yes": 0.25}
    two = ProbeReading(("sad", "happy"), np.array([0.25, 0.75], np.float32))
    assert two.label == "happy" and list(two) == [("sad", 0.25), ("happy", 0.75)] and len(two) == 2
    assert "happy: 0.75" in repr(two)
    with pytest.raises(TypeError, match="sad, happy"):
        float(two)
    with pytest.raises(KeyError, match="'glad' is not one of sad, happy"):
        two["glad"]
    rows = ProbeReadings("models/m/probes/p@1", ("sad", "happy"), [0, 2], np.eye(2, dtype=np.float32))
    assert rows["happy"].tolist() == [0, 1] and rows.at(2)["happy"] == 1 and len(rows) == 2
    assert [position for position, _ in rows] == [0, 2]
    with pytest.raises(KeyError):
        rows.at(1)
    more = ProbeReadings(rows.probe, rows.labels, [1, 2], np.full((2, 2), 0.5, np.float32))
    joined = rows.joined(more)
    assert joined.positions == [0, 1, 2] and joined["happy"].tolist() == [0, 0.5, 1]
    nothing = ProbeReadings(rows.probe, rows.labels, [], np.zeros((0, 2), np.float32))
    assert len(nothing.joined(nothing)) == 0


def test_probes_stream_with_each_token(model: Model) -> None:
    with model.generate(
        "hay",
        max_tokens=6,
        readouts=[
            read_probe("vowels"),
            read_probe("models/fake/probes/letters@1", positions=generated()),
            read_probe("vowels", output="margin", name="logs"),
            read_activations(HOOK),
        ],
    ) as stream:
        seen = stream.prompt_readouts.probes
        tokens = list(stream)
    assert set(seen) == {"vowels", "letters", "logs"}
    assert seen["vowels"].probe == "models/fake/probes/vowels@1" and seen["vowels"].labels == ("vowel",)
    np.testing.assert_allclose(seen["vowels"]["vowel"], [0.1, 0.1, 0.9, 0.1], rtol=1e-6)
    assert seen["logs"]["vowel"][2] == pytest.approx(np.log(9), rel=1e-5)
    assert seen["letters"].positions == [] and seen["letters"].scores.shape == (0, 2)
    # The token at p carries what was read at p - 1.
    assert [float(token.probes["vowels"]) for token in tokens[:2]] == pytest.approx([0.1, 0.1])
    assert "letters" not in tokens[0].probes
    assert tokens[1].probes["letters"].label == "consonant"
    assert stream.result().prompt_readouts.probes["vowels"].positions == [0, 1, 2, 3]


def test_a_generation_ends_at_a_condition(model: Model) -> None:
    free = model.generate("hm", max_tokens=20).result()
    assert free.text == "xyz and then a" and free.abort is None and free.flags == []
    ends = [when("letters", label="vowel", above=0.95), when("vowels", above=0.5, positions=generated())]
    with model.generate("hm", max_tokens=20, abort_when=ends) as stream:
        text = "".join(token.text for token in stream)
    assert text == "xyz a" and stream.finish_reason == "aborted"
    assert stream.abort is not None and stream.abort.condition == 1 and stream.abort.monitor == ""
    assert (stream.abort.position, stream.abort.score, stream.abort.threshold) == (3 + 4, 0.9, 0.5)
    result = model.generate("hm", max_tokens=20, abort_when=ends[1]).result()
    assert result.text == "xyz a" and result.abort is not None and result.abort.condition == 0
    refused = model.generate("a", max_tokens=5, abort_when=when("vowels", above=0.5, over="prompt")).result()
    assert refused.text == "" and refused.token_ids == [] and refused.finish_reason == "aborted"
    feature = model.generate("hm", max_tokens=5, abort_when=when(("resid-post-0", 0), above=-1.0)).result()
    assert feature.abort is not None and feature.abort.position == 0


def test_an_edit_under_a_condition(model: Model) -> None:
    edit = add_vector("joy", 4.0)
    always, never, later, fixed = (
        model.generate("hay", max_tokens=6, seed=1, interventions=[each], readouts=[read_activations(HOOK)])
        for each in (
            edit,
            edit.when("vowels", above=0.95),
            edit.when("vowels", above=0.5, over="latched"),
            add_vector(HOOK, np.arange(8), 4.0),
        )
    )
    results = [each.result() for each in (always, never, later, fixed)]
    receipts = [result.receipt[0] for result in results]
    assert [receipt.positions_applied for receipt in receipts] == [9] * 4
    assert receipts[0].positions_steered == 9 and receipts[1].positions_steered == 0
    assert receipts[2].positions_steered == 7
    assert receipts[0].resources == ["models/fake/directions/joy@1"]
    assert receipts[2].resources == ["models/fake/directions/joy@1", "models/fake/probes/vowels@1"]
    assert receipts[3].resources == [] and receipts[0].hook_point == HOOK
    rows = [result.prompt_readouts[HOOK] for result in results]
    np.testing.assert_array_equal(rows[0], rows[3])
    np.testing.assert_array_equal(rows[2][:2], rows[1][:2])
    np.testing.assert_array_equal(rows[2][2:], rows[0][2:])
    assert (
        model.score("hay", interventions=[edit.when("vowels", above=0.5)]).receipt[0].positions_steered == 1
    )


def test_refusals_name_the_field(model: Model) -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"readouts": [read_probe("vowel")]}, NotFoundError, "readouts[0].probe.probe"),
        ({"abort_when": when("vowel", above=0.5)}, NotFoundError, "abort_when[0].probe.probe"),
        ({"abort_when": when("letters", above=0.5)}, InvalidArgumentError, "abort_when[0].probe.label"),
        ({"abort_when": Condition(probe="vowels")}, InvalidArgumentError, "abort_when[0].above"),
        ({"interventions": [add_vector("sorrow")]}, NotFoundError, "interventions[0].add_vector"),
        (
            {"interventions": [add_vector(HOOK, V).when(("nothing", 0), above=0)]},
            NotFoundError,
            "interventions[0].condition.feature.dictionary",
        ),
    ]
    for parameters, kind, where in cases:
        with pytest.raises(kind) as caught:
            model.generate("hay", max_tokens=2, **parameters).result()
        assert caught.value.field == where  # type: ignore[attr-defined]


def test_flags_and_monitors_aborts_are_shown() -> None:
    state = GenerationState()
    finished = generation_pb2.FinishedEvent(
        finish_reason="FINISH_REASON_ABORTED",
        abort={"monitor": "models/m/monitors/calm@1", "position": 3, "score": 0.9, "threshold": 0.5},
        flags=[
            {
                "monitor": "models/m/monitors/calm@1",
                "position": 3,
                "score": 0.9,
                "threshold": 0.5,
                "action": "MONITOR_ACTION_ABORT",
            }
        ],
    )
    state.feed(generation_pb2.GenerateResponse(prompt={"token_ids": [1]}))
    state.feed(generation_pb2.GenerateResponse(finished=finished))
    result = state.result([])
    assert result.finish_reason == "aborted"
    assert result.abort is not None and result.abort.monitor == "models/m/monitors/calm@1"
    assert result.abort.condition is None
    assert [(flag.action, flag.position) for flag in result.flags] == [("abort", 3)]


def test_asyncio_has_the_same(server: FakeServer) -> None:
    async def main() -> None:
        async with AsyncClient(server.target) as client:
            model = await client.model()
            ends = when("vowels", above=0.5, positions=generated())
            async with model.generate(
                "hm", max_tokens=9, abort_when=ends, readouts=[read_probe("vowels")]
            ) as stream:
                tokens = [token async for token in stream]
            assert stream.abort is not None and stream.abort.position == 7 and stream.flags == []
            assert float(tokens[-1].probes["vowels"]) == pytest.approx(0.1)

    asyncio.run(main())


def test_what_is_published_can_be_read_and_added(model: Model) -> None:
    examples = [("a", "yes"), ("b", "no")] * 4
    probe = model.train_probe(examples, hook_points=[HOOK], name="mood").result(timeout=30)
    direction = model.create_direction("toward", {HOOK: np.ones(8, np.float32)})
    with model.generate(
        "aab",
        max_tokens=3,
        interventions=[add_vector(direction, 2.0).when(probe, above=0.1)],
        readouts=[read_probe(probe), read_activations(HOOK)],
    ) as stream:
        scores = stream.prompt_readouts.probes[probe.name]
        list(stream)
    assert scores.probe == probe.resource_name
    np.testing.assert_allclose(scores.scores[-1, 0], float(probe.score("aab").scores[-1, 0]), rtol=1e-6)
    assert stream.receipt[0].resources == [direction.resource_name, probe.resource_name]
    probe.delete()
    with pytest.raises(NotFoundError):
        model.generate("aab", max_tokens=3, readouts=[read_probe(probe)]).result()
