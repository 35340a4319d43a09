"""Probes, conditions, aborting and named directions through a real server: what they become, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from glasshouse.server.types.conditions import (
    Abort,
    Condition,
    ConditionScope,
    FeatureColumn,
    MonitorAction,
    MonitorFlag,
    ProbeColumn,
    ProbeOutput,
    PromptAggregation,
)
from glasshouse.server.types.generation import GenerationRequest
from glasshouse.server.types.interventions import (
    AblateDirection,
    AddVector,
    CapProjection,
    NamedDirection,
    Rotate,
)
from glasshouse.server.types.readouts import ReadProbe
from glasshouse.server.types.selectors import EVERYWHERE, NamedPositions, Selector
from glasshouse.v1 import conditions_pb2 as conditions
from glasshouse.v1 import generation_pb2 as pb
from glasshouse.wire.tensors import pack

from ..fake_engine import FakeEngine
from ..serving import events_of, refusal, serving

HOOK = "blocks.1.hook_resid_post"
V = np.ones(8, np.float32)


def request(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(input={"text": "abc"}, max_tokens=3, **fields)


async def seen(message: pb.GenerateRequest) -> GenerationRequest:
    engine = FakeEngine()
    async with serving(engine) as served:
        await events_of(served.generation.Generate(message))
    made = engine.seen[-1]
    assert isinstance(made, GenerationRequest)
    return made


async def test_probe_readouts_both_ways() -> None:
    wanted: list[Any] = [
        {"probe": {"probe": "p"}},
        {
            "probe": {"probe": "p@2", "output": "PROBE_OUTPUT_MARGIN"},
            "positions": {"named": "NAMED_POSITIONS_LAST"},
        },
    ]
    engine = FakeEngine()
    async with serving(engine) as served:
        events = await events_of(served.generation.Generate(request(readouts=wanted)))
        metrics = served.metrics()
    (made,) = engine.seen
    assert made.readouts == (
        ReadProbe(probe="p"),
        ReadProbe(probe="p@2", output=ProbeOutput.MARGIN, positions=Selector(named=NamedPositions.LAST)),
    )
    first, second = events[0].prompt.readouts
    assert first.probe.probe == "models/echo/probes/p@2" and list(first.probe.labels) == ["sad", "happy"]
    assert list(first.positions) == [0, 1, 2, 3]
    np.testing.assert_allclose(first.probe.scores, np.arange(8) / 100, rtol=1e-6)
    assert second.readout == 1
    token = next(event for event in events if event.WhichOneof("event") == "tokens").tokens.tokens[0]
    assert [value.readout for value in token.readouts] == [0, 1]
    assert list(token.readouts[0].probe.scores) == pytest.approx([0.25, 0.03])
    # (4 + 3 positions) x 2 readouts x 2 columns x 4 bytes
    assert metrics["glasshouse_readout_bytes_total"] == (4 + 3) * 2 * 2 * 4


async def test_a_long_prompts_scores_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from glasshouse.server.services import events as packing

    monkeypatch.setattr(packing, "CHUNK_BYTES", 64)
    async with serving() as served:
        message = pb.GenerateRequest(
            input={"text": "x" * 99}, max_tokens=1, readouts=[{"probe": {"probe": "p"}}]
        )
        events = await events_of(served.generation.Generate(message))
    pieces = [piece for event in events for piece in event.prompt.readouts]
    assert len(pieces) == math.ceil(100 / 8)
    assert [list(piece.probe.labels) for piece in pieces[:2]] == [["sad", "happy"], []]
    assert list(pieces[0].positions) == list(range(100)) and not pieces[1].positions
    scores = [score for piece in pieces for score in piece.probe.scores]
    np.testing.assert_allclose(scores, np.arange(200) / 100, rtol=1e-6)


async def test_conditions_become_types() -> None:
    add = {"vector": pack(V)}
    where = {"at": {"positions": [1, 2]}}
    message = request(
        interventions=[
            {"hook_point": HOOK, "add_vector": add, "condition": {"probe": {"probe": "p"}, "above": 0.5}},
            {
                "hook_point": HOOK,
                "add_vector": add,
                "condition": {
                    "probe": {"probe": "q@1", "label": "happy", "output": "PROBE_OUTPUT_MARGIN"},
                    "below": -2.5,
                    "scope": "CONDITION_SCOPE_PROMPT",
                    "prompt_aggregation": "PROMPT_AGGREGATION_MEAN",
                    "positions": where,
                },
            },
            {"hook_point": HOOK, "add_vector": add},
        ],
        abort_when=[
            {"feature": {"dictionary": "d", "feature": 7}, "above": 3.0, "scope": "CONDITION_SCOPE_LATCHED"},
            {"probe": {"probe": "p"}, "below": 0.0},
        ],
    )
    made = await seen(message)
    assert [edit.condition for edit in made.interventions] == [
        Condition(source=ProbeColumn(probe="p"), above=0.5),
        Condition(
            source=ProbeColumn(probe="q@1", label="happy", output=ProbeOutput.MARGIN),
            below=-2.5,
            scope=ConditionScope.PROMPT,
            aggregation=PromptAggregation.MEAN,
            positions=Selector(at=(1, 2)),
        ),
        None,
    ]
    assert made.abort_when == (
        Condition(source=FeatureColumn(dictionary="d", feature=7), above=3.0, scope=ConditionScope.LATCHED),
        Condition(source=ProbeColumn(probe="p"), below=0.0, positions=EVERYWHERE),
    )


async def test_named_directions_become_types() -> None:
    made = await seen(
        request(
            interventions=[
                {"add_vector": {"direction": "joy", "coefficient": 2.0}},
                {"hook_point": HOOK, "ablate_direction": {"direction": "models/echo/directions/joy@3"}},
            ]
        )
    )
    assert made.interventions[0].hook_point == ""
    assert made.interventions[0].edit == AddVector(vector=NamedDirection("joy"), coefficient=2.0)
    assert made.interventions[1].edit == AblateDirection(
        vector=NamedDirection("models/echo/directions/joy@3")
    )
    made = await seen(
        request(
            interventions=[
                {"cap_projection": {"direction": "joy", "max": 1.0}},
                {"rotate": {"first": pack(V), "second_direction": "joy", "angle_radians": 1.0}},
            ]
        )
    )
    assert made.interventions[0].edit == CapProjection(vector=NamedDirection("joy"), maximum=1.0)
    rotate = made.interventions[1].edit
    assert isinstance(rotate, Rotate) and rotate.second == NamedDirection("joy")
    assert isinstance(rotate.first, np.ndarray)


async def test_what_ended_it_and_flags() -> None:
    engine = FakeEngine()
    engine.abort = Abort(condition=0, position=5, score=0.75, threshold=0.5)
    engine.flags = (
        MonitorFlag(
            monitor="models/echo/monitors/m@1",
            position=4,
            score=0.9,
            threshold=0.8,
            action=MonitorAction.STEER,
        ),
    )
    async with serving(engine) as served:
        finished = (await events_of(served.generation.Generate(request())))[-1].finished
        assert finished.finish_reason == pb.FINISH_REASON_ABORTED
        assert finished.abort == conditions.Abort(condition=0, position=5, score=0.75, threshold=0.5)
        assert finished.abort.WhichOneof("cause") == "condition"
        assert list(finished.flags) == [
            conditions.MonitorFlag(
                monitor="models/echo/monitors/m@1",
                position=4,
                score=0.9,
                threshold=0.8,
                action=conditions.MONITOR_ACTION_STEER,
            )
        ]
        engine.abort = Abort(monitor="models/echo/monitors/m@1", position=5, score=0.75, threshold=0.5)
        finished = (await events_of(served.generation.Generate(request())))[-1].finished
        assert finished.abort.WhichOneof("cause") == "monitor"
        engine.abort = None
        finished = (await events_of(served.generation.Generate(request())))[-1].finished
        assert not finished.HasField("abort")


def under(**condition: Any) -> dict[str, Any]:
    return {
        "interventions": [{"hook_point": HOOK, "add_vector": {"vector": pack(V)}, "condition": condition}]
    }


def ending(**condition: Any) -> dict[str, Any]:
    return {"abort_when": [condition]}


P = {"probe": "p"}
AT = "interventions[0].condition"
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no probe": ({"readouts": [{"probe": {}}]}, "FIELD_REQUIRED", "readouts[0].probe.probe"),
    "unknown output": (
        {"readouts": [{"probe": {"probe": "p", "output": 9}}]}, "VALUE_OUT_OF_RANGE", "readouts[0].probe.output",
    ),
    "no source": (under(above=0.5), "FIELD_REQUIRED", AT),
    "no threshold": (under(probe=P), "FIELD_REQUIRED", f"{AT}.above"),
    "no name": (under(probe={}, above=0.5), "FIELD_REQUIRED", f"{AT}.probe.probe"),
    "no dictionary": (under(feature={"feature": 3}, above=0.5), "FIELD_REQUIRED", f"{AT}.feature.dictionary"),
    "no probability": (under(probe=P, above=1.5), "VALUE_OUT_OF_RANGE", f"{AT}.above"),
    "negative probability": (under(probe=P, below=-0.1), "VALUE_OUT_OF_RANGE", f"{AT}.below"),
    "not a number": (under(probe=P, above=math.nan), "VALUE_NOT_FINITE", f"{AT}.above"),
    "infinite activation": (
        under(feature={"dictionary": "d"}, above=math.inf), "VALUE_NOT_FINITE", f"{AT}.above",
    ),
    "unknown scope": (under(probe=P, above=0.5, scope=9), "VALUE_OUT_OF_RANGE", f"{AT}.scope"),
    "unknown aggregation": (
        under(probe=P, above=0.5, scope=2, prompt_aggregation=9), "VALUE_OUT_OF_RANGE", f"{AT}.prompt_aggregation",
    ),
    "aggregation of a position": (
        under(probe=P, above=0.5, prompt_aggregation=1), "FIELD_CONFLICT", f"{AT}.prompt_aggregation",
    ),
    "empty selector": (under(probe=P, above=0.5, positions={}), "FIELD_REQUIRED", f"{AT}.positions"),
    "unknown condition output": (
        under(probe={"probe": "p", "output": 7}, above=0.5), "VALUE_OUT_OF_RANGE", f"{AT}.probe.output",
    ),
    "abort: no source": (ending(above=0.5), "FIELD_REQUIRED", "abort_when[0]"),
    "abort: too many": (
        {"abort_when": [{"probe": P, "above": 0.5}] * 17}, "VALUE_OUT_OF_RANGE", "abort_when",
    ),
    "vector and direction": (
        {"interventions": [{"add_vector": {"vector": pack(V), "direction": "joy"}}]},
        "FIELD_CONFLICT",
        "interventions[0].add_vector.direction",
    ),
    "neither vector nor direction": (
        {"interventions": [{"hook_point": HOOK, "ablate_direction": {}}]},
        "FIELD_REQUIRED",
        "interventions[0].ablate_direction.vector",
    ),
    "two seconds": (
        {
            "interventions": [
                {"rotate": {"first_direction": "joy", "second": pack(V), "second_direction": "calm"}}
            ]
        },
        "FIELD_CONFLICT",
        "interventions[0].rotate.second_direction",
    ),
    "no hook point for a vector": (
        {"interventions": [{"rotate": {"first": pack(V), "second": pack(V)}}]},
        "FIELD_REQUIRED",
        "interventions[0].hook_point",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
async def test_refused(case: str) -> None:
    fields, reason, field = REFUSED[case]
    engine = FakeEngine()
    async with serving(engine) as served:
        refused = await refusal(lambda: served.generation.Generate(request(**fields)))
    assert (refused.code, refused.reason, refused.field) == ("INVALID_ARGUMENT", reason, field)
    assert engine.seen == []
