"""Tensors beside the database: safetensors files named by the SHA-256 of their bytes, in a folder or an object store.

1. A blob is written whole before any row names it. In a folder: to a temporary file, synchronised, then renamed, then
   the folder synchronised; an object store's put is atomic by itself.
2. Equal content has the same name: writing it again changes nothing but its time.
3. Reading compares the content with the name: what is damaged is refused.
4. What no row names is an orphan, left by a publisher that was killed or by a deletion; `Registry.sweep` removes it.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from glasshouse.server.registry.records import Arrays
from glasshouse.server.types.errors import FailedPrecondition, Unavailable
from glasshouse.wire import reasons

_NAME = re.compile(r"([0-9a-f]{64})\.safetensors")


@dataclass(frozen=True, kw_only=True)
class StoredBlob:
    """A file of the store: `digest` "" for one left behind half-written. `modified_s`: seconds since 1970."""

    path: str
    digest: str
    modified_s: float


def encode(tensors: Arrays) -> bytes:
    """One safetensors file; equal tensors make equal bytes."""
    data: bytes = save_tensors({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)})
    return data


class BlobStore:
    """Blobs under one fsspec URL, or a path. Safe to use from several threads and processes."""

    def __init__(self, url: str) -> None:
        self._fs, self._root = fsspec.core.url_to_fs(url)
        self._local = isinstance(self._fs, LocalFileSystem)

    def put(self, data: bytes) -> str:
        """Writes `data` durably; returns its digest. Raises `Unavailable` where the store does not take it."""
        digest = hashlib.sha256(data).hexdigest()
        path = self._path(digest)
        try:
            if self._local:
                _write_durably(Path(path), data)
            else:
                self._fs.pipe_file(path, data)
        except OSError as error:
            raise self._unavailable(error) from error
        return digest

    def get(self, digest: str) -> dict[str, np.ndarray[Any, Any]]:
        """The tensors of a blob.

        Raises:
            FailedPrecondition: it is missing, or is not what was written.
            Unavailable: the store does not answer.
        """
        try:
            data = self._fs.cat_file(self._path(digest))
        except FileNotFoundError:
            raise self._damaged(digest, "is missing") from None
        except OSError as error:
            raise self._unavailable(error) from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise self._damaged(digest, "is not what was written")
        try:
            tensors: dict[str, np.ndarray[Any, Any]] = load_tensors(data)
        except SafetensorError as error:
            raise self._damaged(digest, f"cannot be read ({error})") from None
        return tensors

    def holds(self, digest: str) -> bool:
        """Whether the blob is there. Raises `Unavailable`."""
        try:
            # A listing kept from before would answer for the past.
            self._fs.invalidate_cache()
            return bool(self._fs.exists(self._path(digest)))
        except OSError as error:
            raise self._unavailable(error) from error

    def stored(self) -> Iterator[StoredBlob]:
        """Every file of the store, half-written ones included."""
        try:
            self._fs.invalidate_cache()
            paths = self._fs.find(self._root) if self._fs.exists(self._root) else []
        except OSError as error:
            raise self._unavailable(error) from error
        for path in paths:
            name = path.rsplit("/", 1)[-1]
            found = _NAME.fullmatch(name)
            if found is None and ".writing-" not in name:
                continue  # Not ours.
            try:
                modified_s = self._fs.modified(path).timestamp()
            except FileNotFoundError:
                continue
            yield StoredBlob(path=path, digest=found[1] if found else "", modified_s=modified_s)

    def remove(self, blob: StoredBlob) -> None:
        """Removes a file; one that is gone already is fine."""
        try:
            self._fs.rm_file(blob.path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._unavailable(error) from error

    def _path(self, digest: str) -> str:
        return f"{self._root}/{digest[:2]}/{digest}.safetensors"

    def _damaged(self, digest: str, what: str) -> FailedPrecondition:
        return FailedPrecondition(
            f"the tensors {digest[:12]} {what}",
            reason=reasons.BLOB_DAMAGED,
            field="registry.blobs",
            value=digest,
            remedy="restore the blob folder from a copy, or publish a new version",
        )

    def _unavailable(self, error: OSError) -> Unavailable:
        return Unavailable(
            f"the registry's blob store does not answer ({type(error).__name__})",
            reason=reasons.REGISTRY_UNAVAILABLE,
            remedy="check the space and the rights of the blob folder, then try again",
            retry_after_s=1.0,
        )


def _write_durably(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f"{path.name}.writing-{uuid.uuid4().hex}")
    with half.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)
    for folder in (path.parent, path.parent.parent):
        _synchronise(folder)


def _synchronise(folder: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
