"""Addresses, exposure, keys and TLS."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import trustme

from glasshouse.server.transport.keys import KeyFileError, KeyRing
from glasshouse.server.transport.listening import (
    Address,
    ListenError,
    check_exposure,
    credentials,
    parse_address,
)
from glasshouse.server.types.configuration import KeySettings, ListenSettings, Settings, TlsSettings
from glasshouse.server.types.errors import PermissionDenied, Unauthenticated
from glasshouse.v1 import models_pb2

from ..serving import serving

LIST_MODELS = models_pb2.ListModelsRequest()
PORT_0 = ListenSettings(listen="localhost:0")


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:50051", "127.0.0.1", 50051),
        (":9464", "127.0.0.1", 9464),
        ("9464", "127.0.0.1", 9464),
        ("[::1]:0", "::1", 0),
        ("example.org:1", "example.org", 1),
        ("unix:/run/g.sock", "unix:/run/g.sock", 0),
    ],
)
def test_addresses(text: str, host: str, port: int) -> None:
    assert parse_address(text) == Address(host=host, port=port)


@pytest.mark.parametrize(
    "text", ["", "host", "host:", "host:port", "host:65536", "host:-1", "::1:50051", "unix:", "a:²"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ListenError):
        parse_address(text)


@pytest.mark.parametrize("text", ["127.0.0.1:1", "127.8.8.8:1", "localhost:1", "[::1]:1", "unix:/x"])
def test_plaintext_may_stay_on_the_machine(text: str) -> None:
    check_exposure(parse_address(text), ListenSettings(), TlsSettings())


@pytest.mark.parametrize("text", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "example.org:1"])
def test_plaintext_beyond_it_takes_a_word(text: str) -> None:
    address = parse_address(text)
    with pytest.raises(ListenError, match="--insecure-listen"):
        check_exposure(address, ListenSettings(), TlsSettings())
    check_exposure(address, ListenSettings(insecure_listen=True), TlsSettings())
    check_exposure(address, ListenSettings(), TlsSettings(certificate="c", private_key="k"))


def test_tls_files_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ListenError, match="both"):
        credentials(TlsSettings(certificate="x"))
    with pytest.raises(ListenError, match="cannot be read"):
        credentials(TlsSettings(certificate="x", private_key=str(tmp_path / "none")))
    (tmp_path / "key").write_text("not pem")
    with pytest.raises(ListenError, match="not a PEM"):
        credentials(TlsSettings(certificate="x", private_key=str(tmp_path / "key")))
    assert credentials(TlsSettings()) is None


class Authority:
    """A certificate authority, and files of a server's certificate made by it."""

    def __init__(self, folder: Path) -> None:
        self.ca = trustme.CA()
        server = self.ca.issue_cert("localhost")
        self.tls = TlsSettings(certificate=str(folder / "cert.pem"), private_key=str(folder / "key.pem"))
        for index, blob in enumerate(server.cert_chain_pems):
            blob.write_to_path(str(folder / "cert.pem"), append=index > 0)
        server.private_key_pem.write_to_path(str(folder / "key.pem"))
        self.root = self.ca.cert_pem.bytes()
        (folder / "ca.pem").write_bytes(self.root)
        self.mutual = replace(self.tls, client_ca=str(folder / "ca.pem"))


async def test_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    trusting = grpc.ssl_channel_credentials(authority.root)
    async with serving(settings=Settings(server=PORT_0, tls=authority.tls), credentials=trusting) as served:
        await served.models.ListModels(LIST_MODELS)
        async with grpc.aio.insecure_channel(served.target) as plain:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await plain.unary_unary("/glasshouse.v1.ModelService/ListModels")(b"", timeout=3)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_mutual_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    client = authority.ca.issue_cert("client@example.org")
    known = grpc.ssl_channel_credentials(
        authority.root, client.private_key_pem.bytes(), client.cert_chain_pems[0].bytes()
    )
    stranger = grpc.ssl_channel_credentials(authority.root)
    async with serving(settings=Settings(server=PORT_0, tls=authority.mutual), credentials=known) as served:
        await served.models.ListModels(LIST_MODELS)
        async with grpc.aio.secure_channel(served.target, stranger) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await channel.unary_unary("/glasshouse.v1.ModelService/ListModels")(b"", timeout=3)


async def test_a_unix_socket(tmp_path: Path) -> None:
    socket = tmp_path / "g.sock"
    async with serving(settings=Settings(server=ListenSettings(listen=f"unix:{socket}"))) as served:
        assert socket.exists()
        await served.models.ListModels(LIST_MODELS)
    assert not socket.exists()


async def test_a_taken_port_is_not_shared() -> None:
    async with serving() as served:
        with pytest.raises(ListenError, match="taken"):
            async with serving(settings=Settings(server=ListenSettings(listen=served.target))):
                pass


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def test_a_ring_of_keys() -> None:
    ring = KeyRing.load(KeySettings(entries=(f"ada admin {digest('a')}", f"bob user {digest('b').upper()}")))
    assert ring.admit("Bearer a", admin=True) == "ada"
    assert ring.admit("bearer  b ", admin=False) == "bob"
    with pytest.raises(PermissionDenied):
        ring.admit("Bearer b", admin=True)
    for given in (None, "", "b", "Basic b", "Bearer", "Bearer "):
        with pytest.raises(Unauthenticated):
            ring.admit(given, admin=False)
    assert KeyRing().admit(None, admin=True) == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [("bob user", "3|expected"), (f"bob root {digest('b')}", "role"), ("bob user secret", "sha256sum")],
)
def test_lines_that_are_no_key(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=message):
        KeyRing.load(KeySettings(entries=(line,)))
    file = tmp_path / "keys"
    file.write_text(f"\n# comment\n{line}\n")
    with pytest.raises(KeyFileError, match="line 3"):
        KeyRing.load(KeySettings(file=str(file)))


def test_a_key_file_without_keys_lets_nobody_in_by_mistake(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# nothing yet\n")
    with pytest.raises(KeyFileError, match="holds no key"):
        KeyRing.load(KeySettings(file=str(tmp_path / "keys")))
    with pytest.raises(KeyFileError, match="cannot be read"):
        KeyRing.load(KeySettings(file=str(tmp_path / "none")))
