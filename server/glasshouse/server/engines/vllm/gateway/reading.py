"""One readout's rows as workers push them: the prompt's in one table, the others as they come; and what they come to.

A probe that pools over positions is pushed as activations and pooled here, in the order of the positions that stayed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from glasshouse.server.dictionaries.features import NO_FEATURE
from glasshouse.server.probes.pooling import RunningPool
from glasshouse.server.readouts.capture import to_host
from glasshouse.server.readouts.collect import NO_ROWS
from glasshouse.server.readouts.features import FeatureTable
from glasshouse.server.readouts.prepared import PreparedReadout, ProbeReading
from glasshouse.server.types.conditions import ProbeOutput
from glasshouse.server.types.readouts import (
    Array,
    FeatureActivations,
    FeatureRows,
    ProbeScoreRows,
    ProbeScores,
    PromptReadout,
    ReadoutValue,
    TopTokens,
)

from ..contract import ReadoutPlan
from ..contract.plan import FOREVER


class Reading:
    """The rows of one readout of one request."""

    def __init__(self, plan: ReadoutPlan, readout: PreparedReadout, n_prompt: int) -> None:
        self._readout, self._kind, self._clause = readout, plan.kind, plan.clause
        self._n_prompt = n_prompt
        self._excluded = frozenset(plan.clause.excluded_token_ids)
        parts = [np.arange(low, min(high, n_prompt), dtype=np.int32) for low, high in plan.clause.ranges]
        self._prompt_positions = np.concatenate(parts) if parts else np.empty(0, np.int32)
        self._found = np.zeros(len(self._prompt_positions), dtype=bool)
        self._tables: list[Array] = []
        self._prompt: PromptReadout | None = None
        reading = readout.reading
        # A pool of its own: those that the request's readouts share would count a position once each.
        self._pool = None if reading is None or reading.pool is None else RunningPool(reading.pool.pooling)
        # Whether every position beyond the prompt is read, as is usual: then none needs to be looked up.
        self._reads_on = not self._excluded and any(
            low <= n_prompt and high >= FOREVER for low, high in plan.clause.ranges
        )
        # Position -> (row, first position of the run that read it); bytes of each.
        self.later: dict[int, tuple[tuple[Array, ...], int]] = {}
        self.row_bytes = 0

    @property
    def prompt_done(self) -> bool:
        """Whether every position of the prompt has been read."""
        return bool(self._found.all())

    def take(self, positions: Array, values: Sequence[Array], run_start: int) -> None:
        """Takes rows at ascending positions."""
        n_in_prompt = int(np.searchsorted(positions, self._n_prompt))
        if n_in_prompt:
            self._take_prompt(positions[:n_in_prompt], [array[:n_in_prompt] for array in values])
        for row in range(n_in_prompt, len(positions)):
            self.take_row(int(positions[row]), values, row, run_start)

    def take_row(self, position: int, values: Sequence[Array], row: int, run_start: int) -> None:
        """Takes one row, beyond the prompt, of `values`."""
        parts = tuple([array[row] for array in values])
        if not self.row_bytes:
            self.row_bytes = n_bytes_of(parts)
        self.later[position] = (parts, run_start)

    def _take_prompt(self, positions: Array, values: Sequence[Array]) -> None:
        if not self._tables:
            n_rows = len(self._prompt_positions)
            self._tables = [np.empty((n_rows, *array.shape[1:]), array.dtype) for array in values]
        at = np.searchsorted(self._prompt_positions, positions)
        for table, array in zip(self._tables, values, strict=True):
            table[at] = array
        self._found[at] = True

    def covers(self, position: int, token_id: int) -> bool:
        """Whether the token fed at a position beyond the prompt is read."""
        if self._reads_on:
            return True
        if token_id in self._excluded:
            return False
        return any(low <= position < high for low, high in self._clause.ranges)

    def value(self, parts: Sequence[Array]) -> ReadoutValue:
        """What one row beyond the prompt comes to. Called once a position, in their order."""
        reading = self._readout.reading
        if reading is not None and self._pool is not None:
            return ProbeScores(_pooled(reading, self._pool, parts[0][None])[0])
        match self._kind:
            case "activations" | "scores":
                return parts[0]
            case "probe":
                return ProbeScores(parts[0])
            case "lens":
                return TopTokens(parts[0], parts[1])
            case "features":
                n_found = int((parts[0] != NO_FEATURE).sum())
                return FeatureActivations(parts[0][:n_found], parts[1][:n_found])

    def of_prompt(self) -> PromptReadout:
        """The whole prompt's. Called once."""
        values: Array | tuple[TopTokens, ...] | FeatureRows | ProbeScoreRows
        reading, tables = self._readout.reading, self._tables
        if reading is not None:
            scores: Array = np.empty((0, len(reading.probe.facts.columns)), np.float32)
            if tables:
                scores = tables[0] if self._pool is None else _pooled(reading, self._pool, tables[0])
            values = ProbeScoreRows(reading.name, reading.probe.facts.columns, scores)
        elif self._kind == "features":
            values = FeatureRows(*NO_ROWS)
            if tables:
                values = FeatureTable(ids=tables[0], activations=tables[1], padded=True).rows()
        elif self._kind == "lens":
            values = tuple(map(TopTokens, *tables)) if tables else ()
        else:
            values = (
                tables[0]
                if tables
                else to_host(torch.zeros((0, self._readout.point.width)), self._readout.dtype)
            )
        positions = tuple(self._prompt_positions.tolist())
        self._prompt = PromptReadout(readout=self._readout.index, positions=positions, values=values)
        return self._prompt

    def last_of_prompt(self) -> ReadoutValue | None:
        """What was read at the prompt's last position, where it is selected; after `of_prompt`."""
        if not len(self._prompt_positions) or self._prompt_positions[-1] != self._n_prompt - 1:
            return None
        assert self._prompt is not None, "the prompt comes first"
        match self._prompt.values:
            case FeatureRows() as rows:
                return rows.row(len(self._prompt_positions) - 1)
            case ProbeScoreRows(scores=scores):
                return ProbeScores(scores[-1])
            case values:
                last: ReadoutValue = values[-1]
                return last


def n_bytes_of(parts: Sequence[Array]) -> int:
    """Bytes of one row."""
    return sum(part.nbytes for part in parts)


def _pooled(reading: ProbeReading, pool: RunningPool, x_ND: Array) -> Array:
    pooled_ND = pool.add(torch.from_numpy(np.ascontiguousarray(x_ND)))
    probe = reading.probe
    scored = probe.margins(pooled_ND) if reading.output is ProbeOutput.MARGIN else probe.score(pooled_ND)
    host: Array = scored.float().cpu().numpy()
    return host
