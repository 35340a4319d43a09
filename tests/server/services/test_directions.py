"""DirectionService through a real server over the real engine on fable."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.longrunning import operations_pb2
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from glasshouse.server.registry.names import Kind, parse
from glasshouse.server.registry.records import Draft, Provenance
from glasshouse.server.types.configuration import KeySettings, Settings
from glasshouse.v1 import activations_pb2, examples_pb2, generation_pb2, inputs_pb2, interventions_pb2
from glasshouse.v1 import directions_pb2 as pb
from glasshouse.wire.tensors import pack, unpack

from ..serving import Served, events_of, refusal
from . import concept_calls as calls
from .concept_calls import HOOK, LAYERS, compute, computed, concepts, example, labelled, named, pair

SADS = (
    "It was sad.",
    "She cried.",
    "He wept all day.",
    "They felt so bad.",
    "The cat was ill.",
    "Tears fell.",
)
GLADS = (
    "It was fun.",
    "She laughed.",
    "He sang all day.",
    "They felt so good.",
    "The cat purred.",
    "Joy came.",
)
FEW = [example(text, "sad") for text in SADS] + [example(text, "happy") for text in GLADS]


@pytest.fixture(scope="module")
def fable_model() -> Any:
    return calls.load_fable()


@pytest.fixture
async def served(fable_model: Any, tmp_path: Path) -> AsyncIterator[Served]:
    async with concepts(fable_model, tmp_path) as (running, _):
        yield running


async def activations(
    served: Served, texts: list[str], hook_point: str = HOOK, position: int = -1
) -> np.ndarray:
    """Activations of each text at one position, by the service that has always given them."""
    request = activations_pb2.ExtractActivationsRequest(
        inputs=[inputs_pb2.Input(text=text) for text in texts], hook_points=[hook_point]
    )
    rows: dict[int, bytes] = {}
    shapes: dict[int, list[int]] = {}
    async for event in served.activations.ExtractActivations(request):
        if event.HasField("chunk"):
            index = event.chunk.input
            rows[index] = rows.get(index, b"") + event.chunk.piece.data
            if event.chunk.piece.shape:
                shapes[index] = list(event.chunk.piece.shape)
    return np.stack(
        [
            np.frombuffer(rows[i], np.float32).reshape(shapes[i])[position].astype(np.float64)
            for i in range(len(texts))
        ]
    )


async def test_difference_in_means_is_what_numpy_makes_of_the_activations(served: Served) -> None:
    examples = labelled("number", 120)
    response = await computed(
        served, examples=examples, positive_label="plural", hook_points=[HOOK, LAYERS[4]]
    )
    train = [e for e in examples if not e.held_out]
    for at in response.direction.at:
        rows = await activations(served, [e.input.text for e in train], at.hook_point)
        sad = np.array([e.labels[0] == "plural" for e in train])
        expected = rows[sad].mean(0) - rows[~sad].mean(0)
        assert np.linalg.norm(unpack(at.vector) - expected) <= 1e-4 * np.linalg.norm(expected)
        middle = expected @ (rows[sad].mean(0) + rows[~sad].mean(0)) / 2
        assert at.threshold == pytest.approx(middle, rel=1e-3, abs=1e-3)
    assert response.split.n_train == len(train) and response.split.n_held_out == len(examples) - len(train)
    assert response.direction.positive_label == "plural" and response.direction.negative_label == "singular"


async def test_logistic_is_scikit_learn_on_the_same_activations(served: Served) -> None:
    examples = labelled("number", 160)
    response = await computed(
        served, examples=examples, positive_label="plural", hook_points=[HOOK],
        method=pb.DIRECTION_METHOD_LOGISTIC, inverse_l2=0.5,
    )  # fmt: skip
    train = [e for e in examples if not e.held_out]
    rows = await activations(served, [e.input.text for e in train])
    scaler = StandardScaler().fit(rows)
    model = LogisticRegression(C=0.5, max_iter=2000).fit(
        scaler.transform(rows), [e.labels[0] == "plural" for e in train]
    )
    expected = model.coef_[0] / scaler.scale_
    found = unpack(response.direction.at[0].vector)
    assert np.abs(found - expected).max() <= 1e-6


async def test_the_best_layer_is_named_and_examples_may_come_in_pieces(served: Served) -> None:
    examples = labelled("gender")
    whole = await computed(served, examples=examples, positive_label="girl")
    assert [at.hook_point for at in whole.direction.at] == list(LAYERS)
    best = next(at for at in whole.direction.at if at.hook_point == whole.direction.best_hook_point)
    assert best.held_out.auroc.value >= 0.98 and whole.direction.at[0].held_out.auroc.value < 0.8
    pieces = [
        pb.ComputeDirectionsRequest(examples=examples[i : i + 150]) for i in range(0, len(examples), 150)
    ]
    operation = await calls.ended(served, compute(served, *pieces, positive_label="girl"))
    response = pb.ComputeDirectionsResponse()
    assert operation.response.Unpack(response)
    assert response.direction.best_hook_point == whole.direction.best_hook_point
    for one, other in zip(response.direction.at, whole.direction.at, strict=True):
        assert np.allclose(unpack(one.vector), unpack(other.vector), rtol=1e-4, atol=1e-4)


PAIRS = [
    pair("The dog was sad.", "The dog was happy."), pair("The cat was sad.", "The cat was happy."),
    pair("The girl was sad.", "The girl was happy."), pair("A boy was sad.", "A boy was happy."),
    pair("My friend was sad.", "My friend was happy."), pair("The king was sad.", "The king was happy."),
]  # fmt: skip


@pytest.mark.parametrize(
    "method",
    [pb.DIRECTION_METHOD_CAA, pb.DIRECTION_METHOD_PCA, pb.DIRECTION_METHOD_PCA_CENTRED, 0],
)
async def test_pairs(served: Served, method: Any) -> None:
    response = await computed(served, pairs=PAIRS, method=method, hook_points=[HOOK])
    (at,) = response.direction.at
    assert response.direction.method == (method or pb.DIRECTION_METHOD_CAA)
    assert response.split.n_train == 8 and response.split.n_held_out == 4, "pairs stay whole"
    if method in (pb.DIRECTION_METHOD_CAA, 0):
        rows = await activations(served, [p.positive.text for p in PAIRS])
        others = await activations(served, [p.negative.text for p in PAIRS])
        cosine = _cosine(unpack(at.vector), (rows - others).mean(0))
        assert cosine > 0.9 and at.held_out.auroc.value == 1.0


@pytest.mark.parametrize(
    "method",
    [pb.DIRECTION_METHOD_MASS_MEAN, pb.DIRECTION_METHOD_MASS_MEAN_CORRECTED, pb.DIRECTION_METHOD_K_MEANS],
)
async def test_other_methods_find_the_number_too(served: Served, method: Any) -> None:
    response = await computed(
        served, examples=labelled("number", 240), positive_label="plural", hook_points=[HOOK], method=method
    )
    least = 0.7 if method == pb.DIRECTION_METHOD_K_MEANS else 0.95
    assert response.direction.at[0].held_out.auroc.value > least


async def test_given_vectors_are_judged_not_changed(served: Served) -> None:
    made = await computed(
        served, examples=labelled("number", 240), positive_label="plural", hook_points=[HOOK]
    )
    vector = made.direction.at[0].vector
    judged = await computed(
        served, examples=labelled("number", 240), positive_label="plural", method=pb.DIRECTION_METHOD_RAW,
        vectors=[pb.VectorAt(hook_point=HOOK, vector=vector)],
    )  # fmt: skip
    assert judged.direction.at[0].vector == vector
    assert judged.direction.at[0].held_out.auroc == made.direction.at[0].held_out.auroc
    assert judged.direction.at[0].threshold == pytest.approx(made.direction.at[0].threshold, rel=1e-4)
    alone = await computed(
        served,
        method=pb.DIRECTION_METHOD_RAW,
        vectors=[pb.VectorAt(hook_point=HOOK, vector=vector)],
    )
    assert not alone.direction.at[0].HasField("held_out") and "no examples" in alone.notes[0]


async def test_a_name_steers_as_its_vector_does(served: Served) -> None:
    made = await computed(
        served, examples=labelled("number", 120), positive_label="plural", publication=named("gloom"),
        hook_points=[HOOK, LAYERS[4]],
    )  # fmt: skip
    assert made.direction.name == "models/fable/directions/gloom@1"
    texts = {}
    for hook_point in (HOOK, LAYERS[4]):
        vector = next(at.vector for at in made.direction.at if at.hook_point == hook_point)
        for key, add in (
            ("vector", interventions_pb2.AddVector(vector=vector, coefficient=2.0)),
            ("name", interventions_pb2.AddVector(direction="gloom", coefficient=2.0)),
        ):
            request = generation_pb2.GenerateRequest(
                input=inputs_pb2.Input(text="The dog was"),
                max_tokens=8,
                sampling=generation_pb2.SamplingParameters(temperature=0.0),
                interventions=[interventions_pb2.Intervention(hook_point=hook_point, add_vector=add)],
            )
            events = await events_of(served.generation.Generate(request))
            texts[hook_point, key] = [
                t.token_id for e in events if e.HasField("tokens") for t in e.tokens.tokens
            ]
            if key == "name":
                assert events[-1].finished.receipt[0].resources == [made.direction.name]
    assert texts[HOOK, "name"] == texts[HOOK, "vector"]
    assert texts[LAYERS[4], "name"] == texts[LAYERS[4], "vector"] != texts[HOOK, "vector"]


async def test_versions(served: Served) -> None:
    stub = calls.directions(served)
    vectors = [pb.VectorAt(hook_point=HOOK, vector=pack(np.ones(192, np.float32)))]

    def create(**options: Any) -> Any:
        return stub.CreateDirection(
            pb.CreateDirectionRequest(publication=named("d", **options), vectors=vectors)
        )

    first = (await create(description="ones")).direction
    assert (first.name, first.description) == ("models/fable/directions/d@1", "ones")
    assert first.at[0].norm == pytest.approx(192**0.5) and not first.at[0].HasField("vector")
    taken = await refusal(lambda: create())
    assert (taken.code, taken.reason, taken.field) == ("ALREADY_EXISTS", "NAME_TAKEN", "publication.name")
    assert taken.metadata["next_version"] == "2"
    before = await refusal(
        lambda: compute(served, examples=FEW, positive_label="sad", publication=named("d"))
    )
    assert before.code == "ALREADY_EXISTS", "refused before the work, not after it"
    gap = await refusal(lambda: create(version=4))
    assert (gap.code, gap.field) == ("INVALID_ARGUMENT", "publication.version")
    assert (await create(next_version=True)).direction.name.endswith("d@2")
    found = await stub.GetDirection(pb.GetDirectionRequest(name="d"))
    assert found.direction.name.endswith("d@2") and unpack(found.direction.at[0].vector).shape == (192,)
    older = await stub.GetDirection(pb.GetDirectionRequest(name="models/fable/directions/d@1"))
    assert older.direction.description == "ones"
    deleted = await stub.DeleteDirection(pb.DeleteDirectionRequest(name="d@2"))
    assert list(deleted.deleted) == ["models/fable/directions/d@2"]
    assert (await stub.GetDirection(pb.GetDirectionRequest(name="d"))).direction.name.endswith("d@1")
    assert (await create(next_version=True)).direction.name.endswith("d@3"), "a version is never used twice"
    missing = await refusal(lambda: stub.GetDirection(pb.GetDirectionRequest(name="e")))
    assert missing.code == "NOT_FOUND" and "d" in missing.metadata.get("closest", "mood")


async def test_lists_turn_pages_and_what_comes_with_the_model_is_first(served: Served) -> None:
    stub = calls.directions(served)
    vectors = [pb.VectorAt(hook_point=HOOK, vector=pack(np.ones(192, np.float32)))]
    for name in ("a", "b", "b", "m"):
        await stub.CreateDirection(
            pb.CreateDirectionRequest(publication=named(name, next_version=True), vectors=vectors)
        )

    async def listed(size: int, **options: Any) -> list[str]:
        names, token = [], ""
        while True:
            page = await stub.ListDirections(
                pb.ListDirectionsRequest(page_size=size, page_token=token, **options)
            )
            assert len(page.directions) <= size
            names += [each.name.removeprefix("models/fable/directions/") for each in page.directions]
            token = page.next_page_token
            if not token:
                return names

    whole = ["gender@1", "mood@1", "number@1", "a@1", "b@2", "m@1"]
    for size in range(1, 8):
        assert await listed(size) == whole
    assert await listed(2, every_version=True) == [*whole[:4], "b@1", *whole[4:]]
    assert await listed(10, name_prefix="m") == ["mood@1", "m@1"]
    wrong = await refusal(lambda: stub.ListDirections(pb.ListDirectionsRequest(page_token="bm9wZQ==")))
    assert (wrong.code, wrong.field) == ("INVALID_ARGUMENT", "page_token")
    negative = await refusal(lambda: stub.ListDirections(pb.ListDirectionsRequest(page_size=-1)))
    assert negative.field == "page_size"


async def test_what_comes_with_the_model_stays(served: Served) -> None:
    stub = calls.directions(served)
    mood = (await stub.GetDirection(pb.GetDirectionRequest(name="mood"))).direction
    assert mood.built_in and mood.provenance.method == "difference_in_means"
    refused = await refusal(lambda: stub.DeleteDirection(pb.DeleteDirectionRequest(name="mood")))
    assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "IN_USE")
    over = await refusal(
        lambda: stub.CreateDirection(
            pb.CreateDirectionRequest(
                publication=named("mood", next_version=True),
                vectors=[pb.VectorAt(hook_point=HOOK, vector=mood.at[0].vector)],
            )
        )
    )
    assert (over.code, over.field) == ("ALREADY_EXISTS", "publication.name")


async def test_provenance(fable_model: Any, tmp_path: Path) -> None:
    key = "9834876dcfb05cb167a5c24953eba58c4ac89b1adf57f28f2f9d09af107ee8f0"  # of "aaa"
    settings = replace(Settings(), keys=KeySettings(entries=(f"ann user {key}",)))
    async with concepts(fable_model, tmp_path, settings=settings) as (served, _):
        sent = (("authorization", "Bearer aaa"),)
        stub = calls.directions(served)
        call = stub.ComputeDirections(
            iter(
                [
                    pb.ComputeDirectionsRequest(
                        examples=FEW, positive_label="sad", hook_points=[HOOK], publication=named("few")
                    )
                ]
            ),
            metadata=sent,
        )
        operation = await call
        wait = served.channel.unary_unary(
            "/google.longrunning.Operations/WaitOperation",
            request_serializer=operations_pb2.WaitOperationRequest.SerializeToString,
            response_deserializer=operations_pb2.Operation.FromString,
        )
        await wait(operations_pb2.WaitOperationRequest(name=operation.name), metadata=sent)
        found = (await stub.GetDirection(pb.GetDirectionRequest(name="few"), metadata=sent)).direction
        origin = found.provenance
        assert origin.author == "ann" and origin.method == "difference_in_means"
        assert len(origin.model_revision) == 64 and len(origin.data_hash) == 64
        assert list(origin.hook_points) == [HOOK] and 0 <= origin.metrics["auroc"] <= 1
        assert found.HasField("create_time")
        denied = await refusal(
            lambda: stub.DeleteDirection(pb.DeleteDirectionRequest(name="few"), metadata=sent)
        )
        assert (denied.code, denied.reason) == ("PERMISSION_DENIED", "ADMIN_REQUIRED")


async def test_what_a_monitor_uses_stays(fable_model: Any, tmp_path: Path) -> None:
    async with concepts(fable_model, tmp_path) as (served, library):
        stub = calls.directions(served)
        await computed(
            served, examples=FEW, positive_label="sad", hook_points=[HOOK], publication=named("used")
        )
        reference = parse("used@1", kind=Kind.DIRECTION, model="fable")
        await asyncio.to_thread(
            library.publish, Draft(kind=Kind.MONITOR, model="fable", name="watch", uses=(reference,))
        )
        refused = await refusal(lambda: stub.DeleteDirection(pb.DeleteDirectionRequest(name="used")))
        assert (refused.code, refused.reason) == ("FAILED_PRECONDITION", "IN_USE")
        assert refused.metadata["used_by"] == "models/fable/monitors/watch@1"


async def test_of_another_model_or_other_weights(fable_model: Any, tmp_path: Path) -> None:
    async with concepts(fable_model, tmp_path) as (served, library):
        stub = calls.directions(served)
        await computed(served, examples=FEW, positive_label="sad", hook_points=[HOOK], publication=named("d"))
        record = library.registry.get(parse("d", kind=Kind.DIRECTION, model="fable"))
        other = Draft(
            kind=Kind.DIRECTION,
            model="fable",
            name="elsewhere",
            body=record.body,
            tensors=library.registry.tensors(record),
            provenance=Provenance(model_revision="0" * 64),
        )
        await asyncio.to_thread(library.publish, other)

        def generate(name: str, hook_point: str = HOOK) -> Any:
            edit = interventions_pb2.Intervention(
                hook_point=hook_point, add_vector=interventions_pb2.AddVector(direction=name)
            )
            return served.generation.Generate(
                generation_pb2.GenerateRequest(
                    input=inputs_pb2.Input(text="a"), max_tokens=2, interventions=[edit]
                )
            )

        weights = await refusal(lambda: generate("elsewhere"))
        assert (weights.code, weights.reason) == ("FAILED_PRECONDITION", "MODEL_MISMATCH")
        assert weights.field == "interventions[0].add_vector.direction"
        model = await refusal(lambda: generate("models/other/directions/d"))
        assert model.reason == "MODEL_MISMATCH" and "other" in model.message
        width = await refusal(lambda: generate("d", "blocks.2.mlp.hook_post"))
        assert width.reason == "MODEL_MISMATCH" and "192" in width.message
        missing = await refusal(lambda: generate("nope"))
        assert missing.code == "NOT_FOUND"
        found = await stub.GetDirection(pb.GetDirectionRequest(name="elsewhere"))
        assert found.direction.provenance.model_revision == "0" * 64, "it may be looked at"


async def test_copies_are_told_and_kept_together(served: Served) -> None:
    copies = [example(text, "sad") for text in SADS] + [example(text, "happy") for text in GLADS]
    response = await computed(
        served, examples=copies + copies, positive_label="sad", hook_points=[HOOK], held_out_share=0.4
    )
    assert response.split.n_duplicates == 12 and "copies" in " ".join(response.notes)
    assert response.split.n_train % 2 == 0 and response.split.n_held_out % 2 == 0
    leaking = [*copies, *(example(e.input.text, e.labels[0], held_out=True) for e in copies[:2])]
    leaking += [example("He frowned.", "sad", held_out=True), example("He grinned.", "happy", held_out=True)]
    response = await computed(served, examples=leaking, positive_label="sad", hook_points=[HOOK])
    assert (response.split.n_left_out, response.split.n_held_out) == (2, 2)
    assert "left out" in " ".join(response.notes)
    both = [*copies, example(SADS[0], "happy")]
    response = await computed(served, examples=both, positive_label="sad", hook_points=[HOOK])
    assert response.split.n_conflicting == 1 and "different labels" in " ".join(response.notes)


async def test_an_operation_can_be_watched_and_cancelled(served: Served) -> None:
    operation = await compute(served, examples=labelled("number"), positive_label="plural")
    cancel = served.channel.unary_unary(
        "/google.longrunning.Operations/CancelOperation",
        request_serializer=operations_pb2.CancelOperationRequest.SerializeToString,
        response_deserializer=lambda data: data,
    )
    await cancel(operations_pb2.CancelOperationRequest(name=operation.name))
    wait = served.channel.unary_unary(
        "/google.longrunning.Operations/WaitOperation",
        request_serializer=operations_pb2.WaitOperationRequest.SerializeToString,
        response_deserializer=operations_pb2.Operation.FromString,
    )
    ended = await wait(operations_pb2.WaitOperationRequest(name=operation.name))
    assert ended.done and ended.error.code == 1
    metadata = pb.ComputeDirectionsMetadata()
    assert ended.metadata.Unpack(metadata) and metadata.phase in ("queued", "running", "reading", "computing")


ONES = pack(np.ones(192, np.float32))
LONG = "word " * 600
BAD: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "no examples": ({"examples": []}, "INVALID_ARGUMENT", "FIELD_REQUIRED", "examples"),
    "one class": ({"examples": FEW[:6]}, "INVALID_ARGUMENT", "ONE_CLASS_ONLY", "examples.labels"),
    "too few": ({"examples": FEW[:6] + FEW[6:9]}, "INVALID_ARGUMENT", "TOO_FEW_EXAMPLES", "examples.labels"),
    "no concept": ({"positive_label": ""}, "INVALID_ARGUMENT", "FIELD_REQUIRED", "positive_label"),
    "unknown concept": ({"positive_label": "bad"}, "INVALID_ARGUMENT", "FIELD_CONFLICT", "positive_label"),
    "three labels": (
        {"examples": [*FEW, example("x", "odd")], "positive_label": ""},
        "INVALID_ARGUMENT",
        "FIELD_CONFLICT",
        "examples.labels",
    ),
    "empty label": (
        {"examples": [*FEW, example("x", " ")]},
        "INVALID_ARGUMENT",
        "VALUE_OUT_OF_RANGE",
        "examples[12].labels[0]",
    ),
    "longer than the context": (
        {"examples": [*FEW, example(LONG, "sad")]},
        "INVALID_ARGUMENT",
        "CONTEXT_EXCEEDED",
        "examples[12].input",
    ),
    "empty input": (
        {"examples": [*FEW, example("", "sad")]},
        "INVALID_ARGUMENT",
        "EMPTY_INPUT",
        "examples[12].input",
    ),
    "no position": (
        {"positions": inputs_pb2.PositionSelector(span=inputs_pb2.PositionSpan(start=40))},
        "INVALID_ARGUMENT",
        "POSITION_UNREACHABLE",
        "examples[0].positions.span",
    ),
    "generated positions": (
        {"positions": inputs_pb2.PositionSelector(named=inputs_pb2.NAMED_POSITIONS_GENERATED)},
        "INVALID_ARGUMENT",
        "VALUE_OUT_OF_RANGE",
        "positions.named",
    ),
    "hook point": ({"hook_points": ["blocks.2.nope"]}, "NOT_FOUND", "HOOK_POINT_NOT_FOUND", "hook_points[0]"),
    "hook point twice": (
        {"hook_points": [HOOK, "model.layers.2"]},
        "INVALID_ARGUMENT",
        "FIELD_CONFLICT",
        "hook_points[1]",
    ),
    "attention map": (
        {"hook_points": ["blocks.2.attn.hook_pattern"]},
        "INVALID_ARGUMENT",
        "HOOK_POINT_NOT_READABLE",
        "hook_points[0]",
    ),
    "method": ({"method": 77}, "INVALID_ARGUMENT", "VALUE_OUT_OF_RANGE", "method"),
    "pairs wanted": (
        {"method": pb.DIRECTION_METHOD_CAA},
        "INVALID_ARGUMENT",
        "FIELD_CONFLICT",
        "method",
    ),
    "both": ({"pairs": PAIRS}, "INVALID_ARGUMENT", "FIELD_CONFLICT", "pairs"),
    "pooling": ({"pooling": 9}, "INVALID_ARGUMENT", "VALUE_OUT_OF_RANGE", "pooling"),
    "tokens of pairs": (
        {"pairs": PAIRS, "examples": [], "pooling": examples_pb2.POOLING_TOKEN},
        "INVALID_ARGUMENT",
        "FIELD_CONFLICT",
        "pooling",
    ),
    "share": ({"held_out_share": 1.0}, "INVALID_ARGUMENT", "VALUE_OUT_OF_RANGE", "held_out_share"),
    "inverse_l2": ({"inverse_l2": 0.0}, "INVALID_ARGUMENT", "VALUE_OUT_OF_RANGE", "inverse_l2"),
    "inverse_l2 NaN": ({"inverse_l2": float("nan")}, "INVALID_ARGUMENT", "VALUE_NOT_FINITE", "inverse_l2"),
    "seed": ({"seed": -1}, "INVALID_ARGUMENT", "VALUE_OUT_OF_RANGE", "seed"),
    "clusters": ({"n_clusters": 65}, "INVALID_ARGUMENT", "VALUE_OUT_OF_RANGE", "n_clusters"),
    "name": ({"publication": named("a b")}, "INVALID_ARGUMENT", "VALUE_MALFORMED", "publication.name"),
    "no name": ({"publication": named("")}, "INVALID_ARGUMENT", "FIELD_REQUIRED", "publication.name"),
    "version": (
        {"publication": named("a", version=1, next_version=True)},
        "INVALID_ARGUMENT",
        "FIELD_CONFLICT",
        "publication.next_version",
    ),
    "description": (
        {"publication": named("a", description="x" * 2001)},
        "INVALID_ARGUMENT",
        "VALUE_OUT_OF_RANGE",
        "publication.description",
    ),
    "vectors of another method": (
        {"vectors": [pb.VectorAt(hook_point=HOOK, vector=ONES)]},
        "INVALID_ARGUMENT",
        "FIELD_CONFLICT",
        "vectors",
    ),
    "raw without vectors": (
        {"method": pb.DIRECTION_METHOD_RAW},
        "INVALID_ARGUMENT",
        "FIELD_REQUIRED",
        "vectors",
    ),
    "raw of another width": (
        {
            "method": pb.DIRECTION_METHOD_RAW,
            "vectors": [pb.VectorAt(hook_point=HOOK, vector=pack(np.ones(3, np.float32)))],
        },
        "INVALID_ARGUMENT",
        "WRONG_WIDTH",
        "vectors[0].vector",
    ),
    "raw zero": (
        {
            "method": pb.DIRECTION_METHOD_RAW,
            "vectors": [pb.VectorAt(hook_point=HOOK, vector=pack(np.zeros(192, np.float32)))],
        },
        "INVALID_ARGUMENT",
        "VALUE_OUT_OF_RANGE",
        "vectors[0].vector",
    ),
    "dictionary": (
        {
            "method": pb.DIRECTION_METHOD_DICTIONARY_FEATURE,
            "feature": pb.DictionaryFeature(dictionary="nope"),
        },
        "NOT_FOUND",
        "DICTIONARY_NOT_FOUND",
        "feature.dictionary",
    ),
    "model": ({"model": "other"}, "NOT_FOUND", "MODEL_NOT_FOUND", "model"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=list(BAD))
async def test_bad_input(served: Served, case: tuple[dict[str, Any], str, str, str]) -> None:
    fields, code, reason, field = case
    request = {"examples": FEW, "positive_label": "sad", "hook_points": [HOOK]} | fields
    if (
        any(key in fields for key in ("vectors", "feature"))
        or fields.get("method") == pb.DIRECTION_METHOD_RAW
    ):
        request.pop("hook_points")

    def call() -> Any:
        return compute(served, **request)

    try:
        operation = await calls.ended(served, call())
    except Exception:
        refused = await refusal(call)
        assert (refused.code, refused.reason, refused.field) == (code, reason, field), refused.message
        return
    error = operation.error
    details = _info(error)
    assert (error.code, details["reason"], details["field"]) == (3, reason, field), error.message


async def test_messages_after_the_first_hold_examples_alone(served: Served) -> None:
    more = pb.ComputeDirectionsRequest(seed=3, examples=FEW)
    refused = await refusal(lambda: compute(served, more, examples=FEW, positive_label="sad"))
    assert (refused.reason, refused.field) == ("FIELD_CONFLICT", "seed")
    empty = await refusal(lambda: calls.directions(served).ComputeDirections(iter(())))
    assert empty.reason == "FIELD_REQUIRED"


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def _info(status: Any) -> dict[str, str]:
    from google.rpc import error_details_pb2

    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return {"reason": info.reason, "field": info.metadata.get("field", "")}
