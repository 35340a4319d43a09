"""How the tables came to be: numbered steps, each run once, in order, in one transaction under one lock.

Alembic was weighed and left out: its environment, templates and configuration file serve migrations that are generated
and that branch. Ours are few, linear, run at start by whichever server comes first, and must be atomic on both
databases, which a list of statements does in a page. A published step is never edited; a change is a new step.

SQL here is the part that both databases share; `_WORDS` holds where they differ.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, func, insert, inspect, select, text

from glasshouse.server.registry.database import Database
from glasshouse.server.registry.tables import schema_versions
from glasshouse.server.types.errors import FailedPrecondition
from glasshouse.wire import reasons

# Names sort by their bytes on both: SQLite does so by itself, PostgreSQL under the collation "C".
_WORDS: Mapping[str, Mapping[str, str]] = {
    "sqlite": {"id": "INTEGER PRIMARY KEY AUTOINCREMENT", "key": "TEXT", "double": "DOUBLE"},
    "postgresql": {
        "id": "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
        "key": 'TEXT COLLATE "C"',
        "double": "DOUBLE PRECISION",
    },
}

# Any number, the same for every server on the database.
_LOCK = 0x676C6173


@dataclass(frozen=True, kw_only=True)
class Migration:
    """One step. `statements` run on both databases, `only` on the one named besides."""

    version: int
    name: str
    statements: Sequence[str]
    only: Mapping[str, Sequence[str]]


_FROZEN = "kind, model, name, version, subject, provenance, body, blob, blob_bytes, content_hash, created_us"

MIGRATIONS: Sequence[Migration] = (
    Migration(
        version=1,
        name="entries, what they use, feature labels, the counter of changes",
        statements=(
            """CREATE TABLE entries (
                id {id}, kind {key} NOT NULL, model {key} NOT NULL, name {key} NOT NULL, version INTEGER NOT NULL,
                subject {key} NOT NULL, provenance TEXT NOT NULL, body TEXT NOT NULL, blob {key} NOT NULL,
                blob_bytes BIGINT NOT NULL, content_hash TEXT NOT NULL, created_us BIGINT NOT NULL, deleted_us BIGINT,
                change BIGINT NOT NULL, UNIQUE (kind, model, name, version), CHECK (version >= 1))""",
            "CREATE INDEX entries_change ON entries (change)",
            "CREATE INDEX entries_blob ON entries (blob)",
            """CREATE TABLE uses (entry_id BIGINT NOT NULL REFERENCES entries (id),
                used_id BIGINT NOT NULL REFERENCES entries (id), PRIMARY KEY (entry_id, used_id))""",
            "CREATE INDEX uses_used ON uses (used_id)",
            """CREATE TABLE feature_labels (entry_id BIGINT NOT NULL REFERENCES entries (id), feature BIGINT NOT NULL,
                label TEXT NOT NULL, score {double}, PRIMARY KEY (entry_id, feature))""",
            "CREATE TABLE changes (id INTEGER NOT NULL PRIMARY KEY, counter BIGINT NOT NULL)",
            "INSERT INTO changes (id, counter) VALUES (1, 0)",
        ),
        only={
            "sqlite": (
                f"""CREATE TRIGGER entries_unchanged BEFORE UPDATE OF {_FROZEN} ON entries
                    BEGIN SELECT RAISE(ABORT, 'what is published does not change'); END""",
                """CREATE TRIGGER entries_kept BEFORE DELETE ON entries
                    BEGIN SELECT RAISE(ABORT, 'what is published does not change'); END""",
                """CREATE TRIGGER labels_unchanged BEFORE UPDATE ON feature_labels
                    BEGIN SELECT RAISE(ABORT, 'what is published does not change'); END""",
            ),
            "postgresql": (
                """CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS
                    $$ BEGIN RAISE EXCEPTION 'what is published does not change'; END $$""",
                f"""CREATE TRIGGER entries_unchanged BEFORE UPDATE OF {_FROZEN} ON entries
                    FOR EACH ROW EXECUTE FUNCTION refuse_change()""",
                """CREATE TRIGGER entries_kept BEFORE DELETE ON entries
                    FOR EACH ROW EXECUTE FUNCTION refuse_change()""",
                """CREATE TRIGGER labels_unchanged BEFORE UPDATE ON feature_labels
                    FOR EACH ROW EXECUTE FUNCTION refuse_change()""",
            ),
        },
    ),
    Migration(
        version=2,
        name="what monitors noticed",
        statements=(
            """CREATE TABLE monitor_events (
                id {id}, model {key} NOT NULL, monitor {key} NOT NULL, version INTEGER NOT NULL, event {key} NOT NULL,
                action {key} NOT NULL, time_us BIGINT NOT NULL, request_id TEXT NOT NULL, position BIGINT NOT NULL,
                score {double}, details TEXT NOT NULL)""",
            "CREATE INDEX monitor_events_monitor ON monitor_events (model, monitor, id)",
            "CREATE INDEX monitor_events_time ON monitor_events (time_us)",
        ),
        only={},
    ),
)


def migrate(database: Database, steps: Sequence[Migration] = MIGRATIONS) -> int:
    """Runs the steps that have not run; returns how many. Servers that start together take turns.

    Raises:
        FailedPrecondition: a newer server has been here.
    """
    with database.writing() as connection:
        if database.dialect == "postgresql":
            connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))
        done = _done(connection)
        newest = steps[-1].version
        if done > newest:
            raise FailedPrecondition(
                f"the registry's tables are of version {done}, this server knows {newest}",
                reason=reasons.REGISTRY_MISMATCH,
                field="registry.url",
                value=done,
                remedy="run the newer server, or use another database",
            )
        waiting = [step for step in steps if step.version > done]
        for step in waiting:
            _run(connection, step, database.dialect)
        return len(waiting)


def _done(connection: Connection) -> int:
    if not inspect(connection).has_table(schema_versions.name):
        connection.execute(
            text(
                "CREATE TABLE schema_versions (version INTEGER NOT NULL PRIMARY KEY, name TEXT NOT NULL, "
                "applied_us BIGINT NOT NULL)"
            )
        )
        return 0
    return int(connection.execute(select(func.coalesce(func.max(schema_versions.c.version), 0))).scalar_one())


def _run(connection: Connection, step: Migration, dialect: str) -> None:
    for statement in (*step.statements, *step.only.get(dialect, ())):
        words = statement
        for word, meaning in _WORDS[dialect].items():
            words = words.replace(f"{{{word}}}", meaning)
        connection.exec_driver_sql(words)
    connection.execute(
        insert(schema_versions).values(
            version=step.version, name=step.name, applied_us=time.time_ns() // 1000
        )
    )
