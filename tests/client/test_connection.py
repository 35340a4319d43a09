"""Targets, keys, TLS, readiness: what a client checks before it speaks, and what goes with every call."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from pathlib import Path

import grpc
import pytest

from glasshouse.client import (
    AsyncClient,
    Client,
    TLSConfig,
    UnauthenticatedError,
    UnavailableError,
)
from glasshouse.client.connection import is_local
from glasshouse.client.testing import FakeServer


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("localhost:50051", True),
        ("LOCALHOST.:1", True),
        ("127.0.0.1:1", True),
        ("127.9.9.9", True),
        ("[::1]:50051", True),
        ("::1", True),
        ("ipv4:127.0.0.1:1,127.0.0.2:1", True),
        ("ipv6:[::1]:1", True),
        ("ipv6:%5B::1%5D:1", True),
        ("dns:///localhost:1", True),
        ("unix:/tmp/socket", True),
        ("unix-abstract:name", True),
        ("0.0.0.0:1", False),
        ("10.0.0.1:1", False),
        ("localhost.example.org:1", False),
        ("ipv4:127.0.0.1:1,10.0.0.1:1", False),
        ("dns://localhost/example.org:1", False),
        ("xds:///localhost", False),
        ("example.org", False),
        ("[2001:db8::1]:1", False),
    ],
)
def test_what_stays_on_this_machine(target: str, local: bool) -> None:
    assert is_local(target) is local


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_key_does_not_travel_in_plaintext(kind: type) -> None:
    with pytest.raises(ValueError, match="tls=True"):
        kind("example.org:443", api_key="secret")
    kind("example.org:443", api_key="secret", tls=True)
    kind("localhost:1", api_key="secret")
    kind("example.org:443")


@pytest.mark.parametrize(
    "options", [{"timeout": 0}, {"timeout": -1}, {"timeout": None}, {"max_attempts": 0}, {"target": ""}]
)
def test_bad_settings_are_refused_at_once(options: dict) -> None:
    with pytest.raises(ValueError):
        Client(**options)


def test_bad_timeouts_of_a_call(client: Client) -> None:
    with pytest.raises(ValueError, match="positive number of seconds"):
        client.models(timeout=0)


def test_making_a_client_is_cheap_and_connects_to_nothing() -> None:
    start = time.monotonic()
    for _ in range(20):
        Client("localhost:1").close()
        AsyncClient("localhost:1")
    assert time.monotonic() - start < 5


def test_the_key_and_an_id_go_with_every_call() -> None:
    with FakeServer(api_key="k1") as server:
        with Client(server.target, api_key="k1") as client:
            client.model().generate("x", max_tokens=1).result()
        with Client(server.target) as client, pytest.raises(UnauthenticatedError) as caught:
            client.models()
        assert caught.value.reason == "KEY_MISSING" and caught.value.remedy
        with (
            Client(server.target, api_key="k2") as client,
            pytest.raises(UnauthenticatedError, match="KEY_UNKNOWN"),
        ):
            client.models()
    ids = [str(call.metadata["x-request-id"]) for call in server.calls]
    assert len(set(ids)) == len(ids) and all(len(i) == 32 and int(i, 16) for i in ids)
    assert all(call.timeout_s is not None and call.timeout_s < 65 for call in server.calls)


def test_wait_ready() -> None:
    with FakeServer(serving=False) as server, Client(server.target) as client:
        with pytest.raises(UnavailableError, match="not serving"):
            client.wait_ready(0.3)
        threading.Timer(0.2, server.set_serving, [True]).start()
        client.wait_ready(10)
    with Client("localhost:1") as client, pytest.raises(UnavailableError, match="no server answers"):
        client.wait_ready(0.3)


def test_wait_ready_outlasts_a_server_that_starts_late() -> None:
    with FakeServer() as found:
        port = int(found.target.rpartition(":")[2])
    late = FakeServer(port=port)
    threading.Timer(0.4, late.start).start()
    try:
        with Client(late.target) as client:
            client.wait_ready(20)
            assert client.models()
    finally:
        late.stop()


async def test_async_wait_ready() -> None:
    with FakeServer(serving=False) as server:
        async with AsyncClient(server.target) as client:
            with pytest.raises(UnavailableError, match="not serving"):
                await client.wait_ready(0.2)
            server.set_serving(True)
            await client.wait_ready(10)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    key, pem = folder / "key.pem", folder / "cert.pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(pem), "-days", "2", "-subj", "/CN=glass.test"]
    command += ["-addext", "subjectAltName=DNS:glass.test"]
    subprocess.run(command, check=True, capture_output=True)
    return key, pem


async def test_tls_with_an_own_authority_and_name(certificate: tuple[Path, Path]) -> None:
    key, pem = certificate
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), pem.read_bytes())])
    with FakeServer(credentials=credentials, api_key="k") as server:
        for roots in (pem, str(pem), pem.read_bytes()):
            config = TLSConfig(root_certificates=roots, server_name="glass.test")
            with Client(server.target, tls=config, api_key="k") as client:
                assert client.models()
        async with AsyncClient(server.target, tls=config, api_key="k") as async_client:
            assert await async_client.models()
        unnamed = TLSConfig(root_certificates=pem)  # The certificate does not say localhost.
        with (
            Client(server.target, tls=unnamed, max_attempts=1) as client,
            pytest.raises(UnavailableError),
        ):
            client.models()
        with Client(server.target, max_attempts=1) as client, pytest.raises(UnavailableError):
            client.models()


def test_tls_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="both or neither"):
        TLSConfig(client_key=b"x")
    with pytest.raises(FileNotFoundError):
        Client("localhost:1", tls=TLSConfig(root_certificates="/nowhere.pem"))
