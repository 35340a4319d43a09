"""SIGTERM: health says so first, what is in flight finishes, nothing new begins, the exit status is 0."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from glasshouse.client import Client, GeneratedToken, UnavailableError
from glasshouse.tour.server_process import ServerProcess

from .conftest import PROMPT

MakeServer = Callable[..., ServerProcess]


def test_a_stream_in_flight_finishes(make_server: MakeServer) -> None:
    server = make_server()
    with Client(server.target, max_attempts=1) as client:
        model = client.model()
        tokens: list[GeneratedToken] = []
        with model.generate(PROMPT, max_tokens=300, ignore_eos=True, seed=0) as stream:
            tokens.append(next(stream))
            server.terminate()
            tokens += stream
        assert len(tokens) == 300 and stream.finish_reason == "length"
        assert server.wait(20) == 0
        with pytest.raises(UnavailableError):
            model.tokenize("gone", timeout=2)
    assert '"stopped"' in server.log


def test_what_outlasts_the_limit_is_told(make_server: MakeServer) -> None:
    server = make_server("[server]\ndrain_timeout_s = 0.3\n")
    with Client(server.target) as client:
        model = client.model()
        ended = threading.Event()
        errors: list[Exception] = []

        def read_slowly() -> None:
            try:
                with model.generate(PROMPT, max_tokens=480, ignore_eos=True) as stream:
                    for _ in stream:
                        if not ended.is_set():
                            server.terminate()
                            ended.set()
            except Exception as error:
                errors.append(error)

        readers = [threading.Thread(target=read_slowly) for _ in range(24)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(30)
        assert server.wait(20) == 0
    assert errors, "480 tokens of 24 streams are not done in 0.3 s"
    assert {type(error) for error in errors} == {UnavailableError}, errors
