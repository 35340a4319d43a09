"""The probes that workers hold: each sent once, before the first request that needs it."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from glasshouse.server.probes.served import ServedProbe

from ..contract.settings import LOAD_PROBE, UNLOAD_PROBES, probe_parts

# More than a server has in use at a time; those that were not asked for longest make room.
MAX_PROBES = 1024


class WorkerProbes:
    """Probes in the workers, by the `id` of the object here, which is kept alive with them."""

    def __init__(self, call: Callable[..., Awaitable[Any]]) -> None:
        """`call(method, args)` runs a method on every worker."""
        self._call = call
        self._held: OrderedDict[int, tuple[ServedProbe, str]] = OrderedDict()
        self._n_loaded = 0
        self._lock = asyncio.Lock()

    async def keys(self, probes: Sequence[ServedProbe]) -> dict[int, str]:
        """The keys of `probes`, every one of them loaded."""
        if not probes:
            return {}
        async with self._lock:
            for probe in probes:
                if id(probe) in self._held:
                    self._held.move_to_end(id(probe))
                    continue
                self._n_loaded += 1
                key = f"probe-{self._n_loaded}"
                body, tensors = await asyncio.to_thread(probe_parts, probe)
                await self._call(LOAD_PROBE, (key, body, tensors))
                self._held[id(probe)] = (probe, key)
            gone = [self._held.popitem(last=False)[1][1] for _ in range(len(self._held) - MAX_PROBES)]
            if gone:
                await self._call(UNLOAD_PROBES, (gone,))
            return {id(probe): self._held[id(probe)][1] for probe in probes}
