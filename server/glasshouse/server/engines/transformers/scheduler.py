"""What each step of the engine does, and who waits.

A step is: let go of cancelled requests; feed the prompts of newly admitted rows (one padded pass, or the next piece of
a long prompt); one decoding step of all running rows; one pass of forward-only work. Every part of it is bounded, so a
long prompt or a large extraction slows running streams and never stops them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from glasshouse.server.types.errors import Internal, ServingError
from glasshouse.wire import reasons

from .bulk import AnyJob
from .decoding import DecodingBatch, next_tokens
from .feed import FedPass, Model, Prompt, PromptFeed
from .passes import logits_at
from .row import GenerationRow

# Prompts of fewer tokens together are not worth more threads.
_SHORT_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class SchedulerSettings:
    """Bounds of a step. Tokens count padding."""

    max_running: int = 64
    # Positions all running rows may cache together, padded to the longest.
    max_cached_positions: int = 1 << 18
    prefill_tokens: int = 2048
    # Forward-only tokens a step: alone, and while rows decode.
    bulk_tokens: int = 4096
    bulk_tokens_shared: int = 1024
    max_backlog_bytes: int = 64 << 20
    # CPU threads of a decoding step, whose matrices are small, and of the passes over prompts. None: the library's.
    decode_threads: int | None = None
    prompt_threads: int | None = None


class _Threads:
    """The library's thread count, changed only when it has to be: each change starts threads anew."""

    def __init__(self) -> None:
        self._now: int | None = None

    def use(self, count: int | None) -> None:
        if count is not None and count != self._now:
            torch.set_num_threads(count)
            self._now = count


class Scheduler:
    """The requests of one engine. Lives in the engine's thread."""

    def __init__(self, model: Model, settings: SchedulerSettings) -> None:
        self._model = model
        self._settings = settings
        self.waiting: deque[GenerationRow] = deque()
        self.decoding = DecodingBatch(model)
        self.jobs: deque[AnyJob] = deque()
        # A prompt too long for one pass, between its pieces.
        self._long: tuple[GenerationRow, PromptFeed] | None = None
        self._threads = _Threads()

    @property
    def n_running(self) -> int:
        """Generations admitted and not ended."""
        return len(self.decoding.rows) + (self._long is not None)

    @property
    def idle(self) -> bool:
        """Whether there is nothing a step could do."""
        return not (self.waiting or self.n_running or any(self._can_run(job) for job in self.jobs))

    def _can_run(self, job: AnyJob) -> bool:
        return job.stream.cancelled.is_set() or job.ready(self._settings.max_backlog_bytes)

    @torch.inference_mode()
    def step(self) -> None:
        """Does one step. A failure ends the requests it concerns, and only those."""
        self._let_go()
        if self._long is not None:
            self._threads.use(self._settings.prompt_threads)
            self._guard([self._long[0]], self._feed_long)
        elif admitted := self._admit():
            short = sum(row.n_prompt for row in admitted) < _SHORT_TOKENS
            self._threads.use(self._settings.decode_threads if short else self._settings.prompt_threads)
            self._guard(admitted, lambda: self._feed(admitted))
        if self.decoding.rows:
            self._threads.use(self._settings.decode_threads)
            self._guard(list(self.decoding.rows), self.decoding.step)
        self._bulk()

    @torch.inference_mode()
    def fail_all(self, error: BaseException) -> None:
        """Ends every request with `error`."""
        self.decoding.fail(error)
        if self._long is not None:
            self._long[0].stream.fail(error)
            self._long = None
        for row in self.waiting:
            row.stream.fail(error)
        self.waiting.clear()
        for job in self.jobs:
            job.stream.fail(error)
        self.jobs.clear()

    def _let_go(self) -> None:
        self.decoding.drop([row for row in self.decoding.rows if row.stream.cancelled.is_set()])
        if self._long is not None and self._long[0].stream.cancelled.is_set():
            self._long = None
        if any(row.stream.cancelled.is_set() for row in self.waiting):
            self.waiting = deque(row for row in self.waiting if not row.stream.cancelled.is_set())
        if any(job.stream.cancelled.is_set() for job in self.jobs):
            self.jobs = deque(job for job in self.jobs if not job.stream.cancelled.is_set())

    def _admit(self) -> list[GenerationRow]:
        """The next rows in order of arrival whose prompts make one pass, as far as places and cache allow."""
        admitted: list[GenerationRow] = []
        longest = 0
        reserved = max((row.n_reserved for row in self.decoding.rows), default=0)
        while self.waiting:
            row = self.waiting[0]
            n_rows = self.n_running + len(admitted) + 1
            reserved = max(reserved, row.n_reserved)
            if n_rows > self._settings.max_running:
                break
            if n_rows > 1 and n_rows * reserved > self._settings.max_cached_positions:
                break
            longest = max(longest, row.n_prompt)
            if admitted and longest * (len(admitted) + 1) > self._settings.prefill_tokens:
                break
            admitted.append(self.waiting.popleft())
        return admitted

    def _feed(self, rows: list[GenerationRow]) -> None:
        for row in rows:
            row.started()
        feed = PromptFeed(
            self._model,
            [
                Prompt(tokens=row.request.prompt, edits=row.edits, readouts=row.readouts, watch=row.watch)
                for row in rows
            ],
            keep=True,
            piece_tokens=self._settings.prefill_tokens,
        )
        if rows[0].n_prompt > self._settings.prefill_tokens:
            self._long = (rows[0], feed)
            self._feed_long()
        else:
            self._advance(rows, feed)

    def _feed_long(self) -> None:
        assert self._long is not None
        row, feed = self._long
        if self._advance([row], feed):
            self._long = None

    def _advance(self, rows: list[GenerationRow], feed: PromptFeed) -> bool:
        """Feeds the next pass; after the last one chooses the first tokens and lets the rows decode. Whether it is over."""
        logits: list[Tensor] = []

        def look(fed: FedPass) -> None:
            cells = [
                (index, len(span.token_ids) - 1)
                for index, (row, span) in enumerate(zip(rows, fed.spans, strict=True))
                if span.stop == row.n_prompt
            ]
            if cells or fed.planned.logit_cells():
                logits.append(logits_at(self._model.loaded, fed.planned, fed.hidden_BTD, cells))

        feed.advance(look)
        if not feed.done:
            # A lone prompt in pieces: what has been seen of it may be enough to end it.
            return not rows[0].piece_fed(feed.collectors[0].finish)
        chosen = next_tokens(rows, logits[-1])
        assert feed.cache is not None
        for index, row in enumerate(rows):
            collector = feed.collectors[index]
            if row.prefilled(collector.finish()) and row.push(*chosen.of(index), collector.last()):
                self.decoding.join(row, feed.cache, index)
        return True

    def _bulk(self) -> None:
        for _ in range(len(self.jobs)):
            job = self.jobs.popleft()
            if not self._can_run(job):
                self.jobs.append(job)
                continue
            budget = self._settings.bulk_tokens_shared if self.n_running else self._settings.bulk_tokens
            piece = max(budget, self._settings.prefill_tokens)
            self._threads.use(self._settings.prompt_threads)
            try:
                job.step(budget, piece)
            except ServingError as error:
                job.stream.fail(error)
            except Exception as error:
                job.stream.fail(defect(error))
            if not job.stream.ended:
                self.jobs.append(job)
            return

    def _guard(self, rows: list[GenerationRow], work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            cause = error if isinstance(error, ServingError) else defect(error)
            for row in rows:
                row.stream.fail(cause)
            self.decoding.drop([row for row in self.decoding.rows if row in rows])
            if self._long is not None and self._long[0] in rows:
                self._long = None


def defect(error: Exception) -> Internal:
    """Our own failure, as a status; the cause travels along for the log."""
    wrapped = Internal(
        "the engine failed on this request", reason=reasons.DEFECT, remedy="report it with the request id"
    )
    wrapped.__cause__ = error
    return wrapped
