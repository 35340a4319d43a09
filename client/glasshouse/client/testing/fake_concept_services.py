"""DirectionService, ProbeService and FeatureLabelService of a fake server: requests in, responses out, no transport.

A direction is the difference of the classes' letters hashed, a probe scores by the share of vowels: deterministic, and
different inputs have different answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from google.longrunning import operations_pb2
from numpy.typing import NDArray

from glasshouse.client.testing.failures import invalid, refused
from glasshouse.client.testing.fake_model import D_MODEL, FakeDirection, FakeModel, select
from glasshouse.client.testing.fake_operations import FakeOperations
from glasshouse.client.testing.fake_probes import share_of_vowels
from glasshouse.client.testing.fake_services import PAGE
from glasshouse.v1 import directions_pb2, examples_pb2, feature_labels_pb2, probes_pb2, provenance_pb2
from glasshouse.wire import reasons
from glasshouse.wire.tensors import pack, unpack


class FakeConceptServices:
    """What each method answers. `_kept`: what is published, by collection, name and version."""

    def __init__(self, model: Callable[..., FakeModel], operations: FakeOperations) -> None:
        self._model_of = model
        self._operations = operations
        self._kept: dict[str, dict[str, dict[int, Any]]] = {
            "directions": {},
            "probes": {},
            "featureLabels": {},
        }
        self._labels: dict[str, list[feature_labels_pb2.FeatureLabel]] = {}

    # -- directions ----------------------------------------------------------------------------------------------

    def compute_directions(
        self, request: directions_pb2.ComputeDirectionsRequest
    ) -> operations_pb2.Operation:
        """The direction of the examples at each hook point; later ones do better."""
        model = self._model_of(request.model)
        names = [model.resolve(name, f"hook_points[{n}]") for n, name in enumerate(request.hook_points)]
        names = names or [point.name for point in model.hook_points() if "resid_post" in point.name]
        labels = _labels(request.examples)
        if request.examples and len(labels) != 2:
            raise invalid("examples.labels", f"{len(labels)} labels", reasons.ONE_CLASS_ONLY)
        if not request.examples and not request.pairs and not request.vectors:
            raise invalid("examples", "examples or pairs are needed", reasons.FIELD_REQUIRED)
        given = {at.hook_point: at.vector for at in request.vectors}
        direction = directions_pb2.Direction(
            method=request.method or directions_pb2.DIRECTION_METHOD_DIFFERENCE_IN_MEANS,
            at=[
                _direction_at(name, request.SerializeToString(deterministic=True), rank, given.get(name))
                for rank, name in enumerate(given or names)
            ],
            positive_label=request.positive_label or (labels[-1] if labels else "positive"),
            negative_label=next((label for label in labels if label != request.positive_label), "negative"),
            pooling=request.pooling,
        )
        direction.best_hook_point = direction.at[-1].hook_point
        if request.HasField("publication"):
            self._publish("directions", model, request.publication, direction)
        n = len(request.examples) + 2 * len(request.pairs)
        response = directions_pb2.ComputeDirectionsResponse(
            direction=direction,
            split=examples_pb2.SplitSummary(n_train=n - n // 4, n_held_out=n // 4),
            notes=["A fake server's figures mean nothing."],
        )
        return self._operations.start(n, response, _directions_metadata)

    def create_direction(
        self, request: directions_pb2.CreateDirectionRequest
    ) -> directions_pb2.CreateDirectionResponse:
        """Vectors as they are."""
        model = self._model_of(request.model)
        direction = directions_pb2.Direction(
            method=directions_pb2.DIRECTION_METHOD_RAW,
            at=[
                directions_pb2.DirectionAt(
                    hook_point=model.resolve(at.hook_point, f"vectors[{n}].hook_point"),
                    vector=at.vector,
                    width=D_MODEL,
                )
                for n, at in enumerate(request.vectors)
            ],
            positive_label=request.positive_label or "positive",
        )
        direction.best_hook_point = direction.at[0].hook_point
        self._publish("directions", model, request.publication, direction)
        return directions_pb2.CreateDirectionResponse(direction=direction)

    def get_direction(
        self, request: directions_pb2.GetDirectionRequest
    ) -> directions_pb2.GetDirectionResponse:
        """One direction."""
        return directions_pb2.GetDirectionResponse(direction=self._find("directions", request.name))

    def list_directions(
        self, request: directions_pb2.ListDirectionsRequest
    ) -> directions_pb2.ListDirectionsResponse:
        """A page of directions, without vectors."""
        shown, token = self._page("directions", request)
        for direction in shown:
            for at in direction.at:
                at.ClearField("vector")
        return directions_pb2.ListDirectionsResponse(directions=shown, next_page_token=token)

    def delete_direction(
        self, request: directions_pb2.DeleteDirectionRequest
    ) -> directions_pb2.DeleteDirectionResponse:
        """It is no longer there."""
        return directions_pb2.DeleteDirectionResponse(deleted=self._delete("directions", request.name))

    # -- probes --------------------------------------------------------------------------------------------------

    def train_probe(self, request: probes_pb2.TrainProbeRequest) -> operations_pb2.Operation:
        """A probe of the examples' labels."""
        model = self._model_of(request.model)
        labels = list(request.labels) or _labels(request.examples)
        if len(labels) < 2:
            raise invalid("examples.labels", "one class only", reasons.ONE_CLASS_ONLY)
        probe = _probe(model, request, labels)
        probe.report.CopyFrom(_report(probe, len(request.examples)))
        if request.HasField("publication"):
            self._publish("probes", model, request.publication, probe)
        best = request.hook_point_use == probes_pb2.HOOK_POINT_USE_BEST
        response = probes_pb2.TrainProbeResponse(
            probe=probe,
            candidates=[
                probes_pb2.ProbeCandidate(hook_point=name, out_of_fold_auroc=0.9, held_out_auroc=0.9)
                for name in probe.hook_points
            ]
            if best
            else [],
        )
        return self._operations.start(len(request.examples), response, _training_metadata)

    def create_probe(self, request: probes_pb2.CreateProbeRequest) -> probes_pb2.CreateProbeResponse:
        """A probe trained elsewhere."""
        model = self._model_of(request.model)
        probe = _probe(model, request, request.labels)
        probe.weights.CopyFrom(request.weights)
        self._publish("probes", model, request.publication, probe)
        return probes_pb2.CreateProbeResponse(probe=probe)

    def get_probe(self, request: probes_pb2.GetProbeRequest) -> probes_pb2.GetProbeResponse:
        """One probe."""
        probe = self._find("probes", request.name)
        if not request.with_weights:
            probe.ClearField("weights")
        return probes_pb2.GetProbeResponse(probe=probe)

    def list_probes(self, request: probes_pb2.ListProbesRequest) -> probes_pb2.ListProbesResponse:
        """A page of probes."""
        shown, token = self._page("probes", request)
        return probes_pb2.ListProbesResponse(probes=shown, next_page_token=token)

    def delete_probe(self, request: probes_pb2.DeleteProbeRequest) -> probes_pb2.DeleteProbeResponse:
        """It is no longer there."""
        return probes_pb2.DeleteProbeResponse(deleted=self._delete("probes", request.name))

    def score_probe(self, request: probes_pb2.ScoreProbeRequest) -> Iterator[probes_pb2.ScoreProbeResponse]:
        """Shares of vowels, the inputs in reverse order, which a client must not mind."""
        probe = self._find("probes", request.probe, "probe")
        model = self._model_of(probe.name.split("/")[1])
        for index, message in reversed(list(enumerate(request.inputs))):
            ids = model.token_ids(message, f"inputs[{index}]")
            selector = request.positions if request.HasField("positions") else None
            positions = select(selector, ids, len(ids))
            scores = np.array(
                [share_of_vowels(ids[: p + 1], len(probe.columns)) for p in positions], np.float32
            )
            if not request.every_position and probe.pooling != examples_pb2.POOLING_TOKEN:
                scores, positions = scores[-1:], positions[-1:]
            yield probes_pb2.ScoreProbeResponse(
                scored=probes_pb2.ScoredInput(
                    index=index,
                    token_ids=ids,
                    tokens=model.strings(ids),
                    positions=positions,
                    scores=pack(scores),
                )
            )
        yield probes_pb2.ScoreProbeResponse(
            finished=probes_pb2.ScoringFinished(columns=probe.columns, probe=probe.name)
        )

    # -- feature labels ------------------------------------------------------------------------------------------

    def create_feature_labels(
        self, request: feature_labels_pb2.CreateFeatureLabelsRequest
    ) -> feature_labels_pb2.CreateFeatureLabelsResponse:
        """A set of labels."""
        model = self._model_of(request.dictionary.partition("/dictionaries/")[0])
        made = feature_labels_pb2.FeatureLabels(dictionary=request.dictionary, count=len(request.labels))
        self._publish("featureLabels", model, request.publication, made)
        self._labels[made.name] = list(request.labels)
        return feature_labels_pb2.CreateFeatureLabelsResponse(feature_labels=made)

    def get_feature_labels(
        self, request: feature_labels_pb2.GetFeatureLabelsRequest
    ) -> feature_labels_pb2.GetFeatureLabelsResponse:
        """A page of a set's labels."""
        found = self._find("featureLabels", request.name)
        wanted = set(request.features)
        labels = [each for each in self._labels[found.name] if not wanted or each.feature in wanted]
        start = int(request.page_token or 0)
        token = str(start + PAGE) if start + PAGE < len(labels) else ""
        return feature_labels_pb2.GetFeatureLabelsResponse(
            feature_labels=found, labels=labels[start : start + PAGE], next_page_token=token
        )

    def list_feature_labels(
        self, request: feature_labels_pb2.ListFeatureLabelsRequest
    ) -> feature_labels_pb2.ListFeatureLabelsResponse:
        """A page of sets."""
        shown, token = self._page("featureLabels", request)
        return feature_labels_pb2.ListFeatureLabelsResponse(feature_labels=shown, next_page_token=token)

    # -- what is kept --------------------------------------------------------------------------------------------

    def _publish(
        self, collection: str, model: FakeModel, wanted: provenance_pb2.Publication, made: Any
    ) -> None:
        versions = self._kept[collection].setdefault(wanted.name, {})
        free = max(versions, default=0) + 1
        version = free if wanted.next_version else wanted.version or 1
        if version != free:
            raise refused(
                "ALREADY_EXISTS",
                f"version {version} of {wanted.name!r} is published already",
                reason=reasons.NAME_TAKEN,
                field="publication.name",
                next_version=str(free),
            )
        made.name = f"models/{model.name}/{collection}/{wanted.name}@{version}"
        made.description = wanted.description
        versions[version] = type(made).FromString(made.SerializeToString())
        if isinstance(made, probes_pb2.Probe):
            model.probes.setdefault(wanted.name, {})[version] = tuple(made.columns)
        elif isinstance(made, directions_pb2.Direction):
            vectors = {at.hook_point: unpack(at.vector) for at in made.at}
            held = FakeDirection(made.best_hook_point, vectors)
            model.directions.setdefault(wanted.name, {})[version] = held

    def _find(self, collection: str, name: str, field: str = "name") -> Any:
        short, _, version = name.rpartition("/")[2].partition("@")
        versions = self._kept[collection].get(short, {})
        found = versions.get(int(version) if version else max(versions, default=0))
        if found is None:
            raise refused(
                "NOT_FOUND", f"no {name!r}", reason=reasons.RESOURCE_NOT_FOUND, field=field, value=name
            )
        return type(found).FromString(found.SerializeToString())

    def _page(self, collection: str, request: Any) -> tuple[list[Any], str]:
        prefix = getattr(request, "name_prefix", "")
        found = []
        for name, versions in sorted(self._kept[collection].items()):
            if name.startswith(prefix) and versions:
                shown = sorted(versions) if request.every_version else [max(versions)]
                found += [versions[version] for version in shown]
        start = int(request.page_token or 0)
        token = str(start + PAGE) if start + PAGE < len(found) else ""
        page = found[start : start + PAGE]
        return [type(each).FromString(each.SerializeToString()) for each in page], token

    def _delete(self, collection: str, name: str) -> list[str]:
        found = self._find(collection, name)
        short, _, version = found.name.rpartition("/")[2].partition("@")
        del self._kept[collection][short][int(version)]
        model = self._model_of(found.name.split("/")[1])
        held: dict[str, dict[str, dict[int, Any]]] = {"probes": model.probes, "directions": model.directions}
        held.get(collection, {}).get(short, {}).pop(int(version), None)
        return [found.name]


def _labels(examples: Sequence[examples_pb2.LabelledExample]) -> list[str]:
    return sorted({label for example in examples for label in example.labels})


def _direction_at(name: str, seed: bytes, rank: int, given: Any) -> directions_pb2.DirectionAt:
    drawn = np.random.default_rng(list(hashlib.sha256(seed + name.encode()).digest()[:8]))
    vector: NDArray[np.float32] = drawn.standard_normal(D_MODEL).astype(np.float32)
    auroc = 1 - 0.5 / (rank + 2)
    return directions_pb2.DirectionAt(
        hook_point=name,
        vector=given if given is not None else pack(vector),
        norm=float(np.linalg.norm(vector)),
        threshold=0.0,
        width=D_MODEL,
        held_out=_discrimination(auroc),
    )


def _discrimination(auroc: float) -> examples_pb2.Discrimination:
    return examples_pb2.Discrimination(
        auroc=_interval(auroc), accuracy=_interval(auroc), effect_size=1.0, n_positive=2, n_negative=2
    )


def _interval(value: float) -> examples_pb2.Interval:
    return examples_pb2.Interval(value=value, low=max(value - 0.1, 0), high=min(value + 0.1, 1), level=0.95)


def _probe(model: FakeModel, request: Any, labels: Sequence[str]) -> probes_pb2.Probe:
    names = [model.resolve(name, f"hook_points[{n}]") for n, name in enumerate(request.hook_points)]
    if not names:
        raise invalid("hook_points", "at least one is needed", reasons.FIELD_REQUIRED)
    binary = len(labels) == 2
    return probes_pb2.Probe(
        kind=request.kind or probes_pb2.PROBE_KIND_LOGISTIC,
        task=probes_pb2.PROBE_TASK_BINARY if binary else probes_pb2.PROBE_TASK_MULTI_CLASS,
        labels=labels,
        columns=labels[1:] if binary else labels,
        hook_points=names,
        widths=[D_MODEL] * len(names),
        pooling=request.pooling,
        calibration=probes_pb2.CALIBRATION_METHOD_PLATT,
    )


def _report(probe: probes_pb2.Probe, n: int) -> probes_pb2.ProbeReport:
    columns = [
        probes_pb2.ProbeColumnReport(
            label=label,
            held_out=_discrimination(0.9),
            ece=0.05,
            ece_before=0.1,
            brier=0.1,
            operating_points=[
                probes_pb2.OperatingPoint(
                    wanted_false_positive_rate=0.01,
                    threshold=0.8,
                    resolved=True,
                    false_positive_rate=_interval(0.01),
                    true_positive_rate=_interval(0.9),
                )
            ],
            control_auroc=_interval(0.5),
        )
        for label in probe.columns
    ]
    return probes_pb2.ProbeReport(
        columns=columns,
        accuracy=_interval(0.9),
        control_accuracy=_interval(0.5),
        selectivity=0.4,
        split=examples_pb2.SplitSummary(n_train=n - n // 4, n_held_out=n // 4),
        n_folds=5,
        converged=True,
    )


def _directions_metadata(phase: str, fraction: float, done: int, total: int) -> Any:
    return directions_pb2.ComputeDirectionsMetadata(
        phase=phase, fraction=fraction, examples_done=done, examples_total=total
    )


def _training_metadata(phase: str, fraction: float, done: int, total: int) -> Any:
    return probes_pb2.TrainProbeMetadata(
        phase=phase, fraction=fraction, examples_done=done, examples_total=total
    )
