"""Directions and probes as they are kept: as a draft to publish, and as they are found again.

Of either the registry keeps a JSON object and named tensors:

- a direction: `direction_json`, and `vectors.{i}` float64 (width,), in the order of its hook points;
- a probe: the two halves of `storage`, `probe_json` besides, and `calibration_scores` float64 (n, C): out-of-fold
  scores of the examples it was trained on, what drift is measured against.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import numpy as np

from glasshouse.server.probes import storage
from glasshouse.server.probes.discrimination import Discrimination, Interval
from glasshouse.server.probes.examples import FloatRows
from glasshouse.server.probes.json_values import from_json, to_json
from glasshouse.server.probes.pooling import Pooling
from glasshouse.server.probes.served import ProbeFacts, ServedProbe
from glasshouse.server.probes.training import ColumnReport, ProbeReport
from glasshouse.server.registry.names import Kind
from glasshouse.server.registry.records import Arrays, Draft, Provenance, Record
from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument
from glasshouse.server.types.selectors import EVERYWHERE, Selector
from glasshouse.wire import reasons

FORMAT = 1
MAX_DESCRIPTION = 2000


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """How examples were divided; `n_duplicates` copies beyond the first, `n_conflicting` copies of different labels."""

    n_train: int = 0
    n_held_out: int = 0
    n_duplicates: int = 0
    n_left_out: int = 0
    n_conflicting: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class DirectionAt:
    """A direction at one hook point. `vector` float64 (width,), None in lists; x . vector above `threshold` is positive."""

    hook_point: str
    width: int
    norm: float
    threshold: float | None = None
    held_out: Discrimination | None = None
    vector: FloatRows | None = None


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What is known of anything kept. `name`: its resource name with the version, empty where it is not published."""

    name: str = ""
    description: str = ""
    provenance: Provenance = field(default_factory=Provenance)
    created: datetime | None = None
    built_in: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedDirection:
    """A direction at one or more hook points; `best` is one of them. `method`: the value of a `DirectionMethod`,
    "dictionary_feature" or "raw".
    """

    method: str
    at: tuple[DirectionAt, ...]
    best: str
    positive_label: str = "positive"
    negative_label: str = "negative"
    pooling: Pooling = Pooling.LAST
    positions: Selector = EVERYWHERE
    split: SplitSummary | None = None
    origin: Origin = Origin()

    @property
    def nbytes(self) -> int:
        """Bytes of its vectors."""
        return sum(0 if at.vector is None else at.vector.nbytes for at in self.at)


@dataclass(frozen=True, kw_only=True)
class ProbeSummary:
    """What is known of a probe's quality: a `ProbeReport` without its rows."""

    columns: tuple[ColumnReport, ...]
    accuracy: Interval
    control_accuracy: Interval
    split: SplitSummary
    n_folds: int
    converged: bool
    notes: tuple[str, ...] = ()

    @property
    def selectivity(self) -> float:
        """Held-out accuracy less the control task's."""
        return self.accuracy.value - self.control_accuracy.value

    @classmethod
    def of(cls, report: ProbeReport, split: SplitSummary, notes: tuple[str, ...] = ()) -> ProbeSummary:
        """Of a report, with what is known of the split and `notes` after the report's own."""
        return cls(
            columns=report.columns,
            accuracy=report.accuracy,
            control_accuracy=report.control_accuracy,
            split=split,
            n_folds=report.n_folds,
            converged=report.converged,
            notes=(*report.notes, *notes),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedProbe:
    """A probe with what it was made from. `served` and `calibration_scores` (n, C) are None in lists; `report` where it was
    trained elsewhere.
    """

    facts: ProbeFacts
    calibration: str
    positions: Selector = EVERYWHERE
    report: ProbeSummary | None = None
    served: ServedProbe | None = None
    calibration_scores: FloatRows | None = None
    origin: Origin = Origin()

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, about."""
        n_bytes = 0 if self.calibration_scores is None else self.calibration_scores.nbytes
        if self.served is not None:
            n_bytes += sum(layer.weights.nbytes + layer.biases.nbytes for layer in self.served.layers)
        return n_bytes


Saved = SavedDirection | SavedProbe


def direction_draft(direction: SavedDirection, *, model: str, name: str, version: int | None) -> Draft:
    """What is published of a direction with its vectors."""
    body = {"format": FORMAT, **to_json(replace(direction, at=(), origin=Origin()))}
    body["at"] = [to_json(replace(at, vector=None)) for at in direction.at]
    body["description"] = _described(direction.origin)
    tensors = {f"vectors.{i}": np.asarray(at.vector) for i, at in enumerate(direction.at)}
    return _draft(Kind.DIRECTION, direction.origin, body, tensors, model, name, version)


def probe_draft(probe: SavedProbe, *, model: str, name: str, version: int | None) -> Draft:
    """What is published of a probe with its weights."""
    assert probe.served is not None, "a probe is published with its weights"
    body, tensors = storage.to_parts(probe.served)
    body |= {
        "positions": to_json(probe.positions),
        "report": to_json(probe.report),
        "description": _described(probe.origin),
    }
    if probe.calibration_scores is not None:
        tensors["calibration_scores"] = probe.calibration_scores
    return _draft(Kind.PROBE, probe.origin, body, tensors, model, name, version)


def saved_of(record: Record, tensors: Arrays | None, *, built_in: bool = False) -> Saved:
    """The direction or probe of a record, without numbers where `tensors` is None.

    Raises:
        FailedPrecondition: a record of a later format, or a damaged one.
    """
    body, name = record.body, str(record.reference)
    origin = Origin(
        name=name,
        description=str(body.get("description", "")),
        provenance=record.provenance,
        created=record.created,
        built_in=built_in,
    )
    try:
        if record.reference.kind is Kind.DIRECTION:
            return _direction(body, tensors, origin)
        return _probe(body, tensors, origin)
    except (KeyError, TypeError, ValueError) as error:
        raise FailedPrecondition(
            f"{name} cannot be read: {type(error).__name__} {error}",
            reason=reasons.PROBE_MALFORMED,
            field="name",
            value=name,
            remedy="publish it again; a later server may have written it",
        ) from error


def _draft(
    kind: Kind,
    origin: Origin,
    body: Mapping[str, Any],
    tensors: Arrays,
    model: str,
    name: str,
    version: int | None,
) -> Draft:
    return Draft(
        kind=kind,
        model=model,
        name=name,
        version=version,
        provenance=origin.provenance,
        body=body,
        tensors=tensors,
    )


def _described(origin: Origin) -> str:
    if len(origin.description) > MAX_DESCRIPTION:
        raise InvalidArgument(
            f"the description has {len(origin.description)} characters, {MAX_DESCRIPTION} are kept",
            reason=reasons.VALUE_OUT_OF_RANGE,
            field="publication.description",
            value=len(origin.description),
            remedy="shorten it",
        )
    return origin.description


def _direction(body: Mapping[str, Any], tensors: Arrays | None, origin: Origin) -> SavedDirection:
    if body["format"] != FORMAT:
        raise ValueError(f"format {body['format']!r} is not {FORMAT}")
    facts = {**body, "at": []}
    found = from_json(SavedDirection, {k: v for k, v in facts.items() if k != "origin"})
    places = [
        from_json(DirectionAt, {k: v for k, v in place.items() if k != "vector"}) for place in body["at"]
    ]
    if tensors is not None:
        places = [
            replace(place, vector=np.asarray(tensors[f"vectors.{i}"], dtype=np.float64))
            for i, place in enumerate(places)
        ]
    if not any(place.hook_point == found.best for place in places):
        raise ValueError(f"{found.best!r} is not one of its hook points")
    return replace(found, at=tuple(places), origin=origin)


def _probe(body: Mapping[str, Any], tensors: Arrays | None, origin: Origin) -> SavedProbe:
    report = body.get("report")
    arrays = None if tensors is None else {k: v for k, v in tensors.items() if k != "calibration_scores"}
    return SavedProbe(
        facts=storage.facts_of(body),
        calibration=str(body["calibration"]),
        positions=from_json(Selector, body["positions"]) if body.get("positions") else EVERYWHERE,
        report=None if report is None else from_json(ProbeSummary, report),
        served=None if arrays is None else storage.from_parts(body, arrays, path=origin.name),
        calibration_scores=None if tensors is None else tensors.get("calibration_scores"),
        origin=origin,
    )
