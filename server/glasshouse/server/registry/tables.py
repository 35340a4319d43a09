"""The tables as they are now, for queries. `migrations` made them what they are; a test compares the two.

- entries: one row a published version; never changed after, but for `deleted_us` and `change` (triggers see to it).
- uses: (entry_id, used_id), what must stay as long as the entry does.
- feature_labels: the rows of an entry of kind featureLabels.
- monitor_events: what monitors noticed; rows go with time.
- changes: one row; `counter` grows with every publication and deletion. Every writer takes its lock first, so writers
  come one after the other and the counter's order is the order of commits.
- schema_versions: the migrations that ran.

Times are microseconds since 1970 in UTC.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Float, ForeignKey, Integer, MetaData, Table, Text, UniqueConstraint

metadata = MetaData()

entries = Table(
    "entries",
    metadata,
    Column("id", BigInteger, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("subject", Text, nullable=False),
    Column("provenance", Text, nullable=False),
    Column("body", Text, nullable=False),
    Column("blob", Text, nullable=False),
    Column("blob_bytes", BigInteger, nullable=False),
    Column("content_hash", Text, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("deleted_us", BigInteger, nullable=True),
    Column("change", BigInteger, nullable=False),
    UniqueConstraint("kind", "model", "name", "version"),
)

uses = Table(
    "uses",
    metadata,
    Column("entry_id", BigInteger, ForeignKey("entries.id"), primary_key=True),
    Column("used_id", BigInteger, ForeignKey("entries.id"), primary_key=True),
)

feature_labels = Table(
    "feature_labels",
    metadata,
    Column("entry_id", BigInteger, ForeignKey("entries.id"), primary_key=True),
    Column("feature", BigInteger, primary_key=True),
    Column("label", Text, nullable=False),
    Column("score", Float(53), nullable=True),
)

monitor_events = Table(
    "monitor_events",
    metadata,
    Column("id", BigInteger, primary_key=True),
    Column("model", Text, nullable=False),
    Column("monitor", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("event", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("time_us", BigInteger, nullable=False),
    Column("request_id", Text, nullable=False),
    Column("position", BigInteger, nullable=False),
    Column("score", Float(53), nullable=True),
    Column("details", Text, nullable=False),
)

changes = Table(
    "changes",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("counter", BigInteger, nullable=False),
)

schema_versions = Table(
    "schema_versions",
    metadata,
    Column("version", Integer, primary_key=True),
    Column("name", Text, nullable=False),
    Column("applied_us", BigInteger, nullable=False),
)
