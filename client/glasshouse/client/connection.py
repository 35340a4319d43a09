"""Where the server is and how to speak to it: target, TLS, key, channel options. No channel is made here."""

from __future__ import annotations

import ipaddress
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import grpc

REQUEST_ID_KEY: Final = "x-request-id"
_MIB: Final = 1 << 20

PemSource: TypeAlias = "bytes | str | os.PathLike[str]"
"""PEM data as bytes, or the path of a PEM file."""

CHANNEL_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    # The server keeps messages near 1 MiB and below gRPC's customary 4; a little more for good measure.
    ("grpc.max_receive_message_length", 4 * _MIB + 256 * 1024),
    # Deadlines find dead servers; pings only keep idle middleboxes awake. Servers allow one in five minutes.
    ("grpc.keepalive_time_ms", 330_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Our retries pace themselves; the connection should be ready when they come.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A client owns its connection: closing one does not disturb another.
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(frozen=True, kw_only=True)
class TLSConfig:
    """TLS beyond the defaults.

    `root_certificates` replaces the system's authorities. `client_certificate` and `client_key` (both or
    neither) identify this client. `server_name` is the name expected in the server's certificate, where it is
    not the host.
    """

    root_certificates: PemSource | None = None
    client_certificate: PemSource | None = None
    client_key: PemSource | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.client_certificate is None) != (self.client_key is None):
            raise ValueError("client_certificate and client_key belong together: pass both or neither")


@dataclass(frozen=True, kw_only=True)
class Connection:
    """All that a channel is made from. `credentials` None is plaintext."""

    target: str
    credentials: grpc.ChannelCredentials | None
    options: tuple[tuple[str, str | int], ...]
    authorization: str | None
    timeout_s: float
    max_attempts: int

    def metadata(self, request_id: str) -> tuple[tuple[str, str], ...]:
        """What is sent beside every request."""
        identified = ((REQUEST_ID_KEY, request_id),)
        return (
            identified if self.authorization is None else (*identified, ("authorization", self.authorization))
        )


def connection(
    target: str,
    *,
    api_key: str | None,
    tls: bool | TLSConfig | None,
    timeout: float,
    max_attempts: int,
) -> Connection:
    """Checks the arguments of a client and reads its certificates.

    Raises ValueError for a key that would travel in plaintext beyond this machine, and for a timeout or a
    number of attempts that is not positive; OSError where a certificate cannot be read.
    """
    if not target:
        raise ValueError("target is empty: pass HOST:PORT, such as localhost:50051")
    if max_attempts < 1:
        raise ValueError(f"max_attempts must be at least 1, not {max_attempts}")
    if api_key is not None and not tls and not is_local(target):
        raise ValueError(
            f"an api_key would travel unencrypted to {target}: pass tls=True or a TLSConfig "
            "(plaintext is for this machine alone)"
        )
    config = tls if isinstance(tls, TLSConfig) else TLSConfig() if tls else None
    options: tuple[tuple[str, str | int], ...] = CHANNEL_OPTIONS
    credentials = None
    if config is not None:
        credentials = grpc.ssl_channel_credentials(
            _pem(config.root_certificates), _pem(config.client_key), _pem(config.client_certificate)
        )
        if config.server_name:
            options = (*options, ("grpc.ssl_target_name_override", config.server_name))
    return Connection(
        target=target,
        credentials=credentials,
        options=options,
        authorization=None if api_key is None else f"Bearer {api_key}",
        timeout_s=checked_timeout(timeout),
        max_attempts=max_attempts,
    )


def checked_timeout(timeout_s: float) -> float:
    """`timeout_s` if it is a positive number of seconds. Every call has a deadline, so None is refused."""
    if not isinstance(timeout_s, (int, float)) or not timeout_s > 0:
        raise ValueError(f"timeout must be a positive number of seconds, not {timeout_s!r}")
    return timeout_s


def new_request_id() -> str:
    """A fresh id for a call: 32 hex digits."""
    return uuid.uuid4().hex


def is_local(target: str) -> bool:
    """Whether a gRPC target stays on this machine: loopback addresses, localhost and Unix sockets."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    for scheme in ("dns:", "ipv4:", "ipv6:"):
        if target.startswith(scheme):
            target = target.removeprefix(scheme)
            if target.startswith("//"):  # dns://authority/host:port
                target = target[2:].partition("/")[2]
    # A target may list several addresses; each must stay.
    return all(_is_loopback(_host(address)) for address in target.split(","))


def _host(address: str) -> str:
    address = address.strip().replace("%5B", "[").replace("%5D", "]")
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address.partition(":")[0] if address.count(":") <= 1 else address


def _is_loopback(host: str) -> bool:
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _pem(source: PemSource | None) -> bytes | None:
    return source if source is None or isinstance(source, bytes) else Path(source).read_bytes()
