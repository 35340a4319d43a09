"""ProbeService and FeatureLabelService through a real server over the real engine on fable."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from glasshouse import fable
from glasshouse.v1 import (
    dictionaries_pb2,
    dictionaries_pb2_grpc,
    examples_pb2,
    feature_labels_pb2,
    generation_pb2,
    inputs_pb2,
    interventions_pb2,
    readouts_pb2,
)
from glasshouse.v1 import probes_pb2 as pb
from glasshouse.wire.tensors import pack, unpack

from ..serving import Served, events_of, refusal
from . import concept_calls as calls
from .concept_calls import HOOK, LAYERS, concepts, example, labelled, labels, named, probes, train, trained
from .test_directions import FEW, activations


@pytest.fixture(scope="module")
def fable_model() -> Any:
    return calls.load_fable()


@pytest.fixture
async def served(fable_model: Any, tmp_path: Path) -> AsyncIterator[Served]:
    async with concepts(fable_model, tmp_path) as (running, _):
        yield running


async def scores(served: Served, probe: str, *texts: str, **options: Any) -> dict[int, np.ndarray]:
    request = pb.ScoreProbeRequest(
        probe=probe, inputs=[inputs_pb2.Input(text=text) for text in texts], **options
    )
    found = {}
    async for event in probes(served).ScoreProbe(request):
        if event.HasField("scored"):
            found[event.scored.index] = unpack(event.scored.scores)
    assert event.HasField("finished") and len(found) == len(texts)
    return found


async def test_a_logistic_probe_is_scikit_learns(served: Served) -> None:
    examples = labelled("number", 200)
    response = await trained(
        served, examples=examples, hook_points=[HOOK], positive_label="plural",
        calibration=pb.CALIBRATION_METHOD_NONE,
    )  # fmt: skip
    learnt = [e for e in examples if not e.held_out]
    rows = await activations(served, [e.input.text for e in learnt])
    scaler = StandardScaler().fit(rows)
    model = LogisticRegression(max_iter=2000).fit(
        scaler.transform(rows), [e.labels[0] == "plural" for e in learnt]
    )
    (layer,) = response.probe.weights.layers
    expected = model.coef_[0] / scaler.scale_
    assert np.abs(unpack(layer.weights)[:, 0] - expected).max() <= 1e-6
    unseen = [e.input.text for e in examples if e.held_out][:5]
    await trained(
        served, examples=examples, hook_points=[HOOK], positive_label="plural",
        calibration=pb.CALIBRATION_METHOD_NONE, publication=named("plain"),
    )  # fmt: skip
    found = await scores(served, "plain", *unseen)
    theirs = model.predict_proba(scaler.transform(await activations(served, unseen)))[:, 1]
    assert [float(found[i][0, 0]) for i in range(5)] == pytest.approx(theirs.tolist(), abs=1e-5)


async def test_a_report_one_can_believe(served: Served) -> None:
    examples = labelled("number", 400)
    response = await trained(
        served, examples=examples, hook_points=[HOOK], positive_label="plural", publication=named("n"),
        false_positive_rates=[0.01, 0.1],
    )  # fmt: skip
    probe = response.probe
    assert probe.name == "models/fable/probes/n@1" and list(probe.columns) == ["plural"]
    report = probe.report
    (column,) = report.columns
    assert column.held_out.auroc.value >= 0.98 and report.n_folds == 5 and report.converged
    assert column.ece <= 0.1 and 0 <= column.brier <= 0.1
    assert column.control_auroc.low <= 0.5 <= column.control_auroc.high
    assert report.selectivity == pytest.approx(report.accuracy.value - report.control_accuracy.value)
    assert [point.wanted_false_positive_rate for point in column.operating_points] == [0.01, 0.1]
    for point in column.operating_points:
        rate = point.false_positive_rate
        assert rate.low <= rate.value <= rate.high and point.true_positive_rate.value > 0.8
    held = sum(e.held_out for e in examples)
    assert (report.split.n_held_out, report.split.n_train) == (held, len(examples) - held)
    kept = (await probes(served).GetProbe(pb.GetProbeRequest(name="n"))).probe
    assert kept.report == report and not kept.HasField("weights")


async def test_the_best_hook_point_is_chosen_out_of_fold(served: Served) -> None:
    response = await trained(
        served, examples=labelled("gender", 240), hook_points=[LAYERS[0], LAYERS[4]], positive_label="girl",
        hook_point_use=pb.HOOK_POINT_USE_BEST,
    )  # fmt: skip
    assert list(response.probe.hook_points) == [LAYERS[4]]
    first, fourth = response.candidates
    assert fourth.out_of_fold_auroc > 0.95 > first.out_of_fold_auroc
    together = await trained(
        served,
        examples=labelled("gender", 240),
        hook_points=[LAYERS[0], LAYERS[4]],
        positive_label="girl",
    )
    assert list(together.probe.widths) == [192, 192] and not together.candidates
    assert unpack(together.probe.weights.layers[0].weights).shape == (384, 1)


@pytest.mark.parametrize(
    "kind", [pb.PROBE_KIND_MASS_MEAN, pb.PROBE_KIND_MASS_MEAN_CORRECTED, pb.PROBE_KIND_MLP]
)
@pytest.mark.parametrize("calibration", [pb.CALIBRATION_METHOD_PLATT, pb.CALIBRATION_METHOD_ISOTONIC])
async def test_every_kind_is_kept_and_scores_as_its_weights_do(
    served: Served, kind: Any, calibration: Any
) -> None:
    examples = labelled("number", 120)
    await trained(
        served, examples=examples, hook_points=[HOOK], positive_label="plural", kind=kind,
        calibration=calibration, publication=named("k"), hidden_width=8,
    )  # fmt: skip
    probe = (await probes(served).GetProbe(pb.GetProbeRequest(name="k", with_weights=True))).probe
    texts = [e.input.text for e in examples[:6]]
    x = await activations(served, texts)
    for index, layer in enumerate(probe.weights.layers):
        x = (np.maximum(x, 0) if index else x) @ unpack(layer.weights) + unpack(layer.biases)
    if calibration == pb.CALIBRATION_METHOD_PLATT:
        platt = probe.weights.platt
        expected = 1 / (1 + np.exp(-(x * platt.slopes + np.array(platt.offsets))))
    else:
        (knots,) = probe.weights.isotonic.columns
        expected = np.interp(x, knots.margins, knots.probabilities)
    found = await scores(served, "k", *texts)
    assert np.array([found[i][0] for i in range(6)]) == pytest.approx(expected, abs=2e-3)


async def test_classes_and_labels(served: Served) -> None:
    three = [
        *(example(f"The {n} dog", "dog") for n in ("old", "big", "shy", "red", "sad", "new")),
        *(example(f"The {n} tree", "tree") for n in ("old", "big", "shy", "red", "sad", "new")),
        *(example(f"The {n} boat", "boat") for n in ("old", "big", "shy", "red", "sad", "new")),
    ]
    response = await trained(served, examples=three, hook_points=[HOOK], publication=named("noun"))
    assert response.probe.task == pb.PROBE_TASK_MULTI_CLASS
    assert list(response.probe.columns) == ["boat", "dog", "tree"]
    found = (await scores(served, "noun", "The wet tree"))[0]
    assert found.shape == (1, 3) and found.sum() == pytest.approx(1, abs=1e-5) and found.argmax() == 2
    many = [
        example(f"The {size} {what}", *(["big"] if size in ("big", "huge", "giant") else []),
                *(["animal"] if what in ("dog", "cat", "cow") else []))
        for size in ("big", "huge", "giant", "tiny", "small", "little")
        for what in ("dog", "cat", "cow", "tree", "boat", "hat")
    ]  # fmt: skip
    response = await trained(served, examples=many, hook_points=[HOOK, LAYERS[1]], publication=named("two"))
    assert response.probe.task == pb.PROBE_TASK_MULTI_LABEL
    assert list(response.probe.columns) == ["animal", "big"]
    assert (await scores(served, "two", "The huge cow"))[0].shape == (1, 2)


@pytest.mark.parametrize(
    "pooling", [examples_pb2.POOLING_TOKEN, examples_pb2.POOLING_MEAN, examples_pb2.POOLING_MAX]
)
async def test_pooling_and_what_a_generation_reads(served: Served, pooling: Any) -> None:
    await trained(
        served, examples=labelled("number", 80), hook_points=[HOOK], positive_label="plural", pooling=pooling,
        positions=inputs_pb2.PositionSelector(named=inputs_pb2.NAMED_POSITIONS_ALL, exclude_bos=True),
        publication=named("p"),
    )  # fmt: skip
    text = "The frogs near the house"
    one = (await scores(served, "p", text))[0]
    every = (await scores(served, "p", text, every_position=True))[0]
    n_tokens = every.shape[0]
    assert one.shape == ((n_tokens, 1) if pooling == examples_pb2.POOLING_TOKEN else (1, 1))
    assert float(one[-1, 0]) == pytest.approx(float(every[-1, 0]), abs=1e-5), "the last sees all before it"
    request = generation_pb2.GenerateRequest(
        input=inputs_pb2.Input(text=text),
        max_tokens=4,
        sampling=generation_pb2.SamplingParameters(temperature=0.0),
        readouts=[
            readouts_pb2.Readout(
                probe=readouts_pb2.ReadProbe(probe="p"),
                positions=inputs_pb2.PositionSelector(named=inputs_pb2.NAMED_POSITIONS_ALL, exclude_bos=True),
            )
        ],
    )
    events = await events_of(served.generation.Generate(request))
    prompt = next(e.prompt.readouts[0] for e in events if e.HasField("prompt") and e.prompt.readouts)
    assert prompt.probe.probe == "models/fable/probes/p@1" and list(prompt.probe.labels) == ["plural"]
    assert list(prompt.probe.scores) == pytest.approx(every[:, 0].tolist(), abs=1e-4)
    tokens = [token for e in events if e.HasField("tokens") for token in e.tokens.tokens]
    whole = [0, *prompt.positions]
    ids = list(next(e.prompt.token_ids for e in events if e.HasField("prompt") and e.prompt.token_ids))
    fed = ids + [token.token_id for token in tokens]
    later = pb.ScoreProbeRequest(probe="p", inputs=[inputs_pb2.Input(token_ids=fed)], every_position=True)
    async for event in probes(served).ScoreProbe(later):
        if event.HasField("scored"):
            again = unpack(event.scored.scores)[:, 0]
    for offset, token in enumerate(tokens[1:], start=1):
        found = token.readouts[0].probe.scores[0]
        assert found == pytest.approx(float(again[len(whole) - 1 + offset - 1]), abs=1e-3)


async def test_scores_under_edits(served: Served) -> None:
    plain = (await scores(served, "mood", "The dog was"))[0]
    edit = interventions_pb2.Intervention(
        hook_point=HOOK,
        add_vector=interventions_pb2.AddVector(direction="mood", coefficient=4.0),
    )
    sadder = (await scores(served, "mood", "The dog was", interventions=[edit]))[0]
    assert sadder[0, 0] > 0.99 > plain[0, 0]


async def test_a_probe_trained_elsewhere(served: Served) -> None:
    made = await trained(
        served, examples=labelled("number", 120), hook_points=[HOOK], positive_label="plural",
        publication=named("here"),
    )  # fmt: skip
    stub = probes(served)
    request = pb.CreateProbeRequest(
        publication=named("there"), labels=["singular", "plural"], hook_points=["model.layers.2"],
        weights=made.probe.weights,
    )  # fmt: skip
    created = (await stub.CreateProbe(request)).probe
    assert created.name == "models/fable/probes/there@1" and not created.HasField("report")
    assert list(created.hook_points) == [HOOK] and created.provenance.method == "imported"
    here, there = [await scores(served, name, "The old frogs") for name in ("here", "there")]
    assert there[0] == pytest.approx(here[0], abs=1e-5)
    wrong = pb.CreateProbeRequest()
    wrong.CopyFrom(request)
    wrong.publication.next_version = True
    wrong.hook_points.append(LAYERS[3])
    refused = await refusal(lambda: stub.CreateProbe(wrong))
    assert (refused.reason, refused.field) == ("WRONG_WIDTH", "weights.layers[0]")
    wrong.CopyFrom(request)
    wrong.weights.platt.slopes.append(1.0)
    refused = await refusal(lambda: stub.CreateProbe(wrong))
    assert refused.field == "weights.platt.slopes"
    wrong.CopyFrom(request)
    wrong.weights.layers[0].biases.CopyFrom(pack(np.array([np.nan], np.float32)))
    refused = await refusal(lambda: stub.CreateProbe(wrong))
    assert refused.reason == "VALUE_NOT_FINITE"
    again = (await stub.CreateProbe(request)).probe
    assert again.name == created.name, "the same once more: a caller that did not hear may repeat itself"
    request.publication.description = "something else"
    taken = await refusal(lambda: stub.CreateProbe(request))
    assert taken.code == "ALREADY_EXISTS" and taken.metadata["next_version"] == "2"


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "no hook point": ({"hook_points": []}, "FIELD_REQUIRED", "hook_points"),
    "no examples": ({"examples": []}, "FIELD_REQUIRED", "examples"),
    "not a label": (
        {"labels": ["happy", "glum"]},
        "VALUE_OUT_OF_RANGE",
        "examples[0].labels[0]",
    ),
    "kind": ({"kind": 99}, "VALUE_OUT_OF_RANGE", "kind"),
    "task": ({"task": 99}, "VALUE_OUT_OF_RANGE", "task"),
    "calibration": ({"calibration": 99}, "VALUE_OUT_OF_RANGE", "calibration"),
    "use": ({"hook_point_use": 99}, "VALUE_OUT_OF_RANGE", "hook_point_use"),
    "rate": ({"false_positive_rates": [0.1, 1.0]}, "VALUE_OUT_OF_RANGE", "false_positive_rates[1]"),
    "rates": ({"false_positive_rates": [0.1] * 21}, "VALUE_OUT_OF_RANGE", "false_positive_rates"),
    "decay": ({"weight_decay": -1.0}, "VALUE_OUT_OF_RANGE", "weight_decay"),
    "hidden": ({"hidden_width": 5000}, "VALUE_OUT_OF_RANGE", "hidden_width"),
    "labels twice": ({"labels": ["sad", "sad"]}, "VALUE_OUT_OF_RANGE", "labels[1]"),
    "two labels at once": (
        {"task": pb.PROBE_TASK_BINARY, "examples": [*FEW, example("x", "sad", "happy")]},
        "FIELD_CONFLICT",
        "examples[12].labels",
    ),
    "label twice": (
        {"examples": [*FEW, example("x", "sad", "sad")]},
        "VALUE_OUT_OF_RANGE",
        "examples[12].labels",
    ),
    "concept of many": (
        {"examples": [*FEW, *(example(f"x {i}", "odd") for i in range(4))], "positive_label": "odd"},
        "FIELD_CONFLICT",
        "positive_label",
    ),
}


@pytest.mark.parametrize("case", BAD.values(), ids=list(BAD))
async def test_bad_input(served: Served, case: tuple[dict[str, Any], str, str]) -> None:
    fields, reason, field = case
    refused = await refusal(lambda: train(served, **({"examples": FEW, "hook_points": [HOOK]} | fields)))
    assert (refused.code, refused.reason, refused.field) == ("INVALID_ARGUMENT", reason, field)


async def test_scoring_refuses(served: Served) -> None:
    stub = probes(served)

    def score(**fields: Any) -> Any:
        request = {"probe": "mood", "inputs": [inputs_pb2.Input(text="a")]} | fields
        return stub.ScoreProbe(pb.ScoreProbeRequest(**request))

    assert (await refusal(lambda: score(probe=""))).field == "probe"
    assert (await refusal(lambda: score(inputs=[]))).field == "inputs"
    missing = await refusal(lambda: score(probe="mod"))
    assert missing.code == "NOT_FOUND" and "mood" in missing.metadata["closest"]
    assert (await refusal(lambda: score(probe="mood@2"))).code == "NOT_FOUND"
    other = await refusal(lambda: score(probe="models/other/probes/mood"))
    assert other.reason == "MODEL_NOT_FOUND"
    late = inputs_pb2.PositionSelector(span=inputs_pb2.PositionSpan(start=50))
    assert (await refusal(lambda: score(positions=late))).reason == "POSITION_UNREACHABLE"


async def test_labels_of_features(fable_model: Any, tmp_path: Path) -> None:
    async with concepts(fable_model, tmp_path) as (served, _):
        await served.engine.load_dictionary("sae", str(fable.dictionary_path("resid-post-2")))  # type: ignore[attr-defined]
        dictionaries = dictionaries_pb2_grpc.DictionaryServiceStub(served.channel)
        stub = labels(served)

        async def label(feature: int) -> str:
            request = dictionaries_pb2.GetFeatureRequest(dictionary="sae", feature=feature, n_tokens=0)
            return str((await dictionaries.GetFeature(request)).feature.label)

        def create(*pairs: tuple[int, str], **fields: Any) -> Any:
            request = {"dictionary": "sae", "publication": named("mine", next_version=True)} | fields
            return stub.CreateFeatureLabels(
                feature_labels_pb2.CreateFeatureLabelsRequest(
                    labels=[
                        feature_labels_pb2.FeatureLabel(feature=feature, label=text)
                        for feature, text in pairs
                    ],
                    **request,
                )
            )

        assert await label(3) == ""
        made = (await create((3, "sadness"), (5, "names"), (9, "ends"), method="by hand")).feature_labels
        assert made.name == "models/fable/featureLabels/mine@1" and made.count == 3
        assert made.dictionary == "models/fable/dictionaries/sae" and made.provenance.method == "by hand"
        assert await label(3) == "sadness" and await label(4) == ""
        listed = await dictionaries.ListFeatures(
            dictionaries_pb2.ListFeaturesRequest(dictionary="sae", page_size=6)
        )
        assert [feature.label for feature in listed.features] == ["", "", "", "sadness", "", "names"]
        await create((3, "gloom"))
        assert await label(3) == "gloom", "the set published last"
        page = await stub.GetFeatureLabels(
            feature_labels_pb2.GetFeatureLabelsRequest(name="mine@1", page_size=2)
        )
        assert [each.feature for each in page.labels] == [3, 5] and page.next_page_token
        rest = await stub.GetFeatureLabels(
            feature_labels_pb2.GetFeatureLabelsRequest(
                name="mine@1", page_size=2, page_token=page.next_page_token
            )
        )
        assert [each.label for each in rest.labels] == ["ends"] and not rest.next_page_token
        sets = await stub.ListFeatureLabels(
            feature_labels_pb2.ListFeatureLabelsRequest(dictionary="sae", every_version=True)
        )
        assert [each.name[-6:] for each in sets.feature_labels] == ["mine@1", "mine@2"]
        await stub.DeleteFeatureLabels(feature_labels_pb2.DeleteFeatureLabelsRequest(name="mine@2"))
        assert await label(3) == "sadness"
        for pairs, fields, field in (
            ((), {}, "labels"),
            (((3, " "),), {}, "labels[0].label"),
            (((3, "a"), (3, "b")), {}, "labels[1].feature"),
            (((3, "a"),), {"dictionary": "nope"}, "dictionary"),
            (((3, "a"),), {"publication": None}, "publication"),
        ):
            refused = await refusal(lambda pairs=pairs, fields=fields: create(*pairs, **fields))  # type: ignore[misc]
            assert refused.field == field, refused
        beyond = await refusal(lambda: create((10**6, "a")))
        assert beyond.code == "NOT_FOUND"
