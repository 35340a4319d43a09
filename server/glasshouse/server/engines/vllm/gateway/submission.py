"""One request in vLLM: planned, admitted, sent, joined with what workers report of it, aborted when it is left."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from glasshouse.server.interventions.edits import PreparedIntervention
from glasshouse.server.readouts.prepared import PreparedReadout
from glasshouse.server.types.errors import FailedPrecondition, Internal, Unavailable
from glasshouse.server.types.interventions import InterventionReceipt
from glasshouse.wire import reasons

from ..contract import EXTRA_ARG, RequestPlan, cache_salt, pack_plan, plan_request, probes_of
from ..contract.watches import Steering
from .admission import EditSlots, Gate, Opened
from .channel import ReportChannel
from .join import Join, JoinSettings
from .probes import WorkerProbes
from .statistics import Statistics
from .vectors import Lease, WorkerVectors


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A request checked and planned. `plan` is None where no worker has anything to do for it."""

    plan: RequestPlan | None = None
    edits: tuple[PreparedIntervention, ...] = ()
    readouts: tuple[PreparedReadout, ...] = ()
    salt: str | None = None
    recompute_prompt: bool = False
    # Kept for as long as the request: see `gateway.vectors`.
    lease: Lease | None = None

    @property
    def extra(self) -> dict[str, bytes]:
        """What goes to the workers."""
        return {} if self.plan is None else {EXTRA_ARG: pack_plan(self.plan)}


class Submission:
    """Requests on their way through vLLM."""

    def __init__(
        self,
        *,
        gate: Gate,
        slots: EditSlots,
        statistics: Statistics,
        max_resident_vectors: int,
        unavailable: Callable[[], Unavailable],
    ) -> None:
        """`unavailable`: what to say when vLLM is gone."""
        self.gate, self.slots = gate, slots
        # From a dictionary's name to the key that workers hold it under.
        self.dictionary_keys: dict[str, str] = {}
        # Known once the workers are connected.
        self.join_settings: JoinSettings | None = None
        self._statistics, self._unavailable = statistics, unavailable
        self._llm: Any = None
        self._channel: ReportChannel | None = None
        self._probes = WorkerProbes(self.on_workers)
        self._vectors = WorkerVectors(self.on_workers, capacity=max_resident_vectors // 2)
        # Raised when a worker says that edits were not applied: keys and values under the old salt may be unedited.
        self._salt_epoch = 0
        self._n_requests = 0

    def connect(self, llm: Any, channel: ReportChannel) -> None:
        """Requests go to `llm` (an `AsyncLLM`) from now on, reports come by `channel`."""
        self._llm, self._channel = llm, channel

    def disconnect(self) -> None:
        """No reports are taken any more."""
        if self._channel is not None:
            self._channel.stop()

    async def on_workers(self, method: str, arguments: tuple[Any, ...] = ()) -> list[Any]:
        """Runs a method of ours on every worker; their answers.

        Raises:
            Unavailable: vLLM is gone.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            answers: list[Any] = await self._llm.collective_rpc(method, args=arguments)
        except EngineDeadError as error:
            raise self._unavailable() from error
        return answers

    async def prepared(
        self,
        prompt: Sequence[int],
        edits: tuple[PreparedIntervention, ...],
        readouts: tuple[PreparedReadout, ...],
        steering: Steering | None = None,
    ) -> Prepared:
        """A checked request, planned: what it names is with the workers. `steering`: of the monitors that may steer it."""
        if not edits and not readouts:
            return Prepared()
        assert self._channel is not None, "the engine has started"
        probes = probes_of(edits, readouts, steering)
        waiting = () if steering is None else [edit for own in steering.edits for edit in own]
        lease = await self._vectors.lease((*edits, *waiting))
        plan = plan_request(
            self._channel.new_tag(),
            len(prompt),
            edits,
            readouts,
            dictionary_keys=self.dictionary_keys,
            vector_keys=None if lease is None else lease.keys,
            probe_keys=await self._probes.keys(probes),
            steering=steering,
        )
        return Prepared(
            plan=plan,
            edits=edits,
            readouts=readouts,
            salt=cache_salt(
                edits,
                dictionary_keys=self.dictionary_keys,
                epoch=self._salt_epoch,
                steering=steering,
                watches=plan.watches,
            ),
            recompute_prompt=plan.reads_prompt,
            lease=lease,
        )

    @asynccontextmanager
    async def opened(self, prompt: Sequence[int], prepared: Prepared, params: Any) -> AsyncIterator[Opened]:
        """The request in vLLM; leaving aborts what is left of it."""
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        opened = Opened(gate=self.gate)
        self.gate.n_open += 1
        try:
            async with AsyncExitStack() as stack:
                await stack.enter_async_context(self.slots.held(prepared.plan))
                if prepared.plan is not None:
                    opened.join = self._join(stack, prepared, prepared.plan)
                self._n_requests += 1
                fed = tokens_input(list(prompt), cache_salt=prepared.salt)
                opened.outputs = await stack.enter_async_context(
                    aclosing(self._llm.generate(fed, params, str(self._n_requests)))
                )
                yield opened
        except EngineDeadError as error:
            raise self._unavailable() from error
        except EngineGenerateError as error:
            raise Internal(
                "the engine failed on this request",
                reason=reasons.DEFECT,
                remedy="report it with the request id",
            ) from error
        except FailedPrecondition as error:
            if error.reason == reasons.INTERVENTION_NOT_APPLIED:
                self._salt_epoch += 1
            raise
        finally:
            opened.close()

    def _join(self, stack: AsyncExitStack, prepared: Prepared, plan: RequestPlan) -> Join:
        assert self._channel is not None and self.join_settings is not None, "the engine has started"
        join = Join(
            plan,
            edits=prepared.edits,
            readouts=prepared.readouts,
            settings=self.join_settings,
            statistics=self._statistics,
            drain=self._channel.drain,
        )
        self._channel.open(join)
        stack.callback(self._channel.close, join)
        return join


async def fed(opened: Opened) -> Any:
    """Runs forward-only work; vLLM's only output."""
    outputs = [output async for output in opened.outputs]
    opened.started()
    if opened.join is not None:
        await opened.join.armed()
    if outputs[-1].outputs[0].finish_reason != "length":
        raise ended_early(outputs[-1].outputs[0].finish_reason)
    return outputs[-1]


async def receipt_of(opened: Opened, tokens: Sequence[int]) -> tuple[InterventionReceipt, ...]:
    """The receipt of forward-only work over `tokens`."""
    return () if opened.join is None else await opened.join.receipt(tokens, len(tokens))


def ended_early(reason: str | None) -> Internal:
    """vLLM ended what was not at its end."""
    return Internal(
        f"vLLM ended the request before its end: {reason}",
        reason=reasons.DEFECT,
        remedy="report it with the request id",
    )
