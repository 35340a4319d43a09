"""What every attribution call needs: the models, the bounds, the lanes that compute, and the store of results."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Generic, TypeVar

from glasshouse.server.attribution.gradient_model import GradientModel
from glasshouse.server.attribution.transcoders import Transcoders
from glasshouse.server.dictionaries.store import HeldDictionary
from glasshouse.server.operations.attribution import budget
from glasshouse.server.operations.attribution.budget import Estimate
from glasshouse.server.operations.attribution.costs import Costs
from glasshouse.server.operations.attribution.lanes import Lanes, Ticket
from glasshouse.server.operations.attribution.results import ResultStore
from glasshouse.server.operations.manager import OperationManager
from glasshouse.server.types.configuration import AttributionSettings
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.server.types.limits import Limits
from glasshouse.v1 import attribution_pb2 as pb
from glasshouse.wire import reasons

from ..call import Call
from ..catalogue import Catalogue, ServedModel
from ..inputs import InputReader
from .answers import naming

T = TypeVar("T")

# Progress is told at most so often.
_PROGRESS_S = 0.1


# Requests with a clean and a corrupt input.
Pair = (
    pb.PatchSweepRequest
    | pb.MediateEffectRequest
    | pb.PathPatchRequest
    | pb.AttributionPatchRequest
    | pb.DiscoverCircuitRequest
)


@dataclass(frozen=True)
class Done(Generic[T]):
    """The end of work that told its progress."""

    result: T


@dataclass(frozen=True, kw_only=True)
class Office:
    """Shared by the parts of the servicer."""

    catalogue: Catalogue
    limits: Limits
    settings: AttributionSettings
    operations: OperationManager
    lanes: Lanes
    results: ResultStore
    costs: Costs

    async def run(self, model: ServedModel, work: Callable[[GradientModel, Ticket], T]) -> T:
        """Computes in the lane of calls."""
        return await self.lanes.calls.run(lambda ticket: self._on_twin(model, work, ticket))

    def iterate(
        self, model: ServedModel, work: Callable[[GradientModel, Ticket], Iterator[T]]
    ) -> AsyncGenerator[T, None]:
        """Computes in the lane of calls, item by item."""
        return self.lanes.calls.iterate(lambda ticket: self._on_twin(model, work, ticket))

    async def progressing(
        self, model: ServedModel, work: Callable[[GradientModel, Ticket], T]
    ) -> AsyncGenerator[pb.AttributionProgress | Done[T], None]:
        """Computes in the lane of calls: progress now and then, the result last."""
        loop = asyncio.get_running_loop()
        told: asyncio.Queue[tuple[int, int] | None] = asyncio.Queue()
        ticket = Ticket(lambda done, total: _tell(loop, told, (done, total)))
        task = asyncio.create_task(
            self.lanes.calls.run(lambda ticket: self._on_twin(model, work, ticket), ticket)
        )
        task.add_done_callback(lambda _: told.put_nowait(None))
        due = monotonic() + _PROGRESS_S
        try:
            while (heard := await told.get()) is not None:
                if monotonic() >= due:
                    due = monotonic() + _PROGRESS_S
                    yield pb.AttributionProgress(done=heard[0], total=heard[1])
            yield Done(await task)
        finally:
            task.cancel()

    def _on_twin(self, model: ServedModel, work: Callable[[GradientModel, Ticket], T], ticket: Ticket) -> T:
        ticket.beside(model.engine)
        return work(self.lanes.twins.of(model.engine), ticket)

    async def affordable(
        self,
        model: ServedModel,
        *,
        n_rows: int,
        n_tokens: int,
        gradients: bool,
        at_once: int = 1,
        operation: bool = False,
    ) -> None:
        """Refuses work that would take too long or too much, with the numbers: `n_rows` passes, `at_once` of them together.
        A stream of results may take as long as an `operation`.
        """

        def estimate(twin: GradientModel, ticket: Ticket) -> Estimate:
            return self.costs.estimate(
                twin, n_rows=n_rows, n_tokens=n_tokens, gradients=gradients, at_once=at_once
            )

        most = None if operation else self.settings.max_call_seconds
        budget.check(await self.run(model, estimate), self.settings, seconds=most)

    async def check_transcoders(
        self, model: ServedModel, chosen: Sequence[HeldDictionary], field: str
    ) -> None:
        """Refuses dictionaries that cannot stand in for the model's MLPs together."""

        def check(twin: GradientModel, ticket: Ticket) -> None:
            with naming(field):
                Transcoders(twin, [item.dictionary for item in chosen])

        await self.run(model, check)

    def reader(self, model: ServedModel) -> InputReader:
        """What turns inputs into tokens of a model."""
        return InputReader(model, self.limits)

    async def pair(
        self, model: ServedModel, request: Pair, call: Call
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The clean and the corrupt input, of equal length."""
        reader = self.reader(model)
        clean = await reader.prompt(request.clean, request.HasField("clean"), "clean")
        corrupt = await reader.prompt(request.corrupt, request.HasField("corrupt"), "corrupt")
        same_length(clean, corrupt, "corrupt")
        call.accepted(len(clean) + len(corrupt), ())
        return clean, corrupt


def same_length(clean: Sequence[int], other: Sequence[int], field: str) -> None:
    """Refuses an input whose positions do not correspond."""
    if len(clean) != len(other):
        raise InvalidArgument(
            f"the inputs have {len(clean)} and {len(other)} tokens; they are compared position by position",
            reason=reasons.VALUE_OUT_OF_RANGE,
            field=field,
            value=len(other),
            remedy=f"give an input of {len(clean)} tokens; Tokenize shows them",
            metadata={"clean_tokens": str(len(clean)), "other_tokens": str(len(other))},
        )


def _tell(loop: asyncio.AbstractEventLoop, told: asyncio.Queue[T], what: T) -> None:
    loop.call_soon_threadsafe(told.put_nowait, what)
