"""Responses of DirectionService, ProbeService and FeatureLabelService -> values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC
from typing import Any, Final

from glasshouse.client.concepts import builders
from glasshouse.client.concepts.values import (
    DirectionAt,
    DirectionInfo,
    Discrimination,
    FeatureLabel,
    FeatureLabelsInfo,
    Interval,
    OperatingPoint,
    ProbeCandidate,
    ProbeColumnReport,
    ProbeInfo,
    ProbeReport,
    ProbeWeights,
    Provenance,
    SplitSummary,
)
from glasshouse.client.parsers import Page
from glasshouse.v1 import directions_pb2, examples_pb2, feature_labels_pb2, probes_pb2
from glasshouse.wire.tensors import unpack


def _words(numbers: Mapping[str, int]) -> dict[int, str]:
    return {number: name for name, number in numbers.items()}


_METHODS: Final = _words(builders.METHODS)
_POOLINGS: Final = _words(builders.POOLINGS)
_KINDS: Final = _words(builders.KINDS)
_TASKS: Final = _words(builders.TASKS)
_CALIBRATIONS: Final = _words(builders.CALIBRATIONS)


def direction(message: directions_pb2.Direction) -> DirectionInfo:
    """A direction."""
    return DirectionInfo(
        **_published(message),
        method=_METHODS.get(message.method, "unknown"),
        at={at.hook_point: _at(at) for at in message.at},
        best_hook_point=message.best_hook_point,
        positive_label=message.positive_label,
        negative_label=message.negative_label,
        pooling=_POOLINGS.get(message.pooling, "last"),  # type: ignore[arg-type]
    )


def got_direction(response: directions_pb2.GetDirectionResponse) -> DirectionInfo:
    """The direction of GetDirection."""
    return direction(response.direction)


def direction_page(response: directions_pb2.ListDirectionsResponse) -> Page[DirectionInfo]:
    """A page of ListDirections."""
    return Page([direction(message) for message in response.directions], response.next_page_token)


def computed(response: directions_pb2.ComputeDirectionsResponse) -> DirectionInfo:
    """The direction of ComputeDirections, with its split and notes."""
    return replace(
        direction(response.direction),
        split=_split(response.split) if response.HasField("split") else None,
        notes=list(response.notes),
    )


def probe(message: probes_pb2.Probe) -> ProbeInfo:
    """A probe."""
    return ProbeInfo(
        **_published(message),
        kind=_KINDS.get(message.kind, "unknown"),
        task=_TASKS.get(message.task, "binary"),  # type: ignore[arg-type]
        labels=list(message.labels),
        columns=list(message.columns),
        hook_points=list(message.hook_points),
        widths=list(message.widths),
        pooling=_POOLINGS.get(message.pooling, "last"),  # type: ignore[arg-type]
        calibration=_CALIBRATIONS.get(message.calibration, "none"),  # type: ignore[arg-type]
        report=_report(message.report) if message.HasField("report") else None,
        weights=_weights(message.weights) if message.HasField("weights") else None,
    )


def got_probe(response: probes_pb2.GetProbeResponse) -> ProbeInfo:
    """The probe of GetProbe."""
    return probe(response.probe)


def probe_page(response: probes_pb2.ListProbesResponse) -> Page[ProbeInfo]:
    """A page of ListProbes."""
    return Page([probe(message) for message in response.probes], response.next_page_token)


def trained(response: probes_pb2.TrainProbeResponse) -> ProbeInfo:
    """The probe of TrainProbe, with its candidates."""
    tried = [
        ProbeCandidate(
            hook_point=each.hook_point,
            out_of_fold_auroc=each.out_of_fold_auroc,
            held_out_auroc=each.held_out_auroc,
        )
        for each in response.candidates
    ]
    return replace(probe(response.probe), candidates=tried)


def feature_labels(message: feature_labels_pb2.FeatureLabels) -> FeatureLabelsInfo:
    """A set of feature labels."""
    return FeatureLabelsInfo(
        **_published(message),
        dictionary=message.dictionary.partition("/dictionaries/")[2],
        count=message.count,
    )


def feature_labels_page(
    response: feature_labels_pb2.ListFeatureLabelsResponse,
) -> Page[FeatureLabelsInfo]:
    """A page of ListFeatureLabels."""
    return Page([feature_labels(message) for message in response.feature_labels], response.next_page_token)


def label_page(response: feature_labels_pb2.GetFeatureLabelsResponse) -> Page[FeatureLabel]:
    """The labels of GetFeatureLabels."""
    found = [
        FeatureLabel(
            feature=each.feature, label=each.label, score=each.score if each.HasField("score") else None
        )
        for each in response.labels
    ]
    return Page(found, response.next_page_token)


def interval(message: examples_pb2.Interval) -> Interval:
    """A figure with its interval."""
    return Interval(message.value, message.low, message.high, message.level)


def _published(message: Any) -> dict[str, Any]:
    """The fields of `Published` from a message that has a resource name, provenance and time."""
    _, _, rest = message.name.partition("models/")
    model, _, tail = rest.partition("/")
    name, _, version = tail.partition("/")[2].partition("@")
    origin = message.provenance
    return {
        "name": name,
        "model": model,
        "version": int(version or 0),
        "description": message.description,
        "provenance": Provenance(
            model_revision=origin.model_revision,
            hook_points=list(origin.hook_points),
            method=origin.method,
            data_hash=origin.data_hash,
            metrics=dict(sorted(origin.metrics.items())),
            author=origin.author,
        ),
        "created": message.create_time.ToDatetime(UTC) if message.HasField("create_time") else None,
        "built_in": getattr(message, "built_in", False),
    }


def _at(message: directions_pb2.DirectionAt) -> DirectionAt:
    return DirectionAt(
        hook_point=message.hook_point,
        width=message.width,
        norm=message.norm,
        threshold=message.threshold if message.HasField("threshold") else None,
        held_out=_discrimination(message.held_out) if message.HasField("held_out") else None,
        vector=unpack(message.vector) if message.HasField("vector") else None,
    )


def _discrimination(message: examples_pb2.Discrimination) -> Discrimination:
    return Discrimination(
        auroc=interval(message.auroc),
        accuracy=interval(message.accuracy),
        effect_size=message.effect_size,
        n_positive=message.n_positive,
        n_negative=message.n_negative,
    )


def _split(message: examples_pb2.SplitSummary) -> SplitSummary:
    return SplitSummary(
        n_train=message.n_train,
        n_held_out=message.n_held_out,
        n_duplicates=message.n_duplicates,
        n_left_out=message.n_left_out,
        n_conflicting=message.n_conflicting,
    )


def _report(message: probes_pb2.ProbeReport) -> ProbeReport:
    return ProbeReport(
        columns=[_column(column) for column in message.columns],
        accuracy=interval(message.accuracy),
        control_accuracy=interval(message.control_accuracy),
        selectivity=message.selectivity,
        split=_split(message.split),
        n_folds=message.n_folds,
        converged=message.converged,
        notes=list(message.notes),
    )


def _column(message: probes_pb2.ProbeColumnReport) -> ProbeColumnReport:
    points = [
        OperatingPoint(
            wanted_false_positive_rate=point.wanted_false_positive_rate,
            threshold=point.threshold,
            resolved=point.resolved,
            false_positive_rate=interval(point.false_positive_rate),
            true_positive_rate=interval(point.true_positive_rate),
        )
        for point in message.operating_points
    ]
    return ProbeColumnReport(
        label=message.label,
        held_out=_discrimination(message.held_out),
        ece_before=message.ece_before,
        ece=message.ece,
        brier=message.brier,
        operating_points=points,
        control_auroc=interval(message.control_auroc),
    )


def _weights(message: probes_pb2.ProbeWeights) -> ProbeWeights:
    kind = message.WhichOneof("calibration")
    return ProbeWeights(
        layers=[(unpack(layer.weights), unpack(layer.biases)) for layer in message.layers],
        platt=(list(message.platt.slopes), list(message.platt.offsets)) if kind == "platt" else None,
        isotonic=[(list(each.margins), list(each.probabilities)) for each in message.isotonic.columns]
        if kind == "isotonic"
        else None,
    )
