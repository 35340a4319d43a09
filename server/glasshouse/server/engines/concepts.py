"""The directions and probes that a request names, looked up before it is checked."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from glasshouse.server.hooks.table import HookTable
from glasshouse.server.probes.concepts import ConceptStore, HeldDirection, HeldProbe
from glasshouse.server.probes.served import ServedProbe
from glasshouse.server.types.conditions import Condition, ProbeColumn
from glasshouse.server.types.errors import FailedPrecondition, ServingError
from glasshouse.server.types.hook_points import HookPoint
from glasshouse.server.types.interventions import (
    AblateDirection,
    AddVector,
    CapProjection,
    Direction,
    FloatArray,
    Intervention,
    NamedDirection,
    Rotate,
)
from glasshouse.server.types.readouts import Readout, ReadProbe
from glasshouse.wire import reasons


@dataclass(frozen=True, kw_only=True)
class Concepts:
    """What the names in a request mean."""

    probes: Mapping[str, HeldProbe] = field(default_factory=dict)
    directions: Mapping[str, HeldDirection] = field(default_factory=dict)


NO_CONCEPTS = Concepts()


async def look_up(
    store: ConceptStore,
    interventions: Sequence[Intervention] = (),
    readouts: Sequence[Readout] = (),
    abort_when: Sequence[Condition] = (),
) -> Concepts:
    """Every probe and direction that a request names, each looked up once. Raises as `ConceptStore` does."""
    probes: dict[str, HeldProbe] = {}
    for name, path in _probe_names(interventions, readouts, abort_when):
        if name not in probes:
            probes[name] = await store.probe(name, field=path)
    directions: dict[str, HeldDirection] = {}
    for name, path in _direction_names(interventions):
        if name not in directions:
            directions[name] = await store.direction(name, field=path)
    return Concepts(probes=probes, directions=directions) if probes or directions else NO_CONCEPTS


def _probe_names(
    interventions: Sequence[Intervention], readouts: Sequence[Readout], abort_when: Sequence[Condition]
) -> Iterator[tuple[str, str]]:
    for index, readout in enumerate(readouts):
        if isinstance(readout, ReadProbe):
            yield readout.probe, f"readouts[{index}].probe.probe"
    for index, intervention in enumerate(interventions):
        condition = intervention.condition
        if condition is not None and isinstance(condition.source, ProbeColumn):
            yield condition.source.probe, f"interventions[{index}].condition.probe.probe"
    for index, condition in enumerate(abort_when):
        if isinstance(condition.source, ProbeColumn):
            yield condition.source.probe, f"abort_when[{index}].probe.probe"


def _direction_names(interventions: Sequence[Intervention]) -> Iterator[tuple[str, str]]:
    for index, intervention in enumerate(interventions):
        for path, direction in _directions(intervention):
            if isinstance(direction, NamedDirection):
                yield direction.name, f"interventions[{index}].{intervention.edit.kind}.{path}"


def _directions(intervention: Intervention) -> tuple[tuple[str, Direction], ...]:
    """(path within the edit, direction) of those that may be given by name."""
    match intervention.edit:
        case AddVector(vector=vector) | AblateDirection(vector=vector) | CapProjection(vector=vector):
            return (("direction", vector),)
        case Rotate(first=first, second=second):
            return (("first_direction", first), ("second_direction", second))
        case _:
            return ()


def in_place(
    intervention: Intervention, concepts: Concepts, table: HookTable, field: str
) -> tuple[Intervention, tuple[str, ...]]:
    """`intervention` with the vectors of its named directions, at their hook point where it names none; and their names.

    Raises:
        FailedPrecondition: a direction of another width than the hook point, or directions of different hook points and
            none given.
    """
    used = [
        concepts.directions[direction.name]
        for _, direction in _directions(intervention)
        if isinstance(direction, NamedDirection)
    ]
    if not used:
        return intervention, ()
    point = table.resolve(intervention.hook_point or used[0].hook_point, field=f"{field}.hook_point")
    for held in used:
        if held.at(point.name).shape != (point.width,):
            raise _mismatch(
                f"{held.name} has {held.vector.size} elements, {point.name} has {point.width}",
                f"{field}.hook_point",
                held.name,
                f"edit where it was computed, {held.hook_point}, or compute one for {point.name}",
            )
        if not intervention.hook_point and held.hook_point != used[0].hook_point:
            raise _mismatch(
                f"{used[0].name} is of {used[0].hook_point}, {held.name} of {held.hook_point}",
                f"{field}.hook_point",
                held.name,
                "name the hook point to edit",
            )

    def vector(direction: Direction) -> FloatArray:
        if isinstance(direction, NamedDirection):
            return concepts.directions[direction.name].at(point.name)
        return direction

    edit = intervention.edit
    match edit:
        case AddVector() | AblateDirection() | CapProjection():
            edit = replace(edit, vector=vector(edit.vector))
        case Rotate():
            edit = replace(edit, first=vector(edit.first), second=vector(edit.second))
        case _:
            raise AssertionError(f"{edit.kind} takes no direction")
    return replace(intervention, hook_point=point.name, edit=edit), tuple(held.name for held in used)


class DeviceProbes:
    """Probes on the model's device in float32, each copied once for all the requests that hold it."""

    def __init__(self, table: HookTable, device: torch.device) -> None:
        self._table, self._device = table, device
        self._copies: weakref.WeakValueDictionary[str, ServedProbe] = weakref.WeakValueDictionary()

    def of(self, held: HeldProbe) -> ServedProbe:
        """The device's copy, the same for all requests that hold it."""
        copy = self._copies.get(held.content_hash)
        return copy or self._copies.setdefault(held.content_hash, held.probe.to(self._device))

    def points(self, held: HeldProbe, field: str) -> tuple[HookPoint, ...]:
        """The model's hook points that it reads.

        Raises:
            FailedPrecondition: the model has no such point, or one of another width.
        """
        points: list[HookPoint] = []
        facts = held.probe.facts
        for name, width in zip(facts.hook_points, facts.widths, strict=True):
            try:
                point = self._table.resolve(name, field=field)
            except ServingError as error:
                raise _mismatch(
                    f"{held.name} reads a hook point that this model lacks: {error.message}",
                    field,
                    held.name,
                    "use a probe that was trained on this model",
                ) from error
            if point.width != width or not point.readable:
                raise _mismatch(
                    f"{held.name} reads {width} elements at {point.name}, the model has {point.width} to read",
                    field,
                    held.name,
                    "use a probe that was trained on this model",
                )
            points.append(point)
        return tuple(points)


def _mismatch(message: str, field: str, name: str, remedy: str) -> FailedPrecondition:
    return FailedPrecondition(message, reason=reasons.MODEL_MISMATCH, field=field, value=name, remedy=remedy)
