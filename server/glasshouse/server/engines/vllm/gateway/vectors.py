"""Named directions that workers hold: each sent once, however many requests steer by it.

A request that uses some has a lease on them for as long as it lives; what nobody has a lease on makes room. Where there is
no room the vectors go with the request, as those that have no name do.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from glasshouse.server.interventions.edits import PreparedEdit, PreparedIntervention

from ..contract.settings import LOAD_VECTORS, UNLOAD_VECTORS


@dataclass(frozen=True, eq=False)
class Lease:
    """The resident vectors of a request: `keys` by the `id` of its edits. They stay while it is referred to."""

    keys: Mapping[int, tuple[str, ...]]


class WorkerVectors:
    """Vectors in the workers by what they hold, so that a name that changes its meaning cannot mislead."""

    def __init__(self, call: Callable[..., Awaitable[Any]], *, capacity: int) -> None:
        """`call(method, args)` runs a method on every worker. `capacity`: at most half of what workers have room for, since
        they keep what was taken away until the requests that use it have ended there.
        """
        self._call, self._capacity = call, capacity
        # Key -> leases; those used longest ago first.
        self._held: OrderedDict[str, WeakSet[Lease]] = OrderedDict()
        self._lock = asyncio.Lock()

    async def lease(self, edits: Sequence[PreparedIntervention]) -> Lease | None:
        """A lease on the vectors of those `edits` that name what they steer by; None where there are none, or no room."""
        rows: dict[int, tuple[str, ...]] = {}
        wanted: dict[str, bytes] = {}
        for edit in edits:
            if not edit.resources or not isinstance(edit, PreparedEdit):
                continue
            data = [row.tobytes() for row in edit.vectors.cpu().numpy().astype("<f4")]
            keys = tuple(hashlib.sha256(row).hexdigest() for row in data)
            rows[id(edit)] = keys
            wanted |= dict(zip(keys, data, strict=True))
        if not wanted:
            return None
        async with self._lock:
            missing = {key: data for key, data in wanted.items() if key not in self._held}
            if missing and not await self._room_for(len(missing), keep=wanted):
                return None
            if missing:
                await self._call(LOAD_VECTORS, (missing,))
            lease = Lease(rows)
            for key in wanted:
                self._held.setdefault(key, WeakSet()).add(lease)
                self._held.move_to_end(key)
            return lease

    async def _room_for(self, n: int, *, keep: Mapping[str, bytes]) -> bool:
        over = len(self._held) + n - self._capacity
        if over <= 0:
            return True
        idle = [key for key, leases in self._held.items() if not leases and key not in keep]
        if len(idle) < over:
            return False
        await self._call(UNLOAD_VECTORS, (idle[:over],))
        for key in idle[:over]:
            del self._held[key]
        return True
