"""What explaining leaves behind: graphs and circuits as files, kept for a time.

One result is two files in its collection's folder: `{id}.safetensors` with its arrays, written first, and `{id}.json`
with the rest, moved into place last: where the JSON is, the result is whole. What expired is deleted when the store is
next used, and by `sweep`.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import structlog
from safetensors.torch import load_file, save_file
from torch import Tensor

from glasshouse.server.types.configuration import AttributionSettings
from glasshouse.server.types.errors import InvalidArgument, NotFound, ResourceExhausted
from glasshouse.wire import reasons

Collection = Literal["attributionGraphs", "circuits"]

COLLECTIONS: tuple[Collection, ...] = ("attributionGraphs", "circuits")
_ID = re.compile(r"[0-9a-f]{32}")
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredResult:
    """`name`: `{collection}/{id}`. `facts`: JSON values. Times are seconds since the epoch."""

    name: str
    facts: Mapping[str, Any] = field(repr=False)
    created_s: float
    expires_s: float
    size_bytes: int


class ResultStore:
    """Results of a server. Safe to use from several threads."""

    def __init__(self, settings: AttributionSettings) -> None:
        self._settings = settings
        self._temporary = not settings.folder
        self._folder = Path(settings.folder or tempfile.mkdtemp(prefix="glasshouse-attribution-"))
        self._lock = threading.RLock()
        self._known: dict[str, StoredResult] = {}
        for collection in COLLECTIONS:
            self._open(collection)

    def put(
        self, collection: Collection, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> StoredResult:
        """Stores a result. Raises ResourceExhausted where it does not fit."""
        short = uuid.uuid4().hex
        n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        self.check_room(n_bytes)
        folder = self._folder / collection
        save_file(
            {name: tensor.contiguous().cpu() for name, tensor in tensors.items()},
            folder / f"{short}.safetensors",
        )
        now = time.time()
        return self._write(f"{collection}/{short}", facts, now, now + self._settings.keep_s)

    def check_room(self, n_bytes: int) -> None:
        """Refuses a result for which there would be no room."""
        with self._lock:
            self.sweep()
            held = sum(result.size_bytes for result in self._known.values())
        most = self._settings.max_stored_bytes
        if held + n_bytes > most:
            raise ResourceExhausted(
                f"the result may take {n_bytes:,} bytes, {held:,} of {most:,} are taken",
                reason=reasons.MEMORY_BUDGET,
                value=n_bytes,
                remedy="delete stored graphs, or ask the operator to raise attribution.max_stored_bytes",
                metadata={
                    "limit": str(most),
                    "held": str(held),
                    "setting": "attribution.max_stored_bytes",
                },
            )

    def update(self, name: str, facts: Mapping[str, Any]) -> StoredResult:
        """Puts other facts in place of a result's. Raises NotFound."""
        with self._lock:
            result = self.get(name)
            return self._write(name, facts, result.created_s, result.expires_s)

    def get(self, name: str) -> StoredResult:
        """A result. Raises NotFound: never there, deleted, or expired; InvalidArgument for no name of one."""
        with self._lock:
            self.sweep()
            result = self._known.get(name)
        if result is not None:
            return result
        collection, _, short = name.partition("/")
        if collection not in COLLECTIONS or not short:
            raise InvalidArgument(
                f"{name!r:.200} is no name of a stored result",
                reason=reasons.FIELD_REQUIRED if not name else reasons.VALUE_MALFORMED,
                field="name",
                value=name,
                remedy="give `attributionGraphs/{graph}` or `circuits/{circuit}`",
            )
        raise NotFound(
            f"there is no {name!r:.200}",
            reason=reasons.RESOURCE_NOT_FOUND,
            resource_type=collection,
            resource_name=name[:200],
            field="name",
            remedy=f"results are kept for {self._settings.keep_s:.0f} s; the list has those there are",
        )

    def all(self, collection: Collection) -> list[StoredResult]:
        """Those of a collection, the newest first."""
        with self._lock:
            self.sweep()
            found = [result for name, result in self._known.items() if name.startswith(collection + "/")]
        return sorted(found, key=lambda result: (-result.created_s, result.name))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """A result's arrays, mapped from its file."""
        with self._lock:
            self.get(name)
            found: dict[str, Tensor] = load_file(self._path(name, "safetensors"))
            return found

    def delete(self, name: str) -> None:
        """Deletes a result. Raises NotFound."""
        with self._lock:
            self.get(name)
            self._remove(name)

    def sweep(self) -> None:
        """Deletes what has expired."""
        with self._lock:
            now = time.time()
            for name in [name for name, result in self._known.items() if result.expires_s <= now]:
                self._remove(name)

    def close(self) -> None:
        """Deletes a temporary folder."""
        if self._temporary:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _open(self, collection: Collection) -> None:
        folder = self._folder / collection
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            name = f"{collection}/{path.stem}"
            if not _ID.fullmatch(path.stem) or path.suffix not in (".json", ".safetensors"):
                continue
            if not self._path(name, "json").is_file() or not self._path(name, "safetensors").is_file():
                path.unlink(missing_ok=True)  # Half of a result: the server stopped while it was written.
            elif path.suffix == ".json":
                self._read(name)

    def _read(self, name: str) -> None:
        try:
            written = json.loads(self._path(name, "json").read_bytes())
            created_s, expires_s = float(written["created_s"]), float(written["expires_s"])
            facts = dict(written["facts"])
        except (ValueError, KeyError, TypeError) as error:
            _log.warning("result_damaged", name=name, error=str(error))
            return
        self._know(name, facts, created_s, expires_s)

    def _write(self, name: str, facts: Mapping[str, Any], created_s: float, expires_s: float) -> StoredResult:
        path = self._path(name, "json")
        text = json.dumps({"created_s": created_s, "expires_s": expires_s, "facts": facts})
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=".", suffix=".tmp", delete=False, encoding="utf-8"
        ) as file:
            file.write(text)
        with self._lock:
            Path(file.name).replace(path)
            return self._know(name, facts, created_s, expires_s)

    def _know(self, name: str, facts: Mapping[str, Any], created_s: float, expires_s: float) -> StoredResult:
        size = sum(self._path(name, suffix).stat().st_size for suffix in ("json", "safetensors"))
        result = StoredResult(
            name=name, facts=facts, created_s=created_s, expires_s=expires_s, size_bytes=size
        )
        self._known[name] = result
        return result

    def _remove(self, name: str) -> None:
        self._known.pop(name, None)
        for suffix in ("json", "safetensors"):
            self._path(name, suffix).unlink(missing_ok=True)

    def _path(self, name: str, suffix: str) -> Path:
        return self._folder / f"{name}.{suffix}"
