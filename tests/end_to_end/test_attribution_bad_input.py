"""Every field of AttributionService's requests, wrong: refused at once, with the code, the reason and the field."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from glasshouse.tour.server_process import ServerProcess
from glasshouse.v1 import attribution_graphs_pb2 as stored_pb
from glasshouse.v1 import attribution_pb2 as pb
from glasshouse.v1 import attribution_pb2_grpc
from glasshouse.wire.tensors import pack

CLEAN = {"text": "Once upon a time there was a girl named Lily. She was"}
CORRUPT = {"text": "Once upon a time there was a boy named Tommy. He was"}
SHORT = {"text": "A girl"}
SHE = {"texts": [" she"]}
METRIC = {"logit_difference": {"targets": SHE}}
GRID = {"component": "hook_resid_pre"}
SETTING = {"layer": 3, "feature": 5, "position": 2, "value": 1.0}
NAN = math.nan


def vector(n: int, value: float = 1.0) -> Any:
    return pack(np.full(n, value, np.float32))


def kind(name: str, **defaults: Any) -> Any:
    request = getattr(pb, f"{name}Request", None) or getattr(stored_pb, f"{name}Request")
    return name, lambda changes: request(**{**defaults, **changes})


TOKENS = kind("AttributeTokens", input=CLEAN, metric=METRIC)
DIRECT = kind("DirectAttribution", input=CLEAN, targets=SHE)
SWEEP = kind("PatchSweep", clean=CLEAN, corrupt=CORRUPT, metric=METRIC, grids=[GRID])
MEDIATE = kind("MediateEffect", clean=CLEAN, corrupt=CORRUPT, metric=METRIC, grids=[GRID])
PATH = kind(
    "PathPatch",
    clean=CLEAN,
    corrupt=CORRUPT,
    metric=METRIC,
    senders=[{"hook_point": "blocks.1.attn.hook_z", "head": 1}],
    receivers=[{"hook_point": "blocks.5.hook_resid_post"}],
)
PATCH = kind("AttributionPatch", clean=CLEAN, corrupt=CORRUPT, metric=METRIC, nodes={})
FEATURES = kind("AttributeFeatures", input=CLEAN, metric=METRIC, dictionaries=["resid-post-3"])
CIRCUIT = kind("DiscoverCircuit", clean=CLEAN, corrupt=CORRUPT, threshold=0.1)
GRAPH = kind("CreateAttributionGraph", input=CLEAN)
ESTIMATE = kind("EstimateAttribution")
INTERVENE = kind("InterveneOnFeatures", input=CLEAN, settings=[SETTING])
CONNECT = kind("FeatureConnections", layer=3, feature=5)
GET, LIST = kind("GetAttributionGraph"), kind("ListAttributionGraphs")
UPDATE, DELETE, READ = (
    kind("UpdateAttributionGraph"),
    kind("DeleteAttributionGraph"),
    kind("ReadAttributionGraph"),
)
GET_CIRCUIT, LIST_CIRCUITS, DELETE_CIRCUIT = kind("GetCircuit"), kind("ListCircuits"), kind("DeleteCircuit")

INVALID, MISSING, UNMET = "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION"


def metric(**number: Any) -> dict[str, Any]:
    return {"metric": number}


def grids(**grid: Any) -> dict[str, Any]:
    return {"grids": [grid]}


# (request, changes, code, reason, field)
CASES: list[tuple[Any, dict[str, Any], str, str, str]] = [
    (TOKENS, {"model": "nope"}, MISSING, "MODEL_NOT_FOUND", "model"),
    (TOKENS, {"input": None}, INVALID, "FIELD_REQUIRED", "input"),
    (TOKENS, {"input": {"text": ""}}, INVALID, "EMPTY_INPUT", "input"),
    (TOKENS, {"input": {"token_ids": [5000]}}, INVALID, "TOKEN_OUT_OF_RANGE", "input.token_ids[0]"),
    (TOKENS, {"metric": None}, INVALID, "FIELD_REQUIRED", "metric"),
    (TOKENS, metric(position=3), INVALID, "FIELD_REQUIRED", "metric"),
    (TOKENS, metric(logit_difference={}), INVALID, "FIELD_REQUIRED", "metric.logit_difference.targets"),
    (
        TOKENS,
        metric(logit_difference={"targets": {"texts": [" shenanigans"]}}),
        INVALID,
        "VALUE_MALFORMED",
        "metric.logit_difference.targets.texts[0]",
    ),
    (
        TOKENS,
        metric(logit_difference={"targets": {"texts": [""]}}),
        INVALID,
        "VALUE_MALFORMED",
        "metric.logit_difference.targets.texts[0]",
    ),
    (
        TOKENS,
        metric(log_probability={"targets": {"token_ids": [-1]}}),
        INVALID,
        "TOKEN_OUT_OF_RANGE",
        "metric.log_probability.targets.token_ids[0]",
    ),
    (
        TOKENS,
        metric(probability={"targets": {"texts": [" she", " she"]}}),
        INVALID,
        "FIELD_CONFLICT",
        "metric.probability.targets",
    ),
    (
        TOKENS,
        metric(logit_difference={"targets": SHE, "foils": SHE}),
        INVALID,
        "FIELD_CONFLICT",
        "metric.logit_difference.foils",
    ),
    (
        TOKENS,
        metric(probability={"targets": {"top_k": 101}}),
        INVALID,
        "VALUE_OUT_OF_RANGE",
        "metric.probability.targets.top_k",
    ),
    (TOKENS, {"metric": {**METRIC, "position": 99}}, INVALID, "POSITION_UNREACHABLE", "metric.position"),
    (TOKENS, {"metric": {**METRIC, "position": -1}}, INVALID, "POSITION_UNREACHABLE", "metric.position"),
    (
        TOKENS,
        metric(direction={"hook_point": "blocks.1.hook_resid_post", "vector": vector(7)}),
        INVALID,
        "WRONG_WIDTH",
        "metric.direction.vector",
    ),
    (
        TOKENS,
        metric(direction={"hook_point": "blocks.1.hook_resid_post"}),
        INVALID,
        "FIELD_REQUIRED",
        "metric.direction.vector",
    ),
    (
        TOKENS,
        metric(direction={"hook_point": "blocks.1.hook_resid_post", "vector": vector(192, NAN)}),
        INVALID,
        "VALUE_NOT_FINITE",
        "metric.direction.vector",
    ),
    (
        TOKENS,
        metric(direction={"hook_point": "blocks.1.hook_resid_post", "vector": vector(192), "bias": NAN}),
        INVALID,
        "VALUE_NOT_FINITE",
        "metric.direction.bias",
    ),
    (
        TOKENS,
        metric(direction={"hook_point": "blocks.9.hook_resid_post", "vector": vector(192)}),
        INVALID,
        "LAYER_OUT_OF_RANGE",
        "metric.direction.hook_point",
    ),
    (
        TOKENS,
        metric(direction={"vector": vector(192)}),
        INVALID,
        "FIELD_REQUIRED",
        "metric.direction.hook_point",
    ),
    (
        TOKENS,
        metric(feature={"dictionary": "nope", "feature": 1}),
        MISSING,
        "DICTIONARY_NOT_FOUND",
        "metric.feature.dictionary",
    ),
    (
        TOKENS,
        metric(feature={"dictionary": "resid-post-3", "feature": 1024}),
        MISSING,
        "FEATURE_OUT_OF_RANGE",
        "metric.feature.feature",
    ),
    (
        TOKENS,
        metric(feature={"dictionary": "crosscoder", "feature": 1, "pre_activation": True}),
        INVALID,
        "FIELD_CONFLICT",
        "metric.feature.pre_activation",
    ),
    (TOKENS, metric(feature={}), INVALID, "FIELD_REQUIRED", "metric.feature.dictionary"),
    (
        TOKENS,
        {"metric": {"kl_divergence": {}}, "method": 2},
        INVALID,
        "FIELD_REQUIRED",
        "metric.kl_divergence.reference",
    ),
    (
        TOKENS,
        metric(kl_divergence={"reference": {"text": ""}}),
        INVALID,
        "EMPTY_INPUT",
        "metric.kl_divergence.reference",
    ),
    (TOKENS, {"method": 9}, INVALID, "VALUE_OUT_OF_RANGE", "method"),
    (TOKENS, {"steps": -1}, INVALID, "VALUE_OUT_OF_RANGE", "steps"),
    (TOKENS, {"steps": 5000}, INVALID, "VALUE_OUT_OF_RANGE", "steps"),
    (TOKENS, {"hook_point": "nope"}, MISSING, "HOOK_POINT_NOT_FOUND", "hook_point"),
    (TOKENS, {"hook_point": "blocks.1.attn.hook_pattern"}, UNMET, "HOOK_POINT_NOT_WRITABLE", "hook_point"),
    (TOKENS, {"baseline_input": SHORT}, INVALID, "VALUE_OUT_OF_RANGE", "baseline_input"),
    (TOKENS, {"baseline_activations": vector(7)}, INVALID, "WRONG_WIDTH", "baseline_activations"),
    (DIRECT, {"targets": None}, INVALID, "FIELD_REQUIRED", "targets"),
    (DIRECT, {"position": 77}, INVALID, "POSITION_UNREACHABLE", "position"),
    (DIRECT, {"dictionaries": ["nope"]}, MISSING, "DICTIONARY_NOT_FOUND", "dictionaries[0]"),
    (DIRECT, {"dictionaries": [""]}, INVALID, "FIELD_REQUIRED", "dictionaries[0]"),
    (DIRECT, {"dictionaries": ["crosscoder"]}, UNMET, "DICTIONARY_MISMATCH", "dictionaries[0]"),
    (DIRECT, {"dictionaries": ["resid-post-3"] * 65}, INVALID, "VALUE_OUT_OF_RANGE", "dictionaries"),
    (DIRECT, {"top_features": -3}, INVALID, "VALUE_OUT_OF_RANGE", "top_features"),
    (SWEEP, {"corrupt": None}, INVALID, "FIELD_REQUIRED", "corrupt"),
    (SWEEP, {"corrupt": SHORT}, INVALID, "VALUE_OUT_OF_RANGE", "corrupt"),
    (SWEEP, {"grids": []}, INVALID, "FIELD_REQUIRED", "grids"),
    (SWEEP, {"grids": [GRID] * 65}, INVALID, "VALUE_OUT_OF_RANGE", "grids"),
    (SWEEP, grids(layers=[1]), INVALID, "FIELD_REQUIRED", "grids[0].component"),
    (SWEEP, grids(component="nope"), MISSING, "HOOK_POINT_NOT_FOUND", "grids[0].component"),
    (SWEEP, grids(component="attn.hook_pattern"), INVALID, "HOOK_POINT_NOT_WRITABLE", "grids[0].component"),
    (
        SWEEP,
        grids(component="hook_resid_pre", layers=[6]),
        INVALID,
        "LAYER_OUT_OF_RANGE",
        "grids[0].component",
    ),
    (SWEEP, grids(component="hook_resid_pre", layers=[1, 1]), INVALID, "FIELD_CONFLICT", "grids[0].layers"),
    (SWEEP, grids(component="hook_resid_pre", heads=[0]), INVALID, "VALUE_OUT_OF_RANGE", "grids[0].heads"),
    (SWEEP, grids(component="attn.hook_z", heads=[6]), INVALID, "VALUE_OUT_OF_RANGE", "grids[0].heads"),
    (
        SWEEP,
        grids(component="attn.hook_z", heads=[1], units=[1]),
        INVALID,
        "FIELD_CONFLICT",
        "grids[0].units",
    ),
    (SWEEP, grids(component="mlp.hook_post", units=[512]), INVALID, "VALUE_OUT_OF_RANGE", "grids[0].units"),
    (SWEEP, grids(component="hook_resid_pre", features=[1]), INVALID, "FIELD_CONFLICT", "grids[0].features"),
    (
        SWEEP,
        grids(component="hook_resid_pre", positions={"at": {"positions": [99]}}),
        INVALID,
        "POSITION_UNREACHABLE",
        "grids[0].positions.at.positions",
    ),
    (
        SWEEP,
        grids(component="hook_resid_pre", positions={"named": 1}, all_positions_at_once=True),
        INVALID,
        "FIELD_CONFLICT",
        "grids[0].positions",
    ),
    (
        SWEEP,
        grids(component="hook_resid_pre", positions={"named": 3}),
        INVALID,
        "POSITION_UNREACHABLE",
        "grids[0].positions",
    ),
    (SWEEP, grids(dictionary="nope"), MISSING, "DICTIONARY_NOT_FOUND", "grids[0].dictionary"),
    (
        SWEEP,
        grids(dictionary="resid-post-3", features=[1024]),
        MISSING,
        "FEATURE_OUT_OF_RANGE",
        "grids[0].features",
    ),
    (SWEEP, grids(dictionary="resid-post-3", layers=[1]), INVALID, "FIELD_CONFLICT", "grids[0].layers"),
    (SWEEP, {"direction": 7}, INVALID, "VALUE_OUT_OF_RANGE", "direction"),
    (SWEEP, {"replacement": 7}, INVALID, "VALUE_OUT_OF_RANGE", "replacement"),
    (SWEEP, {"replacement": 2}, INVALID, "FIELD_CONFLICT", "corrupt"),
    (SWEEP, {"replacement": 3, "corrupt": None}, INVALID, "FIELD_REQUIRED", "others"),
    (SWEEP, {"others": [CORRUPT]}, INVALID, "FIELD_CONFLICT", "others"),
    (
        SWEEP,
        {"replacement": 4, "corrupt": None, "others": [SHORT]},
        INVALID,
        "VALUE_OUT_OF_RANGE",
        "others[0]",
    ),
    (SWEEP, {"replacement": 2, "corrupt": None, "direction": 2}, INVALID, "FIELD_CONFLICT", "direction"),
    (SWEEP, {"batch_size": -1}, INVALID, "VALUE_OUT_OF_RANGE", "batch_size"),
    (SWEEP, {"batch_size": 2000}, INVALID, "VALUE_OUT_OF_RANGE", "batch_size"),
    (MEDIATE, {"corrupt": SHORT}, INVALID, "VALUE_OUT_OF_RANGE", "corrupt"),
    (MEDIATE, {"clean": None}, INVALID, "FIELD_REQUIRED", "clean"),
    (MEDIATE, {"grids": []}, INVALID, "FIELD_REQUIRED", "grids"),
    (MEDIATE, {"batch_size": -1}, INVALID, "VALUE_OUT_OF_RANGE", "batch_size"),
    (PATH, {"senders": []}, INVALID, "FIELD_REQUIRED", "senders"),
    (PATH, {"receivers": []}, INVALID, "FIELD_REQUIRED", "receivers"),
    (PATH, {"senders": [{}]}, INVALID, "FIELD_REQUIRED", "senders[0].hook_point"),
    (PATH, {"senders": [{"hook_point": "nope"}]}, MISSING, "HOOK_POINT_NOT_FOUND", "senders[0].hook_point"),
    (
        PATH,
        {"senders": [{"hook_point": "unembed"}]},
        INVALID,
        "HOOK_POINT_NOT_WRITABLE",
        "senders[0].hook_point",
    ),
    (
        PATH,
        {"senders": [{"hook_point": "blocks.1.attn.hook_z", "head": 6}]},
        INVALID,
        "VALUE_OUT_OF_RANGE",
        "senders[0].head",
    ),
    (
        PATH,
        {"senders": [{"hook_point": "blocks.1.attn.hook_z", "head": 1, "unit": 1}]},
        INVALID,
        "FIELD_CONFLICT",
        "senders[0].unit",
    ),
    (
        PATH,
        {"senders": [{"hook_point": "blocks.1.attn.hook_z", "position": 99}]},
        INVALID,
        "VALUE_OUT_OF_RANGE",
        "senders[0].position",
    ),
    (
        PATH,
        {"receivers": [{"hook_point": "blocks.0.hook_resid_pre"}]},
        INVALID,
        "VALUE_OUT_OF_RANGE",
        "receivers[0].hook_point",
    ),
    (PATCH, {"nodes": None}, INVALID, "FIELD_REQUIRED", "nodes"),
    (PATCH, {"nodes": {"components": ["nope"]}}, MISSING, "HOOK_POINT_NOT_FOUND", "nodes.components[0]"),
    (PATCH, {"nodes": None, "edges": {"steps": -1}}, INVALID, "VALUE_OUT_OF_RANGE", "edges.steps"),
    (PATCH, {"verify_top": -1}, INVALID, "VALUE_OUT_OF_RANGE", "verify_top"),
    (
        PATCH,
        {"metric": {"kl_divergence": {}}},
        INVALID,
        "FIELD_REQUIRED",
        "metric.kl_divergence.reference",
    ),
    (PATCH, {"corrupt": SHORT}, INVALID, "VALUE_OUT_OF_RANGE", "corrupt"),
    (FEATURES, {"dictionaries": []}, INVALID, "FIELD_REQUIRED", "dictionaries"),
    (FEATURES, {"dictionaries": ["nope"]}, MISSING, "DICTIONARY_NOT_FOUND", "dictionaries[0]"),
    (FEATURES, {"dictionaries": ["clt"]}, UNMET, "DICTIONARY_MISMATCH", "dictionaries[0]"),
    (FEATURES, {"steps": 5000}, INVALID, "VALUE_OUT_OF_RANGE", "steps"),
    (FEATURES, {"method": 9}, INVALID, "VALUE_OUT_OF_RANGE", "method"),
    (FEATURES, {"baseline": SHORT}, INVALID, "VALUE_OUT_OF_RANGE", "baseline"),
    (CIRCUIT, {"threshold": 0.0}, INVALID, "VALUE_OUT_OF_RANGE", "threshold"),
    (CIRCUIT, {"threshold": NAN}, INVALID, "VALUE_NOT_FINITE", "threshold"),
    (CIRCUIT, {"threshold": None}, INVALID, "FIELD_REQUIRED", "threshold"),
    (CIRCUIT, {"threshold": None, "target_edges": 0}, INVALID, "VALUE_OUT_OF_RANGE", "target_edges"),
    (CIRCUIT, {"corrupt": SHORT}, INVALID, "VALUE_OUT_OF_RANGE", "corrupt"),
    (
        CIRCUIT,
        metric(feature={"dictionary": "resid-post-3", "feature": 1}),
        INVALID,
        "FIELD_CONFLICT",
        "metric",
    ),
    (GRAPH, {"input": None}, INVALID, "FIELD_REQUIRED", "input"),
    (GRAPH, {"transcoders": ["nope"]}, MISSING, "DICTIONARY_NOT_FOUND", "transcoders[0]"),
    (GRAPH, {"transcoders": ["resid-post-3"]}, UNMET, "DICTIONARY_MISMATCH", "transcoders"),
    (GRAPH, {"transcoders": ["clt", "clt"]}, INVALID, "FIELD_CONFLICT", "transcoders"),
    (GRAPH, {"transcoders": ["clt", "transcoder-1"]}, UNMET, "DICTIONARY_MISMATCH", "transcoders"),
    (GRAPH, {"targets": [{}]}, INVALID, "FIELD_REQUIRED", "targets[0]"),
    (GRAPH, {"targets": [{"text": " shenanigans"}]}, INVALID, "VALUE_MALFORMED", "targets[0].text"),
    (GRAPH, {"targets": [{"token_id": 4096}]}, INVALID, "VALUE_OUT_OF_RANGE", "targets[0].token_id"),
    (
        GRAPH,
        {"targets": [{"text": " she", "weight": 0.0}]},
        INVALID,
        "VALUE_OUT_OF_RANGE",
        "targets[0].weight",
    ),
    (GRAPH, {"targets": [{"text": " she"}, {"text": " she"}]}, INVALID, "FIELD_CONFLICT", "targets"),
    (GRAPH, {"targets": [{"vector": vector(192)}]}, INVALID, "FIELD_REQUIRED", "targets[0].label"),
    (GRAPH, {"targets": [{"vector": vector(3), "label": "x"}]}, INVALID, "WRONG_WIDTH", "targets[0].vector"),
    (
        GRAPH,
        {"targets": [{"text": " she"}], "max_logits": 3},
        INVALID,
        "FIELD_CONFLICT",
        "max_logits",
    ),
    (GRAPH, {"desired_logit_probability": 0.0}, INVALID, "VALUE_OUT_OF_RANGE", "desired_logit_probability"),
    (GRAPH, {"max_logits": -1}, INVALID, "VALUE_OUT_OF_RANGE", "max_logits"),
    (GRAPH, {"max_feature_nodes": -1}, INVALID, "VALUE_OUT_OF_RANGE", "max_feature_nodes"),
    (GRAPH, {"batch_size": 5000}, INVALID, "VALUE_OUT_OF_RANGE", "batch_size"),
    (GRAPH, {"update_interval": -1}, INVALID, "VALUE_OUT_OF_RANGE", "update_interval"),
    (GRAPH, {"title": "x" * 201}, INVALID, "VALUE_OUT_OF_RANGE", "title"),
    (ESTIMATE, {}, INVALID, "FIELD_REQUIRED", "graph"),
    (
        ESTIMATE,
        {"graph": {"input": CLEAN, "max_logits": -1}},
        INVALID,
        "VALUE_OUT_OF_RANGE",
        "graph.max_logits",
    ),
    (ESTIMATE, {"circuit": {"clean": CLEAN}}, INVALID, "FIELD_REQUIRED", "circuit.corrupt"),
    (INTERVENE, {"settings": []}, INVALID, "FIELD_REQUIRED", "settings"),
    (INTERVENE, {"settings": [{**SETTING, "layer": 9}]}, INVALID, "FEATURE_OUT_OF_RANGE", "settings[0]"),
    (INTERVENE, {"settings": [{**SETTING, "feature": 1536}]}, INVALID, "FEATURE_OUT_OF_RANGE", "settings[0]"),
    (
        INTERVENE,
        {"settings": [{**SETTING, "position": -1}]},
        INVALID,
        "VALUE_OUT_OF_RANGE",
        "settings[0].position",
    ),
    (INTERVENE, {"settings": [{**SETTING, "value": NAN}]}, INVALID, "VALUE_NOT_FINITE", "settings[0].value"),
    (INTERVENE, {"settings": [SETTING, SETTING]}, INVALID, "FIELD_CONFLICT", "settings[1]"),
    (INTERVENE, {"mode": 9}, INVALID, "VALUE_OUT_OF_RANGE", "mode"),
    (INTERVENE, {"mode": 3, "layers": [1]}, INVALID, "FIELD_CONFLICT", "layers"),
    (INTERVENE, {"layers": [6]}, INVALID, "VALUE_OUT_OF_RANGE", "layers[0]"),
    (INTERVENE, {"top_logits": 101}, INVALID, "VALUE_OUT_OF_RANGE", "top_logits"),
    (INTERVENE, {"tokens": {"texts": ["no such token"]}}, INVALID, "VALUE_MALFORMED", "tokens.texts[0]"),
    (INTERVENE, {"generate": {}}, INVALID, "VALUE_OUT_OF_RANGE", "generate.max_tokens"),
    (INTERVENE, {"generate": {"max_tokens": 600}}, INVALID, "CONTEXT_EXCEEDED", "generate.max_tokens"),
    (
        INTERVENE,
        {"generate": {"max_tokens": 4, "temperature": NAN}},
        INVALID,
        "VALUE_NOT_FINITE",
        "generate.temperature",
    ),
    (INTERVENE, {"graph": "attributionGraphs/" + "0" * 32}, INVALID, "FIELD_CONFLICT", "input"),
    (
        INTERVENE,
        {"graph": "attributionGraphs/" + "0" * 32, "input": None},
        MISSING,
        "RESOURCE_NOT_FOUND",
        "graph",
    ),
    (CONNECT, {"layer": 6}, INVALID, "VALUE_OUT_OF_RANGE", "layer"),
    (CONNECT, {"feature": 1536}, MISSING, "FEATURE_OUT_OF_RANGE", "feature"),
    (CONNECT, {"feature": -1}, MISSING, "FEATURE_OUT_OF_RANGE", "feature"),
    (CONNECT, {"top": -1}, INVALID, "VALUE_OUT_OF_RANGE", "top"),
    (GET, {}, INVALID, "FIELD_REQUIRED", "name"),
    (GET, {"name": "nope"}, INVALID, "VALUE_OUT_OF_RANGE", "name"),
    (GET, {"name": "circuits/" + "0" * 32}, INVALID, "VALUE_OUT_OF_RANGE", "name"),
    (GET, {"name": "attributionGraphs/../../etc/passwd"}, MISSING, "RESOURCE_NOT_FOUND", "name"),
    (LIST, {"page_size": -1}, INVALID, "VALUE_OUT_OF_RANGE", "page_size"),
    (LIST, {"page_token": "nope"}, INVALID, "VALUE_MALFORMED", "page_token"),
    (UPDATE, {"name": "attributionGraphs/" + "0" * 32}, MISSING, "RESOURCE_NOT_FOUND", "name"),
    (DELETE, {"name": "attributionGraphs/" + "0" * 32}, MISSING, "RESOURCE_NOT_FOUND", "name"),
    (READ, {"name": "attributionGraphs/" + "0" * 32}, MISSING, "RESOURCE_NOT_FOUND", "name"),
    (GET_CIRCUIT, {"name": "circuits/" + "0" * 32}, MISSING, "RESOURCE_NOT_FOUND", "name"),
    (GET_CIRCUIT, {}, INVALID, "FIELD_REQUIRED", "name"),
    (LIST_CIRCUITS, {"page_size": -1}, INVALID, "VALUE_OUT_OF_RANGE", "page_size"),
    (DELETE_CIRCUIT, {"name": "circuits/" + "0" * 32}, MISSING, "RESOURCE_NOT_FOUND", "name"),
]


@pytest.fixture(scope="module")
def stub(server: ServerProcess) -> Iterator[Any]:
    with grpc.insecure_channel(server.target) as channel:
        yield attribution_pb2_grpc.AttributionServiceStub(channel)


def refused(stub: Any, name: str, request: Any) -> tuple[str, error_details_pb2.ErrorInfo, str]:
    """Code, ErrorInfo and message of a refusal."""
    with pytest.raises(grpc.RpcError) as caught:
        answer = getattr(stub, name)(request, timeout=30)
        if hasattr(answer, "__next__"):
            list(answer)
    error: Any = caught.value
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    assert status is not None, error
    status.details[0].Unpack(info)
    return error.code().name, info, error.details()


@pytest.mark.parametrize(
    ("request_of", "changes", "code", "reason", "field"),
    CASES,
    ids=[f"{case[0][0]}-{case[4]}-{case[3]}-{n}" for n, case in enumerate(CASES)],
)
def test_a_bad_request(
    stub: Any, request_of: Any, changes: dict[str, Any], code: str, reason: str, field: str
) -> None:
    name, make = request_of
    found, info, message = refused(stub, name, make(changes))
    assert (found, info.reason, info.metadata["field"]) == (code, reason, field), message
    assert info.metadata["remedy"], "every refusal says what to do"


def test_a_graph_is_updated_and_read_by_good_requests_only(stub: Any, server: ServerProcess) -> None:
    from glasshouse.client import Client

    with Client(server.target) as client:
        graph = client.model().attribution_graph(CLEAN["text"], max_feature_nodes=16).result(60)
    for name, changes, field in (
        ("UpdateAttributionGraph", {"title": ""}, "title"),
        ("UpdateAttributionGraph", {"title": "x" * 201}, "title"),
        (
            "UpdateAttributionGraph",
            {"annotations": {"supernodes": [{"node_ids": ["1_2_3"]}]}},
            "annotations.supernodes[0].label",
        ),
        (
            "UpdateAttributionGraph",
            {"annotations": {"supernodes": [{"label": "x"}]}},
            "annotations.supernodes[0].node_ids",
        ),
        ("ReadAttributionGraph", {"node_threshold": 0.0}, "node_threshold"),
        ("ReadAttributionGraph", {"edge_threshold": 1.5}, "edge_threshold"),
        ("ReadAttributionGraph", {"node_threshold": NAN}, "node_threshold"),
        ("ReadAttributionGraph", {"format": 9}, "format"),
        ("InterveneOnFeatures", {"graph": graph.name, "model": "nope", "settings": [SETTING]}, "model"),
        (
            "InterveneOnFeatures",
            {"graph": graph.name, "settings": [{**SETTING, "position": 0}]},
            "settings[0]",
        ),
    ):
        _, make = kind(name)
        request = make(changes if "graph" in changes else {"name": graph.name, **changes})
        code, info, message = refused(stub, name, request)
        assert info.metadata["field"] == field, (name, changes, message)
        assert code in (INVALID, MISSING)
