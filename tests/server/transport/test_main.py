"""`glasshouse serve` as a process: what it prints, how it refuses, how it ends."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, sleep

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from glasshouse.v1 import generation_pb2 as pb
from glasshouse.v1 import generation_pb2_grpc

ROOT = Path(__file__).parents[3]
# Serves a fake engine: 5 ms a token.
PROGRAM = """
import sys
from tests.server.fake_engine import FakeEngine
from glasshouse.server.main import main
sys.exit(main(sys.argv[1:], lambda name, settings: FakeEngine(settings.name, step_s=0.005)))
"""
MODEL = ("--model", "some/echo")


def command(*flags: str) -> subprocess.Popen[str]:
    paths = [str(ROOT), *(str(ROOT / part) for part in ("proto", "server", "client"))]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )


@contextmanager
def running(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A process that serves, its address, and what it printed before."""
    process = command(*MODEL, "--listen", "127.0.0.1:0", "--log-format", "json", *flags)
    assert process.stdout is not None
    printed = ""
    try:
        for line in process.stdout:
            if found := re.fullmatch(r"glasshouse: serving echo on (127\.0\.0\.1:\d+)\n", line):
                yield process, found[1], printed
                return
            printed += line
        raise AssertionError(f"it ended: {process.communicate()[1]}")
    finally:
        process.kill()
        process.communicate()


def refused(*flags: str) -> tuple[int, str]:
    process = command(*flags)
    out, err = process.communicate(timeout=60)
    assert out == ""
    return process.returncode, err


def test_it_serves_when_it_says_so_and_drains_when_it_is_told() -> None:
    with running("--metrics", "127.0.0.1:0") as (process, address, printed):
        with grpc.insecure_channel(address) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            page = re.fullmatch(r"glasshouse: metrics on (http://127\.0\.0\.1:\d+/metrics)\n", printed)
            assert page
            with urllib.request.urlopen(page[1], timeout=5) as text:
                assert b"glasshouse_requests_total" in text.read()
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            stream = stub.Generate(pb.GenerateRequest(input={"text": "abc"}, max_tokens=200))
            next(stream)
            process.send_signal(signal.SIGTERM)
            events = list(stream)
            assert events[-1].finished.usage.generated_tokens == 200
        _, err = process.communicate(timeout=20)
        assert process.returncode == 0
        assert '"event": "stopped"' in err


def test_the_second_signal_ends_it_at_once() -> None:
    with running() as (process, address, _), grpc.insecure_channel(address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        stream = stub.Generate(pb.GenerateRequest(input={"text": "abc"}, max_tokens=500))
        next(stream)
        start = perf_counter()
        process.send_signal(signal.SIGINT)
        sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 128 + signal.SIGINT
        assert perf_counter() - start < 2.4
        stream.cancel()


def test_a_taken_port(tmp_path: Path) -> None:
    with running() as (_, address, _):
        code, err = refused(*MODEL, "--listen", address)
    assert code == 1
    assert err.count("\n") == 1
    assert "taken" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--listen", "0.0.0.0:0"), "--insecure-listen"),
        (("--listen", "nonsense"), "not an address"),
        (("--config", "/none.toml"), "cannot be read"),
        (("--dictionary", "nameless"), "NAME=PATH"),
        (("--name", "a/b"), "cannot be a model's name"),
        (("--threads", "-1"), "model.threads"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_cannot_start_says_why_in_a_line(flags: tuple[str, ...], message: str) -> None:
    code, err = refused(*MODEL, *flags)
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("glasshouse: ")
    assert message in err


def test_bad_usage() -> None:
    code, err = refused("--lissten", "x")
    assert code == 2
    assert "usage: glasshouse serve" in err


@pytest.fixture
def kept_logging() -> Iterator[None]:
    """Puts the process's logging back: `main` takes it over."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("kept_logging")
def test_an_engine_that_fails_to_load(capfd: pytest.CaptureFixture[str]) -> None:
    from glasshouse.server.main import main

    def broken(name: str, settings: object) -> object:
        raise RuntimeError("no such weights")

    assert main([*MODEL, "--listen", "127.0.0.1:0", "--log-format", "json"], broken) == 1  # type: ignore[arg-type]
    out, err = capfd.readouterr()
    assert out == ""
    assert "some/echo cannot be served: RuntimeError: no such weights" in err
