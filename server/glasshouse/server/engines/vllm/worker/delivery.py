"""What follows a forward pass: questions answered and the report sent, off the engine's thread where that takes long.

The next step need not wait for a large dictionary's product: the captured rows are this step's own, and the thread here
answers them while the engine samples, schedules and runs on. Reports keep their order. At most `MAX_PENDING` steps
wait: then the engine does, so what is read slows generation down rather than piling up.

On a CPU the thread takes a processor and the interpreter's lock from the model: 8 of 1,536 features of 32 rows take 0.6 ms
on the engine's thread, and 0.9 ms beside it, spread over 2.9 ms, with a longer step. So it is used for what takes longer.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from glasshouse.server.engines.vllm.contract.messages import READOUT_FAILED, Ran, RowBlock, StepError

from .answering import AnsweringContext, answer_rows
from .planning import Answer
from .reporter import Reporter
from .requests import Question

MAX_PENDING = 4
# The lens may run collectives, which every rank must begin in the same order: it is answered on the engine's thread.
_COLLECTIVE = "lens"
# Multiplications that a CPU does on the engine's thread, about a millisecond's. A GPU's answers wait for the GPU.
MOST_PRODUCTS = 1 << 26


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """A step's report, still to be made: `answers` with the questions they answer and the rows they need, by hook point.
    `rows`: whether this rank sends them, or only takes part in making them.
    """

    number: int
    armed: Sequence[int] = ()
    closed: Sequence[int] = ()
    errors: Sequence[StepError] = ()
    ran: Sequence[Ran] = ()
    blocks: Sequence[RowBlock] = ()
    answers: Sequence[tuple[Answer, Question]] = ()
    captured: Mapping[int, Tensor] = field(default_factory=dict)
    age: int = 0
    rows: bool = True

    @property
    def collective(self) -> bool:
        """Whether other ranks take part in answering it."""
        return any(question.kind == _COLLECTIVE for _, question in self.answers)

    def at_once(self, most_products: int) -> bool:
        """Whether it is worth no thread: at most so many multiplications."""
        return sum(len(answer.tags) * question.products for answer, question in self.answers) <= most_products


class Delivery:
    """Answers steps and reports them, in order."""

    def __init__(self, reporter: Reporter, context: AnsweringContext, device: torch.device) -> None:
        self._reporter = reporter
        self._context = context
        self._device = device
        self._most_products = MOST_PRODUCTS if device.type == "cpu" else 0
        self._queue: queue.Queue[tuple[Step, object] | None] = queue.Queue(MAX_PENDING)
        self._unfinished = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        # Tags whose readouts failed: the engine's thread stops working for them.
        self.failed: deque[int] = deque()
        self.n_failed = 0

    def deliver(self, step: Step) -> None:
        """Takes a step over. Raises nothing."""
        if step.collective:
            self.drain()
        if step.collective or (self._unfinished == 0 and step.at_once(self._most_products)):
            self._guarded(step)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="glasshouse-delivery", daemon=True)
            self._thread.start()
        with self._lock:
            self._unfinished += 1
        self._queue.put((step, _mark(self._device)))

    def drain(self) -> None:
        """Waits until all that was taken over is sent."""
        self._queue.join()

    def _run(self) -> None:
        with torch.inference_mode(), SideStream(self._device) as wait:
            while (item := self._queue.get()) is not None:
                step, mark = item
                wait(mark, step.captured)
                self._guarded(step)
                with self._lock:
                    self._unfinished -= 1
                self._queue.task_done()

    def _guarded(self, step: Step) -> None:
        try:
            self._send(step)
        except Exception as error:
            # The socket itself: nothing can be said over it. The gateway's join times out and names the request.
            self.n_failed += 1
            print(f"glasshouse: a report could not be sent: {said(error)}", flush=True)  # noqa: T201

    def _send(self, step: Step) -> None:
        blocks, errors = list(step.blocks), list(step.errors)
        for answer, question in step.answers:
            try:
                blocks.append(answer_rows(answer, question, step.captured, step.age, self._context))
            except Exception as error:
                self.n_failed += 1
                message = f"reading {question.kind} failed: {said(error)}"
                tags = sorted(set(answer.tags.tolist()))
                self.failed.extend(tags)
                errors += [StepError(tag=tag, reason=READOUT_FAILED, message=message) for tag in tags]
        dropped = self._reporter.report(
            step.number,
            armed=step.armed,
            closed=step.closed,
            errors=errors,
            ran=step.ran,
            blocks=blocks if step.rows else (),
        )
        self.failed.extend(dropped)


def said(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _mark(device: torch.device) -> object:
    """Where the device stands: what was captured is there once it has come so far."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


class SideStream:
    """A stream of the thread's own on a GPU; gives a function that waits for a mark. Nothing on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Callable[[object, Mapping[int, Tensor]], None]:
        stream = self._stream
        if stream is None:
            return lambda mark, captured: None
        torch.cuda.set_stream(stream)

        def wait(mark: object, captured: Mapping[int, Tensor]) -> None:
            assert isinstance(mark, torch.cuda.Event)
            stream.wait_event(mark)
            for tensor in captured.values():
                tensor.record_stream(stream)

        return wait

    def __exit__(self, *_: object) -> None:
        """The thread ends with its process."""
