"""A patch sweep as its events come, without transport: values in, results with their places out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasshouse.client.attribution.parts import held_fixed, tokens
from glasshouse.client.attribution.values import HeldFixed
from glasshouse.client.exceptions import GlasshouseError
from glasshouse.client.results import Tokens
from glasshouse.v1 import attribution_pb2 as pb


@dataclass(frozen=True, slots=True)
class PatchResult:
    """One node patched. `effect` = value - the base's value. `column`: a head, unit or feature; None: the whole
    vector. `position` None: all at once. `grid`: which of the grids.
    """

    component: str
    layer: int
    column: int | None
    position: int | None
    value: float
    effect: float
    grid: int = 0


@dataclass(frozen=True, kw_only=True)
class SweepAxes:
    """The axes of a grid. `columns` holds heads, units or features as `column_kind` says; (None,) for whole vectors.
    `positions` is (None,) where all are patched at once.
    """

    component: str
    column_kind: str
    layers: tuple[int, ...]
    columns: tuple[int | None, ...]
    positions: tuple[int | None, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(n_layers, n_columns, n_positions)."""
        return len(self.layers), len(self.columns), len(self.positions)


@dataclass(frozen=True, kw_only=True)
class SweepGrid:
    """A grid's numbers. values, effects: (n_layers, n_columns, n_positions) float64."""

    axes: SweepAxes
    values: NDArray[np.float64] = field(repr=False)
    effects: NDArray[np.float64] = field(repr=False)
    tokens: list[str] = field(repr=False)

    @property
    def row_labels(self) -> list[str]:
        """One a (layer, column), layers outermost: "L3" or "L3.H1"."""
        letter = {"head": "H", "unit": "U", "feature": "F"}.get(self.axes.column_kind, "")
        return [
            f"L{layer}" if column is None else f"L{layer}.{letter}{column if column >= 0 else 'error'}"
            for layer in self.axes.layers
            for column in self.axes.columns
        ]

    @property
    def column_labels(self) -> list[str]:
        """One a position: the token there; "all" where all are patched at once."""
        return ["all" if p is None else self.tokens[p] for p in self.axes.positions]

    @property
    def table(self) -> NDArray[np.float64]:
        """(n_rows, n_positions): the effects as `row_labels` and `column_labels` have them."""
        return self.effects.reshape(-1, self.effects.shape[-1])

    def top(self, n: int = 10) -> list[PatchResult]:
        """The `n` largest effects by magnitude."""
        order = np.argsort(-np.abs(self.effects), axis=None, kind="stable")[:n]
        axes = self.axes
        return [
            PatchResult(
                axes.component, axes.layers[a], axes.columns[b], axes.positions[c],
                float(self.values[a, b, c]), float(self.effects[a, b, c]),
            )
            for a, b, c in zip(*np.unravel_index(order, self.effects.shape))
        ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PatchSweepResult:
    """A finished sweep; with one grid, `grid` is it."""

    clean: Tokens
    corrupt: Tokens | None
    clean_value: float
    corrupt_value: float | None
    base_value: float
    grids: list[SweepGrid]
    seconds: float
    held_fixed: HeldFixed

    @property
    def grid(self) -> SweepGrid:
        """The only grid. Raises ValueError where there are several."""
        (only,) = self.grids
        return only


@dataclass(frozen=True, kw_only=True)
class MediationGrid:
    """direct, indirect: (n_layers, n_columns, n_positions) float64."""

    axes: SweepAxes
    direct: NDArray[np.float64] = field(repr=False)
    indirect: NDArray[np.float64] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Mediation:
    """Effects of the change from clean to corrupt: `total` in all, of each node the direct (around it) and the indirect
    (through it).
    """

    clean: Tokens
    corrupt: Tokens
    total: float
    grids: list[MediationGrid]
    held_fixed: HeldFixed


class SweepState:
    """Everything known of a sweep under way."""

    def __init__(self) -> None:
        self.started: Any = None
        self.pending: deque[PatchResult] = deque()
        self.finished = False
        self.seconds = 0.0
        self._values: list[list[float]] = []
        self._direct: list[list[float]] = []
        self._axes: list[SweepAxes] = []
        self._places: Iterator[tuple[int, SweepAxes, int, int | None, int | None]] = iter(())
        self._n_done = 0

    @property
    def n_done(self) -> int:
        """Nodes whose values have come."""
        return self._n_done

    @property
    def n_nodes(self) -> int:
        """Nodes in all; 0 before the sweep has begun."""
        return self.started.n_nodes if self.started is not None else 0

    def feed(self, event: pb.PatchSweepResponse | pb.MediateEffectResponse) -> None:
        """Takes in one event."""
        if event.HasField("started"):
            self.started = event.started
            self._axes = [_axes(message) for message in event.started.grids]
            self._places = (
                (index, axes, layer, column, position)
                for index, axes in enumerate(self._axes)
                for layer in axes.layers
                for column in axes.columns
                for position in axes.positions
            )
        elif event.HasField("values"):
            self._take(event.values)
        elif event.HasField("finished"):
            self.finished, self.seconds = True, event.finished.seconds

    def end(self) -> None:
        """The stream is over. Raises GlasshouseError where it broke off."""
        if not self.finished or self._n_done < self.n_nodes:
            message = f"the stream ended after {self._n_done} of {self.n_nodes} nodes"
            raise GlasshouseError(message, code="DATA_LOSS")

    def result(self) -> PatchSweepResult:
        """The whole sweep; once it is over."""
        self.end()
        started, base = self.started, self.started.base_value
        clean = tokens(started.clean)
        flat = np.concatenate([np.asarray(v, dtype=np.float64) for v in self._values] or [np.zeros(0)])
        grids = [
            SweepGrid(axes=axes, values=values, effects=values - base, tokens=clean.strings)
            for axes, values in self._split(flat)
        ]
        return PatchSweepResult(
            clean=clean,
            corrupt=tokens(started.corrupt) if started.HasField("corrupt") else None,
            clean_value=started.clean_value,
            corrupt_value=started.corrupt_value if started.HasField("corrupt_value") else None,
            base_value=base,
            grids=grids,
            seconds=self.seconds,
            held_fixed=held_fixed(started.held_fixed),
        )

    def mediation(self) -> Mediation:
        """The whole mediation analysis; once it is over."""
        self.end()
        indirect, direct = (
            np.concatenate([np.asarray(v, dtype=np.float64) for v in parts] or [np.zeros(0)])
            for parts in (self._values, self._direct)
        )
        grids = [
            MediationGrid(axes=axes, direct=around, indirect=through)
            for (axes, through), (_, around) in zip(self._split(indirect), self._split(direct), strict=True)
        ]
        started = self.started
        return Mediation(
            clean=tokens(started.clean),
            corrupt=tokens(started.corrupt),
            total=started.corrupt_value - started.clean_value,
            grids=grids,
            held_fixed=held_fixed(started.held_fixed),
        )

    def _take(self, message: Any) -> None:
        if message.first_node != self._n_done:
            raise GlasshouseError(f"the server sent node {message.first_node} out of order", code="INTERNAL")
        if isinstance(message, pb.MediationValues):
            self._values.append(list(message.indirect))
            self._direct.append(list(message.direct))
            self._n_done += len(message.indirect)
            return
        values = list(message.values)
        self._values.append(values)
        self._n_done += len(values)
        base = self.started.base_value
        for value in values:
            index, axes, layer, column, position = next(self._places)
            self.pending.append(
                PatchResult(axes.component, layer, column, position, value, value - base, index)
            )

    def _split(self, flat: NDArray[np.float64]) -> list[tuple[SweepAxes, NDArray[np.float64]]]:
        found, start = [], 0
        for axes in self._axes:
            stop = start + int(np.prod(axes.shape))
            found.append((axes, flat[start:stop].reshape(axes.shape)))
            start = stop
        return found


def _axes(message: pb.SweepAxes) -> SweepAxes:
    return SweepAxes(
        component=message.component,
        column_kind=message.column_kind,
        layers=tuple(message.layers),
        columns=tuple(message.columns) or (None,),
        positions=tuple(message.positions) or (None,),
    )
