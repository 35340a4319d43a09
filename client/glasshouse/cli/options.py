"""The options that every command which speaks to a server shares, and the client made from them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

if TYPE_CHECKING:
    from glasshouse.client import Client

Target: TypeAlias = Annotated[
    str, typer.Option("--target", envvar="GLASSHOUSE_TARGET", metavar="HOST:PORT", help="The server.")
]
ApiKey: TypeAlias = Annotated[
    str | None,
    typer.Option("--api-key", envvar="GLASSHOUSE_API_KEY", metavar="KEY", help="The key to send."),
]
Tls: TypeAlias = Annotated[bool, typer.Option("--tls", help="TLS with the system's authorities.")]
TlsCa: TypeAlias = Annotated[
    Path | None,
    typer.Option("--tls-ca", metavar="FILE", help="TLS with the authorities of a PEM file."),
]
ModelName: TypeAlias = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="The model; default the only one served.")
]
Timeout: TypeAlias = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", help="Deadline of each call.")
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]

DEFAULT_TARGET = "localhost:50051"
DEFAULT_TIMEOUT_S = 60.0


def connect(target: str, api_key: str | None, tls: bool, tls_ca: Path | None, timeout_s: float) -> Client:
    """The client these options describe. Raises typer.BadParameter (status 2) where they cannot be."""
    from glasshouse.client import Client, TLSConfig

    try:
        security = TLSConfig(root_certificates=tls_ca) if tls_ca is not None else tls
        return Client(target, api_key=api_key, tls=security, timeout=timeout_s)
    except OSError as error:
        raise typer.BadParameter(f"cannot read {tls_ca}: {error.strerror}", param_hint="--tls-ca") from None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
