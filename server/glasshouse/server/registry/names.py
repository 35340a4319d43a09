"""Names of what the registry holds.

::

    models/{model}/{collection}/{name}             every version of a name, or its latest
    models/{model}/{collection}/{name}@{version}   one version
    {name}, {name}@{version}                       the same where the model and the collection are known

Collections: directions, probes, monitors, featureLabels. Versions count from 1 and are never used twice, not even after
a deletion.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from glasshouse.server.types.errors import InvalidArgument
from glasshouse.wire import reasons

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MODEL = re.compile(r"[^/@\s\x00]{1,200}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


class Kind(Enum):
    """What an entry is; the value is its collection in resource names."""

    DIRECTION = "directions"
    PROBE = "probes"
    MONITOR = "monitors"
    FEATURE_LABELS = "featureLabels"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """One version of a name; `version` None: its latest."""

    kind: Kind
    model: str
    name: str
    version: int | None = None

    def __str__(self) -> str:
        plain = f"models/{self.model}/{self.kind.value}/{self.name}"
        return plain if self.version is None else f"{plain}@{self.version}"


def parse(text: str, *, kind: Kind, model: str, field: str = "name") -> Reference:
    """The reference that `text` names, full or short; the short form is of `kind` and `model`.

    Raises:
        InvalidArgument: text that is no name, or names another collection.
    """
    rest = text
    if text.startswith("models/"):
        parts = text.split("/")
        if len(parts) != 4 or parts[2] != kind.value:
            raise _malformed(
                text,
                f"is not the name of one of {kind.value}",
                field,
                f"models/{{model}}/{kind.value}/{{name}}",
            )
        model, rest = parts[1], parts[3]
    name, at, version = rest.partition("@")
    if at and not _VERSION.fullmatch(version):
        raise _malformed(text, f"has no version after '@': {version!r}", field, "name@1")
    check_name(name, field=field)
    check_model(model, field=field)
    return Reference(kind=kind, model=model, name=name, version=int(version) if at else None)


def check_name(name: str, *, field: str = "name") -> str:
    """`name` where it follows the rules; raises `InvalidArgument`."""
    if not _NAME.fullmatch(name):
        raise _malformed(
            name,
            "is not a name",
            field,
            "1 to 100 letters, digits, '.', '_' and '-', the first a letter or a digit",
        )
    return name


def check_model(model: str, *, field: str = "model") -> str:
    """`model` where it can stand in a resource name; raises `InvalidArgument`."""
    if not _MODEL.fullmatch(model):
        raise _malformed(
            model, "is not the name of a model", field, "the served model's name, without '/' and '@'"
        )
    return model


def _malformed(text: str, what: str, field: str, example: str) -> InvalidArgument:
    return InvalidArgument(
        f"{text[:200]!r} {what}",
        reason=reasons.VALUE_MALFORMED,
        field=field,
        value=text,
        remedy=f"use {example}",
    )
