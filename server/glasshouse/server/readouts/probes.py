"""Captured activations scored by probes: rows of one pass go through all probes of their hook points together.

1. A cell is the activations of one row of the batch at a set of hook points; a probe that pools over positions sees what
   its request's running pool makes of them. Probes of one request that see the same share the cell.
2. Cells of the same hook points and pooling make one matrix x, and their affine probes one bank: one product scores all
   of them. Probes that few rows ask for are scored on those rows alone, as are the two-layer ones.
3. All scores of a pass cross to the host at once for each such matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from glasshouse.server.probes.pooling import Pooling, PoolStack, RunningPool
from glasshouse.server.probes.served import ProbeBank, ServedProbe
from glasshouse.server.types.conditions import ProbeOutput
from glasshouse.server.types.readouts import Array, ProbeScores, ReadoutValue

from .capture import CapturePlan, Share, SiteCapture
from .prepared import PreparedReadout, ProbeReading

# A bank scores every row by every probe of it: with more columns than this, rows are parted by what they ask for.
_BANK_COLUMNS = 256

_Asked = tuple[ServedProbe, ProbeOutput]


@dataclass(eq=False)
class _Cell:
    """What one row gives a set of hook points, and who wants it scored."""

    row: int
    pool: RunningPool | None
    # One a hook point.
    parts: dict[int, tuple[SiteCapture, Share]] = field(default_factory=dict)
    readouts: list[PreparedReadout] = field(default_factory=list)


_Found = dict[int, dict[int, ReadoutValue]]
_Key = tuple[tuple[str, ...], Pooling | None]


def _cells(plan: CapturePlan) -> list[list[_Cell]]:
    """The cells of a pass, in groups of the same hook points and pooling."""
    groups: dict[_Key, dict[tuple[int, int, tuple[int, ...]], _Cell]] = {}
    for site, share in plan:
        readout = share.readout
        reading = readout.reading
        if reading is None:
            continue
        pool = reading.pool
        names = tuple(point.name for point in readout.points)
        group = groups.setdefault((names, None if pool is None else pool.pooling), {})
        # Cells of a row differ by the pool, or where nothing is pooled by the positions read.
        where = tuple(share.positions) if pool is None else ()
        cell = group.setdefault((share.row, id(pool), where), _Cell(share.row, pool))
        cell.parts.setdefault(share.source, (site, share))
        if share.source == 0:
            cell.readouts.append(readout)
    return [list(group.values()) for group in groups.values()]


class _Scoring:
    """Scores what `asked` names of rows x (N, D): one column range an asked probe and output."""

    def __init__(self, asked: Sequence[_Asked]) -> None:
        affine = {
            output: [one for one, wanted in asked if one.is_affine and wanted is output]
            for output in ProbeOutput
        }
        self._banks = {
            output: ProbeBank.of(
                [one if output is ProbeOutput.SCORE else one.calibrated(None) for one in probes]
            )
            for output, probes in affine.items()
            if probes
        }
        self._others = [pair for pair in asked if not pair[0].is_affine]
        order = [(one, output) for output in self._banks for one in affine[output]] + self._others
        self.columns: dict[tuple[int, ProbeOutput], slice] = {}
        start = 0
        for one, output in order:
            stop = start + len(one.facts.columns)
            self.columns[id(one), output] = slice(start, stop)
            start = stop

    def __call__(self, x_ND: Tensor) -> Array:
        """Scores (N, sum of C), float32, on the host."""
        parts: list[Tensor] = []
        for output, bank in self._banks.items():
            parts += bank.score(x_ND) if output is ProbeOutput.SCORE else bank.margins(x_ND)
        for probe, output in self._others:
            margins = probe.margins(x_ND)
            parts.append(probe.score_margins(margins) if output is ProbeOutput.SCORE else margins)
        scores = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        host: Array = scores.float().cpu().numpy()
        return host


def _asked(cell: _Cell) -> list[_Asked]:
    readings = [_reading(readout) for readout in cell.readouts]
    return [(reading.probe, reading.output) for reading in readings]


def _scorings(cells: Sequence[_Cell]) -> list[tuple[_Scoring, list[int]]]:
    """How the cells of one matrix are scored: by one bank of all that is asked, or parted by what each asks for."""
    union = {(id(one), output): (one, output) for cell in cells for one, output in _asked(cell)}
    n_columns = sum(len(one.facts.columns) for one, _ in union.values())
    if n_columns <= _BANK_COLUMNS:
        return [(_Scoring(list(union.values())), list(range(len(cells))))]
    parted: dict[frozenset[tuple[int, ProbeOutput]], list[int]] = {}
    for place, cell in enumerate(cells):
        parted.setdefault(frozenset((id(one), output) for one, output in _asked(cell)), []).append(place)
    return [(_Scoring([union[key] for key in keys]), places) for keys, places in parted.items()]


def _reading(readout: PreparedReadout) -> ProbeReading:
    assert readout.reading is not None
    return readout.reading


def score_captures(plan: CapturePlan) -> dict[tuple[int, int], Array]:
    """Every probe readout of a pass: (row of the batch, readout index) -> its scores (n, C) at the positions captured."""
    found: dict[tuple[int, int], Array] = {}
    for cells in _cells(plan):
        inputs = []
        for cell in cells:
            parts = [site.values(share).float() for _, (site, share) in sorted(cell.parts.items())]
            x_TD = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            inputs.append(x_TD if cell.pool is None else cell.pool.add(x_TD))
        for scoring, places in _scorings(cells):
            scores = scoring(torch.cat([inputs[place] for place in places]))
            start = 0
            for place in places:
                stop = start + inputs[place].shape[0]
                for readout in cells[place].readouts:
                    reading = _reading(readout)
                    columns = scoring.columns[id(reading.probe), reading.output]
                    found[cells[place].row, readout.index] = scores[start:stop, columns]
                start = stop
    return found


class _StepGroup:
    """Cells of one matrix in a pass of one token a row, ready for every step that the plan holds for."""

    def __init__(self, cells: Sequence[_Cell]) -> None:
        device = _device(cells[0].readouts[0])
        # Of each hook point: where the cells lie in what is captured there, None for all of it in order.
        self._sources: list[tuple[SiteCapture, Tensor | None]] = []
        for source, (site, _) in sorted(cells[0].parts.items()):
            places = site.places_of([cell.parts[source][1] for cell in cells])
            assert site.tensor is not None, f"{site.point.name} was planned and did not run"
            every = places == list(range(site.tensor.shape[0]))
            self._sources.append((site, None if every else torch.tensor(places, device=device)))
        self._pools: PoolStack | None = None
        pools = [cell.pool for cell in cells if cell.pool is not None]
        if pools:
            width = sum(point.width for point in cells[0].readouts[0].points)
            self._pools = PoolStack(pools, width, device)
        # Of each scoring: its rows of x, or None for all in order, and who gets what.
        self._plans: list[tuple[_Scoring, Tensor | None, list[tuple[int, int, int, slice]]]] = []
        for scoring, places in _scorings(cells):
            wanted = [
                (at, cells[place].row, readout.index, scoring.columns[id(reading.probe), reading.output])
                for at, place in enumerate(places)
                for readout in cells[place].readouts
                for reading in [_reading(readout)]
            ]
            every = places == list(range(len(cells)))
            rows = None if every else torch.tensor(places, device=device)
            self._plans.append((scoring, rows, wanted))

    def score(self, found: _Found) -> None:
        parts = [(site.everything if at is None else site.pick(at)).float() for site, at in self._sources]
        x_RD = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if self._pools is not None:
            x_RD = self._pools.add(x_RD)
        for scoring, rows, wanted in self._plans:
            scores = scoring(x_RD if rows is None else x_RD[rows])
            for at, row, index, columns in wanted:
                found.setdefault(row, {})[index] = ProbeScores(scores[at, columns])


def _device(readout: PreparedReadout) -> torch.device:
    return _reading(readout).probe.layers[0].weights.device


class StepScoring:
    """The probe readouts of a plan of one token a row, made when its first pass has run."""

    def __init__(self, plan: CapturePlan) -> None:
        self._groups = [_StepGroup(cells) for cells in _cells(plan)]

    def score(self, found: _Found) -> None:
        """Scores what the step captured into `found`: row of the batch -> readout index -> value."""
        for group in self._groups:
            group.score(found)


def no_rows(n_columns: int) -> Array:
    """The scores of no position."""
    return np.zeros((0, n_columns), dtype=np.float32)
