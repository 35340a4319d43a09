"""Persistent tables with recycled slots: the vectors and numbers of every running request's edits.

Vectors live in one (capacity, W) float32 tensor on the model's device that is never moved: captured graphs may hold
its address. Numbers live in host arrays, for planning. A slot belongs to a request until it ends, then it is used again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray


class TableFull(Exception):
    """No free slot is left: the gateway let in more than `WorkerSettings` allows."""


class Slots:
    """Which of `capacity` slots are free."""

    def __init__(self, capacity: int, what: str) -> None:
        self.capacity = capacity
        self._what = what
        self._free = list(range(capacity - 1, -1, -1))

    @property
    def in_use(self) -> int:
        """Slots taken."""
        return self.capacity - len(self._free)

    def take(self, n: int) -> list[int]:
        """Raises `TableFull` and takes none where fewer than `n` are free."""
        if n > len(self._free):
            raise TableFull(f"{n} {self._what} asked for, {len(self._free)} of {self.capacity} are free")
        taken = self._free[len(self._free) - n :]
        del self._free[len(self._free) - n :]
        return taken

    def give(self, slots: Sequence[int]) -> None:
        """Gives slots back."""
        self._free.extend(slots)


class VectorTable:
    """Rows for running requests' vectors, and resident rows by name that requests share."""

    def __init__(self, n_request: int, n_resident: int, width: int, device: torch.device) -> None:
        self.width = width
        self.rows_VW = torch.zeros(n_request + n_resident, width, dtype=torch.float32, device=device)
        self.requests = Slots(n_request, "vectors")
        self.residents = Slots(n_resident, "resident vectors")
        self._first_resident = n_request
        self._named: dict[str, int] = {}
        self._users: dict[int, int] = {}
        self._leaving: set[int] = set()

    def write(self, data: bytes, n_rows: int) -> list[int]:
        """Rows holding `n_rows` vectors, float32 little-endian."""
        if len(data) != 4 * n_rows * self.width:
            raise ValueError(f"{len(data)} bytes for {n_rows} vectors of width {self.width}")
        rows = self.requests.take(n_rows)
        values = torch.from_numpy(np.frombuffer(data, dtype="<f4").reshape(n_rows, self.width).copy())
        self.rows_VW[torch.tensor(rows, device=self.rows_VW.device)] = values.to(self.rows_VW.device)
        return rows

    def values(self, data: bytes, n_rows: int, names: Sequence[str]) -> Tensor:
        """The vectors themselves, (n, W) float32, without rows of the table: resident ones by name, or those of `data`."""
        if names:
            rows = self.use(names)
            self.release(rows)
            return self.rows_VW[torch.tensor(rows, device=self.rows_VW.device)]
        if len(data) != 4 * n_rows * self.width:
            raise ValueError(f"{len(data)} bytes for {n_rows} vectors of width {self.width}")
        host = torch.from_numpy(np.frombuffer(data, dtype="<f4").reshape(n_rows, self.width).copy())
        return host.to(self.rows_VW.device)

    def load(self, name: str, data: bytes) -> None:
        """Makes a vector resident. A name loaded anew means the new vector from now on."""
        if len(data) != 4 * self.width:
            raise ValueError(f"vector {name!r}: {len(data)} bytes for width {self.width}")
        row = self._first_resident + self.residents.take(1)[0]
        self.rows_VW[row] = torch.from_numpy(np.frombuffer(data, dtype="<f4").copy()).to(self.rows_VW.device)
        self.unload(name)
        self._named[name] = row

    def unload(self, name: str) -> None:
        """Forgets a resident vector; its row is free once no request uses it."""
        row = self._named.pop(name, None)
        if row is None:
            return
        if self._users.get(row):
            self._leaving.add(row)
        else:
            self.residents.give([row - self._first_resident])

    def use(self, names: Sequence[str]) -> list[int]:
        """Rows of resident vectors, kept until `release`."""
        missing = [name for name in names if name not in self._named]
        if missing:
            raise KeyError(f"no resident vector {missing[0]!r}")
        rows = [self._named[name] for name in names]
        for row in rows:
            self._users[row] = self._users.get(row, 0) + 1
        return rows

    def release(self, rows: Sequence[int]) -> None:
        """Gives back what `write` or `use` handed out."""
        for row in rows:
            if row < self._first_resident:
                self.requests.give([row])
                continue
            self._users[row] -= 1
            if not self._users[row]:
                del self._users[row]
                if row in self._leaving:
                    self._leaving.discard(row)
                    self.residents.give([row - self._first_resident])

    @property
    def n_resident(self) -> int:
        """Resident vectors by name."""
        return len(self._named)


class EditTable:
    """The numbers of every installed edit, by slot: host arrays that planning gathers from."""

    def __init__(self, capacity: int) -> None:
        self.slots = Slots(capacity, "edits")
        # The first of the edit's vectors; the others follow in `vectors`.
        self.vectors_E3: Array = np.zeros((capacity, 3), dtype=np.int64)
        # plain, scaled, low, high
        self.numbers_E4: Array = np.zeros((capacity, 4), dtype=np.float32)
        self.keep_norm_E: Array = np.zeros(capacity, dtype=bool)
        # Replace with one row a position: its rows, in order of position; None otherwise.
        self.replacement: list[Array | None] = [None] * capacity
