"""Python values -> requests of DirectionService, ProbeService and FeatureLabelService."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from google.protobuf.message import Message

from glasshouse.client import builders
from glasshouse.client.arrays import VectorLike, as_float32
from glasshouse.client.concepts.examples import (
    ExamplesLike,
    PairsLike,
    example_messages,
    pair_messages,
)
from glasshouse.client.concepts.values import FeatureLabel, ProbeWeights
from glasshouse.client.dictionaries.names import dictionary_name
from glasshouse.client.inputs import Input
from glasshouse.client.interventions import Intervention
from glasshouse.client.positions import PositionsLike, as_positions
from glasshouse.client.scalars import text, whole, word
from glasshouse.v1 import (
    directions_pb2,
    examples_pb2,
    feature_labels_pb2,
    probes_pb2,
    provenance_pb2,
)
from glasshouse.wire.tensors import pack

MESSAGE_BYTES: Final = 1 << 20
"""Examples that go into one message of a request, about."""

METHODS: Final = {
    "difference_in_means": directions_pb2.DIRECTION_METHOD_DIFFERENCE_IN_MEANS,
    "caa": directions_pb2.DIRECTION_METHOD_CAA,
    "pca": directions_pb2.DIRECTION_METHOD_PCA,
    "pca_centred": directions_pb2.DIRECTION_METHOD_PCA_CENTRED,
    "mass_mean": directions_pb2.DIRECTION_METHOD_MASS_MEAN,
    "mass_mean_corrected": directions_pb2.DIRECTION_METHOD_MASS_MEAN_CORRECTED,
    "logistic": directions_pb2.DIRECTION_METHOD_LOGISTIC,
    "k_means": directions_pb2.DIRECTION_METHOD_K_MEANS,
    "dictionary_feature": directions_pb2.DIRECTION_METHOD_DICTIONARY_FEATURE,
    "raw": directions_pb2.DIRECTION_METHOD_RAW,
}
POOLINGS: Final = {
    "token": examples_pb2.POOLING_TOKEN,
    "last": examples_pb2.POOLING_LAST,
    "mean": examples_pb2.POOLING_MEAN,
    "max": examples_pb2.POOLING_MAX,
}
KINDS: Final = {
    "logistic": probes_pb2.PROBE_KIND_LOGISTIC,
    "mass_mean": probes_pb2.PROBE_KIND_MASS_MEAN,
    "mass_mean_corrected": probes_pb2.PROBE_KIND_MASS_MEAN_CORRECTED,
    "mlp": probes_pb2.PROBE_KIND_MLP,
}
TASKS: Final = {
    "binary": probes_pb2.PROBE_TASK_BINARY,
    "multi_class": probes_pb2.PROBE_TASK_MULTI_CLASS,
    "multi_label": probes_pb2.PROBE_TASK_MULTI_LABEL,
}
CALIBRATIONS: Final = {
    "none": probes_pb2.CALIBRATION_METHOD_NONE,
    "platt": probes_pb2.CALIBRATION_METHOD_PLATT,
    "isotonic": probes_pb2.CALIBRATION_METHOD_ISOTONIC,
}


def publication(
    name: str | None, version: int | None, next_version: bool, description: str
) -> provenance_pb2.Publication | None:
    """Under which name; None for none."""
    if name is None:
        return None
    return provenance_pb2.Publication(
        name=text(name, "name"),
        version=0 if version is None else whole(version, "version"),
        next_version=next_version,
        description=text(description, "description"),
    )


def compute_directions(
    model: str,
    examples: ExamplesLike | None,
    *,
    pairs: PairsLike | None,
    method: str | None,
    hook_points: str | Sequence[str] | None,
    positions: PositionsLike | None,
    pooling: str,
    positive: str | None,
    held_out_share: float,
    inverse_l2: float,
    n_clusters: int,
    seed: int,
    feature: tuple[Any, int] | None,
    vectors: Mapping[str, VectorLike] | None,
    published: provenance_pb2.Publication | None,
    best_only: bool,
) -> list[Message]:
    """The messages of the request; the first holds all but most of the examples."""
    if method is None:
        method = "dictionary_feature" if feature is not None else "raw" if vectors is not None else None
    first = directions_pb2.ComputeDirectionsRequest(
        model=model,
        method=directions_pb2.DIRECTION_METHOD_UNSPECIFIED
        if method is None
        else word(method, METHODS, "method"),
        hook_points=names(hook_points),
        positions=builders.selector(as_positions(positions), "positions"),
        pooling=word(pooling, POOLINGS, "pooling"),
        positive_label="" if positive is None else text(positive, "positive_label"),
        held_out_share=held_out_share,
        inverse_l2=inverse_l2,
        n_clusters=whole(n_clusters, "n_clusters"),
        seed=whole(seed, "seed", bits=64),
        feature=None if feature is None else dictionary_feature(feature),
        vectors=vectors_at(vectors or {}),
        publication=published,
        publish_best_only=best_only,
    )
    return list(
        _spread(
            first,
            directions_pb2.ComputeDirectionsRequest,
            examples=example_messages(examples) if examples is not None else iter(()),
            pairs=pair_messages(pairs) if pairs is not None else iter(()),
        )
    )


def create_direction(
    model: str,
    *,
    vectors: Mapping[str, VectorLike] | None,
    feature: tuple[Any, int] | None,
    positive: str | None,
    published: provenance_pb2.Publication | None,
) -> directions_pb2.CreateDirectionRequest:
    """Vectors by hook point, or a dictionary's feature."""
    return directions_pb2.CreateDirectionRequest(
        model=model,
        publication=published,
        vectors=vectors_at(vectors or {}),
        feature=None if feature is None else dictionary_feature(feature),
        positive_label="" if positive is None else text(positive, "positive_label"),
    )


def train_probe(
    model: str,
    examples: ExamplesLike,
    *,
    hook_points: str | Sequence[str],
    kind: str,
    task: str | None,
    labels: Sequence[str],
    positive: str | None,
    best: bool,
    positions: PositionsLike | None,
    pooling: str,
    calibration: str,
    false_positive_rates: Sequence[float],
    held_out_share: float,
    inverse_l2: float,
    hidden_width: int,
    weight_decay: float,
    seed: int,
    published: provenance_pb2.Publication | None,
) -> list[Message]:
    """The messages of the request."""
    first = probes_pb2.TrainProbeRequest(
        model=model,
        kind=word(kind, KINDS, "kind"),
        task=probes_pb2.PROBE_TASK_UNSPECIFIED if task is None else word(task, TASKS, "task"),
        labels=labels,
        positive_label="" if positive is None else text(positive, "positive_label"),
        hook_points=names(hook_points),
        hook_point_use=probes_pb2.HOOK_POINT_USE_BEST if best else probes_pb2.HOOK_POINT_USE_TOGETHER,
        positions=builders.selector(as_positions(positions), "positions"),
        pooling=word(pooling, POOLINGS, "pooling"),
        calibration=word(calibration, CALIBRATIONS, "calibration"),
        false_positive_rates=false_positive_rates,
        held_out_share=held_out_share,
        inverse_l2=inverse_l2,
        hidden_width=whole(hidden_width, "hidden_width"),
        weight_decay=weight_decay,
        seed=whole(seed, "seed", bits=64),
        publication=published,
    )
    return list(_spread(first, probes_pb2.TrainProbeRequest, examples=example_messages(examples)))


def create_probe(
    model: str,
    *,
    weights: ProbeWeights,
    labels: Sequence[str],
    hook_points: str | Sequence[str],
    kind: str,
    task: str | None,
    pooling: str,
    positions: PositionsLike | None,
    published: provenance_pb2.Publication | None,
) -> probes_pb2.CreateProbeRequest:
    """A probe trained elsewhere."""
    message = probes_pb2.ProbeWeights(
        layers=[
            probes_pb2.AffineLayer(
                weights=pack(as_float32(matrix, f"weights.layers[{index}].weights")),
                biases=pack(as_float32(biases, f"weights.layers[{index}].biases")),
            )
            for index, (matrix, biases) in enumerate(weights.layers)
        ]
    )
    if weights.platt is not None:
        slopes, offsets = weights.platt
        message.platt.CopyFrom(probes_pb2.PlattCalibration(slopes=slopes, offsets=offsets))
    elif weights.isotonic is not None:
        columns = [
            probes_pb2.IsotonicColumn(margins=margins, probabilities=probabilities)
            for margins, probabilities in weights.isotonic
        ]
        message.isotonic.CopyFrom(probes_pb2.IsotonicCalibration(columns=columns))
    return probes_pb2.CreateProbeRequest(
        model=model,
        publication=published,
        kind=word(kind, KINDS, "kind"),
        task=probes_pb2.PROBE_TASK_UNSPECIFIED if task is None else word(task, TASKS, "task"),
        labels=labels,
        hook_points=names(hook_points),
        pooling=word(pooling, POOLINGS, "pooling"),
        positions=builders.selector(as_positions(positions), "positions"),
        weights=message,
    )


def score_probe(
    probe: str,
    inputs: Sequence[Input],
    *,
    positions: PositionsLike | None,
    every_position: bool,
    interventions: Sequence[Intervention],
) -> probes_pb2.ScoreProbeRequest:
    """Inputs to score."""
    return probes_pb2.ScoreProbeRequest(
        probe=probe,
        inputs=builders.model_inputs(inputs),
        positions=builders.selector(as_positions(positions), "positions"),
        every_position=every_position,
        interventions=builders.edits(interventions),
    )


def create_feature_labels(
    dictionary: str,
    labels: Mapping[int, str] | Sequence[FeatureLabel],
    *,
    method: str,
    published: provenance_pb2.Publication | None,
) -> feature_labels_pb2.CreateFeatureLabelsRequest:
    """Labels by feature, or with their scores."""
    if isinstance(labels, Mapping):
        labels = [FeatureLabel(feature=feature, label=label) for feature, label in labels.items()]
    return feature_labels_pb2.CreateFeatureLabelsRequest(
        dictionary=dictionary,
        publication=published,
        labels=[
            feature_labels_pb2.FeatureLabel(
                feature=whole(each.feature, f"labels[{index}].feature"),
                label=text(each.label, f"labels[{index}].label"),
                score=each.score,
            )
            for index, each in enumerate(labels)
        ],
        method=text(method, "method"),
    )


def names(value: str | Sequence[str] | None) -> list[str]:
    """One name or several."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else [text(name, "hook_points") for name in value]


def dictionary_feature(value: tuple[Any, int]) -> directions_pb2.DictionaryFeature:
    """(dictionary, index)."""
    dictionary, index = value
    return directions_pb2.DictionaryFeature(
        dictionary=dictionary_name(dictionary), feature=whole(index, "feature.feature")
    )


def vectors_at(vectors: Mapping[str, VectorLike]) -> list[directions_pb2.VectorAt]:
    """Vectors by hook point."""
    return [
        directions_pb2.VectorAt(
            hook_point=text(name, f"vectors[{index}].hook_point"),
            vector=pack(as_float32(vector, f"vectors[{index}].vector")),
        )
        for index, (name, vector) in enumerate(vectors.items())
    ]


def _spread(first: Any, kind: Any, **examples: Iterator[Message]) -> Iterator[Message]:
    """`first` and messages of `kind`, with the examples of each field spread over them."""
    current, size = first, first.ByteSize()
    for field, messages in examples.items():
        for message in messages:
            n_bytes = message.ByteSize() + 8
            if size + n_bytes > MESSAGE_BYTES and size:
                yield current
                current, size = kind(), 0
            getattr(current, field).append(message)
            size += n_bytes
    yield current
