"""Rows of `entries` into records and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import RowMapping

from glasshouse.server.registry.names import Kind, Reference
from glasshouse.server.registry.records import Draft, Provenance, Record, dump


def provenance_json(provenance: Provenance) -> str:
    """Canonical JSON of a provenance."""
    body = {
        "model_revision": provenance.model_revision,
        "hook_points": list(provenance.hook_points),
        "method": provenance.method,
        "data_hash": provenance.data_hash,
        "metrics": dict(provenance.metrics),
        "author": provenance.author,
    }
    return dump(body, field="provenance")


def columns_of(draft: Draft, *, blob: str, blob_bytes: int) -> dict[str, Any]:
    """What the draft itself says of its row, with the hash of all of it."""
    columns = {
        "kind": draft.kind.value,
        "model": draft.model,
        "name": draft.name,
        "subject": draft.subject,
        "provenance": provenance_json(draft.provenance),
        "body": dump(draft.body, field="body"),
        "blob": blob,
        "blob_bytes": blob_bytes,
    }
    labels = [[label.feature, label.label, label.score] for label in draft.labels]
    used = sorted(str(reference) for reference in draft.uses)
    whole = json.dumps([columns, labels, used], sort_keys=True)
    return {**columns, "content_hash": hashlib.sha256(whole.encode()).hexdigest()}


def record_of(row: RowMapping | Mapping[str, Any]) -> Record:
    """The record of a row."""
    origin = json.loads(row["provenance"])
    reference = Reference(
        kind=Kind(row["kind"]), model=row["model"], name=row["name"], version=int(row["version"])
    )
    return Record(
        id=int(row["id"]),
        reference=reference,
        provenance=Provenance(
            model_revision=origin["model_revision"],
            hook_points=tuple(origin["hook_points"]),
            method=origin["method"],
            data_hash=origin["data_hash"],
            metrics=origin["metrics"],
            author=origin["author"],
        ),
        body=json.loads(row["body"]),
        subject=row["subject"],
        blob=row["blob"],
        blob_bytes=int(row["blob_bytes"]),
        content_hash=row["content_hash"],
        created=_time(row["created_us"]),
        deleted=None if row["deleted_us"] is None else _time(row["deleted_us"]),
        change=int(row["change"]),
    )


def _time(microseconds: int) -> datetime:
    return datetime.fromtimestamp(microseconds / 1e6, tz=UTC)
