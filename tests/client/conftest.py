"""A fake server on a real socket, and a client connected to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from glasshouse.client import Client, Model
from glasshouse.client.testing import FakeServer


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as running:
        yield running


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.target, timeout=20) as connected:
        yield connected


@pytest.fixture
def model(client: Client) -> Model:
    return client.model()
