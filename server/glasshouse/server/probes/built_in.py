"""Directions and probes that come with a model, from files: read-only, beside the registry.

A folder holds, of each, `{kind}-{name}.json` (provenance, body, time) and `{kind}-{name}.safetensors` (tensors): the two
halves the registry keeps. They are version 1 of their names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from glasshouse.server.probes.saved import Saved, SavedDirection, SavedProbe, saved_of
from glasshouse.server.registry.names import Kind, Reference
from glasshouse.server.registry.records import Draft, Provenance, Record

S = TypeVar("S", SavedDirection, SavedProbe)
_STEMS = {Kind.DIRECTION: "direction", Kind.PROBE: "probe"}


@dataclass(frozen=True, kw_only=True, eq=False)
class BuiltIn:
    """One of them. `record` stands for what the registry would say of it."""

    record: Record
    saved: Saved


def described(saved: S, description: str) -> S:
    """The same with a description for people."""
    return replace(saved, origin=replace(saved.origin, description=description))


def write(draft: Draft, folder: Path, created: datetime) -> None:
    """Writes a draft as one of `folder`'s."""
    draft.check()
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{_STEMS[draft.kind]}-{draft.name}"
    facts = {
        "created": created.isoformat(),
        "provenance": asdict(draft.provenance),
        "body": draft.body,
    }
    stem.with_suffix(".safetensors").write_bytes(save_tensors(dict(draft.tensors)))
    stem.with_suffix(".json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read(folder: Path, model: str) -> dict[tuple[Kind, str], BuiltIn]:
    """Those of a folder, for the model served as `model`, by kind and name."""
    found = {}
    for kind, stem in _STEMS.items():
        for path in sorted(folder.glob(f"{stem}-*.json")):
            name = path.stem.removeprefix(f"{stem}-")
            facts = json.loads(path.read_text(encoding="utf-8"))
            record = _record(Reference(kind=kind, model=model, name=name, version=1), facts)
            tensors = load_tensors(path.with_suffix(".safetensors").read_bytes())
            found[kind, name] = BuiltIn(record=record, saved=saved_of(record, tensors, built_in=True))
    return found


def _record(reference: Reference, facts: Mapping[str, Any]) -> Record:
    origin = facts["provenance"]
    return Record(
        id=0,
        reference=reference,
        provenance=Provenance(**{**origin, "hook_points": tuple(origin["hook_points"])}),
        body=facts["body"],
        subject="",
        blob="",
        blob_bytes=0,
        content_hash="",
        created=datetime.fromisoformat(facts["created"]).astimezone(UTC),
        deleted=None,
        change=0,
    )
