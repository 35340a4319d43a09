"""Which weights these are: a name that changes when they do, so that what was made on one is not used on another.

- A model of the hub: the commit it was loaded at.
- A folder: SHA-256 over its configuration and its weight files, in the order of their names. Of files above
  `WHOLE_FILE_BYTES` it is their size, their beginning and pieces spread evenly over them: training moves every
  piece, and gigabytes are not read through at each start.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import IO

from glasshouse.server.models.loaded import LoadedModel

WHOLE_FILE_BYTES = 64 << 20
_PIECE_BYTES = 1 << 16
_PIECES = 64
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")


def revision_of_model(loaded: LoadedModel) -> str:
    """Of a model in memory, its weights there or not: whichever engine serves it, the same."""
    config = getattr(loaded.model, "config", None)
    return revision_of(loaded.source, getattr(config, "_commit_hash", None))


def revision_of(source: str, commit: str | None = None) -> str:
    """The commit where there is one, else the hash of what lies at `source`; empty where nothing does."""
    if commit:
        return commit
    folder = Path(source)
    files = sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)}) if folder.is_dir() else []
    if not files:
        return ""
    found = hashlib.sha256()
    for path in (folder / "config.json", *files):
        if path.is_file():
            found.update(path.name.encode() + b"\0")
            with path.open("rb") as file:
                _add(found, file, path.stat().st_size)
    return found.hexdigest()


def _add(found: hashlib._Hash, file: IO[bytes], size: int) -> None:
    found.update(size.to_bytes(8, "little"))
    if size <= WHOLE_FILE_BYTES:
        while piece := file.read(1 << 20):
            found.update(piece)
        return
    for index in range(_PIECES):
        file.seek(index * (size - _PIECE_BYTES) // (_PIECES - 1))
        found.update(file.read(_PIECE_BYTES))
