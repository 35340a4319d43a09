"""From the activations of a text's positions to the rows a probe sees.

- TOKEN: every selected position is a row.
- LAST: the last selected position.
- MEAN: the mean over the selected positions.
- MAX: the largest value over the selected positions, coordinate by coordinate.

(The maximum of the *scores* over tokens is an aggregation of token scores, see `aggregation`.)

While text is being generated a pooled probe is read at every position over what came so far: `RunningPool` gives the
same rows as pooling each prefix would.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

from glasshouse.server.types.errors import InvalidArgument
from glasshouse.wire import reasons


class Pooling(Enum):
    """What a row is; the value is the name in provenance."""

    TOKEN = "token"
    LAST = "last"
    MEAN = "mean"
    MAX = "max"


def pool(x_TD: Tensor, pooling: Pooling) -> Tensor:
    """The rows (R, D) float32 of one text's selected positions x_TD: R = T for TOKEN, else 1.

    Raises:
        InvalidArgument: no position is selected.
    """
    if x_TD.shape[0] == 0:
        raise InvalidArgument(
            "no position of the text is selected",
            reason=reasons.EMPTY_INPUT,
            field="positions",
            value="0 positions",
            remedy="select at least one position of every example",
        )
    x_TD = x_TD.float()
    match pooling:
        case Pooling.TOKEN:
            return x_TD
        case Pooling.LAST:
            return x_TD[-1:]
        case Pooling.MEAN:
            return x_TD.double().mean(0, keepdim=True).float()
        case Pooling.MAX:
            return x_TD.amax(0, keepdim=True)


class RunningPool:
    """Pools one text as it grows. State: a sum or maximum (D,), and a count."""

    def __init__(self, pooling: Pooling) -> None:
        self.pooling = pooling
        self.n_positions = 0
        self._held_D: Tensor | None = None

    def add(self, x_TD: Tensor) -> Tensor:
        """The next T selected positions; returns (T, D) float32: row t pools everything up to and with position t."""
        x_TD = x_TD.float()
        n_new = x_TD.shape[0]
        if n_new == 0 or self.pooling in (Pooling.TOKEN, Pooling.LAST):
            self.n_positions += n_new
            return x_TD
        if self.pooling is Pooling.MAX:
            if self._held_D is not None:
                x_TD = torch.maximum(x_TD, self._held_D)
            pooled_TD = x_TD.cummax(0).values
            self._held_D = pooled_TD[-1].clone()
        else:
            sums_TD = x_TD.double().cumsum(0)
            if self._held_D is not None:
                sums_TD += self._held_D
            self._held_D = sums_TD[-1].clone()
            counts_T = torch.arange(1, n_new + 1, device=x_TD.device, dtype=torch.float64) + self.n_positions
            pooled_TD = (sums_TD / counts_T[:, None]).float()
        self.n_positions += n_new
        return pooled_TD


class PoolStack:
    """Running pools of one kind that take one position each at every step: their states lie together, and each pool goes on
    from where the last step left it.
    """

    def __init__(self, pools: Sequence[RunningPool], width: int, device: torch.device) -> None:
        self._pools = pools
        self._pooling = pools[0].pooling
        assert all(pool.pooling is self._pooling for pool in pools), "a stack holds pools of one kind"
        mean = self._pooling is Pooling.MEAN
        empty_D = torch.full(
            (width,),
            0.0 if mean else -torch.inf,
            dtype=torch.float64 if mean else torch.float32,
            device=device,
        )
        self._held_RD = torch.stack([empty_D if pool._held_D is None else pool._held_D for pool in pools])
        self._counts_R = torch.tensor(
            [pool.n_positions for pool in pools], dtype=torch.float64, device=device
        )
        for row, pool in enumerate(pools):
            pool._held_D = self._held_RD[row]

    def add(self, x_RD: Tensor) -> Tensor:
        """The next position of each pool; returns (R, D) float32: what each pools up to and with it."""
        for pool in self._pools:
            pool.n_positions += 1
        if self._pooling is Pooling.MAX:
            return torch.maximum(self._held_RD, x_RD.float(), out=self._held_RD)
        self._held_RD += x_RD
        self._counts_R += 1
        return (self._held_RD / self._counts_R[:, None]).float()
