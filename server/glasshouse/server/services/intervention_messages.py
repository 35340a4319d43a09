"""Interventions and selectors as messages: what is kept is shown as it would be asked for."""

from __future__ import annotations

from glasshouse.server.types.interventions import (
    AblateDirection,
    AddVector,
    CapProjection,
    Direction,
    FloatArray,
    Intervention,
    NamedDirection,
    Replace,
    Rotate,
    ScaleFeatures,
    SetFeatures,
)
from glasshouse.server.types.selectors import NamedPositions, Selector
from glasshouse.v1 import inputs_pb2, tensors_pb2
from glasshouse.v1 import interventions_pb2 as pb

from .tensors import fill

_NAMED = {
    NamedPositions.ALL: inputs_pb2.NAMED_POSITIONS_ALL,
    NamedPositions.PROMPT: inputs_pb2.NAMED_POSITIONS_PROMPT,
    NamedPositions.GENERATED: inputs_pb2.NAMED_POSITIONS_GENERATED,
    NamedPositions.LAST: inputs_pb2.NAMED_POSITIONS_LAST,
}


def selector_message(selector: Selector) -> inputs_pb2.PositionSelector:
    """A selector as it would be asked for."""
    message = inputs_pb2.PositionSelector(
        exclude_bos=selector.exclude_bos, exclude_special=selector.exclude_special
    )
    if selector.named is not None:
        message.named = _NAMED[selector.named]
    elif selector.at is not None:
        message.at.positions.extend(selector.at)
    elif selector.span is not None:
        start, stop = selector.span
        message.span.start = start
        if stop is not None:
            message.span.stop = stop
    return message


def intervention_message(intervention: Intervention) -> pb.Intervention:
    """An edit as it would be asked for, its condition left out: what is kept has none."""
    message = pb.Intervention(
        hook_point=intervention.hook_point,
        positions=selector_message(intervention.positions),
        preserve_norm=intervention.preserve_norm,
    )
    match intervention.edit:
        case AddVector() as edit:
            message.add_vector.coefficient = edit.coefficient
            message.add_vector.scale = pb.ADD_SCALE_NORM if edit.norm_scaled else pb.ADD_SCALE_PLAIN
            _vector(message.add_vector, edit.vector)
        case AblateDirection() as edit:
            _vector(message.ablate_direction, edit.vector)
        case CapProjection() as edit:
            if edit.maximum is not None:
                message.cap_projection.max = edit.maximum
            if edit.minimum is not None:
                message.cap_projection.min = edit.minimum
            _vector(message.cap_projection, edit.vector)
        case Rotate() as edit:
            message.rotate.angle_radians = edit.angle_radians
            if isinstance(edit.first, NamedDirection):
                message.rotate.first_direction = edit.first.name
            else:
                _fill(message.rotate.first, edit.first)
            if isinstance(edit.second, NamedDirection):
                message.rotate.second_direction = edit.second.name
            else:
                _fill(message.rotate.second, edit.second)
        case Replace() as edit:
            _fill(message.replace.activations, edit.activations)
        case SetFeatures() as edit:
            message.set_features.dictionary = edit.dictionary
            message.set_features.features.extend(edit.features)
            message.set_features.values.extend(edit.values)
        case ScaleFeatures() as edit:
            message.scale_features.dictionary = edit.dictionary
            message.scale_features.features.extend(edit.features)
            message.scale_features.factors.extend(edit.factors)
    return message


def _vector(message: pb.AddVector | pb.AblateDirection | pb.CapProjection, direction: Direction) -> None:
    if isinstance(direction, NamedDirection):
        message.direction = direction.name
    else:
        _fill(message.vector, direction)


def _fill(message: tensors_pb2.Tensor, array: FloatArray) -> None:
    fill(message, array)
