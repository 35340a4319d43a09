"""The worker's state: requests installed, the plan of the step that runs, what it answered. Knows nothing of vLLM.

A step, as the runner adapters drive it:

1. `update`  what the scheduler says: requests begin and end. A plan that cannot be installed fails that request alone.
2. `prepare` the rows of the batch are known: the step is planned, or the last plan used again, and junctions are set.
3. The forward pass runs; junctions do their work.
4. `finish`  every junction that had work must have fired; readouts are answered; one report leaves.

Nothing here raises into vLLM: an exception in `execute_model` ends the engine. Whatever goes wrong fails the requests it
concerns, by tag, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glasshouse.server.dictionaries.dictionary import Dictionary
from glasshouse.server.engines.vllm.contract.messages import (
    NOT_APPLIED,
    PLAN_REFUSED,
    RowBlock,
    StepError,
)
from glasshouse.server.engines.vllm.contract.plan import unpack_plan
from glasshouse.server.engines.vllm.contract.settings import WorkerSettings
from glasshouse.server.probes.served import ServedProbe

from . import junctions
from .account import Account
from .actions import Action
from .answering import AnsweringContext
from .delivery import Delivery, Step, said
from .junctions import Junction
from .planning import Answer, HookedBatch, Sites, StepPlan, plan_step
from .reporter import Reporter
from .requests import InstalledRequest, Question, Questions, install, uninstall
from .steering import Rosters
from .tables import EditTable, VectorTable

Array = np.ndarray


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """The whole batch of a step: request ids, and of each the first position and the number of tokens it runs, integers
    (B,), T in all; the arrays may be the runner's own, which change with the next step. `token_ids` gives the batch's token
    ids, (T,).
    """

    req_ids: Sequence[str]
    starts: Array
    counts: Array
    n_tokens: int
    token_ids: Callable[[], Array]


class Hooks:
    """Per-request hooks of one worker."""

    def __init__(
        self,
        found: Sequence[Junction],
        *,
        width: int,
        device: torch.device,
        settings: WorkerSettings,
        reporter: Reporter,
        reports_rows: bool,
        context: AnsweringContext,
    ) -> None:
        self.sites = Sites.of(found)
        self._numbers = {name: index for index, name in enumerate(self.sites.names)}
        self._edits = EditTable(settings.max_edits)
        self._vectors = VectorTable(settings.max_vectors, settings.max_resident_vectors, width, device)
        self._questions = Questions()
        self._rosters = Rosters()
        self._dictionaries: dict[str, Dictionary] = {}
        self._probes: dict[str, ServedProbe] = {}
        self._requests: dict[str, InstalledRequest] = {}
        self._reporter = reporter
        self._reports_rows = reports_rows
        self._delivery = Delivery(reporter, context, device)
        self._fired = bytearray(len(found))
        self._failures: list[tuple[Action, Exception]] = []
        self._armed: list[int] = []
        self._closed: list[int] = []
        self._errors: list[StepError] = []
        self._account = Account()
        self._plan: StepPlan | None = None
        self._active = False
        # What the last plan was made for.
        self._last_ids: list[str] = []
        self._next_starts: Array = np.empty(0, dtype=np.int64)
        # Of the step that runs.
        self._token_ids: Callable[[], Array] = lambda: np.empty(0, dtype=np.int64)
        self._edits_any = False
        self._step = 0
        self.counters = dict.fromkeys(
            ("steps_hooked", "steps_planned", "requests_installed", "requests_failed"), 0
        )

    # -- what requests may use -----------------------------------------------------------------------------------

    @property
    def dictionaries(self) -> dict[str, Dictionary]:
        """Dictionaries by key."""
        return self._dictionaries

    @property
    def probes(self) -> dict[str, ServedProbe]:
        """Probes by key, on the model's device in float32."""
        return self._probes

    @property
    def vectors(self) -> VectorTable:
        """The vectors of running requests, and resident ones."""
        return self._vectors

    def statistics(self) -> dict[str, int]:
        """Counters since the start, and gauges."""
        return {
            **self.counters,
            "requests_running": len(self._requests),
            "edit_slots_used": self._edits.slots.in_use,
            "edit_slots": self._edits.slots.capacity,
            "vector_rows_used": self._vectors.requests.in_use,
            "vector_rows": self._vectors.requests.capacity,
            "resident_vectors": self._vectors.n_resident,
            "dictionaries": len(self._dictionaries),
            "messages_sent": self._reporter.n_messages,
            "bytes_sent": self._reporter.n_bytes,
            "overflows": self._reporter.n_overflows,
            "readouts_failed": self._delivery.n_failed,
        }

    # -- a step --------------------------------------------------------------------------------------------------

    def update(self, new: Iterable[tuple[str, bytes | None]], finished: Iterable[str]) -> None:
        """Requests that begin, with their packed plans (None: not ours), and ids of those that ended."""
        if self._requests:
            for req_id in finished:
                if req_id in self._requests:
                    self._closed.append(self._requests[req_id].tag)
                self._drop(req_id)
            if self._closed:
                # At once: their receipts wait for the account.
                self._deliver()
            if self._delivery.failed:
                self._give_up()
        for req_id, packed in new:
            if packed is not None:
                self._add(req_id, packed)

    @property
    def idle(self) -> bool:
        """Whether no request is hooked and no junction is set: the step needs nothing of this."""
        return not self._requests and self._plan is None

    def works_for(self, req_ids: Iterable[str]) -> bool:
        """Whether any of these requests is hooked."""
        return bool(self._requests) and any(req_id in self._requests for req_id in req_ids)

    @property
    def edits(self) -> bool:
        """Whether any request is edited, as of the last plan."""
        return self._edits_any

    def is_edited(self, req_id: str) -> bool:
        """Whether a request has edits."""
        request = self._requests.get(req_id)
        return request is not None and request.edited

    def prepare(self, batch: StepBatch) -> None:
        """Plans the forward pass that comes now."""
        try:
            self._prepare(batch)
        except Exception as error:  # see the module's docstring
            self._fail_all(self._hooked(batch.req_ids), NOT_APPLIED, f"planning failed: {said(error)}")
            self._plan = None
        plan = self._plan
        self._active = plan is not None
        if plan is None:
            junctions.clear()
        else:
            self._token_ids = batch.token_ids
            self._set_junctions(plan)

    def finish(self) -> None:
        """Answers readouts and reports, after the forward pass."""
        if not self._active:
            if self._armed or self._errors or self._reporter.has_pending:
                self._deliver()
            return
        plan = self._plan
        assert plan is not None
        self._active = False
        self.counters["steps_hooked"] += 1
        try:
            failed = self._failed_members(plan)
            self._account.book(plan)
            answers = self._answers(plan, failed)
            captured = {
                site: capture.taken_NW
                for site, capture in plan.captures.items()
                if capture.taken_NW is not None
            }
            blocks: list[RowBlock] = []
            if plan.conditional is not None and (steered := plan.conditional.steered(plan.age)) is not None:
                blocks.append(steered)
            if plan.watched:
                blocks += self._conclude(plan, captured)
        except Exception as error:
            self._fail_all(plan.members, NOT_APPLIED, f"the step could not be completed: {said(error)}")
            self._deliver()
        else:
            if answers or blocks or self._armed or self._errors or self._account.full:
                self._deliver(blocks, answers, captured, plan.age)
        for capture in plan.captures.values():
            capture.taken_NW = None

    def drain(self) -> None:
        """Reports what has not been yet, and waits until every report has left."""
        self._deliver()
        self._delivery.drain()

    def forget_step(self) -> None:
        """Makes every junction idle: a pass that serves no request comes (warm-up, a dummy batch)."""
        junctions.clear()
        self._plan, self._active, self._last_ids = None, False, []

    # -- installation --------------------------------------------------------------------------------------------

    def _add(self, req_id: str, packed: bytes) -> None:
        tag = -1
        try:
            plan = unpack_plan(packed)
            tag = plan.tag
            known = self._requests.get(req_id)
            if known is not None and known.tag == tag:
                return  # resumed after preemption
            self._drop(req_id)
            self._requests[req_id] = install(
                plan,
                sites=self._numbers,
                edits=self._edits,
                vectors=self._vectors,
                questions=self._questions,
                dictionaries=self._dictionaries,
                probes=self._probes,
                rosters=self._rosters,
            )
            self._armed.append(tag)
            self.counters["requests_installed"] += 1
        except Exception as error:
            self.counters["requests_failed"] += 1
            self._errors.append(StepError(tag=tag, reason=PLAN_REFUSED, message=said(error)))
        self._last_ids = []

    def _drop(self, req_id: str) -> None:
        request = self._requests.pop(req_id, None)
        if request is not None:
            uninstall(request, edits=self._edits, vectors=self._vectors, questions=self._questions)
            self._last_ids = []

    def _give_up(self) -> None:
        """Stops working for requests whose readouts failed: the gateway has been told."""
        tags = set()
        while self._delivery.failed:
            tags.add(self._delivery.failed.popleft())
        for request in self._requests.values():
            if request.tag in tags and not request.failed:
                request.failed = True
                self.counters["requests_failed"] += 1
                self._last_ids = []

    def _hooked(self, req_ids: Iterable[str]) -> list[InstalledRequest]:
        return [request for req_id in req_ids if (request := self._requests.get(req_id)) is not None]

    # -- planning ------------------------------------------------------------------------------------------------

    def _prepare(self, batch: StepBatch) -> None:
        if self._goes_on(batch):
            plan = self._plan
            if plan is not None:
                plan.age += 1
                plan.valid_steps -= 1
            return
        if self._plan is not None:
            self._plan.remember()
        starts, counts = batch.starts.astype(np.int64), batch.counts.astype(np.int64)
        hooked = _hooked_batch(batch, starts, counts, self._requests)
        self._plan = None
        if hooked is not None:
            self.counters["steps_planned"] += 1
            self._plan = self._planned(hooked)
        self._edits_any = any(request.edited for request in self._requests.values())
        self._last_ids = list(batch.req_ids)
        self._next_starts = starts + 1

    def _goes_on(self, batch: StepBatch) -> bool:
        """Whether the last plan holds: the same requests, each one token further."""
        plan = self._plan
        if plan is not None and plan.valid_steps <= 0:
            return False
        ids = batch.req_ids
        if not batch.n_tokens == len(ids) == len(self._last_ids) or ids != self._last_ids:
            return False
        # As many tokens as requests, and none without: one each.
        if (batch.starts != self._next_starts).any():
            return False
        self._next_starts += 1
        return True

    def _planned(self, batch: HookedBatch) -> StepPlan | None:
        table = self._vectors.rows_VW
        try:
            return plan_step(batch, sites=self.sites, edits=self._edits, vectors_VW=table)
        except Exception:
            # One of them: find out which, so that the others go on.
            good = []
            for place, member in enumerate(batch.members):
                one = _part(batch, [place])
                try:
                    plan_step(one, sites=self.sites, edits=self._edits, vectors_VW=table)
                    good.append(place)
                except Exception as error:
                    self._fail(member, NOT_APPLIED, f"planning failed: {said(error)}")
            if not good:
                return None
            return plan_step(_part(batch, good), sites=self.sites, edits=self._edits, vectors_VW=table)

    def _set_junctions(self, plan: StepPlan) -> None:
        fired = self._fired
        if plan.age == 0:
            junctions.clear()
            for index, actions in plan.actions.items():
                junctions.set_run(index, self._junction_run(index, actions))
        for index in plan.actions:
            fired[index] = 0

    def _junction_run(self, index: int, actions: Sequence[Action]) -> junctions.JunctionRun:
        fired, failures = self._fired, self._failures

        def run(x: Tensor, residual: Tensor | None) -> None:
            for action in actions:
                try:
                    action(x, residual)
                except Exception as error:
                    failures.append((action, error))
            fired[index] = 1

        return run

    # -- after the pass ------------------------------------------------------------------------------------------

    def _failed_members(self, plan: StepPlan) -> set[int]:
        """Members whose hooks did not all run, now failed."""
        failed: set[int] = set()
        for index, actions in plan.actions.items():
            if not self._fired[index]:
                names = [n for n, j in zip(self.sites.names, self.sites.junctions, strict=True) if j == index]
                for place in {m for action in actions for m in action.members}:
                    failed.add(place)
                    self._fail(plan.members[place], NOT_APPLIED, f"{names[0]} did not fire in this pass")
        for action, error in self._failures:
            for place in action.members:
                failed.add(place)
                self._fail(plan.members[place], NOT_APPLIED, f"{type(action).__name__} failed: {said(error)}")
        self._failures.clear()
        return failed

    def _conclude(self, plan: StepPlan, captured: Mapping[int, Tensor]) -> list[RowBlock]:
        """Lets monitors that steer decide on the next pass; the scores that they decided by."""
        blocks: list[RowBlock] = []
        for watched in plan.watched:
            if any(site not in captured for site in watched.sites):
                continue  # it did not fire: its requests have failed
            try:
                found = watched.conclude(captured, self._token_ids, plan.age)
            except Exception as error:
                self._fail_all(watched.requests, NOT_APPLIED, f"monitors could not steer: {said(error)}")
                continue
            if found.changed:
                self._last_ids = []
            for request, why in found.failed:
                self._fail(request, NOT_APPLIED, f"monitors could not steer: {why}")
            blocks += found.blocks
        return blocks

    def _answers(self, plan: StepPlan, failed: set[int]) -> list[tuple[Answer, Question]]:
        """What is still to be answered, by a rank that reports; by every rank where answering runs collectives."""
        answers = []
        for answer in plan.answers:
            if failed and failed.issuperset(answer.members.tolist()):
                continue
            question = self._questions[answer.question]
            if self._reports_rows or question.kind == "lens":
                answers.append((answer, question))
        return answers

    def _deliver(
        self,
        blocks: Sequence[RowBlock] = (),
        answers: Sequence[tuple[Answer, Question]] = (),
        captured: Mapping[int, Tensor] | None = None,
        age: int = 0,
    ) -> None:
        self._step += 1
        armed, closed, errors = self._armed, self._closed, self._errors
        self._armed, self._closed, self._errors = [], [], []
        ran = self._account.take()
        if not self._reports_rows and not errors and not answers:
            return
        reports = self._reports_rows
        self._delivery.deliver(
            Step(
                number=self._step,
                armed=armed if reports else (),
                closed=closed if reports else (),
                errors=errors,
                ran=ran if reports else (),
                blocks=blocks if reports else (),
                answers=answers,
                captured=captured or {},
                age=age,
                rows=reports,
            )
        )

    def _fail(self, request: InstalledRequest, reason: str, message: str) -> None:
        if request.failed:
            return
        request.failed = True
        self.counters["requests_failed"] += 1
        self._errors.append(StepError(tag=request.tag, reason=reason, message=message))
        # Left out of the next plan.
        self._last_ids = []

    def _fail_all(self, requests: Iterable[InstalledRequest], reason: str, message: str) -> None:
        for request in requests:
            self._fail(request, reason, message)


def _hooked_batch(
    batch: StepBatch, starts: Array, counts: Array, requests: dict[str, InstalledRequest]
) -> HookedBatch | None:
    places, members = [], []
    for place, req_id in enumerate(batch.req_ids):
        request = requests.get(req_id)
        if request is not None and not request.failed:
            places.append(place)
            members.append(request)
    if not members:
        return None
    offsets = np.cumsum(counts) - counts
    return HookedBatch(
        members=members,
        offsets=offsets[places],
        starts=starts[places],
        counts=counts[places],
        n_tokens=batch.n_tokens,
        token_ids=batch.token_ids,
    )


def _part(batch: HookedBatch, places: list[int]) -> HookedBatch:
    return HookedBatch(
        members=[batch.members[place] for place in places],
        offsets=batch.offsets[places],
        starts=batch.starts[places],
        counts=batch.counts[places],
        n_tokens=batch.n_tokens,
        token_ids=batch.token_ids,
    )
