"""One database, SQLite or PostgreSQL, and its failures as errors a caller understands.

- SQLite: write-ahead log, full synchronisation (a commit survives a power cut), writers begin with the write lock so
  that none deadlocks, and wait for it up to `LOCK_TIMEOUT_S`.
- PostgreSQL: psycopg, connections checked before use, so that a database that came back is used again; locks and
  statements have time limits, so that a call never hangs.

What the database cannot do now becomes `Unavailable`: the caller may try again. A commit whose outcome is not known is
one of these; publishing the same draft again is safe (see `registry`).
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, exc
from sqlalchemy.engine import URL, make_url

from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument, Unavailable
from glasshouse.wire import reasons

LOCK_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 5
STATEMENT_TIMEOUT_S = 30.0


class Database:
    """Transactions on one database. Safe to use from several threads."""

    def __init__(self, url: str) -> None:
        """`url`: ``sqlite:///PATH`` or ``postgresql://...``. Opens no connection yet.

        Raises:
            InvalidArgument: another kind of URL.
            FailedPrecondition: PostgreSQL's driver is not installed.
        """
        parsed = _parse(url)
        self.dialect = parsed.get_backend_name()
        self.location = parsed.render_as_string(hide_password=True)
        self._engine = _sqlite(parsed) if self.dialect == "sqlite" else _postgresql(parsed)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that only reads."""
        with self._translated(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that writes: all of it is committed when the block is left, or nothing."""
        with self._translated(), self._engine.connect() as connection:
            connection = connection.execution_options(writing=True)
            with connection.begin():
                yield connection

    def close(self) -> None:
        """Closes the connections that are not in use."""
        self._engine.dispose()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except exc.TimeoutError as error:
            raise self._unavailable("every connection is in use") from error
        except exc.DBAPIError as error:
            gone = (
                isinstance(error, exc.OperationalError | exc.InterfaceError) or error.connection_invalidated
            )
            code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
            if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
                raise self._damaged(str(error.orig)) from error
            gone = (
                isinstance(error, exc.OperationalError | exc.InterfaceError) or error.connection_invalidated
            )
            # SQLITE_ERROR is a wrong statement: our own defect.
            if not gone or code == sqlite3.SQLITE_ERROR:
                raise
            raise self._unavailable(type(error.orig).__name__) from error

    def _damaged(self, why: str) -> FailedPrecondition:
        return FailedPrecondition(
            f"the registry's file is damaged or no database ({why})",
            reason=reasons.REGISTRY_MISMATCH,
            field="registry.url",
            value=self.location,
            remedy="restore it from a copy, or name another file",
        )

    def _unavailable(self, why: str) -> Unavailable:
        return Unavailable(
            f"the registry's database does not answer ({why})",
            reason=reasons.REGISTRY_UNAVAILABLE,
            remedy="try again; generation and what is already loaded go on meanwhile",
            retry_after_s=1.0,
        )


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except exc.ArgumentError:
        raise _wrong_url("it cannot be read") from None
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        if not parsed.database or parsed.database == ":memory:":
            raise _wrong_url("an SQLite registry is a file")
        return parsed.set(drivername="sqlite+pysqlite")
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    raise _wrong_url(f"{backend} is not supported")


def _wrong_url(why: str) -> InvalidArgument:
    # The URL itself may hold a password: it is not repeated.
    return InvalidArgument(
        f"the registry's URL: {why}",
        reason=reasons.VALUE_MALFORMED,
        field="registry.url",
        remedy="use sqlite:///PATH or postgresql://USER@HOST/DATABASE",
    )


def _sqlite(url: URL) -> Engine:
    Path(url.database or "").parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, connect_args={"timeout": LOCK_TIMEOUT_S}, pool_size=5, max_overflow=20)

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, record: Any) -> None:
        # No implicit BEGIN by the driver: `begin` below says which kind.
        connection.isolation_level = None
        _write_ahead(connection)
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writing = connection.get_execution_options().get("writing", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

    return engine


def _write_ahead(connection: Any) -> None:
    """Turns the write-ahead log on. On a new file SQLite does not wait for another process that is doing the same."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except Exception as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _postgresql(url: URL) -> Engine:
    limits = (
        f"-c lock_timeout={int(LOCK_TIMEOUT_S * 1000)} -c statement_timeout={int(STATEMENT_TIMEOUT_S * 1000)}"
    )
    try:
        return create_engine(
            url,
            pool_pre_ping=True,
            pool_size=5,
            max_overflow=20,
            pool_timeout=LOCK_TIMEOUT_S,
            connect_args={"connect_timeout": CONNECT_TIMEOUT_S, "options": limits},
        )
    except ModuleNotFoundError as error:
        raise FailedPrecondition(
            f"a registry on PostgreSQL needs {error.name}",
            reason=reasons.CAPABILITY_MISSING,
            field="registry.url",
            remedy="pip install 'glasshouse[postgres]'",
        ) from None
