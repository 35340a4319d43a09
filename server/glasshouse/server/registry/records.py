"""What is published and what is found again: plain frozen values. Tensors are numpy arrays, row-major."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np

from glasshouse.server.registry.names import Kind, Reference, check_model, check_name
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.wire import reasons

Arrays = Mapping[str, np.ndarray[Any, Any]]

MAX_BODY_BYTES = 1 << 20
# What safetensors and numpy both know.
_DTYPES = frozenset(["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"])


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where an entry came from.

    `model_revision`: a commit or content hash of the model's weights. `data_hash`: SHA-256, in hex, of the examples it was
    made from. `metrics`: finite figures by name. `author`: who the caller's key belongs to.
    """

    model_revision: str = ""
    hook_points: tuple[str, ...] = ()
    method: str = ""
    data_hash: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    author: str = ""


@dataclass(frozen=True, kw_only=True)
class FeatureLabel:
    """What one feature of a dictionary stands for; `score` as its method defines it, None where there is none."""

    feature: int
    label: str
    score: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Draft:
    """Something to publish.

    `version`: the one it shall have, which must be the next free one; None: the next free one, whatever it is. `body`: a
    JSON object, what the kind needs besides tensors. `subject`: what it is about, to be found by (a dictionary's name
    for feature labels). `uses`: entries that must not be deleted as long as this one is there.
    """

    kind: Kind
    model: str
    name: str
    version: int | None = 1
    provenance: Provenance = Provenance()
    body: Mapping[str, Any] = field(default_factory=dict)
    tensors: Arrays = field(default_factory=dict)
    labels: tuple[FeatureLabel, ...] = ()
    subject: str = ""
    uses: tuple[Reference, ...] = ()

    def check(self) -> Draft:
        """Returns itself; raises `InvalidArgument` for what cannot be kept, naming the field."""
        check_name(self.name)
        check_model(self.model)
        if self.version is not None and not 1 <= self.version < 10**9:
            raise _refused("version", self.version, "is not 1 or more", "leave it out for the next one")
        for name, value in self.provenance.metrics.items():
            if not math.isfinite(value):
                raise _not_finite(f"provenance.metrics[{name}]", value)
        dump(self.body, field="body")
        for name, array in self.tensors.items():
            if str(array.dtype) not in _DTYPES:
                raise _refused(
                    f"tensors[{name}]",
                    array.dtype,
                    "is not a dtype that is kept",
                    "use float32, float64 or int64",
                )
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise _not_finite(f"tensors[{name}]", array[~np.isfinite(array)][0])
        if self.labels and self.kind is not Kind.FEATURE_LABELS:
            raise _refused(
                "labels", len(self.labels), f"do not belong to {self.kind.value}", "leave them out"
            )
        seen: set[int] = set()
        for index, label in enumerate(self.labels):
            if label.feature < 0 or label.feature in seen:
                raise _refused(
                    f"labels[{index}].feature",
                    label.feature,
                    "is negative or labelled twice",
                    "one label a feature",
                )
            if label.score is not None and not math.isfinite(label.score):
                raise _not_finite(f"labels[{index}].score", label.score)
            seen.add(label.feature)
        return self


@dataclass(frozen=True, kw_only=True)
class Record:
    """One published version. `blob`: SHA-256 of its tensors' file, "" without tensors; `created` and `deleted` in UTC;
    `change`: the registry's counter when it was published or deleted.
    """

    id: int
    reference: Reference
    provenance: Provenance
    body: Mapping[str, Any]
    subject: str
    blob: str
    blob_bytes: int
    content_hash: str
    created: datetime
    deleted: datetime | None
    change: int

    @property
    def version(self) -> int:
        """Its version."""
        assert self.reference.version is not None
        return self.reference.version


@dataclass(frozen=True, kw_only=True)
class RecordPage:
    """Some of a list; an empty `next_page_token` means the end."""

    records: tuple[Record, ...]
    next_page_token: str


def dump(value: Any, *, field: str) -> str:
    """Canonical JSON: sorted keys, no spaces, finite numbers only.

    Raises:
        InvalidArgument: what is not JSON, or more than `MAX_BODY_BYTES`.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise _refused(
            field, type(value).__name__, f"is not JSON: {error}", "use JSON with finite numbers"
        ) from None
    if len(text.encode()) > MAX_BODY_BYTES or "\\u0000" in text:
        raise _refused(
            field,
            len(text),
            f"takes more than {MAX_BODY_BYTES:,} bytes or holds a NUL",
            "put arrays into tensors",
        )
    return text


def _refused(field: str, value: object, what: str, remedy: str) -> InvalidArgument:
    return InvalidArgument(
        f"{field}: {value} {what}", reason=reasons.VALUE_OUT_OF_RANGE, field=field, value=value, remedy=remedy
    )


def _not_finite(field: str, value: object) -> InvalidArgument:
    return InvalidArgument(
        f"{field} holds {value}",
        reason=reasons.VALUE_NOT_FINITE,
        field=field,
        value=value,
        remedy="send finite numbers",
    )
