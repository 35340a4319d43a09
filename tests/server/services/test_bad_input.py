"""Every bad input through a real server: its code, its reason, its field; never INTERNAL, never a wait."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from google.rpc import error_details_pb2

from glasshouse.server.types.configuration import Settings
from glasshouse.server.types.limits import Limits
from glasshouse.v1 import (
    activations_pb2,
    generation_pb2,
    inputs_pb2,
    interventions_pb2,
    models_pb2,
    tensors_pb2,
)
from glasshouse.wire.tensors import pack

from ..fake_engine import FakeEngine
from ..serving import refusal, serving

HOOK = "blocks.1.hook_resid_post"
VECTOR = np.ones(8, np.float32)
LIMITS = Limits(
    max_tokens=100,
    max_text_bytes=5000,
    max_inputs=3,
    max_input_tokens_total=600,
    max_hook_points=2,
    max_interventions=2,
    max_readouts=2,
    max_positions=4,
    max_prompt_tokens=450,
    max_top_logprobs=50,
)

Change = Callable[[Any], None]


def generate(change: Change) -> Any:
    request = generation_pb2.GenerateRequest(max_tokens=4)
    request.input.text = "abc"
    change(request)
    return request


def score(change: Change) -> Any:
    request = generation_pb2.ScoreRequest()
    request.input.text = "abc"
    change(request)
    return request


def extract(change: Change) -> Any:
    request = activations_pb2.ExtractActivationsRequest(hook_points=[HOOK])
    request.inputs.add(text="abc")
    change(request)
    return request


def setting(**values: Any) -> Change:
    """Sets fields by their paths, with __ for dots."""

    def change(request: Any) -> None:
        for path, value in values.items():
            *parents, name = path.split("__")
            target = request
            for parent in parents:
                target = getattr(target, parent)
            if isinstance(value, list):
                getattr(target, name).extend(value)
            else:
                setattr(target, name, value)

    return change


def edit(**fields: Any) -> Change:
    """One intervention."""

    def change(request: Any) -> None:
        request.interventions.append(interventions_pb2.Intervention(**{"hook_point": HOOK, **fields}))

    return change


def add(vector: tensors_pb2.Tensor | None, **fields: Any) -> Change:
    return edit(add_vector=interventions_pb2.AddVector(vector=vector, **fields))


def where(**selector: Any) -> Change:
    return edit(
        positions=inputs_pb2.PositionSelector(**selector),
        add_vector=interventions_pb2.AddVector(vector=pack(VECTOR)),
    )


def read(**readout: Any) -> Change:
    return lambda request: request.readouts.add(**readout)


def no_input(request: Any) -> None:
    request.ClearField("input")


def truncated(tensor: tensors_pb2.Tensor) -> tensors_pb2.Tensor:
    tensor.data = tensor.data[:-1]
    return tensor


def both_forms(request: Any) -> None:
    request.input.token_ids.append(3)


def all_forms(request: Any) -> None:
    request.input.ClearField("text")
    request.input.token_ids.append(3)
    request.input.messages.add(role="user", content="x")


def ids(*values: int) -> Change:
    def change(request: Any) -> None:
        request.input.ClearField("text")
        request.input.token_ids.extend(values)

    return change


def roleless(request: Any) -> None:
    request.input.ClearField("text")
    request.input.messages.add(content="x")


NAN, INF = math.nan, math.inf
NAN_VECTOR = np.array([1, NAN] + [1] * 6, np.float32)
PATH = "interventions[0].add_vector"
INVALID, EXHAUSTED, MISSING = "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "NOT_FOUND"

GENERATE: list[tuple[str, Change, str, str, str]] = [
    ("unknown model", setting(model="models/ecco"), MISSING, "MODEL_NOT_FOUND", "model"),
    ("no input", no_input, INVALID, "FIELD_REQUIRED", "input"),
    ("empty text", setting(input__text=""), INVALID, "EMPTY_INPUT", "input"),
    ("two forms", both_forms, INVALID, "FIELD_CONFLICT", "input.token_ids"),
    ("two other forms", all_forms, INVALID, "FIELD_CONFLICT", "input.messages"),
    ("negative token", ids(1, -1), INVALID, "TOKEN_OUT_OF_RANGE", "input.token_ids[1]"),
    ("token beyond vocabulary", ids(1, 2, 258), INVALID, "TOKEN_OUT_OF_RANGE", "input.token_ids[2]"),
    ("no role", roleless, INVALID, "FIELD_REQUIRED", "input.messages[0].role"),
    ("prompt beyond context", setting(input__text="x" * 600), INVALID, "CONTEXT_EXCEEDED", "input"),
    ("prompt beyond limit", setting(input__text="x" * 460), EXHAUSTED, "LIMIT_EXCEEDED", "input"),
    ("text beyond limit", setting(input__text="x" * 5001), EXHAUSTED, "LIMIT_EXCEEDED", "input.text"),
    ("no max_tokens", setting(max_tokens=0), INVALID, "FIELD_REQUIRED", "max_tokens"),
    ("negative max_tokens", setting(max_tokens=-5), INVALID, "VALUE_OUT_OF_RANGE", "max_tokens"),
    ("absurd max_tokens", setting(max_tokens=2**31 - 1), INVALID, "CONTEXT_EXCEEDED", "max_tokens"),
    ("max_tokens one over", setting(max_tokens=509), INVALID, "CONTEXT_EXCEEDED", "max_tokens"),
    ("max_tokens over limit", setting(max_tokens=101), EXHAUSTED, "LIMIT_EXCEEDED", "max_tokens"),
    (
        "nan temperature",
        setting(sampling__temperature=NAN),
        INVALID,
        "VALUE_NOT_FINITE",
        "sampling.temperature",
    ),
    (
        "inf temperature",
        setting(sampling__temperature=INF),
        INVALID,
        "VALUE_NOT_FINITE",
        "sampling.temperature",
    ),
    (
        "negative temperature",
        setting(sampling__temperature=-1),
        INVALID,
        "VALUE_OUT_OF_RANGE",
        "sampling.temperature",
    ),
    ("hot", setting(sampling__temperature=101), INVALID, "VALUE_OUT_OF_RANGE", "sampling.temperature"),
    ("zero top_p", setting(sampling__top_p=0), INVALID, "VALUE_OUT_OF_RANGE", "sampling.top_p"),
    ("large top_p", setting(sampling__top_p=1.01), INVALID, "VALUE_OUT_OF_RANGE", "sampling.top_p"),
    ("nan top_p", setting(sampling__top_p=NAN), INVALID, "VALUE_NOT_FINITE", "sampling.top_p"),
    ("negative top_k", setting(sampling__top_k=-1), INVALID, "VALUE_OUT_OF_RANGE", "sampling.top_k"),
    ("empty stop", setting(stop=["a", ""]), INVALID, "FIELD_REQUIRED", "stop[1]"),
    ("long stop", setting(stop=["é" * 129]), INVALID, "VALUE_OUT_OF_RANGE", "stop[0]"),
    ("many stops", setting(stop=["a"] * 17), INVALID, "VALUE_OUT_OF_RANGE", "stop"),
    ("bad stop token", setting(stop_token_ids=[258]), INVALID, "TOKEN_OUT_OF_RANGE", "stop_token_ids[0]"),
    ("many stop tokens", setting(stop_token_ids=[1] * 65), INVALID, "VALUE_OUT_OF_RANGE", "stop_token_ids"),
    ("negative logprobs", setting(top_logprobs=-1), INVALID, "VALUE_OUT_OF_RANGE", "top_logprobs"),
    ("many logprobs", setting(top_logprobs=101), INVALID, "VALUE_OUT_OF_RANGE", "top_logprobs"),
    ("logprobs over limit", setting(top_logprobs=51), EXHAUSTED, "LIMIT_EXCEEDED", "top_logprobs"),
    ("no hook point", edit(hook_point=""), INVALID, "FIELD_REQUIRED", "interventions[0].hook_point"),
    (
        "unknown hook point",
        edit(hook_point="blocks.9.hook_resid_post", add_vector={"vector": pack(VECTOR)}),
        MISSING,
        "HOOK_POINT_NOT_FOUND",
        "interventions[0].hook_point",
    ),
    ("no edit", edit(), INVALID, "FIELD_REQUIRED", "interventions[0]"),
    ("no vector", add(None), INVALID, "FIELD_REQUIRED", f"{PATH}.vector"),
    ("nan vector", add(pack(NAN_VECTOR)), INVALID, "VALUE_NOT_FINITE", f"{PATH}.vector"),
    ("inf vector", add(pack(VECTOR * INF)), INVALID, "VALUE_NOT_FINITE", f"{PATH}.vector"),
    ("huge f64", add(pack(np.full(8, 1e300))), INVALID, "VALUE_NOT_FINITE", f"{PATH}.vector"),
    ("matrix", add(pack(np.ones((2, 4), np.float32))), INVALID, "TENSOR_MALFORMED", f"{PATH}.vector.shape"),
    ("scalar", add(pack(np.float32(1).reshape(()))), INVALID, "TENSOR_MALFORMED", f"{PATH}.vector.shape"),
    ("empty vector", add(pack(np.zeros(0, np.float32))), INVALID, "TENSOR_MALFORMED", f"{PATH}.vector.shape"),
    ("integers", add(pack(np.ones(8, np.int32))), INVALID, "TENSOR_MALFORMED", f"{PATH}.vector.dtype"),
    ("no dtype", add(tensors_pb2.Tensor(shape=[8])), INVALID, "TENSOR_MALFORMED", f"{PATH}.vector.dtype"),
    ("unknown dtype", add(tensors_pb2.Tensor(dtype=99)), INVALID, "TENSOR_MALFORMED", f"{PATH}.vector.dtype"),
    ("short data", add(truncated(pack(VECTOR))), INVALID, "TENSOR_MALFORMED", f"{PATH}.vector.data"),
    (
        "negative shape",
        add(tensors_pb2.Tensor(dtype=1, shape=[-8])),
        INVALID,
        "TENSOR_MALFORMED",
        f"{PATH}.vector.shape[0]",
    ),
    (
        "absurd shape",
        add(tensors_pb2.Tensor(dtype=1, shape=[2**62, 2**62])),
        INVALID,
        "TENSOR_MALFORMED",
        f"{PATH}.vector.shape[0]",
    ),
    (
        "nan coefficient",
        add(pack(VECTOR), coefficient=NAN),
        INVALID,
        "VALUE_NOT_FINITE",
        f"{PATH}.coefficient",
    ),
    (
        "absurd coefficient",
        add(pack(VECTOR), coefficient=1e39),
        INVALID,
        "VALUE_NOT_FINITE",
        f"{PATH}.coefficient",
    ),
    ("unknown scale", add(pack(VECTOR), scale=9), INVALID, "VALUE_OUT_OF_RANGE", f"{PATH}.scale"),
    ("zero direction", add(pack(0 * VECTOR), scale=2), INVALID, "VALUE_OUT_OF_RANGE", f"{PATH}.vector"),
    (
        "zero ablation",
        edit(ablate_direction={"vector": pack(0 * VECTOR)}),
        INVALID,
        "VALUE_OUT_OF_RANGE",
        "interventions[0].ablate_direction.vector",
    ),
    (
        "boundless cap",
        edit(cap_projection={"vector": pack(VECTOR)}),
        INVALID,
        "FIELD_REQUIRED",
        "interventions[0].cap_projection.max",
    ),
    (
        "crossed cap",
        edit(cap_projection={"vector": pack(VECTOR), "min": 2, "max": 1}),
        INVALID,
        "FIELD_CONFLICT",
        "interventions[0].cap_projection.min",
    ),
    (
        "nan cap",
        edit(cap_projection={"vector": pack(VECTOR), "min": NAN}),
        INVALID,
        "VALUE_NOT_FINITE",
        "interventions[0].cap_projection.min",
    ),
    (
        "parallel plane",
        edit(rotate={"first": pack(VECTOR), "second": pack(-3 * VECTOR)}),
        INVALID,
        "VALUE_OUT_OF_RANGE",
        "interventions[0].rotate.second",
    ),
    (
        "plane of two widths",
        edit(rotate={"first": pack(VECTOR), "second": pack(VECTOR[:4])}),
        INVALID,
        "WRONG_WIDTH",
        "interventions[0].rotate.second",
    ),
    (
        "infinite angle",
        edit(
            rotate={
                "first": pack(VECTOR),
                "second": pack(np.eye(8, dtype=np.float32)[0]),
                "angle_radians": INF,
            }
        ),
        INVALID,
        "VALUE_NOT_FINITE",
        "interventions[0].rotate.angle_radians",
    ),
    (
        "cube of activations",
        edit(replace={"activations": pack(np.ones((1, 1, 8), np.float32))}),
        INVALID,
        "TENSOR_MALFORMED",
        "interventions[0].replace.activations.shape",
    ),
    (
        "many interventions",
        lambda r: [add(pack(VECTOR))(r) for _ in range(3)],  # type: ignore[func-returns-value]
        EXHAUSTED,
        "LIMIT_EXCEEDED",
        "interventions",
    ),
    ("unset selector", where(), INVALID, "FIELD_REQUIRED", "interventions[0].positions"),
    ("unnamed selector", where(named=0), INVALID, "FIELD_REQUIRED", "interventions[0].positions.named"),
    ("unknown name", where(named=77), INVALID, "VALUE_OUT_OF_RANGE", "interventions[0].positions.named"),
    ("empty list", where(at={}), INVALID, "FIELD_REQUIRED", "interventions[0].positions.at.positions"),
    (
        "negative position",
        where(at={"positions": [0, -1]}),
        INVALID,
        "VALUE_OUT_OF_RANGE",
        "interventions[0].positions.at.positions[1]",
    ),
    (
        "position twice",
        where(at={"positions": [2, 1, 2]}),
        INVALID,
        "FIELD_CONFLICT",
        "interventions[0].positions.at.positions[2]",
    ),
    (
        "many positions",
        where(at={"positions": range(5)}),
        EXHAUSTED,
        "LIMIT_EXCEEDED",
        "interventions[0].positions.at.positions",
    ),
    (
        "position never fed",
        where(at={"positions": [7]}),
        INVALID,
        "POSITION_UNREACHABLE",
        "interventions[0].positions.at.positions",
    ),
    (
        "span backwards",
        where(span={"start": 3, "stop": 3}),
        INVALID,
        "VALUE_OUT_OF_RANGE",
        "interventions[0].positions.span.stop",
    ),
    (
        "negative span",
        where(span={"start": -3}),
        INVALID,
        "VALUE_OUT_OF_RANGE",
        "interventions[0].positions.span.start",
    ),
    (
        "absurd span",
        where(span={"start": 0, "stop": 2**62}),
        INVALID,
        "POSITION_UNREACHABLE",
        "interventions[0].positions.span",
    ),
    (
        "nobody's features",
        edit(set_features={"features": [1], "values": [1]}),
        INVALID,
        "FIELD_REQUIRED",
        "interventions[0].set_features.dictionary",
    ),
    (
        "no features",
        edit(set_features={"dictionary": "d", "values": [1]}),
        INVALID,
        "FIELD_REQUIRED",
        "interventions[0].set_features.features",
    ),
    (
        "values that do not fit",
        edit(set_features={"dictionary": "d", "features": [1, 2, 3], "values": [1, 2]}),
        INVALID,
        "FIELD_CONFLICT",
        "interventions[0].set_features.values",
    ),
    (
        "nan factor",
        edit(scale_features={"dictionary": "d", "features": [1, 2], "factors": [1, NAN]}),
        INVALID,
        "VALUE_NOT_FINITE",
        "interventions[0].scale_features.factors[1]",
    ),
    (
        "many features",
        edit(scale_features={"dictionary": "d", "features": range(4097), "factors": [0]}),
        INVALID,
        "VALUE_OUT_OF_RANGE",
        "interventions[0].scale_features.features",
    ),
    (
        "nobody's features to read",
        read(features={"top_k": 3}),
        INVALID,
        "FIELD_REQUIRED",
        "readouts[0].features.dictionary",
    ),
    (
        "features two ways",
        read(features={"dictionary": "d", "top_k": 3, "features": [1]}),
        INVALID,
        "FIELD_CONFLICT",
        "readouts[0].features.top_k",
    ),
    (
        "top features of none",
        read(features={"dictionary": "d", "top_k": 0}),
        INVALID,
        "VALUE_OUT_OF_RANGE",
        "readouts[0].features.top_k",
    ),
    ("no readout", read(), INVALID, "FIELD_REQUIRED", "readouts[0]"),
    (
        "nowhere to read",
        read(activations={}),
        INVALID,
        "FIELD_REQUIRED",
        "readouts[0].activations.hook_point",
    ),
    (
        "integer readout",
        read(activations={"hook_point": HOOK, "dtype": 4}),
        INVALID,
        "VALUE_OUT_OF_RANGE",
        "readouts[0].activations.dtype",
    ),
    (
        "unknown readout point",
        read(activations={"hook_point": "nowhere"}),
        MISSING,
        "HOOK_POINT_NOT_FOUND",
        "readouts[0].hook_point",
    ),
    (
        "lens of none",
        read(logit_lens={"hook_point": HOOK, "top_k": 0}),
        INVALID,
        "VALUE_OUT_OF_RANGE",
        "readouts[0].logit_lens.top_k",
    ),
    (
        "lens of many",
        read(logit_lens={"hook_point": HOOK, "top_k": 101}),
        INVALID,
        "VALUE_OUT_OF_RANGE",
        "readouts[0].logit_lens.top_k",
    ),
    (
        "bad readout selector",
        read(positions={}, logit_lens={"hook_point": HOOK}),
        INVALID,
        "FIELD_REQUIRED",
        "readouts[0].positions",
    ),
    (
        "many readouts",
        lambda r: [r.readouts.add(activations={"hook_point": HOOK}) for _ in range(3)],  # type: ignore[arg-type,return-value]
        EXHAUSTED,
        "LIMIT_EXCEEDED",
        "readouts",
    ),
]


def more_inputs(*texts: str) -> Change:
    def change(request: Any) -> None:
        for text in texts:
            request.inputs.add(text=text)

    return change


EXTRACT: list[tuple[str, Change, str, str, str]] = [
    ("unknown model", setting(model="nope"), MISSING, "MODEL_NOT_FOUND", "model"),
    ("no inputs", lambda r: r.ClearField("inputs"), INVALID, "FIELD_REQUIRED", "inputs"),
    ("empty input", more_inputs(""), INVALID, "EMPTY_INPUT", "inputs[1]"),
    ("inputless input", lambda r: r.inputs.add(), INVALID, "FIELD_REQUIRED", "inputs[1]"),
    (
        "two forms",
        lambda r: r.inputs.add(text="a", token_ids=[1]),
        INVALID,
        "FIELD_CONFLICT",
        "inputs[1].token_ids",
    ),
    ("long input", more_inputs("x" * 512), INVALID, "CONTEXT_EXCEEDED", "inputs[1]"),
    ("many inputs", more_inputs("a", "b", "c"), EXHAUSTED, "LIMIT_EXCEEDED", "inputs"),
    ("many tokens", more_inputs("x" * 300, "x" * 300), EXHAUSTED, "LIMIT_EXCEEDED", "inputs"),
    ("no hook points", lambda r: r.ClearField("hook_points"), INVALID, "FIELD_REQUIRED", "hook_points"),
    ("empty hook point", setting(hook_points=[""]), INVALID, "FIELD_REQUIRED", "hook_points[1]"),
    ("hook point twice", setting(hook_points=[HOOK]), INVALID, "FIELD_CONFLICT", "hook_points[1]"),
    ("unknown hook point", setting(hook_points=["x"]), MISSING, "HOOK_POINT_NOT_FOUND", "hook_points[1]"),
    ("many hook points", setting(hook_points=["x", "y"]), EXHAUSTED, "LIMIT_EXCEEDED", "hook_points"),
    ("generated", setting(positions__named=3), INVALID, "VALUE_OUT_OF_RANGE", "positions.named"),
    ("unset selector", setting(positions__exclude_bos=True), INVALID, "FIELD_REQUIRED", "positions"),
    ("integers", setting(dtype=4), INVALID, "VALUE_OUT_OF_RANGE", "dtype"),
    ("unknown dtype", setting(dtype=99), INVALID, "VALUE_OUT_OF_RANGE", "dtype"),
    ("nan vector", add(pack(NAN_VECTOR)), INVALID, "VALUE_NOT_FINITE", f"{PATH}.vector"),
]

SCORE: list[tuple[str, Change, str, str, str]] = [
    ("unknown model", setting(model="nope"), MISSING, "MODEL_NOT_FOUND", "model"),
    ("no input", no_input, INVALID, "FIELD_REQUIRED", "input"),
    ("empty", setting(input__text=""), INVALID, "EMPTY_INPUT", "input"),
    ("too long", setting(input__text="x" * 512), INVALID, "CONTEXT_EXCEEDED", "input"),
    ("negative top_k", setting(top_k=-1), INVALID, "VALUE_OUT_OF_RANGE", "top_k"),
    ("large top_k", setting(top_k=101), INVALID, "VALUE_OUT_OF_RANGE", "top_k"),
    ("nan vector", add(pack(NAN_VECTOR)), INVALID, "VALUE_NOT_FINITE", f"{PATH}.vector"),
]

MODELS: list[tuple[str, str, Any, str, str, str]] = [
    (
        "get unknown",
        "GetModel",
        models_pb2.GetModelRequest(name="models/ehco"),
        MISSING,
        "MODEL_NOT_FOUND",
        "name",
    ),
    (
        "negative page",
        "ListModels",
        models_pb2.ListModelsRequest(page_size=-1),
        INVALID,
        "VALUE_OUT_OF_RANGE",
        "page_size",
    ),
    (
        "bad token",
        "ListModels",
        models_pb2.ListModelsRequest(page_token="xyz"),
        INVALID,
        "VALUE_MALFORMED",
        "page_token",
    ),
    (
        "foreign token",
        "ListHookPoints",
        models_pb2.ListHookPointsRequest(page_token="cGFnZTo5OQ=="),
        INVALID,
        "VALUE_MALFORMED",
        "page_token",
    ),
    (
        "negative size",
        "ListHookPoints",
        models_pb2.ListHookPointsRequest(page_size=-9),
        INVALID,
        "VALUE_OUT_OF_RANGE",
        "page_size",
    ),
    ("tokenize nothing", "Tokenize", models_pb2.TokenizeRequest(), INVALID, "FIELD_REQUIRED", "input"),
    (
        "tokenize much",
        "Tokenize",
        models_pb2.TokenizeRequest(input={"text": "é" * 2501}),
        EXHAUSTED,
        "LIMIT_EXCEEDED",
        "input.text",
    ),
    (
        "detokenize",
        "Detokenize",
        models_pb2.DetokenizeRequest(token_ids=[0, 999]),
        INVALID,
        "TOKEN_OUT_OF_RANGE",
        "token_ids[1]",
    ),
    (
        "detokenize much",
        "Detokenize",
        models_pb2.DetokenizeRequest(token_ids=[1] * 601),
        EXHAUSTED,
        "LIMIT_EXCEEDED",
        "token_ids",
    ),
    ("empty chat", "RenderChat", models_pb2.RenderChatRequest(), INVALID, "FIELD_REQUIRED", "messages"),
]


def named(table: list[Any]) -> dict[str, Any]:
    return {"argvalues": [row[1:] for row in table], "ids": [row[0] for row in table]}


async def check(service: str, method: str, request: Any, code: str, reason: str, field: str) -> None:
    engine = FakeEngine()
    async with serving(engine, settings=Settings(limits=LIMITS)) as served:
        call = getattr(getattr(served, service), method)
        refused = await refusal(lambda: call(request))
        assert (refused.code, refused.reason, refused.field) == (code, reason, field), refused.message
        assert refused.metadata["remedy"]
        assert refused.trailer_bytes < 8192
        if code == INVALID:
            assert refused.detail(error_details_pb2.BadRequest).field_violations[0].field == field
        if code == MISSING:
            assert refused.detail(error_details_pb2.ResourceInfo).resource_name
            assert refused.metadata["closest"]
        assert engine.running == 0
        # The next request is served as if nothing had been.
        assert len([e async for e in served.generation.Generate(generate(lambda r: None))]) >= 3


@pytest.mark.parametrize(("change", "code", "reason", "field"), **named(GENERATE))
async def test_generate(change: Change, code: str, reason: str, field: str) -> None:
    await check("generation", "Generate", generate(change), code, reason, field)


@pytest.mark.parametrize(("change", "code", "reason", "field"), **named(SCORE))
async def test_score(change: Change, code: str, reason: str, field: str) -> None:
    await check("generation", "Score", score(change), code, reason, field)


@pytest.mark.parametrize(("change", "code", "reason", "field"), **named(EXTRACT))
async def test_extract(change: Change, code: str, reason: str, field: str) -> None:
    await check("activations", "ExtractActivations", extract(change), code, reason, field)


@pytest.mark.parametrize(("method", "request_", "code", "reason", "field"), **named(MODELS))
async def test_models(method: str, request_: Any, code: str, reason: str, field: str) -> None:
    await check("models", method, request_, code, reason, field)


async def test_second_intervention_is_named_by_its_index() -> None:
    request = generate(lambda r: (add(pack(VECTOR))(r), add(pack(NAN_VECTOR))(r)))  # type: ignore[arg-type, func-returns-value]
    async with serving() as served:
        refused = await refusal(lambda: served.generation.Generate(request))
    assert refused.field == "interventions[1].add_vector.vector"
    assert refused.metadata["element"] == "1"


async def test_context_error_carries_the_numbers() -> None:
    async with serving() as served:
        refused = await refusal(lambda: served.generation.Generate(generate(setting(max_tokens=600))))
    numbers = {key: refused.metadata[key] for key in ("prompt_tokens", "max_tokens", "context_length")}
    assert numbers == {"prompt_tokens": "4", "max_tokens": "600", "context_length": "512"}


async def test_closest_model_is_offered() -> None:
    async with serving(FakeEngine("echo"), FakeEngine("parrot")) as served:
        refused = await refusal(lambda: served.models.GetModel(models_pb2.GetModelRequest(name="parot")))
        assert refused.metadata["closest"] == "models/parrot"
        nameless = await refusal(lambda: served.models.GetModel(models_pb2.GetModelRequest()))
        assert (nameless.reason, nameless.field) == ("FIELD_REQUIRED", "name")


async def test_no_chat_template() -> None:
    engine = FakeEngine()
    engine.codec.has_chat_template = False  # type: ignore[misc]
    request = models_pb2.RenderChatRequest(messages=[{"role": "user", "content": "hi"}])
    async with serving(engine) as served:
        refused = await refusal(lambda: served.models.RenderChat(request))
    assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "NO_CHAT_TEMPLATE")
    violation = refused.detail(error_details_pb2.PreconditionFailure).violations[0]
    assert (violation.type, violation.subject) == ("NO_CHAT_TEMPLATE", "messages")
