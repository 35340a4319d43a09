"""Named directions and probes, as requests find them.

A request's names are looked up once, before it is queued, and it keeps what it found to its end: publishing or deleting
a version changes nothing for requests that run.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from glasshouse.server.registry.names import Kind, Reference, parse
from glasshouse.server.types.errors import NotFound
from glasshouse.server.types.interventions import FloatArray
from glasshouse.wire import reasons

from .served import ServedProbe
from .storage import to_parts

Concept = TypeVar("Concept", bound="HeldProbe | HeldDirection")


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldProbe:
    """A version of a probe. `name`: `models/{model}/probes/{probe}@{version}`; `probe` in float64 on the host;
    `content_hash` as `probe_hash` makes it. The same version is the same object from look-up to look-up.
    """

    name: str
    probe: ServedProbe
    content_hash: str


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldDirection:
    """A version of a direction. `name`: `models/{model}/directions/{direction}@{version}`; `vector` (width of
    `hook_point`,), and `elsewhere` those of other hook points, where it was made at several.
    """

    name: str
    hook_point: str
    vector: FloatArray
    elsewhere: Mapping[str, FloatArray] = field(default_factory=dict)

    def at(self, hook_point: str) -> FloatArray:
        """What an edit at `hook_point` (its canonical name) takes: the vector made there, else `vector`."""
        return self.elsewhere.get(hook_point, self.vector)


class ConceptStore(ABC):
    """Where an engine finds what requests name."""

    @abstractmethod
    async def probe(self, name: str, *, field: str) -> HeldProbe:
        """The probe called `name`, full or short, with a version or its latest; `field` is where the request names it.

        Raises:
            InvalidArgument: `name` is no name.
            NotFound: there is no such probe of this model.
            FailedPrecondition: it cannot be read.
            Unavailable: the registry cannot be reached, and the probe is not held.
        """

    @abstractmethod
    async def direction(self, name: str, *, field: str) -> HeldDirection:
        """The direction called `name`; otherwise as `probe`."""


class ConceptShelf(ConceptStore):
    """Probes and directions of one model in memory. Versions count from 1."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._probes: dict[str, list[HeldProbe]] = {}
        self._directions: dict[str, list[HeldDirection]] = {}

    def put_probe(self, name: str, probe: ServedProbe) -> HeldProbe:
        """Holds `probe` as the next version of `name`."""
        versions = self._probes.setdefault(name, [])
        held = HeldProbe(
            name=self._full(Kind.PROBE, name, len(versions) + 1), probe=probe, content_hash=probe_hash(probe)
        )
        versions.append(held)
        return held

    def put_direction(self, name: str, hook_point: str, vector: FloatArray) -> HeldDirection:
        """Holds `vector` as the next version of `name`."""
        versions = self._directions.setdefault(name, [])
        full = self._full(Kind.DIRECTION, name, len(versions) + 1)
        held = HeldDirection(name=full, hook_point=hook_point, vector=np.asarray(vector, np.float32))
        versions.append(held)
        return held

    async def probe(self, name: str, *, field: str) -> HeldProbe:
        """See `ConceptStore`."""
        return self._find(self._probes, Kind.PROBE, name, field)

    async def direction(self, name: str, *, field: str) -> HeldDirection:
        """See `ConceptStore`."""
        return self._find(self._directions, Kind.DIRECTION, name, field)

    def _full(self, kind: Kind, name: str, version: int) -> str:
        return str(Reference(kind=kind, model=self._model, name=name, version=version))

    def _find(self, held: Mapping[str, list[Concept]], kind: Kind, text: str, field: str) -> Concept:
        reference = parse(text, kind=kind, model=self._model, field=field)
        versions = held.get(reference.name, []) if reference.model == self._model else []
        version = reference.version or len(versions)
        if not 1 <= version <= len(versions):
            closest = tuple(difflib.get_close_matches(reference.name, list(held), n=3, cutoff=0.4))
            raise NotFound(
                f"there is no {kind.name.lower()} {text!r:.200}",
                reason=reasons.RESOURCE_NOT_FOUND,
                resource_type=kind.name.lower(),
                resource_name=text[:200],
                closest=closest,
                field=field,
                remedy=f"use one that is held: {', '.join(closest or sorted(held)[:5]) or 'there are none'}",
            )
        return versions[version - 1]


def probe_hash(probe: ServedProbe) -> str:
    """SHA-256, in hex, over what a probe is and its tensors."""
    body, arrays = to_parts(probe)
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(repr((name, arrays[name].shape)).encode())
        digest.update(arrays[name].astype("<f8").tobytes())
    return digest.hexdigest()
