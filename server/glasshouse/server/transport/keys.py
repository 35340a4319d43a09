"""API keys: `authorization: Bearer KEY`, kept as SHA-256 digests, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from glasshouse.server.types.configuration import KeySettings, Role
from glasshouse.server.types.errors import PermissionDenied, Unauthenticated
from glasshouse.wire import reasons

_DIGEST = re.compile(r"[0-9a-f]{64}")
_SCHEME = "bearer "
_HOW = "send the metadata `authorization: Bearer KEY`"


class KeyFileError(Exception):
    """Keys that cannot be read; the message says where and what to do."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key the server knows: by `name` in the log, by `digest` on the wire."""

    name: str
    role: Role
    digest: bytes


class KeyRing:
    """The keys of a server. An empty ring lets everyone in, as admin."""

    def __init__(self, keys: Iterable[Key] = ()) -> None:
        self._keys = tuple(keys)

    @classmethod
    def load(cls, settings: KeySettings) -> KeyRing:
        """The keys of the configuration.

        Raises:
            KeyFileError: a file that cannot be read, or a line that is no key.
        """
        keys = [_key(line, f"keys.entries[{index}]") for index, line in enumerate(settings.entries)]
        if settings.file:
            try:
                lines = Path(settings.file).expanduser().read_text("utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise KeyFileError(f"keys.file: {settings.file} cannot be read: {error}") from error
            for number, line in enumerate(lines, start=1):
                if line.strip() and not line.lstrip().startswith("#"):
                    keys.append(_key(line, f"{settings.file}, line {number}"))
            if not keys:
                raise KeyFileError(
                    f"keys.file: {settings.file} holds no key; leave keys.file out to let everyone in"
                )
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def admit(self, authorization: str | None, *, admin: bool) -> str:
        """The name of the key that came along; empty where the server asks for none.

        Raises:
            Unauthenticated: no key, or one that is not known.
            PermissionDenied: the key's role is not enough.
        """
        if not self._keys:
            return ""
        if not authorization or not authorization.lower().startswith(_SCHEME):
            raise Unauthenticated("this server asks for an API key", reason=reasons.KEY_MISSING, remedy=_HOW)
        digest = hashlib.sha256(authorization[len(_SCHEME) :].strip().encode()).digest()
        # Every key is compared, so that the time taken says nothing about which one was close.
        found = [key for key in self._keys if hmac.compare_digest(key.digest, digest)]
        if not found:
            raise Unauthenticated(
                "the API key is not one this server knows",
                reason=reasons.KEY_UNKNOWN,
                remedy="check the key, or ask the operator for one",
            )
        if admin and all(key.role != "admin" for key in found):
            raise PermissionDenied(
                "this method is for keys of the role admin",
                reason=reasons.ADMIN_REQUIRED,
                remedy="use a key of the role admin",
            )
        return found[0].name


def _key(line: str, where: str) -> Key:
    parts = line.split()
    if len(parts) != 3:
        raise KeyFileError(f"{where}: expected NAME ROLE SHA256, found {len(parts)} words")
    name, role, digest = parts
    if role not in get_args(Role):
        raise KeyFileError(f"{where}: the role is {role!r}, it must be user or admin")
    if not _DIGEST.fullmatch(digest.lower()):
        raise KeyFileError(
            f"{where}: the last word is not a SHA-256 digest; make one with: printf %s KEY | sha256sum"
        )
    return Key(name=name, role=cast(Role, role), digest=bytes.fromhex(digest))
