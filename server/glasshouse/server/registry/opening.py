"""The registry that a server's settings ask for.

- Nothing said: an SQLite file and its tensors in one folder of the user's. Where that folder cannot be written, a
  temporary one, with a warning: a server that keeps nothing is better than none.
- A URL: that database. PostgreSQL is there to be shared, so where the tensors lie has to be said too.
- "memory": a temporary folder.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from glasshouse.server.registry.registry import Registry
from glasshouse.server.types.configuration import RegistrySettings
from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument
from glasshouse.wire import reasons

MEMORY = "memory"
DATA_VARIABLE = "GLASSHOUSE_DATA"

_log = structlog.get_logger(__name__)


@contextmanager
def opened(settings: RegistrySettings) -> Iterator[Registry]:
    """The registry, closed when the block is left.

    Raises:
        InvalidArgument: a URL that is none, or a shared database without a place for its tensors.
        FailedPrecondition: a folder that cannot be written, tables of a newer server, a driver that is missing.
        Unavailable: the database does not answer.
    """
    if settings.url == MEMORY:
        with _temporary() as registry:
            yield registry
        return
    folder = Path(settings.data) if settings.data else default_data_folder()
    try:
        if not (settings.url and settings.blobs):
            _make(folder)
    except OSError as error:
        if settings.data or settings.url or DATA_VARIABLE in os.environ:
            raise _not_writable(folder, error) from error
        _log.warning(
            "registry_is_temporary",
            why=f"{folder} cannot be written ({error.strerror or error})",
            remedy="say with --data where directions, probes and monitors are kept",
        )
        with _temporary() as registry:
            yield registry
        return
    registry = Registry.open(
        settings.url or f"sqlite:///{folder / 'registry.sqlite3'}", _blobs(settings, folder)
    )
    try:
        yield registry
    finally:
        registry.close()


def default_data_folder() -> Path:
    """$GLASSHOUSE_DATA, or `glasshouse` in the user's data folder."""
    if given := os.environ.get(DATA_VARIABLE):
        return Path(given)
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "glasshouse"


def _blobs(settings: RegistrySettings, folder: Path) -> str:
    if settings.blobs:
        return settings.blobs
    if settings.url.startswith("postgres"):
        raise InvalidArgument(
            "a PostgreSQL registry is shared by servers: where its tensors lie must be said",
            reason=reasons.FIELD_REQUIRED,
            field="registry.blobs",
            remedy="set registry.blobs to a folder or an object store that all its servers reach",
        )
    return str(folder / "blobs")


@contextmanager
def _temporary() -> Iterator[Registry]:
    with tempfile.TemporaryDirectory(prefix="glasshouse-", ignore_cleanup_errors=True) as folder:
        registry = Registry.at(Path(folder))
        try:
            yield registry
        finally:
            registry.close()


def _make(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _not_writable(folder: Path, error: OSError) -> FailedPrecondition:
    return FailedPrecondition(
        f"{folder} cannot be written ({error.strerror or error})",
        reason=reasons.REGISTRY_MISMATCH,
        field="registry.data",
        value=str(folder),
        remedy="name a folder that the server may write with --data",
    )
