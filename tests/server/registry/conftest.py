"""Every registry test runs on both databases. Without PostgreSQL's binaries its half is skipped, loudly; with
GLASSHOUSE_REQUIRE_POSTGRES=1, as in continuous integration, that is an error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.server.registry.postgres import INSTALL, Cluster, find_binaries

from glasshouse.server.registry.registry import Registry

MISSING = (
    f"PostgreSQL is not installed: its half of the registry's tests did NOT run. Install it with: {INSTALL}"
)
BOTH = ("sqlite", "postgresql")

OpenRegistry = Callable[[], Registry]


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    binaries = find_binaries()
    if binaries is None:
        if os.environ.get("GLASSHOUSE_REQUIRE_POSTGRES"):
            pytest.fail(MISSING)
        # A skip is one letter, and pytest-xdist's workers have no summary of their own: say it where it is seen.
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n!!! {MISSING}\n", file=sys.stderr, flush=True)
        pytest.skip(MISSING)
    found = Cluster(binaries)
    yield found
    found.remove()


@pytest.fixture(params=BOTH)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a new, empty database, of each kind in turn."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'registry.sqlite3'}"
    cluster: Cluster = request.getfixturevalue("cluster")
    return cluster.new_database()


@pytest.fixture
def blobs(tmp_path: Path) -> str:
    return str(tmp_path / "blobs")


@pytest.fixture
def open_registry(url: str, blobs: str) -> Iterator[OpenRegistry]:
    """Opens one more registry on the same database and blobs, as another server would."""
    opened: list[Registry] = []

    def another() -> Registry:
        opened.append(Registry.open(url, blobs))
        return opened[-1]

    yield another
    for registry in opened:
        registry.close()


@pytest.fixture
def registry(open_registry: OpenRegistry) -> Registry:
    return open_registry()
