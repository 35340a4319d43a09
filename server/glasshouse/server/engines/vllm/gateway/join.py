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

from glasshouse.server.interventions.edits import PreparedIntervention
from glasshouse.server.readouts.prepared import PreparedReadout
from glasshouse.server.types.errors import FailedPrecondition, Internal, ResourceExhausted, ServingError
from glasshouse.server.types.interventions import InterventionReceipt
from glasshouse.server.types.readouts import Array, PromptReadout, ReadoutValue
from glasshouse.wire import reasons

from ..contract import Ledger, RequestPlan, StepError
from ..contract.messages import NOT_APPLIED, OVERFLOW, PLAN_REFUSED
from ..contract.watches import Ranges
from .reading import Reading
from .statistics import Statistics

_log = structlog.get_logger(__name__)
NOWHERE: Mapping[int, Ranges] = {}


@dataclass(frozen=True, kw_only=True)
class JoinSettings:
    """`reporters`: rank -> hook points of the workers that report. `speculating`: whether drafts are fed."""

    reporters: Mapping[int, frozenset[str]]
    timeout_s: float
    max_rows: int
    max_bytes: int
    speculating: bool = False


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
        self._readings = {
            part.index: Reading(part, readout, plan.n_prompt)
            for part, readout in zip(plan.readouts, readouts, strict=True)
        }
        # Of edits under conditions: position -> whether the edit was made there.
        self._steered: dict[int, dict[int, bool]] = {
            edit.index: {} for edit in plan.edits if edit.condition >= 0
        }
        self._ledgers = {
            rank: Ledger(own)
            for rank, sites in settings.reporters.items()
            if (own := [edit for edit in plan.edits if not sites.isdisjoint(edit.sites_out)])
        }
        self._run_start = 0
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

    def ran(self, rank: int, start: int, count: int, applied: int, steps: int = 1) -> None:
        """A worker ran positions of the request, in as many passes, each beginning where the last one ended."""
        self._run_start = start + (steps - 1) * count
        if (ledger := self._ledgers.get(rank)) is not None:
            ledger.ran(start, count * steps, applied * steps)

    def rows(self, kind: str, readout: int, positions: Array, values: Sequence[Array]) -> None:
        """A worker read; or, of kind "steered", says where a conditional edit was made."""
        if kind == "steered":
            self._steered[readout].update(zip(positions.tolist(), values[0].tolist(), strict=True))
            return
        reading = self._readings[readout]
        reading.take(positions, values, self._run_start)
        self._check_kept(reading)

    def row(self, kind: str, readout: int, position: int, values: Sequence[Array], row: int) -> None:
        """The same of a single row of `values`, as a step of generation brings it."""
        if kind == "steered" or position < self._plan.n_prompt:
            self.rows(kind, readout, np.array([position]), [array[row : row + 1] for array in values])
            return
        reading = self._readings[readout]
        reading.take_row(position, values, row, self._run_start)
        self._check_kept(reading)

    def _check_kept(self, reading: Reading) -> None:
        n_rows = len(reading.later)
        if n_rows <= 1:
            return
        kept_bytes = sum(len(each.later) * each.row_bytes for each in self._readings.values())
        if kept_bytes > self._settings.max_bytes or n_rows > self._settings.max_rows:
            self._fail(
                ResourceExhausted(
                    f"the reader is {n_rows} events behind",
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
        return tuple(self._readings[readout.index].of_prompt() for readout in self._readouts)

    async def before(self, position: int, token_id: int) -> Mapping[int, ReadoutValue]:
        """What was read at `position` - 1, where `token_id` was fed: the readouts of the token at `position`."""
        if position == self._plan.n_prompt:
            found = {index: reading.last_of_prompt() for index, reading in self._readings.items()}
            return {index: value for index, value in found.items() if value is not None}
        fed = position - 1
        wanted = {
            index: reading for index, reading in self._readings.items() if reading.covers(fed, token_id)
        }
        if not self._here(fed, wanted):
            self._drain()
            if not self._here(fed, wanted):
                self._statistics.joins_late += 1
                await self._until(
                    lambda: self._here(fed, wanted), f"what was read at position {fed} did not come"
                )
        return {index: reading.value(reading.later.pop(fed)[0]) for index, reading in wanted.items()}

    def _here(self, position: int, wanted: Mapping[int, Reading]) -> bool:
        """Whether all that is read at a position has come, and is of the token that stayed."""
        for reading in wanted.values():
            found = reading.later.get(position)
            if found is None or not self._sure(position, found[1]):
                return False
        return True

    def _sure(self, position: int, run_start: int) -> bool:
        """Whether the row at a position is of the token that stayed."""
        if not self._settings.speculating or run_start == position:
            return True
        return self._run_start > position or not self._unclosed

    async def receipt(
        self, token_ids: Sequence[int], n_fed: int, steered: Mapping[int, Ranges] = NOWHERE, n_seen: int = 0
    ) -> tuple[InterventionReceipt, ...]:
        """What was applied at the `n_fed` positions of `token_ids` that were fed. `steered`: where the edits of each
        watch of the plan were due, as far as `n_seen` positions have been looked at: nothing is reported of them, but they
        too are applied wherever they are due.

        Raises:
            FailedPrecondition: an edit ran at fewer positions than its selector covers, or at more.
        """
        await self._until(
            lambda: all(ledger.complete(n_fed) for ledger in self._ledgers.values()),
            "the account of the edits did not come",
        )
        if self._settings.speculating and self._steered:
            await self._until(lambda: not self._unclosed, "the account of the conditions did not come")
        applied: dict[int, int] = {}
        for ledger in self._ledgers.values():
            ledger.steered(steered, min(n_seen, n_fed - 1) + 1)
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
                positions_steered=self._n_steered(edit.index, applied[edit.index], n_fed),
                resources=edit.resources,
            )
            for edit in self._edits
        )

    def _n_steered(self, edit: int, n_applied: int, n_fed: int) -> int:
        """Where an edit was made: everywhere that it applied, or under a condition where that held."""
        steered = self._steered.get(edit)
        if steered is None:
            return n_applied
        return sum(made for position, made in steered.items() if position < n_fed)

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
