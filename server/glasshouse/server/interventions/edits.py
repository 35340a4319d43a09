"""One intervention, checked against its hook point and made ready to apply.

Every edit becomes one of four primitives (see `kernels`): ADD (plain and norm-scaled), PROJECT (ablate a direction, cap
a projection), ROTATE and REPLACE. That is what lets a batch of many different edits run in a handful of operations.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import torch
from torch import Tensor

from glasshouse.server.types.errors import InvalidArgument
from glasshouse.server.types.hook_points import HookPoint
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
from glasshouse.server.types.selectors import ResolvedPositions
from glasshouse.wire import reasons

from .conditions import Gate, PreparedCondition, Steered


class Primitive(Enum):
    """The kernel an edit runs on."""

    ADD = "add"
    PROJECT = "project"
    ROTATE = "rotate"
    REPLACE = "replace"


@dataclass(frozen=True, kw_only=True)
class Scalars:
    """The numbers of an edit: ADD (plain + scaled |s|) v; PROJECT clamps to [low, high]."""

    plain: float = 0.0
    scaled: float = 0.0
    low: float = -math.inf
    high: float = math.inf


@dataclass(eq=False, kw_only=True)
class PreparedIntervention:
    """What every intervention has once it is ready to apply, and the count of what it did."""

    index: int
    kind: str
    hook_points: tuple[HookPoint, ...]
    positions: ResolvedPositions
    preserve_norm: bool = False
    content_hash: str = ""
    # Positions the passes fed that the selector covers, and positions at which the kernel ran.
    promised: int = 0
    applied: int = 0
    # The named directions and probes it uses, with their versions.
    resources: tuple[str, ...] = ()
    condition: PreparedCondition | None = None
    steered: Steered | None = None

    def under(self, condition: PreparedCondition, identity: str) -> None:
        """Makes it apply where `condition` holds; `identity` is what the condition says, for the content hash."""
        self.condition = condition
        self.steered = Steered(torch.zeros((), dtype=torch.int64))
        self.content_hash = hashlib.sha256(f"{self.content_hash} under {identity}".encode()).hexdigest()

    @property
    def n_steered(self) -> int:
        """Positions at which the edit was made. Waits for the device where there is a condition."""
        return self.applied if self.steered is None else int(self.steered.count)


@dataclass(frozen=True, eq=False)
class GatedCells:
    """Cells (row of the batch, index within the row) of edits under conditions: cell i is of `edits[gate.owner_N[i]]`, made
    where `gate.last_N1` is true.
    """

    edits: Sequence[PreparedIntervention]
    gate: Gate
    rows_N: Tensor
    columns_N: Tensor


@dataclass(eq=False, kw_only=True)
class PreparedEdit(PreparedIntervention):
    """An edit at one hook point.

    `vectors` float32 on the model's device: ADD (1, W) v, unit where norm-scaled; PROJECT (1, W) unit v; ROTATE (3, W) b1,
    b2, target; REPLACE (n, W), one row a selected position in order of `row_of`, or (1, W) for all alike.
    """

    primitive: Primitive
    vectors: Tensor
    scalars: Scalars
    row_of: dict[int, int] = field(default_factory=dict)

    @property
    def point(self) -> HookPoint:
        """Where it is applied."""
        return self.hook_points[0]


def prepare(
    intervention: Intervention,
    *,
    index: int,
    point: HookPoint,
    positions: ResolvedPositions,
    device: torch.device,
    field: str,
) -> PreparedEdit:
    """Checks `intervention` against `point` and builds its tensors.

    Raises:
        InvalidArgument: a vector of the wrong width or shape, not finite, or zero where a direction is needed; limits or
            angles that make no sense. `field` is the path of the intervention in the request.
    """
    edit = intervention.edit
    path = f"{field}.{edit.kind}"
    primitive = Primitive.ADD
    vectors: FloatArray
    scalars = Scalars()
    row_of: dict[int, int] = {}
    match edit:
        case AddVector():
            vector = _vector(edit.vector, point, f"{path}.vector")
            coefficient = finite(edit.coefficient, f"{path}.coefficient")
            if edit.norm_scaled:
                vectors, scalars = _unit(vector, f"{path}.vector")[None], Scalars(scaled=coefficient)
            else:
                vectors, scalars = vector[None], Scalars(plain=coefficient)
        case AblateDirection():
            primitive = Primitive.PROJECT
            vectors = _unit(_vector(edit.vector, point, f"{path}.vector"), f"{path}.vector")[None]
            scalars = Scalars(low=0.0, high=0.0)
        case CapProjection():
            primitive = Primitive.PROJECT
            vectors = _unit(_vector(edit.vector, point, f"{path}.vector"), f"{path}.vector")[None]
            scalars = _limits(edit, path)
        case Rotate():
            primitive, vectors = Primitive.ROTATE, _plane(edit, point, path)
        case Replace():
            primitive = Primitive.REPLACE
            vectors, row_of = _replacement(edit, point, positions, f"{path}.activations")
        case SetFeatures() | ScaleFeatures():
            raise AssertionError("a feature edit is prepared by `features.prepare`")
    return PreparedEdit(
        index=index,
        kind=edit.kind,
        hook_points=(point,),
        positions=positions,
        primitive=primitive,
        vectors=torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32)).to(device),
        preserve_norm=intervention.preserve_norm,
        content_hash=content_hash(
            (edit.kind, point.name, intervention.preserve_norm, scalars), positions, vectors
        ),
        row_of=row_of,
        scalars=scalars,
    )


def _vector(vector: Direction, point: HookPoint, field: str) -> FloatArray:
    assert not isinstance(vector, NamedDirection), "the engine puts named directions in place"
    if vector.shape != (point.width,):
        raise InvalidArgument(
            f"the vector has shape {tuple(vector.shape)}, {point.name} has width {point.width}",
            reason=reasons.WRONG_WIDTH,
            field=field,
            value=tuple(vector.shape),
            remedy=f"give a vector of shape ({point.width},)",
        )
    return _all_finite(vector, field)


def _all_finite(array: FloatArray, field: str) -> FloatArray:
    if not np.isfinite(array).all():
        bad = np.argwhere(~np.isfinite(array))[0].tolist()
        raise InvalidArgument(
            f"element {bad} is not finite as float32",
            reason=reasons.VALUE_NOT_FINITE,
            field=field,
            value=array[tuple(bad)],
            remedy="send finite numbers only",
        )
    return array


def _unit(vector: FloatArray, field: str) -> FloatArray:
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    if norm == 0.0:
        raise InvalidArgument(
            "a vector of zeros has no direction",
            reason=reasons.VALUE_OUT_OF_RANGE,
            field=field,
            value="norm 0",
            remedy="give a vector that is not zero",
        )
    return (vector.astype(np.float64) / norm).astype(np.float32)


def finite(number: float, field: str) -> float:
    # A coefficient beyond float32 would turn activations infinite.
    if not math.isfinite(number) or abs(number) > float(np.finfo(np.float32).max):
        raise InvalidArgument(
            f"{number} is not a finite float32 number",
            reason=reasons.VALUE_NOT_FINITE,
            field=field,
            value=number,
            remedy="send a finite number",
        )
    return number


def _limits(edit: CapProjection, path: str) -> Scalars:
    if edit.maximum is None and edit.minimum is None:
        raise InvalidArgument(
            "neither max nor min is given",
            reason=reasons.FIELD_REQUIRED,
            field=f"{path}.max",
            remedy="give max, min or both",
        )
    high = math.inf if edit.maximum is None else finite(edit.maximum, f"{path}.max")
    low = -math.inf if edit.minimum is None else finite(edit.minimum, f"{path}.min")
    if low > high:
        raise InvalidArgument(
            f"min {low} is above max {high}",
            reason=reasons.VALUE_OUT_OF_RANGE,
            field=f"{path}.min",
            value=low,
            remedy="give min <= max",
        )
    return Scalars(low=low, high=high)


def _plane(edit: Rotate, point: HookPoint, path: str) -> FloatArray:
    angle = finite(edit.angle_radians, f"{path}.angle_radians")
    first = _unit(_vector(edit.first, point, f"{path}.first"), f"{path}.first").astype(np.float64)
    second = _unit(_vector(edit.second, point, f"{path}.second"), f"{path}.second").astype(np.float64)
    across = second - (second @ first) * first
    norm = float(np.linalg.norm(across))
    if norm < 1e-5:
        raise InvalidArgument(
            "first and second are parallel: they span no plane",
            reason=reasons.VALUE_OUT_OF_RANGE,
            field=f"{path}.second",
            value=f"sine of the angle between them {norm:.1e}",
            remedy="give two vectors that are not parallel",
        )
    across /= norm
    target = math.cos(angle) * first + math.sin(angle) * across
    return np.stack([first, across, target]).astype(np.float32)


def _replacement(
    edit: Replace, point: HookPoint, positions: ResolvedPositions, field: str
) -> tuple[FloatArray, dict[int, int]]:
    rows = edit.activations
    if rows.shape == (point.width,):
        return _all_finite(rows, field)[None], {}
    if rows.ndim != 2 or rows.shape[1] != point.width:
        raise InvalidArgument(
            f"the activations have shape {tuple(rows.shape)}, {point.name} has width {point.width}",
            reason=reasons.WRONG_WIDTH,
            field=field,
            value=tuple(rows.shape),
            remedy=f"give shape (n, {point.width}) for n selected positions, or ({point.width},)",
        )
    selected = [p for low, high in positions.ranges for p in range(low, high) if p not in positions.excluded]
    if positions.excluded_token_ids or len(selected) != rows.shape[0]:
        raise InvalidArgument(
            f"{rows.shape[0]} rows of activations for {len(selected)} selected positions",
            reason=reasons.WRONG_WIDTH,
            field=field,
            value=tuple(rows.shape),
            remedy="select as many positions as there are rows, by a list or a span with a stop",
        )
    return _all_finite(rows, field), {position: row for row, position in enumerate(selected)}


def content_hash(what: object, positions: ResolvedPositions, array: FloatArray) -> str:
    """SHA-256, in hex, over what is done (`what`, by its repr), where, and with which numbers."""
    where = (positions.ranges, sorted(positions.excluded), sorted(positions.excluded_token_ids))
    digest = hashlib.sha256(repr((what, where, array.shape)).encode())
    digest.update(np.ascontiguousarray(array, dtype="<f4").tobytes())
    return digest.hexdigest()
