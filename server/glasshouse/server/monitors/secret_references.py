"""Secrets by name: the configuration says where each is found, monitors say only its name.

    [secrets]
    pager = "env:PAGER_SECRET"         an environment variable
    audit = "file:/run/secrets/audit"  a file, its last line break left out

A secret is read when it is used, so that it can be changed without a restart, and is never stored, sent or logged.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from glasshouse.server.types.errors import FailedPrecondition
from glasshouse.wire import reasons

# Shorter ones can be guessed.
MIN_BYTES = 16


class SecretReferences:
    """The names a server knows."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = dict(places)

    def read(self, name: str, *, field: str = "secret") -> bytes:
        """The secret called `name`.

        Raises:
            FailedPrecondition: no such name, or nothing usable where it points.
        """
        place = self._places.get(name)
        if place is None:
            raise self._refused(
                name, "is not known to this server", field, "the operator adds it to [secrets]"
            )
        kind, _, where = place.partition(":")
        try:
            value = os.environ.get(where, "").encode() if kind == "env" else Path(where).read_bytes()
        except OSError as error:
            raise self._refused(
                name, f"cannot be read ({error.strerror or error})", field, "the operator checks [secrets]"
            ) from None
        value = value.removesuffix(b"\n").removesuffix(b"\r")
        if len(value) < MIN_BYTES:
            raise self._refused(
                name,
                f"has {len(value)} bytes where it is found",
                field,
                f"the operator puts at least {MIN_BYTES} bytes there",
            )
        return value

    @staticmethod
    def _refused(name: str, what: str, field: str, remedy: str) -> FailedPrecondition:
        return FailedPrecondition(
            f"the secret {name!r} {what}",
            reason=reasons.CAPABILITY_MISSING,
            field=field,
            value=name,
            remedy=remedy,
        )
