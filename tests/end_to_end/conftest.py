"""One real server for the tests of a process: `glasshouse serve` on fable, on loopback."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest

from glasshouse.client import Client, Model
from glasshouse.tour.server_process import ServerProcess

HOOK_POINT = "blocks.3.hook_resid_post"
PROMPT = "Once upon a time, there was a little girl named Lily."
THREADS = ("--threads", "1", "--registry", "memory")


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """Stopped in order at the end, which must work too."""
    with ServerProcess("--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", *THREADS) as process:
        yield process
        process.stop()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.target) as client:
        yield client


@pytest.fixture
def model(client: Client) -> Model:
    return client.model()


@pytest.fixture(scope="session")
def vectors() -> np.ndarray:
    """Steering vectors (64, d_model) that change what fable says and leave it finite."""
    drawn = np.random.default_rng(0).standard_normal((64, 192)).astype(np.float32)
    return drawn * (40 / np.linalg.norm(drawn, axis=1, keepdims=True))


@pytest.fixture
def metric(server: ServerProcess) -> Callable[[str], float]:
    """A number of the metrics page, summed over its labels."""
    return lambda name: read_metric(server, name)


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts a server of the test's own, with a configuration file where `configuration` has text."""
    started: list[ServerProcess] = []

    def make(configuration: str = "") -> ServerProcess:
        arguments = ["--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", *THREADS]
        if configuration:
            file = tmp_path / "glasshouse.toml"
            file.write_text(configuration)
            arguments += ["--config", str(file)]
        started.append(ServerProcess(*arguments))
        return started[-1]

    yield make
    for process in started:
        process.kill()


def read_metric(server: ServerProcess, name: str) -> float:
    with urlopen(server.metrics_url, timeout=10) as page:
        lines = page.read().decode().splitlines()
    values = [float(line.rpartition(" ")[2]) for line in lines if re.match(rf"{name}(\{{| )", line)]
    assert values, f"no metric {name}"
    return sum(values)


def until(holds: Callable[[], bool], within_s: float = 10.0) -> None:
    """Returns once something holds; fails where it does not in time."""
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, f"did not hold within {within_s:g} s"
        time.sleep(0.02)
