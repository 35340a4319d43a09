"""The library as an engine sees it: probes and directions of one model, ready for its requests."""

from __future__ import annotations

import asyncio
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np

from glasshouse.server.probes.concepts import ConceptStore, HeldDirection, HeldProbe, probe_hash
from glasshouse.server.probes.library import ConceptLibrary, of_model, of_revision
from glasshouse.server.probes.saved import SavedDirection, SavedProbe
from glasshouse.server.registry.names import Kind, Reference, parse


class ModelConcepts(ConceptStore):
    """A `ConceptStore` over a library. `revision`: of the model's weights, "" where it is not known."""

    def __init__(self, library: ConceptLibrary, *, model: str, revision: str = "") -> None:
        self._library = library
        self._model = model
        self._revision = revision
        # By version: requests that hold one share it, however the library's cache fares meanwhile.
        self._probes: WeakValueDictionary[str, HeldProbe] = WeakValueDictionary()
        # What was made of those in the library's cache, for as long as they are there: nothing is hashed or cast twice.
        self._made_probes: WeakKeyDictionary[SavedProbe, HeldProbe] = WeakKeyDictionary()
        self._made_directions: WeakKeyDictionary[SavedDirection, HeldDirection] = WeakKeyDictionary()

    async def probe(self, name: str, *, field: str) -> HeldProbe:
        """See `ConceptStore`."""
        reference = self._reference(name, Kind.PROBE, field)
        found = self._library.held(reference)
        if not isinstance(found, SavedProbe):
            found = await asyncio.to_thread(self._library.probe, reference, field=field)
        of_revision(found, self._revision, field=field)
        held = self._made_probes.get(found) or self._probes.get(found.origin.name)
        if held is None:
            assert found.served is not None
            held = HeldProbe(
                name=found.origin.name, probe=found.served, content_hash=probe_hash(found.served)
            )
            self._probes[held.name] = held
        self._made_probes[found] = held
        return held

    async def direction(self, name: str, *, field: str) -> HeldDirection:
        """See `ConceptStore`."""
        reference = self._reference(name, Kind.DIRECTION, field)
        found = self._library.held(reference)
        if not isinstance(found, SavedDirection):
            found = await asyncio.to_thread(self._library.direction, reference, field=field)
        of_revision(found, self._revision, field=field)
        held = self._made_directions.get(found)
        if held is None:
            vectors = {at.hook_point: np.asarray(at.vector, dtype=np.float32) for at in found.at}
            held = HeldDirection(
                name=found.origin.name,
                hook_point=found.best,
                vector=vectors[found.best],
                elsewhere={point: vector for point, vector in vectors.items() if point != found.best},
            )
            self._made_directions[found] = held
        return held

    def _reference(self, name: str, kind: Kind, field: str) -> Reference:
        reference = parse(name, kind=kind, model=self._model, field=field)
        return of_model(reference, model=self._model, field=field)
