"""Publishing, finding, listing and deleting, on whichever database and blob store.

Publishing, so that a kill at any moment leaves nothing half-published:

1. The draft is checked and its tensors are written to the blob store, durably (`blobs`). Nobody can see them yet.
2. One transaction takes the writers' lock, sees that the version is free and that the blob and all that is used are
   there, and inserts the row with its labels. Its commit is the publication.
3. A kill before the commit leaves at most a blob that no row names, which `sweep` removes.

Publishing the same draft again, with its version, answers with what is there already: a caller who did not hear the
outcome may repeat the call. Every method blocks; call them from a thread.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import Connection, RowMapping, Select, delete, func, insert, select, tuple_, update

from glasshouse.server.registry import pages, rows
from glasshouse.server.registry.blobs import BlobStore, encode
from glasshouse.server.registry.database import Database
from glasshouse.server.registry.events import EventLog
from glasshouse.server.registry.migrations import migrate
from glasshouse.server.registry.names import Kind, Reference
from glasshouse.server.registry.records import Draft, FeatureLabel, Record, RecordPage
from glasshouse.server.registry.tables import changes, entries, feature_labels, uses
from glasshouse.server.types.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from glasshouse.wire import reasons

# A publisher has this long between writing a blob and naming it before a sweep may look at it.
SWEEP_GRACE_S = 3600.0


class Registry:
    """One registry. Safe to use from several threads; several processes may share one."""

    def __init__(self, database: Database, blobs: BlobStore) -> None:
        """Of a database that is migrated; `open` does both."""
        self._database = database
        self._blobs = blobs

    @classmethod
    def open(cls, url: str, blobs: str) -> Registry:
        """The registry on database `url` (``sqlite:///PATH``, ``postgresql://...``) with its tensors at the fsspec URL or
        path `blobs`, its tables made or brought up to date.

        Raises:
            InvalidArgument: a URL that is none.
            FailedPrecondition: tables of a newer server, or a driver that is not installed.
            Unavailable: the database does not answer.
        """
        database = Database(url)
        migrate(database)
        return cls(database, BlobStore(blobs))

    @classmethod
    def at(cls, folder: Path) -> Registry:
        """The embedded registry: one folder, with SQLite and blobs in it."""
        return cls.open(f"sqlite:///{folder / 'registry.sqlite3'}", str(folder / "blobs"))

    @property
    def location(self) -> str:
        """The database's URL, without its password."""
        return self._database.location

    @property
    def events(self) -> EventLog:
        """The monitors' log, in the same database."""
        return EventLog(self._database)

    def close(self) -> None:
        """Closes the connections."""
        self._database.close()

    def publish(self, draft: Draft) -> Record:
        """Publishes `draft` as the version it asks for.

        Raises:
            InvalidArgument: a draft that cannot be kept, or a version beyond the next free one.
            AlreadyExists: the version holds something else; `metadata["next_version"]` is free.
            NotFound: something it uses is not there.
            Unavailable: the database or the blob store does not answer; publishing again is safe.
        """
        draft.check()
        data = encode(draft.tensors) if draft.tensors else b""
        digest = self._blobs.put(data) if data else ""
        columns = rows.columns_of(draft, blob=digest, blob_bytes=len(data))
        with self._database.writing() as connection:
            change = _take_turn(connection)
            taken = connection.execute(
                select(func.coalesce(func.max(entries.c.version), 0)).where(*_called(draft))
            ).scalar_one()
            version = int(taken) + 1 if draft.version is None else draft.version
            if version <= taken:
                return _already(connection, draft, version, int(taken) + 1, columns["content_hash"])
            if version > taken + 1:
                raise InvalidArgument(
                    f"version {version} of {draft.name!r} would leave a gap: the next is {taken + 1}",
                    reason=reasons.VALUE_OUT_OF_RANGE,
                    field="version",
                    value=version,
                    remedy=f"publish version {taken + 1}",
                )
            used = [_find(connection, reference, "uses") for reference in draft.uses]
            if digest and not self._blobs.holds(digest):
                # Swept between our writing and our turn, which takes longer than the sweep's grace.
                self._blobs.put(data)
            row = {**columns, "version": version, "created_us": _now_us(), "change": change}
            entry_id = connection.execute(insert(entries).values(**row).returning(entries.c.id)).scalar_one()
            if used:
                unique = sorted({int(found["id"]) for found in used})
                connection.execute(insert(uses), [{"entry_id": entry_id, "used_id": one} for one in unique])
            if draft.labels:
                connection.execute(
                    insert(feature_labels), [_label_row(entry_id, label) for label in draft.labels]
                )
            return rows.record_of({**row, "id": entry_id, "deleted_us": None})

    def next_version(self, reference: Reference) -> int:
        """The version that the next publication of the name will have; those deleted are not given again."""
        taken = select(func.coalesce(func.max(entries.c.version), 0)).where(*_called(reference))
        with self._database.reading() as connection:
            return int(connection.execute(taken).scalar_one()) + 1

    def get(self, reference: Reference, *, field: str = "name") -> Record:
        """The version that `reference` names, or the latest. Raises `NotFound` with the closest names."""
        with self._database.reading() as connection:
            return rows.record_of(_find(connection, reference, field))

    def tensors(self, record: Record) -> dict[str, np.ndarray[Any, Any]]:
        """Its tensors by name. Raises `FailedPrecondition` where they are missing or damaged."""
        return self._blobs.get(record.blob) if record.blob else {}

    def labels(
        self, record: Record, *, features: Sequence[int] = (), after: int = -1, limit: int = 1000
    ) -> tuple[FeatureLabel, ...]:
        """Labels by feature, ascending: those of `features`, or all, the first `limit` of those above `after`."""
        wanted = select(feature_labels).where(
            feature_labels.c.entry_id == record.id, feature_labels.c.feature > after
        )
        if features:
            wanted = wanted.where(feature_labels.c.feature.in_(features))
        with self._database.reading() as connection:
            found = connection.execute(wanted.order_by(feature_labels.c.feature).limit(limit)).mappings()
            return tuple(
                FeatureLabel(feature=row["feature"], label=row["label"], score=row["score"]) for row in found
            )

    def used_by(self, record: Record) -> tuple[Record, ...]:
        """What is there and uses it."""
        with self._database.reading() as connection:
            return tuple(rows.record_of(row) for row in _users(connection, [record.id]))

    def list(
        self,
        kind: Kind,
        *,
        model: str = "",
        name_prefix: str = "",
        subject: str = "",
        every_version: bool = False,
        page_size: int = 0,
        page_token: str = "",
    ) -> RecordPage:
        """What is there of a kind, by model, name (in byte order) and version; each name's latest version only, unless
        `every_version`. Empty filters let everything through. What is published meanwhile may or may not appear; nothing
        appears twice.

        Raises:
            InvalidArgument: a negative size, or a token of another list.
        """
        question = (kind, model, name_prefix, subject, every_version)
        size, start = pages.size_of(page_size), pages.after(question, page_token)
        wanted = select(entries).where(entries.c.kind == kind.value, entries.c.deleted_us.is_(None))
        if model:
            wanted = wanted.where(entries.c.model == model)
        if name_prefix:
            # Names are ASCII: nothing in one sorts above DEL.
            wanted = wanted.where(entries.c.name >= name_prefix, entries.c.name < name_prefix + "\x7f")
        if subject:
            wanted = wanted.where(entries.c.subject == subject)
        if not every_version:
            wanted = _latest_only(wanted)
        place = tuple_(entries.c.model, entries.c.name, entries.c.version)
        if start is not None:
            wanted = wanted.where(place > start)
        ordered = wanted.order_by(entries.c.model, entries.c.name, entries.c.version).limit(size + 1)
        with self._database.reading() as connection:
            found = [rows.record_of(row) for row in connection.execute(ordered).mappings()]
        shown, token = found[:size], ""
        if len(found) > size:
            last = shown[-1]
            token = pages.token(question, (last.reference.model, last.reference.name, last.version))
        return RecordPage(records=tuple(shown), next_page_token=token)

    def delete(self, reference: Reference, *, field: str = "name") -> tuple[Record, ...]:
        """Deletes the version that `reference` names, or every version; returns what was deleted. The versions are never
        used again; the tensors go with the next sweep.

        Raises:
            NotFound: it is not there.
            FailedPrecondition: something else uses it.
        """
        with self._database.writing() as connection:
            change = _take_turn(connection)
            found = [_find(connection, reference, field)]
            if reference.version is None:
                found = list(
                    connection.execute(
                        select(entries)
                        .where(*_called(reference), entries.c.deleted_us.is_(None))
                        .order_by(entries.c.version)
                    ).mappings()
                )
            ids = [int(row["id"]) for row in found]
            users = [row for row in _users(connection, ids) if int(row["id"]) not in ids]
            if users:
                names = [str(rows.record_of(row).reference) for row in users]
                raise FailedPrecondition(
                    f"{reference} is used by {', '.join(names[:5])}",
                    reason=reasons.IN_USE,
                    field=field,
                    value=str(reference),
                    remedy="delete what uses it first",
                    metadata={"used_by": ", ".join(names[:20])},
                )
            gone = {"deleted_us": _now_us(), "change": change}
            connection.execute(update(entries).where(entries.c.id.in_(ids)).values(**gone))
            return tuple(rows.record_of({**row, **gone}) for row in found)

    def counter(self) -> int:
        """How many changes there have been: a publication and a deletion each is one."""
        with self._database.reading() as connection:
            return int(connection.execute(select(changes.c.counter)).scalar_one())

    def changes_since(self, counter: int) -> tuple[int, tuple[Record, ...]]:
        """The counter now, and what was published or deleted after `counter`, in order; a deleted record says so."""
        with self._database.reading() as connection:
            # The newest first: should a change come between, it is seen again rather than missed.
            now = int(connection.execute(select(changes.c.counter)).scalar_one())
            found = connection.execute(
                select(entries).where(entries.c.change > counter).order_by(entries.c.change, entries.c.id)
            ).mappings()
            return now, tuple(rows.record_of(row) for row in found)

    def sweep(self, *, grace_s: float = SWEEP_GRACE_S) -> int:
        """Removes blobs older than `grace_s` that no row names, and half-written ones; returns how many. The labels of
        deleted entries go too.

        Each is removed under the writers' lock, and publishers look for their blob under the same lock: a blob is never
        taken from under a publication.
        """
        deleted = select(entries.c.id).where(entries.c.deleted_us.is_not(None))
        with self._database.writing() as connection:
            connection.execute(delete(feature_labels).where(feature_labels.c.entry_id.in_(deleted)))
        removed = 0
        for blob in self._blobs.stored():
            if blob.modified_s > time.time() - grace_s:
                continue
            with self._database.writing() as connection:
                connection.execute(select(changes.c.counter).with_for_update()).one()
                if not (blob.digest and _named(connection, blob.digest)):
                    self._blobs.remove(blob)
                    removed += 1
        return removed


def _take_turn(connection: Connection) -> int:
    """Takes the writers' lock until the transaction ends; returns this change's number."""
    counted = update(changes).values(counter=changes.c.counter + 1).returning(changes.c.counter)
    return int(connection.execute(counted).scalar_one())


def _called(named: Reference | Draft) -> tuple[Any, ...]:
    return (
        entries.c.kind == named.kind.value,
        entries.c.model == named.model,
        entries.c.name == named.name,
    )


def _named(connection: Connection, digest: str) -> bool:
    wanted = select(entries.c.id).where(entries.c.blob == digest, entries.c.deleted_us.is_(None)).limit(1)
    return connection.execute(wanted).first() is not None


def _latest_only(wanted: Select[Any]) -> Select[Any]:
    later = entries.alias("later")
    return wanted.where(
        ~select(later.c.id)
        .where(
            later.c.kind == entries.c.kind,
            later.c.model == entries.c.model,
            later.c.name == entries.c.name,
            later.c.version > entries.c.version,
            later.c.deleted_us.is_(None),
        )
        .exists()
    )


def _find(connection: Connection, reference: Reference, field: str) -> RowMapping:
    wanted = select(entries).where(*_called(reference), entries.c.deleted_us.is_(None))
    if reference.version is not None:
        wanted = wanted.where(entries.c.version == reference.version)
    row = connection.execute(wanted.order_by(entries.c.version.desc()).limit(1)).mappings().first()
    if row is not None:
        return row
    siblings = select(entries.c.name, entries.c.version).where(
        entries.c.kind == reference.kind.value,
        entries.c.model == reference.model,
        entries.c.deleted_us.is_(None),
    )
    known = connection.execute(siblings.order_by(entries.c.id.desc()).limit(1000)).all()
    versions = sorted(version for name, version in known if name == reference.name)
    if versions:
        closest = tuple(f"{reference.name}@{version}" for version in versions[-3:])
    else:
        closest = tuple(
            difflib.get_close_matches(reference.name, sorted({name for name, _ in known}), n=3, cutoff=0.5)
        )
    raise NotFound(
        f"{reference} is not in the registry",
        reason=reasons.RESOURCE_NOT_FOUND,
        resource_type=reference.kind.value,
        resource_name=str(reference),
        closest=closest,
        field=field,
        remedy=f"there is {', '.join(closest)}" if closest else "list them for what is there",
    )


def _users(connection: Connection, ids: Sequence[int]) -> list[RowMapping]:
    wanted = (
        select(entries)
        .join(uses, uses.c.entry_id == entries.c.id)
        .where(uses.c.used_id.in_(ids), entries.c.deleted_us.is_(None))
        .distinct()
        .order_by(entries.c.id)
    )
    return list(connection.execute(wanted).mappings())


def _already(connection: Connection, draft: Draft, version: int, free: int, content_hash: str) -> Record:
    """What is there already where it is the draft itself. Raises `AlreadyExists` where it is not."""
    row = (
        connection.execute(select(entries).where(*_called(draft), entries.c.version == version))
        .mappings()
        .first()
    )
    if row is not None and row["content_hash"] == content_hash and row["deleted_us"] is None:
        return rows.record_of(row)
    raise AlreadyExists(
        f"version {version} of {draft.name!r} is published already; the next is {free}",
        reason=reasons.NAME_TAKEN,
        field="name",
        value=f"{draft.name}@{version}",
        remedy=f"publish version {free}, or under another name",
        metadata={"next_version": str(free)},
    )


def _label_row(entry_id: int, label: FeatureLabel) -> dict[str, Any]:
    return {"entry_id": entry_id, "feature": label.feature, "label": label.label, "score": label.score}


def _now_us() -> int:
    return time.time_ns() // 1000
