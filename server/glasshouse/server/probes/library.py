"""Directions and probes by name: those that come with a model, and the registry's behind a bounded cache.

1. A name with a version never changes its meaning: once read it is served from memory, least recently used out first.
2. A name without one means the latest version. Which that is, is remembered until the watch (`registry.watching`) sees
   the name published or deleted, here or by another server: within a second.
3. While the database is away, what is held goes on being served under both kinds of name. Anything else is
   `Unavailable`, and nothing but what needs the registry notices.

Methods block but for `held`; call them from a thread.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import structlog

from glasshouse.server.probes import built_in
from glasshouse.server.probes.built_in import BuiltIn
from glasshouse.server.probes.feature_labels import FeatureNames
from glasshouse.server.probes.saved import Saved, SavedDirection, SavedProbe, saved_of
from glasshouse.server.registry.names import Kind, Reference
from glasshouse.server.registry.records import Draft, Record
from glasshouse.server.registry.registry import Registry
from glasshouse.server.registry.watching import RegistryWatch
from glasshouse.server.types.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ServingError,
)
from glasshouse.wire import reasons

MAX_CACHE_BYTES = 256 << 20
# A probe's or direction's own overhead in the cache, besides its tensors.
_ENTRY_BYTES = 4096
_SWEEP_INTERVAL_S = 6 * 3600.0

_log = structlog.get_logger(__name__)

Name = tuple[Kind, str, str]


class ConceptLibrary:
    """What a server knows of directions and probes, and of what features are called. Safe to use from several threads."""

    def __init__(self, registry: Registry | None = None, *, max_cache_bytes: int = MAX_CACHE_BYTES) -> None:
        self._registry = registry
        self._max_cache_bytes = max_cache_bytes
        self._built_in: dict[Name, BuiltIn] = {}
        self._lock = threading.Lock()
        self._held: OrderedDict[Reference, Saved] = OrderedDict()
        self._latest: dict[Name, int] = {}
        self.feature_names = FeatureNames(registry)
        self._changes = 0
        self._watch: RegistryWatch | None = None
        self._stopping = threading.Event()
        self._sweeper = threading.Thread(target=self._sweep, name="registry-sweep", daemon=True)

    # -- life ----------------------------------------------------------------------------------------------------

    def add_built_in(self, folder: Path, model: str) -> None:
        """Serves what `folder` holds with `model`."""
        for (kind, name), found in built_in.read(folder, model).items():
            self._built_in[kind, model, name] = found

    def start(self) -> None:
        """Watches the registry from now on. Raises `Unavailable`."""
        if self._registry is not None:
            self._watch = RegistryWatch(self._registry, self._take, since=self._registry.counter())
            self._watch.start()
            self._sweeper.start()

    def stop(self) -> None:
        """Ends the watch. The registry is closed by whoever opened it."""
        self._stopping.set()
        if self._watch is not None:
            self._watch.stop()

    @property
    def registry(self) -> Registry:
        """The registry. Raises `FailedPrecondition` where the server has none."""
        if self._registry is None:
            raise FailedPrecondition(
                "this server has no registry",
                reason=reasons.CAPABILITY_MISSING,
                field="registry.url",
                remedy="start it with --data or --registry",
            )
        return self._registry

    @property
    def has_registry(self) -> bool:
        """Whether there is a registry."""
        return self._registry is not None

    @property
    def unavailable_since_s(self) -> float | None:
        """Since when the database has not answered, seconds since 1970; None while all is well."""
        return None if self._watch is None else self._watch.unavailable_since_s

    # -- finding -------------------------------------------------------------------------------------------------

    def held(self, reference: Reference) -> Saved | None:
        """What `reference` names, where no look at the database is needed for it. Does not block."""
        found = self._built_in.get(_name(reference))
        if found is not None and reference.version in (None, 1):
            return found.saved
        with self._lock:
            version = reference.version or self._latest.get(_name(reference))
            if version is None:
                return None
            exact = _at(reference, version)
            kept = self._held.get(exact)
            if kept is not None:
                self._held.move_to_end(exact)
            return kept

    def direction(self, reference: Reference, *, field: str = "name") -> SavedDirection:
        """The direction that `reference` names, or its latest version, with its vectors.

        Raises:
            NotFound: it is not there.
            FailedPrecondition: it is damaged.
            Unavailable: it is not held, and the database does not answer.
        """
        found = self._find(reference, field)
        assert isinstance(found, SavedDirection)
        return found

    def probe(self, reference: Reference, *, field: str = "name") -> SavedProbe:
        """The probe that `reference` names, as `direction`; with its weights."""
        found = self._find(reference, field)
        assert isinstance(found, SavedProbe)
        return found

    def built_in(self, kind: Kind, *, model: str, name_prefix: str = "") -> Sequence[Saved]:
        """Those that come with `model`, by name."""
        found = [
            (name, item)
            for (of_kind, of_model, name), item in self._built_in.items()
            if of_kind is kind and of_model == model and name.startswith(name_prefix)
        ]
        return [item.saved for _, item in sorted(found, key=lambda pair: pair[0])]

    def is_built_in(self, reference: Reference) -> bool:
        """Whether it comes with its model; a `Draft.uses` leaves those out."""
        return _name(reference) in self._built_in and reference.version in (None, 1)

    def _find(self, reference: Reference, field: str) -> Saved:
        found = self.held(reference)
        if found is not None:
            return found
        with self._lock:
            changes = self._changes
        record = self._record(reference, field)
        found = saved_of(record, self.registry.tensors(record))
        exact = record.reference
        with self._lock:
            # Another thread may have read it meanwhile: everyone gets the same object.
            found = self._held.setdefault(exact, found)
            self._held.move_to_end(exact)
            if reference.version is None and changes == self._changes:
                self._latest[_name(reference)] = record.version
            self._make_room()
        return found

    def _record(self, reference: Reference, field: str) -> Record:
        try:
            return self.registry.get(reference, field=field)
        except NotFound as error:
            known = self.built_in(reference.kind, model=reference.model)
            names = [saved.origin.name.rpartition("/")[2].partition("@")[0] for saved in known]
            closest = (*error.closest, *(name for name in names if name not in error.closest))[:5]
            raise NotFound(
                f"there is no {reference.kind.name.lower()} {reference}",
                reason=error.reason,
                resource_type=error.resource_type,
                resource_name=error.resource_name,
                closest=closest,
                field=field,
                remedy=f"there is {', '.join(closest)}" if closest else "list them for what is there",
            ) from None

    def _make_room(self) -> None:
        size = sum(saved.nbytes + _ENTRY_BYTES for saved in self._held.values())
        while size > self._max_cache_bytes and len(self._held) > 1:
            _, dropped = self._held.popitem(last=False)
            size -= dropped.nbytes + _ENTRY_BYTES

    # -- changing ------------------------------------------------------------------------------------------------

    def check_free(self, kind: Kind, *, model: str, name: str, version: int | None) -> None:
        """Refuses early what `publish` would refuse after the work: a name or version that is taken.

        Raises:
            AlreadyExists: `metadata["next_version"]` is free, but for a name that comes with the model.
            InvalidArgument: a version beyond the next one.
            Unavailable: the database does not answer.
        """
        reference = Reference(kind=kind, model=model, name=name)
        if self.is_built_in(reference):
            raise AlreadyExists(
                f"{name!r} comes with the model {model}",
                reason=reasons.NAME_TAKEN,
                field="publication.name",
                value=name,
                remedy="publish under another name",
            )
        free = self.registry.next_version(reference)
        if version is not None and version < free:
            raise AlreadyExists(
                f"version {version} of {name!r} is published already; the next is {free}",
                reason=reasons.NAME_TAKEN,
                field="publication.name",
                value=f"{name}@{version}",
                remedy=f"publish version {free}, or under another name",
                metadata={"next_version": str(free)},
            )
        if version is not None and version > free:
            raise InvalidArgument(
                f"version {version} of {name!r} would leave a gap: the next is {free}",
                reason=reasons.VALUE_OUT_OF_RANGE,
                field="publication.version",
                value=version,
                remedy=f"publish version {free}",
            )

    def publish(self, draft: Draft) -> Record:
        """Publishes; see `Registry.publish`. From here on this server's requests find it."""
        if self.is_built_in(Reference(kind=draft.kind, model=draft.model, name=draft.name)):
            self.check_free(draft.kind, model=draft.model, name=draft.name, version=draft.version)
        try:
            record = self.registry.publish(draft)
        except ServingError as error:
            if error.field in ("name", "version"):
                error.at("publication")
            raise
        self._take((record,))
        return record

    def delete(self, reference: Reference, *, field: str = "name") -> tuple[Record, ...]:
        """Deletes; see `Registry.delete`. Raises `FailedPrecondition` too for what comes with the model."""
        if self.is_built_in(reference):
            raise FailedPrecondition(
                f"{reference} comes with the model",
                reason=reasons.IN_USE,
                field=field,
                value=str(reference),
                remedy="leave it; it costs nothing",
            )
        deleted = self.registry.delete(reference, field=field)
        self._take(deleted)
        return deleted

    def _take(self, records: Sequence[Record]) -> None:
        """What was published or deleted, here or elsewhere; a change may come more than once."""
        for record in records:
            name = _name(record.reference)
            if record.reference.kind is Kind.FEATURE_LABELS:
                self.feature_names.forget()
            with self._lock:
                self._changes += 1
                if record.deleted is not None:
                    self._held.pop(record.reference, None)
                # News of a version that is known changes nothing: what is held stays, should the database go away.
                known = self._latest.get(name, 0)
                if known < record.version or (record.deleted is not None and known == record.version):
                    self._latest.pop(name, None)

    def _sweep(self) -> None:
        """Removes, now and then, the tensors that nothing names."""
        while not self._stopping.wait(_SWEEP_INTERVAL_S):
            try:
                removed = self.registry.sweep()
                if removed:
                    _log.info("registry_swept", blobs=removed)
            except ServingError as error:
                _log.warning("registry_not_swept", message=error.message)


def of_model(reference: Reference, *, model: str, field: str) -> Reference:
    """`reference` where it is of `model`. Raises `FailedPrecondition` where it is of another."""
    if reference.model != model:
        raise FailedPrecondition(
            f"{reference} is of the model {reference.model}, the request is for {model}",
            reason=reasons.MODEL_MISMATCH,
            field=field,
            value=str(reference),
            remedy=f"make one on {model}, or send its vector",
        )
    return reference


def of_revision(saved: Saved, revision: str, *, field: str) -> None:
    """Refuses what was made on other weights, where both are known. Raises `FailedPrecondition`."""
    made_on = saved.origin.provenance.model_revision
    if made_on and revision and made_on != revision:
        raise FailedPrecondition(
            f"{saved.origin.name} was made on other weights ({made_on[:12]}; served are {revision[:12]})",
            reason=reasons.MODEL_MISMATCH,
            field=field,
            value=saved.origin.name,
            remedy="make it again on the model as it is served, or send its vector",
            metadata={"model_revision": revision, "made_on": made_on},
        )


def _name(reference: Reference) -> Name:
    return reference.kind, reference.model, reference.name


def _at(reference: Reference, version: int) -> Reference:
    return Reference(kind=reference.kind, model=reference.model, name=reference.name, version=version)
