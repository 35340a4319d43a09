"""A monitor in the registry: a JSON object, and tensors where it steers. Nothing is executed on the way back.

    {"format": 1, "spec": {"type": "MonitorSpec", "source": {"type": "ProbeColumn", ...}, ...}}

- A value of one of `_CLASSES` is an object with its class as "type" and its fields; those at their defaults are left out,
  so a field that is added later reads as its default.
- An enumeration is its value, a tuple a list, an array {"tensor": KEY} beside the tensor KEY.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import numpy as np

from glasshouse.server.monitors.spec import DriftSpec, MonitorFilter, MonitorSpec, WebhookSpec
from glasshouse.server.probes.aggregation import Rule
from glasshouse.server.probes.drift import ScoreHistogram
from glasshouse.server.registry.names import Kind, Reference, parse
from glasshouse.server.registry.records import Arrays, Draft, Provenance
from glasshouse.server.types import interventions as edits
from glasshouse.server.types.conditions import FeatureColumn, ProbeColumn
from glasshouse.server.types.errors import FailedPrecondition
from glasshouse.server.types.selectors import Selector
from glasshouse.wire import reasons

FORMAT = 1

_CLASSES: Mapping[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        MonitorSpec,
        ProbeColumn,
        FeatureColumn,
        Rule,
        Selector,
        MonitorFilter,
        DriftSpec,
        ScoreHistogram,
        WebhookSpec,
        edits.Intervention,
        edits.AddVector,
        edits.AblateDirection,
        edits.CapProjection,
        edits.Rotate,
        edits.Replace,
        edits.SetFeatures,
        edits.ScaleFeatures,
        edits.NamedDirection,
    )
}


def draft(
    spec: MonitorSpec,
    *,
    model: str,
    name: str,
    version: int | None,
    author: str,
    is_built_in: Callable[[Reference], bool] = lambda reference: False,
) -> Draft:
    """`spec` as something to publish. What it names in the registry must stay as long as it does."""
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    body = {"format": FORMAT, "spec": _to_json(spec, tensors, "spec")}
    used = []
    if isinstance(spec.source, ProbeColumn):
        used.append(parse(spec.source.probe, kind=Kind.PROBE, model=model, field="spec.probe.probe"))
    for intervention in spec.interventions:
        for direction in named_directions(intervention).values():
            used.append(parse(direction, kind=Kind.DIRECTION, model=model, field="spec.interventions"))
    return Draft(
        kind=Kind.MONITOR,
        model=model,
        name=name,
        version=version,
        provenance=Provenance(method="monitor", author=author),
        body=body,
        tensors=tensors,
        uses=tuple(reference for reference in dict.fromkeys(used) if not is_built_in(reference)),
    )


def named_directions(intervention: edits.Intervention) -> dict[str, str]:
    """The directions that an edit uses by name: field of the edit -> name."""
    values = {
        field.name: getattr(intervention.edit, field.name) for field in dataclasses.fields(intervention.edit)
    }
    return {field: value.name for field, value in values.items() if isinstance(value, edits.NamedDirection)}


def dictionaries_of(spec: MonitorSpec) -> frozenset[str]:
    """The dictionaries that a monitor scores or steers with, by their names on the server."""
    names = [
        one.edit.dictionary
        for one in spec.interventions
        if isinstance(one.edit, edits.SetFeatures | edits.ScaleFeatures)
    ]
    if isinstance(spec.source, FeatureColumn):
        names.append(spec.source.dictionary)
    return frozenset(name.rpartition("/dictionaries/")[2] for name in names)


def with_directions(intervention: edits.Intervention, names: Mapping[str, str]) -> edits.Intervention:
    """The same edit by other names: field of the edit -> name."""
    changed: dict[str, Any] = {field: edits.NamedDirection(name) for field, name in names.items()}
    return dataclasses.replace(intervention, edit=dataclasses.replace(intervention.edit, **changed))


def spec_of(body: Mapping[str, Any], tensors: Arrays, *, name: str) -> MonitorSpec:
    """The monitor of `draft`.

    Raises:
        FailedPrecondition: a format of the future, or parts that are missing or make no sense.
    """
    try:
        if body["format"] != FORMAT:
            raise ValueError(f"format {body['format']!r} is not {FORMAT}")
        spec = _from_json(body["spec"], MonitorSpec, tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FailedPrecondition(
            f"{name} cannot be read: {error}",
            reason=reasons.MONITOR_MALFORMED,
            field="name",
            value=name,
            remedy="publish it again, or serve it with the version of the server that wrote it",
        ) from None
    assert isinstance(spec, MonitorSpec)
    return spec


def _to_json(value: Any, tensors: dict[str, np.ndarray[Any, Any]], path: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        assert type(value).__name__ in _CLASSES, f"{type(value).__name__} is not kept"
        body: dict[str, Any] = {"type": type(value).__name__}
        for field in dataclasses.fields(value):
            one = getattr(value, field.name)
            if isinstance(one, np.ndarray) or not _is_default(field, one):
                body[field.name] = _to_json(one, tensors, f"{path}.{field.name}")
        return body
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, np.ndarray):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, tuple):
        return [_to_json(one, tensors, f"{path}.{index}") for index, one in enumerate(value)]
    if isinstance(value, Mapping):
        return dict(value)
    assert value is None or isinstance(value, str | bool | int | float), f"{path}: {type(value).__name__}"
    return value


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    if field.default is not dataclasses.MISSING:
        return bool(field.default == value)
    if field.default_factory is not dataclasses.MISSING:
        return bool(field.default_factory() == value)
    return False


def _from_json(value: Any, kind: Any, tensors: Arrays) -> Any:
    """`value` as `kind`, the type that the field it goes into is declared with."""
    if typing.get_origin(kind) is Mapping:
        return dict(value)
    if isinstance(value, dict) and "type" in value:
        made = _CLASSES[value["type"]]
        hints = typing.get_type_hints(made)
        fields = {field.name for field in dataclasses.fields(made)}
        given = {name: one for name, one in value.items() if name != "type"}
        if unknown := given.keys() - fields:
            raise ValueError(f"{value['type']} has no {', '.join(sorted(unknown))}")
        return made(**{name: _from_json(one, hints[name], tensors) for name, one in given.items()})
    if isinstance(value, dict) and "tensor" in value:
        return np.asarray(tensors[value["tensor"]])
    options = typing.get_args(kind) if _is_union(kind) else (kind,)
    if isinstance(value, list):
        inner = next((option for option in options if typing.get_origin(option) is tuple), None)
        if inner is None:
            raise ValueError(f"a list where {kind} is wanted")
        parts = typing.get_args(inner)
        kinds = [parts[0]] * len(value) if parts[-1] is Ellipsis else parts
        return tuple(_from_json(one, part, tensors) for one, part in zip(value, kinds, strict=True))
    for option in options:
        if isinstance(option, type) and issubclass(option, Enum):
            return option(value)
    return value


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)
