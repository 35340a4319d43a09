"""A fake server and the command line pointed at it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from glasshouse.client.testing import FakeServer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    with FakeServer() as running:
        monkeypatch.setenv("GLASSHOUSE_TARGET", running.target)
        yield running


@pytest.fixture
def vector(tmp_path: Path) -> Path:
    path = tmp_path / "v.npy"
    np.save(path, np.ones(8, dtype=np.float32))
    return path
