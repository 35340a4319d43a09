"""Several servers on one registry: kills, concurrent publishers, who sees what and when, outages, schema versions."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import exc, inspect, text
from tests.server.registry import drafts
from tests.server.registry.postgres import Cluster

from glasshouse.server.registry.database import Database
from glasshouse.server.registry.migrations import MIGRATIONS, Migration, migrate
from glasshouse.server.registry.names import Kind
from glasshouse.server.registry.records import Record
from glasshouse.server.registry.registry import Registry
from glasshouse.server.registry.tables import metadata
from glasshouse.server.registry.watching import RegistryWatch
from glasshouse.server.types.errors import AlreadyExists, FailedPrecondition, InvalidArgument, Unavailable

PUBLISHER = Path(__file__).with_name("publisher.py")
KILLS = 20
NEXT = MIGRATIONS[-1].version + 1


def test_kill_at_any_moment_leaves_nothing_half_published(url: str, blobs: str, registry: Registry) -> None:
    process = subprocess.Popen(
        [sys.executable, str(PUBLISHER), url, blobs], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin and process.stdout
    told: set[str] = set()
    moments = random.Random(0)
    for child in range(KILLS):
        process.stdin.write(f"{child}\n")
        process.stdin.flush()
        line = process.stdout.readline()
        while not line.startswith("pid "):
            told.add(line.strip())
            line = process.stdout.readline()
        pid = int(line.split()[1])
        if child % 4:
            # In its stride: within some publication after the first.
            told.add(process.stdout.readline().strip())
        time.sleep(moments.uniform(0.0, 0.06))
        os.kill(pid, signal.SIGKILL)
        while (line := process.stdout.readline()) != "dead\n":
            told.add(line.strip())
    process.stdin.close()
    assert process.wait(timeout=20) == 0
    found, token = {}, ""
    while True:
        page = registry.list(Kind.FEATURE_LABELS, page_size=500, page_token=token)
        found |= {record.reference.name: record for record in page.records}
        if not (token := page.next_page_token):
            break
    # Nothing lost that was told, nothing half there: every tensor and every label of every row.
    assert told <= found.keys()
    assert len(told) >= KILLS * 3 // 4
    for record in found.values():
        assert registry.tensors(record)["vector"].shape == (5000,)
        assert len(registry.labels(record)) == 50
    with registry._database.reading() as connection:
        n_labels = connection.execute(text("SELECT count(*) FROM feature_labels")).scalar_one()
    assert n_labels == 50 * len(found)
    registry.sweep(grace_s=-1)
    n_blobs = sum(1 for _ in registry._blobs.stored())
    assert n_blobs == len(found)
    for record in found.values():
        assert registry.tensors(record)
    # And it goes on.
    assert registry.publish(drafts.direction()).version == 1


def test_concurrent_publishers_share_the_versions_out(open_registry: Callable[[], Registry]) -> None:
    servers = [open_registry() for _ in range(3)]

    def publish(number: int) -> int:
        return servers[number % 3].publish(drafts.direction(version=None, seed=number)).version

    def compete(number: int) -> bool:
        try:
            servers[number % 3].publish(drafts.probe("one", seed=number))
        except AlreadyExists:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(publish, range(24))) == list(range(1, 25))
        assert sum(pool.map(compete, range(12))) == 1
    assert servers[0].counter() == 25


def test_a_sweep_never_takes_a_blob_from_under_a_publication(open_registry: Callable[[], Registry]) -> None:
    publishing, sweeping = open_registry(), open_registry()
    done = threading.Event()

    def sweep() -> int:
        removed = 0
        while not done.is_set():
            removed += sweeping.sweep(grace_s=-1)
        return removed

    def publish(number: int) -> Record:
        # A few contents, deleted and published again and again, against a sweep without any grace.
        draft = drafts.direction(f"d{number}", seed=number % 3)
        while True:
            try:
                return publishing.publish(draft)
            except Unavailable:
                continue  # Its file was swept while it was being written: the same call again.

    with ThreadPoolExecutor(4) as pool:
        swept = pool.submit(sweep)
        records = list(pool.map(publish, range(30)))
        for record in records[::2]:
            publishing.delete(record.reference)
        done.set()
        swept.result()
    for record in records[1::2]:
        assert publishing.tensors(record).keys() == {"vector"}


def test_servers_that_start_together_take_turns(url: str, blobs: str) -> None:
    with ThreadPoolExecutor(6) as pool:
        opened = list(pool.map(lambda _: Registry.open(url, blobs), range(6)))
    assert {registry.counter() for registry in opened} == {0}
    for registry in opened:
        registry.close()


def test_a_publication_is_seen_within_a_second(open_registry: Callable[[], Registry]) -> None:
    one, other = open_registry(), open_registry()
    one.publish(drafts.direction("before"))
    seen: list[tuple[float, Record]] = []
    arrived = threading.Condition()

    def take(records: Sequence[Record]) -> None:
        with arrived:
            seen.extend((time.monotonic(), record) for record in records)
            arrived.notify_all()

    watch = RegistryWatch(other, take, since=0)
    watch.start()
    published_s = {}
    for number in range(3):
        record = one.publish(drafts.direction(f"d{number}"))
        published_s[record.reference.name] = time.monotonic()
    one.delete(record.reference)
    with arrived:
        assert arrived.wait_for(lambda: seen and seen[-1][1].deleted is not None, timeout=10)
    watch.stop()
    names = [record.reference.name for _, record in seen]
    assert names[0] == "before"
    assert set(names) == {"before", "d0", "d1", "d2"}
    changes = [record.change for _, record in seen]
    assert changes == sorted(changes)
    for at, record in seen[1:]:
        assert at - published_s[record.reference.name] < 1.0


def test_a_watch_outlives_its_owners_mistakes(registry: Registry) -> None:
    calls: list[int] = []
    done = threading.Event()

    def take(records: Sequence[Record]) -> None:
        calls.append(len(records))
        if len(calls) == 1:
            raise RuntimeError("planted")
        done.set()

    registry.publish(drafts.direction())
    watch = RegistryWatch(registry, take, interval_s=0.01)
    watch.start()
    assert done.wait(10)
    watch.stop()
    assert calls == [1, 1]


def test_tables_are_what_the_migrations_made(registry: Registry) -> None:
    with registry._database.reading() as connection:
        found = inspect(connection)
        assert set(found.get_table_names()) == set(metadata.tables)
        for name, table in metadata.tables.items():
            columns = {column["name"]: column["nullable"] for column in found.get_columns(name)}
            keys = set(found.get_pk_constraint(name)["constrained_columns"])
            for column in table.columns:
                assert column.name in columns
                assert (column.name in keys) == bool(column.primary_key)
                assert column.primary_key or columns[column.name] == column.nullable
            assert set(columns) == {column.name for column in table.columns}


def test_migrations_run_once_in_order_and_whole(url: str) -> None:
    database = Database(url)
    assert migrate(database) == len(MIGRATIONS)
    assert migrate(database) == 0
    broken = Migration(
        version=NEXT,
        name="breaks half-way",
        statements=("CREATE TABLE second (id INTEGER)", "INSERT INTO nowhere VALUES (1)"),
        only={},
    )
    with pytest.raises(exc.DBAPIError, match="nowhere"):
        migrate(database, (*MIGRATIONS, broken))
    with database.reading() as connection:
        assert not inspect(connection).has_table("second")
    whole = Migration(version=NEXT, name="works", statements=broken.statements[:1], only={})
    assert migrate(database, (*MIGRATIONS, whole)) == 1
    with pytest.raises(
        FailedPrecondition, match=f"of version {NEXT}, this server knows {NEXT - 1}"
    ) as caught:
        migrate(database)
    assert caught.value.reason == "REGISTRY_MISMATCH"
    database.close()


def test_an_outage_is_unavailable_and_passes(cluster: Cluster, blobs: str) -> None:
    url = cluster.new_database()
    registry = Registry.open(url, blobs)
    registry.publish(drafts.direction())
    watch = RegistryWatch(registry, lambda records: None, interval_s=0.02)
    watch.start()
    cluster.stop()
    try:
        with pytest.raises(Unavailable) as caught:
            registry.publish(drafts.direction("later"))
        assert (caught.value.reason, caught.value.retry_after_s) == ("REGISTRY_UNAVAILABLE", 1.0)
        assert _soon(lambda: watch.unavailable_since_s is not None)
        with pytest.raises(Unavailable):
            Registry.open(url, blobs)
    finally:
        cluster.start()
    assert registry.publish(drafts.direction("later")).version == 1
    assert len(registry.list(Kind.DIRECTION).records) == 2
    assert _soon(lambda: watch.unavailable_since_s is None)
    watch.stop()
    registry.close()


def _soon(what: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_a_locked_file_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glasshouse.server.registry.database.LOCK_TIMEOUT_S", 0.1)
    registry = Registry.at(tmp_path)
    other = Registry.at(tmp_path)
    with other._database.writing(), pytest.raises(Unavailable):
        registry.publish(drafts.direction())
    # Readers do not wait for writers.
    with other._database.writing():
        assert registry.list(Kind.DIRECTION).records == ()
    for opened in (registry, other):
        opened.close()


def test_a_full_or_forbidden_blob_folder_is_unavailable(tmp_path: Path) -> None:
    registry = Registry.at(tmp_path)
    (tmp_path / "blobs").write_text("a file where the folder should be")
    with pytest.raises(Unavailable, match="blob store"):
        registry.publish(drafts.direction())
    assert registry.list(Kind.DIRECTION).records == ()
    registry.close()


@pytest.mark.parametrize(
    "wrong", ["nonsense", "sqlite://", "sqlite:///:memory:", "mysql://user:secret@host/x"]
)
def test_urls_that_are_none(wrong: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Database(wrong)
    assert caught.value.field == "registry.url"
    assert "secret" not in str(caught.value)


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "registry.sqlite3").write_text("hello " * 1000)
    with pytest.raises(FailedPrecondition, match="damaged or no database"):
        Registry.at(tmp_path)
