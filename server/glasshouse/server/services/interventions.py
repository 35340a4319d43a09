"""Interventions: protobuf to types, and their receipts back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from glasshouse.server.types.errors import InvalidArgument
from glasshouse.server.types.interventions import (
    AblateDirection,
    AddVector,
    CapProjection,
    Direction,
    Edit,
    FloatArray,
    Intervention,
    InterventionReceipt,
    NamedDirection,
    Replace,
    Rotate,
    ScaleFeatures,
    SetFeatures,
)
from glasshouse.server.types.limits import Limits
from glasshouse.v1 import interventions_pb2 as pb
from glasshouse.v1 import tensors_pb2
from glasshouse.wire import reasons

from . import fields, tensors
from .conditions import condition
from .selectors import selector

_FEATURE_EDITS = ("set_features", "scale_features")
_EDITS = ("add_vector", "ablate_direction", "cap_projection", "rotate", "replace", *_FEATURE_EDITS)
MAX_FEATURES = 4096
# Below this sine of the angle between them, two vectors span no plane in float32.
_PARALLEL_SINE = 1e-5
_PLANE: tuple[Literal["first", "second"], ...] = ("first", "second")


def interventions(messages: Sequence[pb.Intervention], limits: Limits) -> tuple[Intervention, ...]:
    """The edits of a request, in order."""
    fields.count(
        len(messages), "interventions", limits.max_interventions, "max_interventions", "interventions"
    )
    return tuple(_intervention(m, f"interventions[{i}]", limits) for i, m in enumerate(messages))


def receipts(entries: Sequence[InterventionReceipt]) -> list[pb.InterventionReceipt]:
    """Receipts as messages."""
    return [
        pb.InterventionReceipt(
            index=entry.index,
            edit=entry.edit,
            hook_point=entry.hook_points[0] if entry.hook_points else "",
            positions_applied=entry.positions_applied,
            hook_points=entry.hook_points,
            content_hash=entry.content_hash,
            positions_steered=entry.positions_steered,
            resources=entry.resources,
        )
        for entry in entries
    ]


def _intervention(message: pb.Intervention, field: str, limits: Limits) -> Intervention:
    kind = message.WhichOneof("edit")
    if kind is not None and kind not in _EDITS:
        raise fields.not_served(f"{field}.{kind}", kind)
    if not message.hook_point and kind not in _FEATURE_EDITS and not _names_a_direction(message):
        raise fields.required(
            f"{field}.hook_point", "where to edit", "name a writable hook point; ListHookPoints lists them"
        )
    positions = selector(message.positions, message.HasField("positions"), f"{field}.positions", limits)
    return Intervention(
        hook_point=message.hook_point,
        edit=_edit(message, field),
        positions=positions,
        preserve_norm=message.preserve_norm,
        condition=(
            condition(message.condition, f"{field}.condition", limits)
            if message.HasField("condition")
            else None
        ),
    )


def _names_a_direction(message: pb.Intervention) -> bool:
    """Whether a named direction can say where the edit is made."""
    match message.WhichOneof("edit"):
        case "add_vector":
            return bool(message.add_vector.direction)
        case "ablate_direction":
            return bool(message.ablate_direction.direction)
        case "cap_projection":
            return bool(message.cap_projection.direction)
        case "rotate":
            return bool(message.rotate.first_direction or message.rotate.second_direction)
        case _:
            return False


def _direction(
    vector: tensors_pb2.Tensor, present: bool, name: str, field: str, named: str, *, nonzero: bool
) -> Direction:
    """A vector, or the name of one: `field` is the vector's path, `named` the name's."""
    if not name:
        return tensors.vector(vector, present, field, nonzero=nonzero)
    if present:
        raise InvalidArgument(
            f"{field} and {named} are both given",
            reason=reasons.FIELD_CONFLICT,
            field=named,
            value=name,
            remedy="send the vector, or name a direction",
        )
    return NamedDirection(name)


def _edit(message: pb.Intervention, field: str) -> Edit:
    match message.WhichOneof("edit"):
        case "add_vector":
            return _add_vector(message.add_vector, f"{field}.add_vector")
        case "ablate_direction":
            ablate = message.ablate_direction
            path = f"{field}.ablate_direction"
            return AblateDirection(vector=_vector(ablate, path, nonzero=True))
        case "cap_projection":
            return _cap(message.cap_projection, f"{field}.cap_projection")
        case "rotate":
            return _rotate(message.rotate, f"{field}.rotate")
        case "replace":
            return _replace(message.replace, f"{field}.replace")
        case "set_features":
            chosen, path = message.set_features, f"{field}.set_features"
            numbers = _features(chosen.dictionary, chosen.features, chosen.values, path, "values")
            return SetFeatures(dictionary=chosen.dictionary, features=tuple(chosen.features), values=numbers)
        case "scale_features":
            scaled, path = message.scale_features, f"{field}.scale_features"
            numbers = _features(scaled.dictionary, scaled.features, scaled.factors, path, "factors")
            return ScaleFeatures(
                dictionary=scaled.dictionary, features=tuple(scaled.features), factors=numbers
            )
        case _:
            names = ", ".join(_EDITS)
            raise fields.required(field, f"an edit, one of {names}", f"set one of {names}")


def _vector(
    message: pb.AddVector | pb.AblateDirection | pb.CapProjection, field: str, *, nonzero: bool
) -> Direction:
    return _direction(
        message.vector,
        message.HasField("vector"),
        message.direction,
        f"{field}.vector",
        f"{field}.direction",
        nonzero=nonzero,
    )


def _add_vector(message: pb.AddVector, field: str) -> AddVector:
    if message.scale not in pb.AddScale.values():
        raise fields.out_of_range(f"{field}.scale", message.scale, "a known AddScale: plain or norm")
    norm_scaled = message.scale == pb.ADD_SCALE_NORM
    return AddVector(
        vector=_vector(message, field, nonzero=norm_scaled),
        coefficient=(
            fields.finite(message.coefficient, f"{field}.coefficient")
            if message.HasField("coefficient")
            else 1.0
        ),
        norm_scaled=norm_scaled,
    )


def _cap(message: pb.CapProjection, field: str) -> CapProjection:
    maximum = fields.finite(message.max, f"{field}.max") if message.HasField("max") else None
    minimum = fields.finite(message.min, f"{field}.min") if message.HasField("min") else None
    if maximum is None and minimum is None:
        raise fields.required(f"{field}.max", "at least one of max and min", "set max, min or both")
    if maximum is not None and minimum is not None and minimum > maximum:
        raise InvalidArgument(
            f"{field}.min is {minimum}, above max, {maximum}",
            reason=reasons.FIELD_CONFLICT,
            field=f"{field}.min",
            value=minimum,
            remedy="give a min that is not above max",
        )
    return CapProjection(vector=_vector(message, field, nonzero=True), maximum=maximum, minimum=minimum)


def _rotate(message: pb.RotateActivation, field: str) -> Rotate:
    first, second = (
        _direction(
            getattr(message, part),
            message.HasField(part),
            getattr(message, f"{part}_direction"),
            f"{field}.{part}",
            f"{field}.{part}_direction",
            nonzero=True,
        )
        for part in _PLANE
    )
    angle = fields.finite(message.angle_radians, f"{field}.angle_radians")
    if isinstance(first, NamedDirection) or isinstance(second, NamedDirection):
        return Rotate(first=first, second=second, angle_radians=angle)
    if first.shape != second.shape:
        raise InvalidArgument(
            f"{field}.second has {second.size} elements, first has {first.size}",
            reason=reasons.WRONG_WIDTH,
            field=f"{field}.second",
            value=second.size,
            remedy="give two vectors of the hook point's width",
        )
    if _parallel(first, second):
        raise InvalidArgument(
            f"{field}.second is parallel to first: together they span no plane",
            reason=reasons.VALUE_OUT_OF_RANGE,
            field=f"{field}.second",
            value="parallel to first",
            remedy="give two vectors that point in different directions",
        )
    return Rotate(first=first, second=second, angle_radians=angle)


def _parallel(first: FloatArray, second: FloatArray) -> bool:
    a = first.astype(np.float64) / np.abs(first).max()
    b = second.astype(np.float64) / np.abs(second).max()
    a /= np.linalg.norm(a)
    b /= np.linalg.norm(b)
    return bool(np.linalg.norm(b - (a @ b) * a) < _PARALLEL_SINE)


def _replace(message: pb.ReplaceActivations, field: str) -> Replace:
    path = f"{field}.activations"
    array = tensors.floats(message.activations, message.HasField("activations"), path)
    if array.ndim not in (1, 2):
        raise InvalidArgument(
            f"{path}.shape: expected (width,) or (n, width), found {array.shape}",
            reason=reasons.TENSOR_MALFORMED,
            field=f"{path}.shape",
            value=array.shape,
            remedy="send one row for every selected position, or a single row for all",
        )
    return Replace(activations=array)


def _features(
    dictionary: str, features: Sequence[int], numbers: Sequence[float], field: str, name: str
) -> tuple[float, ...]:
    """The checked `numbers` of a feature edit; which features the dictionary has is for the engine to say."""
    if not dictionary:
        raise fields.required(f"{field}.dictionary", "whose features", "name a dictionary that is loaded")
    if not features:
        raise fields.required(f"{field}.features", "at least one feature", "list the features to edit")
    if len(features) > MAX_FEATURES:
        raise fields.out_of_range(
            f"{field}.features", f"a list of {len(features)}", f"at most {MAX_FEATURES} features"
        )
    if len(numbers) not in (1, len(features)):
        raise InvalidArgument(
            f"{field}.{name} has {len(numbers)} entries for {len(features)} features",
            reason=reasons.FIELD_CONFLICT,
            field=f"{field}.{name}",
            value=len(numbers),
            remedy="give one for each feature, or one for all",
        )
    return tuple(fields.finite(number, f"{field}.{name}[{at}]") for at, number in enumerate(numbers))
