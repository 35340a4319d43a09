"""Every bad input through a real server: never INTERNAL, at once, with the code, the reason and the field.

What the client would not send is sent by the stubs, and what no stub would send by the bare channel.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.request import urlopen

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from glasshouse.client import (
    AsyncClient,
    Client,
    DeadlineExceededError,
    FailedPreconditionError,
    Model,
    NotFoundError,
    ResourceExhaustedError,
    add_vector,
)
from glasshouse.tour.server_process import ServerProcess
from glasshouse.v1 import (
    activations_pb2 as activations_pb,
)
from glasshouse.v1 import (
    generation_pb2 as generation_pb,
)
from glasshouse.v1 import (
    inputs_pb2 as inputs_pb,
)
from glasshouse.v1 import (
    interventions_pb2 as interventions_pb,
)
from glasshouse.v1 import (
    models_pb2 as models_pb,
)
from glasshouse.wire.tensors import pack

from .conftest import HOOK_POINT, PROMPT, until

D_MODEL, CONTEXT, VOCABULARY = 192, 512, 4096
VECTOR = np.ones(D_MODEL, np.float32)
AT_ONCE_S = 5.0
NAN, INF = math.nan, math.inf

Change = Callable[[Any], None]


def calls(channel: grpc.Channel, request: Any) -> Any:
    """What the method of a request answers with: the last message, or the refusal."""
    path, answer, streams = METHODS[type(request)]
    kind = channel.unary_stream if streams else channel.unary_unary
    call = kind(
        path,
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=answer.FromString,
    )
    found = call(request, timeout=30)
    return list(found)[-1] if streams else found


METHODS: dict[type, tuple[str, Any, bool]] = {
    generation_pb.GenerateRequest: (
        "/glasshouse.v1.GenerationService/Generate",
        generation_pb.GenerateResponse,
        True,
    ),
    generation_pb.ScoreRequest: (
        "/glasshouse.v1.GenerationService/Score",
        generation_pb.ScoreResponse,
        False,
    ),
    activations_pb.ExtractActivationsRequest: (
        "/glasshouse.v1.ActivationService/ExtractActivations",
        activations_pb.ExtractActivationsResponse,
        True,
    ),
    models_pb.GetModelRequest: ("/glasshouse.v1.ModelService/GetModel", models_pb.GetModelResponse, False),
    models_pb.ListHookPointsRequest: (
        "/glasshouse.v1.ModelService/ListHookPoints",
        models_pb.ListHookPointsResponse,
        False,
    ),
    models_pb.TokenizeRequest: ("/glasshouse.v1.ModelService/Tokenize", models_pb.TokenizeResponse, False),
    models_pb.DetokenizeRequest: (
        "/glasshouse.v1.ModelService/Detokenize",
        models_pb.DetokenizeResponse,
        False,
    ),
}


def generate(**fields: Any) -> generation_pb.GenerateRequest:
    return generation_pb.GenerateRequest(**{"input": {"text": PROMPT}, "max_tokens": 4, **fields})


def score(**fields: Any) -> generation_pb.ScoreRequest:
    return generation_pb.ScoreRequest(**{"input": {"text": PROMPT}, **fields})


def extract(**fields: Any) -> activations_pb.ExtractActivationsRequest:
    defaults = {"inputs": [{"text": PROMPT}], "hook_points": [HOOK_POINT]}
    return activations_pb.ExtractActivationsRequest(**{**defaults, **fields})


def edit(hook_point: str = HOOK_POINT, positions: Any = None, **what: Any) -> list[Any]:
    what = what or {"add_vector": {"vector": pack(VECTOR)}}
    return [interventions_pb.Intervention(hook_point=hook_point, positions=positions, **what)]


def add(vector: np.ndarray, **rest: Any) -> list[Any]:
    return edit(add_vector={"vector": pack(vector), **rest})


def where(**selector: Any) -> list[Any]:
    return edit(positions=inputs_pb.PositionSelector(**selector))


def with_one(value: float) -> np.ndarray:
    vector = VECTOR.copy()
    vector[7] = value
    return vector


BAD, ABSENT, FULL, UNFIT = "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION"
HOOK = "interventions[0].hook_point"
ADD = "interventions[0].add_vector"
AT = "interventions[0].positions"

CASES: dict[str, tuple[Any, str, str, str]] = {
    # Names.
    "unknown model": (generate(model="fabel"), ABSENT, "MODEL_NOT_FOUND", "model"),
    "unknown model by resource name": (
        models_pb.GetModelRequest(name="models/fabel"),
        ABSENT,
        "MODEL_NOT_FOUND",
        "name",
    ),
    "unknown hook point": (
        generate(interventions=edit("blocks.3.hook_resid_pots")),
        ABSENT,
        "HOOK_POINT_NOT_FOUND",
        HOOK,
    ),
    "unknown hook point to extract": (
        extract(hook_points=[HOOK_POINT, "blocks.3.hook_resid_pots"]),
        ABSENT,
        "HOOK_POINT_NOT_FOUND",
        "hook_points[1]",
    ),
    "unknown hook point to read": (
        generate(readouts=[{"activations": {"hook_point": "blocks.3.hook_resid_pots"}}]),
        ABSENT,
        "HOOK_POINT_NOT_FOUND",
        "readouts[0].activations.hook_point",
    ),
    "layer out of range": (
        generate(interventions=edit("blocks.6.hook_resid_post")),
        BAD,
        "LAYER_OUT_OF_RANGE",
        HOOK,
    ),
    "absurd layer": (
        extract(hook_points=["blocks.99999999999999999999.hook_resid_post"]),
        BAD,
        "LAYER_OUT_OF_RANGE",
        "hook_points[0]",
    ),
    "hook point twice": (
        extract(hook_points=[HOOK_POINT, HOOK_POINT]),
        BAD,
        "FIELD_CONFLICT",
        "hook_points[1]",
    ),
    "not the residual stream": (
        generate(readouts=[{"logit_lens": {"hook_point": "blocks.3.mlp.hook_post"}}]),
        BAD,
        "VALUE_OUT_OF_RANGE",
        "readouts[0].logit_lens.hook_point",
    ),
    # Vectors.
    "wrong width": (generate(interventions=add(VECTOR[:-1])), BAD, "WRONG_WIDTH", f"{ADD}.vector"),
    "wrong width to score": (score(interventions=add(VECTOR[:-1])), BAD, "WRONG_WIDTH", f"{ADD}.vector"),
    "NaN": (generate(interventions=add(with_one(NAN))), BAD, "VALUE_NOT_FINITE", f"{ADD}.vector"),
    "infinity": (score(interventions=add(with_one(INF))), BAD, "VALUE_NOT_FINITE", f"{ADD}.vector"),
    "NaN to extract under": (
        extract(interventions=add(with_one(NAN))),
        BAD,
        "VALUE_NOT_FINITE",
        f"{ADD}.vector",
    ),
    "NaN coefficient": (
        generate(interventions=add(VECTOR, coefficient=NAN)),
        BAD,
        "VALUE_NOT_FINITE",
        f"{ADD}.coefficient",
    ),
    "integers": (
        generate(interventions=add(np.ones(D_MODEL, np.int64))),
        BAD,
        "TENSOR_MALFORMED",
        f"{ADD}.vector.dtype",
    ),
    "bytes that do not fit": (
        generate(interventions=edit(add_vector={"vector": {"dtype": 1, "shape": [192], "data": b"1234"}})),
        BAD,
        "TENSOR_MALFORMED",
        f"{ADD}.vector.data",
    ),
    "absurd shape": (
        generate(interventions=edit(add_vector={"vector": {"dtype": 1, "shape": [2**62]}})),
        BAD,
        "TENSOR_MALFORMED",
        f"{ADD}.vector.shape[0]",
    ),
    "no direction": (
        generate(interventions=edit(ablate_direction={"vector": pack(0 * VECTOR)})),
        BAD,
        "VALUE_OUT_OF_RANGE",
        "interventions[0].ablate_direction.vector",
    ),
    "no edit": (
        generate(interventions=[interventions_pb.Intervention(hook_point=HOOK_POINT)]),
        BAD,
        "FIELD_REQUIRED",
        "interventions[0]",
    ),
    # Prompts.
    "empty prompt": (generate(input={"text": ""}), BAD, "EMPTY_INPUT", "input"),
    "no prompt": (generation_pb.GenerateRequest(max_tokens=4), BAD, "FIELD_REQUIRED", "input"),
    "nothing to extract": (extract(inputs=[]), BAD, "FIELD_REQUIRED", "inputs"),
    "nothing to extract from": (extract(hook_points=[]), BAD, "FIELD_REQUIRED", "hook_points"),
    "one of the inputs empty": (
        extract(inputs=[{"text": PROMPT}, {"text": ""}]),
        BAD,
        "EMPTY_INPUT",
        "inputs[1]",
    ),
    "both prompt forms": (
        generate(input={"text": PROMPT, "token_ids": [5]}),
        BAD,
        "FIELD_CONFLICT",
        "input.token_ids",
    ),
    "token beyond the vocabulary": (
        generate(input={"token_ids": [5, VOCABULARY]}),
        BAD,
        "TOKEN_OUT_OF_RANGE",
        "input.token_ids[1]",
    ),
    "negative token": (score(input={"token_ids": [-1]}), BAD, "TOKEN_OUT_OF_RANGE", "input.token_ids[0]"),
    "negative token to say": (
        models_pb.DetokenizeRequest(token_ids=[5, -7]),
        BAD,
        "TOKEN_OUT_OF_RANGE",
        "token_ids[1]",
    ),
    "prompt and max_tokens beyond the context": (
        generate(input={"token_ids": [5] * 500}, max_tokens=13),
        BAD,
        "CONTEXT_EXCEEDED",
        "max_tokens",
    ),
    "prompt beyond the context": (
        score(input={"token_ids": [5] * (CONTEXT + 1)}),
        BAD,
        "CONTEXT_EXCEEDED",
        "input",
    ),
    "text beyond the limit": (
        generate(input={"text": "a " * (1 << 20)}),
        FULL,
        "LIMIT_EXCEEDED",
        "input.text",
    ),
    # Numbers.
    "no max_tokens": (generate(max_tokens=0), BAD, "FIELD_REQUIRED", "max_tokens"),
    "negative max_tokens": (generate(max_tokens=-1), BAD, "VALUE_OUT_OF_RANGE", "max_tokens"),
    "absurd max_tokens": (generate(max_tokens=2**31 - 1), BAD, "CONTEXT_EXCEEDED", "max_tokens"),
    "negative temperature": (
        generate(sampling={"temperature": -0.1}),
        BAD,
        "VALUE_OUT_OF_RANGE",
        "sampling.temperature",
    ),
    "NaN temperature": (
        generate(sampling={"temperature": NAN}),
        BAD,
        "VALUE_NOT_FINITE",
        "sampling.temperature",
    ),
    "top_p above 1": (generate(sampling={"top_p": 1.5}), BAD, "VALUE_OUT_OF_RANGE", "sampling.top_p"),
    "negative top_k": (generate(sampling={"top_k": -2}), BAD, "VALUE_OUT_OF_RANGE", "sampling.top_k"),
    "negative top_logprobs": (generate(top_logprobs=-1), BAD, "VALUE_OUT_OF_RANGE", "top_logprobs"),
    "negative page": (
        models_pb.ListHookPointsRequest(page_size=-1),
        BAD,
        "VALUE_OUT_OF_RANGE",
        "page_size",
    ),
    "no such page": (
        models_pb.ListHookPointsRequest(page_token="page two"),
        BAD,
        "VALUE_MALFORMED",
        "page_token",
    ),
    # Selectors.
    "empty selector": (generate(interventions=where()), BAD, "FIELD_REQUIRED", AT),
    "position never fed": (
        generate(interventions=where(at={"positions": [400]})),
        BAD,
        "POSITION_UNREACHABLE",
        f"{AT}.at.positions",
    ),
    "negative position": (
        generate(interventions=where(at={"positions": [-1]})),
        BAD,
        "VALUE_OUT_OF_RANGE",
        f"{AT}.at.positions[0]",
    ),
    "position twice": (
        generate(interventions=where(at={"positions": [1, 1]})),
        BAD,
        "FIELD_CONFLICT",
        f"{AT}.at.positions[1]",
    ),
    "span backwards": (
        generate(interventions=where(span={"start": 3, "stop": 2})),
        BAD,
        "VALUE_OUT_OF_RANGE",
        f"{AT}.span.stop",
    ),
    "generated positions of an extraction": (
        extract(positions={"named": inputs_pb.NAMED_POSITIONS_GENERATED}),
        BAD,
        "VALUE_OUT_OF_RANGE",
        "positions.named",
    ),
    "replacement rows that do not fit": (
        generate(
            interventions=edit(
                positions=inputs_pb.PositionSelector(at={"positions": [1, 2]}),
                replace={"activations": pack(np.ones((3, D_MODEL), np.float32))},
            )
        ),
        BAD,
        "WRONG_WIDTH",
        "interventions[0].replace.activations",
    ),
    "too many interventions": (
        generate(interventions=65 * add(VECTOR)),
        FULL,
        "LIMIT_EXCEEDED",
        "interventions",
    ),
    # What a capability would take.
    "not writable": (
        generate(interventions=edit("blocks.3.attn.hook_pattern")),
        UNFIT,
        "HOOK_POINT_NOT_WRITABLE",
        HOOK,
    ),
}


@pytest.fixture(scope="module")
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(server.target, options=options) as channel:
        yield channel


@pytest.mark.parametrize("case", CASES)
def test_a_bad_request(channel: grpc.Channel, case: str) -> None:
    request, code, reason, field = CASES[case]
    begun = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        calls(channel, request)
    assert time.monotonic() - begun < AT_ONCE_S
    info, violations = details(caught.value)
    assert (caught.value.code().name, info.reason, info.metadata.get("field")) == (code, reason, field)
    assert info.domain == "glasshouse" and info.metadata["request_id"] and info.metadata["remedy"]
    if code == BAD:
        assert violations == [field]


@pytest.mark.parametrize("name", ["fabel", "blocks.3.hook_resid_pots"])
def test_the_closest_names_are_offered(client: Client, model: Model, name: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        if name == "fabel":
            client.model(name)
        else:
            model.activations(PROMPT, hook_points=name)
    assert caught.value.closest[0] in ("models/fable", HOOK_POINT)


RAW = {
    "truncated": generate().SerializeToString()[:-3],
    "not protobuf": b"\xff\xff\xff\xff\xff\xff",
    "text that is not UTF-8": b"\x12\x04\x0a\x02\xff\xfe",
    "a length beyond the message": b"\x12\xff\x7f\x0a",
}


@pytest.mark.parametrize("case", RAW)
@pytest.mark.parametrize("method", [path for path, _, _ in METHODS.values()])
def test_bytes_that_are_no_request(channel: grpc.Channel, method: str, case: str) -> None:
    if case == "text that is not UTF-8" and not method.endswith(("Generate", "Score", "Tokenize")):
        pytest.skip("the field is another in this request")
    streams = next(s for path, _, s in METHODS.values() if path == method)
    call = (channel.unary_stream if streams else channel.unary_unary)(method, bytes, bytes)
    with pytest.raises(grpc.RpcError) as caught:
        answer = call(RAW[case], timeout=10)
        if streams:
            list(answer)
    info, _ = details(caught.value)
    assert (caught.value.code().name, info.reason) == (BAD, "MESSAGE_MALFORMED")


def test_every_truncation_is_answered(channel: grpc.Channel) -> None:
    whole = generate(interventions=add(VECTOR), max_tokens=1).SerializeToString()
    call = channel.unary_stream(METHODS[generation_pb.GenerateRequest][0], bytes, bytes)
    for length in [*range(40), *range(40, len(whole), 97)]:
        try:
            list(call(whole[:length], timeout=10))
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, length  # type: ignore[attr-defined]


def test_an_oversize_message(channel: grpc.Channel, model: Model) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        calls(channel, generate(input={"text": "x" * (5 << 20)}))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(ResourceExhaustedError) as seen:
        model.generate("x" * (5 << 20), max_tokens=1).result()
    assert seen.value.remedy


def test_unknown_fields_are_ignored(channel: grpc.Channel) -> None:
    call = channel.unary_unary(
        METHODS[models_pb.TokenizeRequest][0], bytes, models_pb.TokenizeResponse.FromString
    )
    request = models_pb.TokenizeRequest(input={"text": PROMPT}).SerializeToString() + b"\xf2\x7f\x03abc"
    assert call(request, timeout=10).token_ids


def test_a_deadline_in_mid_generation(model: Model, metric: Callable[[str], float]) -> None:
    with pytest.raises(DeadlineExceededError) as caught:
        model.generate(PROMPT, max_tokens=480, ignore_eos=True, timeout=0.15).result()
    assert caught.value.remedy
    until(lambda: metric("glasshouse_active_requests") == 0, within_s=3)


def test_edits_that_drive_the_model_to_infinity(model: Model) -> None:
    huge = add_vector(HOOK_POINT, VECTOR, coefficient=3e38)
    with pytest.raises(FailedPreconditionError) as caught:
        model.generate(PROMPT, max_tokens=4, interventions=[huge, huge]).result()
    assert caught.value.reason == "LOGITS_NOT_FINITE"


async def test_a_queue_over_its_bound(make_server: Callable[..., ServerProcess]) -> None:
    server = make_server("[limits]\nmax_running = 2\nmax_queued = 3\n")
    async with AsyncClient(server.target, max_attempts=1) as client:
        model = await client.model()
        streams = [model.generate(PROMPT, max_tokens=200, ignore_eos=True) for _ in range(12)]
        begun = time.monotonic()
        done = await asyncio.gather(*(stream.result() for stream in streams), return_exceptions=True)
        refused = [error for error in done if isinstance(error, BaseException)]
        assert time.monotonic() - begun < 60
        # Three may wait; the engine takes two more as soon as it comes to it.
        assert 7 <= len(refused) <= 9
        for error in refused:
            assert isinstance(error, ResourceExhaustedError)
            assert error.reason == "QUEUE_FULL" and (error.retry_after_s or 0) > 0
        # Those let in are served whole, and so is who comes afterwards.
        assert all(len(each.token_ids) == 200 for each in done if not isinstance(each, BaseException))
        assert (await model.generate(PROMPT, max_tokens=2).result()).token_ids


def test_good_company_is_not_disturbed(channel: grpc.Channel, model: Model) -> None:
    def story() -> Any:
        return model.generate(PROMPT, max_tokens=300, seed=4, ignore_eos=True)

    expected = story().result().token_ids
    with story() as stream:
        for request, *_ in CASES.values():
            with pytest.raises(grpc.RpcError):
                calls(channel, request)
        list(stream)
    assert stream.token_ids == expected


def test_nothing_was_internal(server: ServerProcess, metric: Callable[[str], float]) -> None:
    with urlopen(server.metrics_url, timeout=10) as page:
        text = page.read().decode()
    assert 'code="INTERNAL"' not in text and 'code="UNKNOWN"' not in text
    assert metric("glasshouse_active_requests") == 0
    assert "defect" not in server.log


def details(error: Any) -> tuple[error_details_pb2.ErrorInfo, list[str]]:
    """The ErrorInfo of a refusal, and the fields of its BadRequest."""
    status = rpc_status.from_call(error)
    assert status is not None, f"{error.code()} {error.details()} without details"
    info, fields = error_details_pb2.ErrorInfo(), list[str]()
    for packed in status.details:
        if packed.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            packed.Unpack(info)
        elif packed.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest()
            packed.Unpack(bad)
            fields = [violation.field for violation in bad.field_violations]
    return info, fields
