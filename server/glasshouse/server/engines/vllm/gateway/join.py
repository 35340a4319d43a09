"""One request's side of the reports: armed or not, which positions ran, what was read, matched with its tokens by position.

- Nothing is handed out before every reporting worker has armed the request's plan.
- A row is keyed by its position, and the last one wins: after preemption a position runs again.
- Under speculation a row may be of a draft that was rejected. A run's first position is always a confirmed token, so a
  row is sure once its run began there, once a later run began beyond it, or once the worker has let go of the request.
- What does not come in time is an error, never an answer without it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import structlog

from glasshouse.server.dictionaries.features import NO_FEATURE
from glasshouse.server.engines.transcript import n_bytes
from glasshouse.server.interventions.edits import PreparedIntervention
from glasshouse.server.readouts.capture import to_host
from glasshouse.server.readouts.collect import NO_ROWS
from glasshouse.server.readouts.features import FeatureTable
from glasshouse.server.readouts.prepared import PreparedReadout
from glasshouse.server.types.errors import FailedPrecondition, Internal, ResourceExhausted, ServingError
from glasshouse.server.types.interventions import InterventionReceipt
from glasshouse.server.types.readouts import (
    Array,
    FeatureActivations,
    FeatureRows,
    PromptReadout,
    ReadoutValue,
    TopTokens,
)
from glasshouse.wire import reasons

from ..contract import Ledger, ReadoutPlan, RequestPlan, StepError
from ..contract.messages import NOT_APPLIED, OVERFLOW, PLAN_REFUSED
from .statistics import Statistics

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class JoinSettings:
    """`reporters`: rank -> hook points of the workers that report. `speculating`: whether drafts are fed."""

    reporters: Mapping[int, frozenset[str]]
    timeout_s: float
    max_rows: int
    max_bytes: int
    speculating: bool = False


class _Reading:
    """One readout's rows: the prompt's in one table, the others as they come."""

    def __init__(self, plan: ReadoutPlan, n_prompt: int) -> None:
        self.kind, self.clause = plan.kind, plan.clause
        self.excluded = frozenset(plan.clause.excluded_token_ids)
        parts = [np.arange(low, min(high, n_prompt), dtype=np.int32) for low, high in plan.clause.ranges]
        self.prompt_positions = np.concatenate(parts) if parts else np.empty(0, np.int32)
        self.n_prompt = n_prompt
        self._found = np.zeros(len(self.prompt_positions), dtype=bool)
        self._tables: list[Array] = []
        # Position -> (value, first position of the run that read it).
        self.later: dict[int, tuple[ReadoutValue, int]] = {}

    @property
    def prompt_done(self) -> bool:
        """Whether every position of the prompt has been read."""
        return bool(self._found.all())

    def take(self, positions: Array, values: Sequence[Array], run_start: int) -> int:
        """Takes rows at ascending positions; returns the bytes of those that are kept apart."""
        n_in_prompt = int(np.searchsorted(positions, self.n_prompt))
        if n_in_prompt:
            self._take_prompt(positions[:n_in_prompt], [array[:n_in_prompt] for array in values])
        kept = 0
        for row in range(n_in_prompt, len(positions)):
            position = int(positions[row])
            if position not in self.later:
                kept += sum(array[row].nbytes for array in values)
            self.later[position] = (_value(self.kind, [array[row] for array in values]), run_start)
        return kept

    def _take_prompt(self, positions: Array, values: Sequence[Array]) -> None:
        if not self._tables:
            self._tables = [
                np.empty((len(self.prompt_positions), *array.shape[1:]), array.dtype) for array in values
            ]
        at = np.searchsorted(self.prompt_positions, positions)
        for table, array in zip(self._tables, values, strict=True):
            table[at] = array
        self._found[at] = True

    def covers(self, position: int, token_id: int) -> bool:
        """Whether the token fed at a position beyond the prompt is read."""
        if token_id in self.excluded:
            return False
        return any(low <= position < high for low, high in self.clause.ranges)

    def last_of_prompt(self) -> ReadoutValue | None:
        """What was read at the prompt's last position, where it is selected."""
        if not len(self.prompt_positions) or self.prompt_positions[-1] != self.n_prompt - 1:
            return None
        return _value(self.kind, [table[-1] for table in self._tables])

    def of_prompt(self, readout: PreparedReadout) -> PromptReadout:
        """The whole prompt's."""
        values: Array | tuple[TopTokens, ...] | FeatureRows
        if self.kind == "features":
            values = (
                FeatureTable(ids=self._tables[0], activations=self._tables[1], padded=True).rows()
                if self._tables
                else FeatureRows(*NO_ROWS)
            )
        elif self.kind == "lens":
            values = tuple(map(TopTokens, *self._tables)) if self._tables else ()
        elif self._tables:
            values = self._tables[0]
        else:
            values = _nothing_read(readout)
        return PromptReadout(
            readout=readout.index, positions=tuple(self.prompt_positions.tolist()), values=values
        )


def _nothing_read(readout: PreparedReadout) -> Array:
    import torch

    return to_host(torch.zeros((0, readout.point.width)), readout.dtype)


def _value(kind: str, parts: Sequence[Array]) -> ReadoutValue:
    if kind == "activations":
        return parts[0]
    if kind == "lens":
        return TopTokens(parts[0], parts[1])
    ids, activations = parts
    n_found = int((ids != NO_FEATURE).sum())
    return FeatureActivations(ids[:n_found], activations[:n_found])


class Join:
    """A request with a plan, between its first report and its receipt. Lives on the event loop."""

    def __init__(
        self,
        plan: RequestPlan,
        *,
        edits: Sequence[PreparedIntervention],
        readouts: Sequence[PreparedReadout],
        settings: JoinSettings,
        statistics: Statistics,
        drain: Callable[[], None],
    ) -> None:
        self.tag = plan.tag
        self._plan = plan
        self._edits, self._readouts = edits, readouts
        self._settings, self._statistics, self._drain = settings, statistics, drain
        self._unarmed = set(settings.reporters)
        self._unclosed = set(settings.reporters)
        self._readings = {readout.index: _Reading(readout, plan.n_prompt) for readout in plan.readouts}
        self._ledgers = {
            rank: Ledger(own)
            for rank, sites in settings.reporters.items()
            if (own := [edit for edit in plan.edits if not sites.isdisjoint(edit.sites_out)])
        }
        self._run_start = 0
        self._kept_bytes = 0
        self._error: ServingError | None = None
        # The worker's own word, where it failed the request.
        self.step_error: StepError | None = None
        self._waiter: asyncio.Future[None] | None = None

    # -- what the channel tells ----------------------------------------------------------------------------------

    def arm(self, rank: int) -> None:
        """A worker has installed the plan."""
        self._unarmed.discard(rank)

    def closed(self, rank: int) -> None:
        """A worker has let go of the request: nothing more comes from it."""
        self._unclosed.discard(rank)

    def ran(self, rank: int, start: int, count: int, applied: int) -> None:
        """A worker ran positions of the request."""
        self._run_start = start
        if (ledger := self._ledgers.get(rank)) is not None:
            ledger.ran(start, count, applied)

    def rows(self, readout: int, positions: Array, values: Sequence[Array]) -> None:
        """A worker read."""
        reading = self._readings[readout]
        self._kept_bytes += reading.take(positions, values, self._run_start)
        if self._kept_bytes > self._settings.max_bytes or len(reading.later) > self._settings.max_rows:
            self._fail(
                ResourceExhausted(
                    f"the reader is {len(reading.later)} events behind",
                    reason=reasons.SLOW_CONSUMER,
                    remedy="read the stream faster, or ask for fewer readouts",
                )
            )

    def fail_step(self, error: StepError) -> None:
        """A worker failed the request."""
        self.step_error = error
        self._fail(_serving_error(error))

    def _fail(self, error: ServingError) -> None:
        if self._error is None:
            self._error = error

    def wake(self) -> None:
        """Something has changed."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # -- what the request asks -----------------------------------------------------------------------------------

    @property
    def reads(self) -> bool:
        """Whether anything is read."""
        return bool(self._readings)

    def check(self) -> None:
        """Raises what ended the request, if anything did."""
        if self._error is not None:
            raise self._error

    async def armed(self) -> None:
        """Returns once every reporting worker has installed the plan."""
        await self._until(lambda: not self._unarmed, "the edits and readouts were not confirmed")

    async def prompt_readouts(self) -> tuple[PromptReadout, ...]:
        """What was read of the prompt."""
        await self._until(
            lambda: all(reading.prompt_done for reading in self._readings.values()),
            "what was read of the prompt did not come",
        )
        return tuple(self._readings[readout.index].of_prompt(readout) for readout in self._readouts)

    async def before(self, position: int, token_id: int) -> Mapping[int, ReadoutValue]:
        """What was read at `position` - 1, where `token_id` was fed: the readouts of the token at `position`."""
        if position == self._plan.n_prompt:
            found = {index: reading.last_of_prompt() for index, reading in self._readings.items()}
            return {index: value for index, value in found.items() if value is not None}
        fed = position - 1
        wanted = [
            (index, reading.later)
            for index, reading in self._readings.items()
            if reading.covers(fed, token_id)
        ]

        def here() -> bool:
            return all(fed in later and self._sure(fed, later[fed][1]) for _, later in wanted)

        if not here():
            self._drain()
            if not here():
                self._statistics.joins_late += 1
                await self._until(here, f"what was read at position {fed} did not come")
        values: dict[int, ReadoutValue] = {}
        for index, later in wanted:
            value, _ = later.pop(fed)
            self._kept_bytes -= n_bytes(value)
            values[index] = value
        return values

    def _sure(self, position: int, run_start: int) -> bool:
        """Whether the row at a position is of the token that stayed."""
        if not self._settings.speculating or run_start == position:
            return True
        return self._run_start > position or not self._unclosed

    async def receipt(self, token_ids: Sequence[int], n_fed: int) -> tuple[InterventionReceipt, ...]:
        """What was applied at the `n_fed` positions of `token_ids` that were fed.

        Raises:
            FailedPrecondition: an edit ran at fewer positions than its selector covers, or at more.
        """
        await self._until(
            lambda: all(ledger.complete(n_fed) for ledger in self._ledgers.values()),
            "the account of the edits did not come",
        )
        applied: dict[int, int] = {}
        for ledger in self._ledgers.values():
            mismatch = ledger.first_mismatch(token_ids)
            if mismatch is not None:
                start, count, found, expected = mismatch
                raise not_applied(
                    f"at positions {start} to {start + count - 1} edits were applied {found} times instead of {expected}"
                )
            applied |= ledger.applied(n_fed, token_ids)
        return tuple(
            InterventionReceipt(
                index=edit.index,
                edit=edit.kind,
                hook_points=tuple(point.name for point in edit.hook_points),
                positions_applied=applied[edit.index],
                content_hash=edit.content_hash,
            )
            for edit in self._edits
        )

    async def _until(self, holds: Callable[[], bool], otherwise: str) -> None:
        self.check()
        if holds():
            return
        self._drain()
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                while not holds():
                    self.check()
                    self._waiter = asyncio.get_running_loop().create_future()
                    await self._waiter
        except TimeoutError as error:
            self._statistics.captures_failed += 1
            _log.error("join_timeout", what=otherwise, tag=self.tag)
            raise Internal(
                f"{otherwise} within {self._settings.timeout_s:g} s",
                reason=reasons.DEFECT,
                remedy="report it with the request id; the tokens streamed before are not to be used",
            ) from error
        self.check()


def not_applied(message: str) -> FailedPrecondition:
    """Edits were not applied as promised."""
    return FailedPrecondition(
        message,
        reason=reasons.INTERVENTION_NOT_APPLIED,
        field="interventions",
        remedy="this is a defect of the engine: the tokens streamed before are not to be used",
    )


def _serving_error(error: StepError) -> ServingError:
    if error.reason == OVERFLOW:
        return ResourceExhausted(
            f"what was read could not be delivered: {error.message}",
            reason=reasons.SLOW_CONSUMER,
            field="readouts",
            remedy="ask for fewer readouts at a time",
        )
    if error.reason == NOT_APPLIED:
        return not_applied(error.message)
    _log.error("request_failed_in_worker", reason=error.reason, error=error.message)
    what = "the edits and readouts were refused" if error.reason == PLAN_REFUSED else "reading failed"
    return Internal(
        f"{what} by the engine's worker",
        reason=reasons.DEFECT,
        remedy="report it with the request id",
    )
