"""Directions: types to protobuf, and the parts of their requests."""

from __future__ import annotations

import numpy as np
from google.protobuf.message import Message

from glasshouse.server.operations.compute_directions import ComputedDirections
from glasshouse.server.operations.manager import Progress
from glasshouse.server.probes.directions import DirectionMethod
from glasshouse.server.probes.saved import DirectionAt, SavedDirection
from glasshouse.v1 import directions_pb2 as pb
from glasshouse.wire.tensors import pack

from .concept_messages import (
    discrimination_message,
    pooling_number,
    provenance_message,
    split_message,
    timestamp,
)
from .selectors import selector_message

DICTIONARY_FEATURE, RAW = "dictionary_feature", "raw"

METHODS: dict[int, DirectionMethod] = {
    pb.DIRECTION_METHOD_DIFFERENCE_IN_MEANS: DirectionMethod.DIFFERENCE_IN_MEANS,
    pb.DIRECTION_METHOD_CAA: DirectionMethod.CAA,
    pb.DIRECTION_METHOD_PCA: DirectionMethod.PCA,
    pb.DIRECTION_METHOD_PCA_CENTRED: DirectionMethod.PCA_CENTRED,
    pb.DIRECTION_METHOD_MASS_MEAN: DirectionMethod.MASS_MEAN,
    pb.DIRECTION_METHOD_MASS_MEAN_CORRECTED: DirectionMethod.MASS_MEAN_CORRECTED,
    pb.DIRECTION_METHOD_LOGISTIC: DirectionMethod.LOGISTIC,
    pb.DIRECTION_METHOD_K_MEANS: DirectionMethod.K_MEANS,
}
_NUMBERS: dict[str, pb.DirectionMethod.ValueType] = {
    method.value: pb.DirectionMethod.ValueType(number) for number, method in METHODS.items()
} | {DICTIONARY_FEATURE: pb.DIRECTION_METHOD_DICTIONARY_FEATURE, RAW: pb.DIRECTION_METHOD_RAW}


def direction_message(direction: SavedDirection) -> pb.Direction:
    """A direction, with its vectors where it has them."""
    origin = direction.origin
    return pb.Direction(
        name=origin.name,
        method=_NUMBERS.get(direction.method, pb.DIRECTION_METHOD_UNSPECIFIED),
        at=[_at_message(at) for at in direction.at],
        best_hook_point=direction.best,
        positive_label=direction.positive_label,
        negative_label=direction.negative_label,
        pooling=pooling_number(direction.pooling),
        positions=selector_message(direction.positions),
        description=origin.description,
        provenance=provenance_message(origin.provenance),
        create_time=timestamp(origin.created),
        built_in=origin.built_in,
    )


def computed_message(computed: ComputedDirections) -> pb.ComputeDirectionsResponse:
    """The result of ComputeDirections."""
    split = computed.direction.split
    return pb.ComputeDirectionsResponse(
        direction=direction_message(computed.direction),
        split=None if split is None else split_message(split),
        notes=computed.notes,
    )


def directions_metadata(progress: Progress) -> Message:
    """Progress of ComputeDirections: `done` counts examples while they are read, then hook points."""
    reading = progress.phase == "reading"
    return pb.ComputeDirectionsMetadata(
        phase=progress.phase,
        fraction=stage_fraction(progress, "computing"),
        examples_done=progress.done if reading else 0,
        examples_total=progress.total if reading else 0,
    )


def stage_fraction(progress: Progress, second: str) -> float:
    """How far an operation is whose first half is reading, and whose second is called `second`."""
    if progress.phase == "reading":
        return progress.fraction / 2
    if progress.phase == second:
        return 0.5 + progress.fraction / 2
    return 1.0 if progress.phase in ("publishing", "done") else 0.0


def _at_message(at: DirectionAt) -> pb.DirectionAt:
    return pb.DirectionAt(
        hook_point=at.hook_point,
        vector=None if at.vector is None else pack(np.asarray(at.vector, dtype=np.float32)),
        norm=at.norm,
        threshold=at.threshold,
        held_out=None if at.held_out is None else discrimination_message(at.held_out),
        width=at.width,
    )
