"""Where the server listens, and whether it may: plaintext beyond loopback takes the operator's word."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

import grpc

from glasshouse.server.types.configuration import ListenSettings, TlsSettings

UNIX_PREFIX = "unix:"


class ListenError(Exception):
    """An address that cannot be listened on; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """HOST:PORT, or a Unix socket's path in `host` with port 0."""

    host: str
    port: int

    @property
    def is_unix(self) -> bool:
        """Whether it is a Unix socket."""
        return self.host.startswith(UNIX_PREFIX)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        if self.is_unix or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        if self.is_unix:
            return self.host
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str, default_host: str = "127.0.0.1") -> Address:
    """HOST:PORT, :PORT, PORT, [IPV6]:PORT or unix:PATH.

    Raises:
        ListenError: anything else.
    """
    if text.startswith(UNIX_PREFIX):
        if text == UNIX_PREFIX:
            raise ListenError(f"{text!r} names no socket; give unix:PATH")
        return Address(host=text, port=0)
    host, _, port = text.rpartition(":")
    if not port.isascii() or not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise ListenError(
            f"{text!r} is not an address; give HOST:PORT with a port from 0 to 65535, or unix:PATH"
        )
    bare = host.removeprefix("[").removesuffix("]")
    if ":" in bare and not host.startswith("["):
        raise ListenError(f"{text!r} is not an address; put an IPv6 host in brackets, such as [::1]:{port}")
    return Address(host=bare or default_host, port=int(port))


def check_exposure(address: Address, settings: ListenSettings, tls: TlsSettings) -> None:
    """Refuses plaintext that other machines can reach, unless the operator has said that it is meant.

    Raises:
        ListenError: with the ways out.
    """
    if address.is_local or tls.enabled or settings.insecure_listen:
        return
    raise ListenError(
        f"{address} is reachable from other machines and TLS is off: prompts, keys and activations would "
        "travel in the clear. Set tls.certificate and tls.private_key in the configuration file, listen on "
        "127.0.0.1, or pass --insecure-listen if something else protects the connection"
    )


def credentials(tls: TlsSettings) -> grpc.ServerCredentials | None:
    """The server's TLS credentials; None where it speaks plaintext.

    Raises:
        ListenError: a file that is missing or not PEM.
    """
    if not tls.enabled:
        return None
    if not (tls.certificate and tls.private_key):
        raise ListenError("TLS needs both tls.certificate and tls.private_key")
    pair = (_pem(tls.private_key, "tls.private_key"), _pem(tls.certificate, "tls.certificate"))
    if not tls.client_ca:
        return grpc.ssl_server_credentials([pair])
    authority = _pem(tls.client_ca, "tls.client_ca")
    return grpc.ssl_server_credentials([pair], root_certificates=authority, require_client_auth=True)


def _pem(path: str, setting: str) -> bytes:
    try:
        content = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ListenError(f"{setting}: {path} cannot be read: {error.strerror or error}") from error
    if b"-----BEGIN " not in content:
        raise ListenError(f"{setting}: {path} is not a PEM file")
    return content
