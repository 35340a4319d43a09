"""The dictionaries a server holds, by name.

A request takes its dictionaries when it is checked and keeps them to its end: one unloaded meanwhile goes on
serving the requests that hold it, its memory is given back with the last of them, and new requests get
NOT_FOUND.
"""

from __future__ import annotations

import difflib
import re
import threading
from dataclasses import dataclass

import numpy as np

from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from glasshouse.server.types.hook_points import HookPoint
from glasshouse.wire import reasons

from .dictionary import Dictionary

_NAME = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")
_PREFIX = re.compile(r"models/[^/]+/dictionaries/")


@dataclass(frozen=True, kw_only=True, eq=False)
class DictionaryCheck:
    """What a dictionary did on built-in text when it was loaded: mean active features, fraction of variance
    unexplained, the share of positions each feature fired at (float32 (d_sae,)), and a warning where the
    figures are absurd.
    """

    l0: float
    fvu: float
    positions: int
    density: np.ndarray
    warning: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldDictionary:
    """A dictionary of the store, with the model's hook points it reads and writes.

    A crosscoder over two models reads what no single model has: it is held with no hook points, `detached` says why, and
    it encodes and decodes given activations only.
    """

    name: str
    path: str
    dictionary: Dictionary
    points_in: tuple[HookPoint, ...]
    points_out: tuple[HookPoint, ...]
    size_bytes: int
    check: DictionaryCheck | None = None
    detached: str = ""
    # Why the engine that serves the model does not reach its hook points, where it does not: passes with gradients do.
    unreached: str = ""

    def live(self, field: str) -> HeldDictionary:
        """Itself, where it can run within the passes of the engine.

        Raises:
            FailedPrecondition: it cannot.
        """
        if self.unreached:
            raise FailedPrecondition(
                f"dictionary {self.name} {self.unreached}",
                reason=reasons.CAPABILITY_MISSING,
                field=field,
                value=self.name,
                remedy="serve the model with --engine transformers, or use a dictionary of the residual stream",
            )
        return self.attached(field)

    def attached(self, field: str) -> HeldDictionary:
        """Itself, where it can run on the model's own activations.

        Raises:
            FailedPrecondition: it cannot.
        """
        if self.detached:
            raise FailedPrecondition(
                f"dictionary {self.name} {self.detached}",
                reason=reasons.CAPABILITY_MISSING,
                field=field,
                value=self.name,
                remedy="encode given activations: EncodeFeatures with `activations`",
            )
        return self


class DictionaryStore:
    """Dictionaries by name, within a budget of bytes. Safe to use from several threads."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._held: dict[str, HeldDictionary] = {}
        # Names being loaded, with the bytes set aside for them.
        self._reserved: dict[str, int] = {}
        self._lock = threading.Lock()

    def get(self, name: str, *, field: str = "dictionary") -> HeldDictionary:
        """The dictionary called `name`: a resource name, or its last part alone. Raises `NotFound`."""
        short = _PREFIX.sub("", name, count=1)
        held = self._held.get(short)
        if held is None:
            closest = tuple(difflib.get_close_matches(short, list(self._held), n=3, cutoff=0.5))
            known = ", ".join(closest) if closest else ", ".join(sorted(self._held)[:5]) or "none is loaded"
            raise NotFound(
                f"no dictionary {short!r} is loaded",
                reason=reasons.DICTIONARY_NOT_FOUND,
                resource_type="dictionary",
                resource_name=name,
                closest=closest,
                field=field,
                remedy=f"ListDictionaries lists them: {known}",
            )
        return held

    def all(self) -> list[HeldDictionary]:
        """Every dictionary, by name."""
        return [self._held[name] for name in sorted(self._held)]

    @property
    def held_bytes(self) -> int:
        """Bytes of those held and being loaded."""
        return sum(held.size_bytes for held in self._held.values()) + sum(self._reserved.values())

    def reserve(self, name: str, size_bytes: int) -> None:
        """Sets `name` and its bytes aside before loading; `release` or `add` follow.

        Raises:
            InvalidArgument: a name that is malformed.
            FailedPrecondition: a name in use.
            ResourceExhausted: more than the budget holds.
        """
        if not _NAME.fullmatch(name):
            raise InvalidArgument(
                f"{name!r} is not a name",
                reason=reasons.VALUE_MALFORMED,
                field="dictionary",
                value=name,
                remedy="use letters, digits, '.', '_', '-' and '/' between parts",
            )
        with self._lock:
            taken = [n for n in (*self._held, *self._reserved) if n == name or n.startswith(name + "/")]
            if taken:
                raise FailedPrecondition(
                    f"the name {taken[0]!r} is in use",
                    reason=reasons.FIELD_CONFLICT,
                    field="dictionary",
                    value=name,
                    remedy="unload it first, or choose another name",
                )
            if self.held_bytes + size_bytes > self._budget_bytes:
                raise ResourceExhausted(
                    f"the dictionary takes {size_bytes:,} bytes, {self.held_bytes:,} of {self._budget_bytes:,} are taken",
                    reason=reasons.MEMORY_BUDGET,
                    field="path",
                    value=size_bytes,
                    remedy="unload another, or raise limits.max_dictionary_bytes",
                )
            self._reserved[name] = size_bytes

    def release(self, name: str) -> None:
        """Gives back what `reserve` set aside."""
        with self._lock:
            self._reserved.pop(name, None)

    def add(self, held: HeldDictionary) -> None:
        """Makes a dictionary known."""
        with self._lock:
            self._held[held.name] = held

    def remove(self, name: str) -> HeldDictionary:
        """Forgets a dictionary. Raises `NotFound`."""
        held = self.get(name, field="name")
        with self._lock:
            self._held.pop(held.name, None)
        return held
