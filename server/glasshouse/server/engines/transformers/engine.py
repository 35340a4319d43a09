"""The transformers engine: a thread that steps, and the interface around it.

Requests are checked on the caller's side of the queue, so a bad one never reaches the engine's thread. The thread owns
the model: nothing else runs it. Results leave through bounded streams (see `stream`).
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

import structlog
import torch

from glasshouse.server.attribution.twin import twin_of
from glasshouse.server.dictionaries.store import DictionaryStore, HeldDictionary
from glasshouse.server.engines import dictionaries, watch_sources
from glasshouse.server.engines.concepts import Concepts, look_up
from glasshouse.server.engines.engine import Engine, EngineStatus
from glasshouse.server.engines.preparation import Preparation
from glasshouse.server.engines.watching import RequestWatch, prepare_steering
from glasshouse.server.hooks.table import HookTable
from glasshouse.server.models import head
from glasshouse.server.models.loaded import LoadedModel
from glasshouse.server.models.revision import revision_of_model
from glasshouse.server.models.tokenizer import TextCodec
from glasshouse.server.readouts.score_columns import ColumnSource
from glasshouse.server.types.conditions import FeatureColumn, ProbeColumn
from glasshouse.server.types.errors import InvalidArgument, ResourceExhausted
from glasshouse.server.types.generation import (
    ExtractedInput,
    ExtractionRequest,
    GenerationEvent,
    GenerationRequest,
    ScoreRequest,
    ScoreResult,
)
from glasshouse.server.types.hook_points import HookPoint
from glasshouse.server.types.interventions import FloatArray, Intervention
from glasshouse.server.types.limits import Limits
from glasshouse.server.types.models import ModelInfo
from glasshouse.wire import reasons

from .bulk import AnyJob, BulkInput, ExtractionJob, ScoreJob
from .feed import Model, Prompt
from .row import GenerationRow
from .scheduler import Scheduler, SchedulerSettings
from .stream import EventStream, hand_over, unavailable

_log = structlog.get_logger(__name__)
CAPABILITIES = (
    "generate",
    "score",
    "extract",
    "intervene",
    "readout",
    "logit_lens",
    "features",
    "gradients",
    "probes",
    "conditions",
)
# Forward-only requests wait in a queue of their own.
_MAX_JOBS = 64
# Models below this decode on one thread.
_SMALL_PARAMETERS = 50_000_000
T = TypeVar("T")


def decode_threads(loaded: LoadedModel, threads: int | None) -> int | None:
    """Threads of a decoding step on a CPU. A small model's matrices are done before a second thread has begun, and threads
    that wait for one another take the cores that the server and its callers need.
    """
    if loaded.device.type != "cpu":
        return None
    n_parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    most = threads or torch.get_num_threads()
    return 1 if n_parameters < _SMALL_PARAMETERS else most


class TransformersEngine(Engine):
    """Continuous batching over a Hugging Face model in this process."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        limits: Limits,
        threads: int | None = None,
        steps: SchedulerSettings | None = None,
        preload: Mapping[str, str] | None = None,
    ) -> None:
        self._loaded = loaded
        self._limits = limits
        self._preload = dict(preload or {})
        self._table = HookTable(loaded)
        self._info = ModelInfo(
            name=loaded.name,
            family=loaded.family.name,
            n_layers=loaded.n_layers,
            d_model=loaded.d_model,
            n_heads=loaded.n_heads,
            n_kv_heads=loaded.n_kv_heads,
            d_head=loaded.d_head,
            d_mlp=loaded.d_mlp,
            vocab_size=loaded.vocab_size,
            context_length=loaded.context_length,
            dtype=str(loaded.dtype).removeprefix("torch."),
            device=str(loaded.device),
            engine="transformers",
            has_chat_template=loaded.tokenizer.has_chat_template,
            eos_token_ids=loaded.eos_token_ids,
            bos_token_id=loaded.bos_token_id,
            special_token_ids=loaded.special_token_ids,
            capabilities=CAPABILITIES,
            final_logit_softcap=loaded.family.final_logit_softcap,
            revision=revision_of_model(loaded),
        )
        self._dictionaries = DictionaryStore(limits.max_dictionary_bytes)
        self._preparation = Preparation(
            info=self._info,
            table=self._table,
            device=loaded.device,
            dictionaries=self._dictionaries,
            max_readout_bytes=limits.max_readout_bytes,
        )
        self._model = Model(loaded, self._table)
        position_bytes = 2 * loaded.n_layers * loaded.n_kv_heads * loaded.d_head * loaded.dtype.itemsize
        self._settings = replace(
            steps or SchedulerSettings(),
            max_running=limits.max_running,
            max_cached_positions=limits.max_cache_bytes // position_bytes,
            max_backlog_bytes=limits.max_buffered_bytes // 2,
            decode_threads=decode_threads(loaded, threads),
            prompt_threads=threads or (torch.get_num_threads() if loaded.device.type == "cpu" else None),
        )
        self._scheduler = Scheduler(self._model, self._settings)
        self._inbox: deque[GenerationRow | AnyJob] = deque()
        self._wake = threading.Condition()
        self._signalled = False
        self._stopping = False
        self._failure = ""
        self._streams: list[EventStream[Any]] = []
        self._thread: threading.Thread | None = None
        self._twin: LoadedModel | None = None
        self._twin_lock = threading.Lock()

    # -- facts ---------------------------------------------------------------------------------------------------

    @property
    def info(self) -> ModelInfo:
        """Facts of the model."""
        return self._info

    @property
    def codec(self) -> TextCodec:
        """Its tokenizer."""
        return self._loaded.tokenizer

    @property
    def hook_points(self) -> Sequence[HookPoint]:
        """Its hook points."""
        return self._table.points

    def hook_point(self, name: str, *, field: str = "hook_point") -> HookPoint:
        """The hook point that `name` means; says too which layers there are and what other architectures have."""
        return self._table.resolve(name, field=field)

    @property
    def dictionaries(self) -> DictionaryStore:
        """The dictionaries that requests may name."""
        return self._dictionaries

    def status(self) -> EngineStatus:
        """The engine now; counts are of the last step."""
        healthy = self._thread is not None and self._thread.is_alive() and not self._failure
        queued = len(self._scheduler.waiting) + sum(
            isinstance(item, GenerationRow) for item in tuple(self._inbox)
        )
        return EngineStatus(
            running=self._scheduler.n_running, queued=queued, healthy=healthy, reason=self._failure
        )

    # -- life ----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Starts the thread, warms the model up, and loads the dictionaries it was made with."""
        self._thread = threading.Thread(target=self._run, name="glasshouse-engine", daemon=True)
        self._thread.start()
        warm_up = GenerationRequest(prompt=(self._info.bos_token_id or 0,), max_tokens=2)
        async for _ in self.generate(warm_up):
            pass
        sample = dictionaries.Sample(self)
        for name, path in self._preload.items():
            await dictionaries.load(self, self._table, name, path, sample)

    def token_contributions(self, directions: FloatArray) -> FloatArray:
        """Logit contributions of directions; see `Engine`. Reads weights only, so any thread may call it."""
        host: FloatArray = head.token_contributions(self._loaded, torch.from_numpy(directions)).numpy()
        return host

    def gradient_twin(self) -> LoadedModel:
        """The model for passes with gradients; see `Engine`."""
        with self._twin_lock:
            if self._twin is None:
                self._twin = twin_of(self._loaded)
            return self._twin

    async def load_dictionary(self, name: str, path: str) -> Sequence[HeldDictionary]:
        """Loads, fits and measures a dictionary; see `engines.dictionaries`."""
        return await dictionaries.load(self, self._table, name, path)

    async def stop(self) -> None:
        """Stops the thread; what still runs ends with Unavailable."""
        self._stopping = True
        self._signal()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    async def score_source(self, column: ProbeColumn | FeatureColumn, *, field: str) -> ColumnSource:
        """What scores a column; see `Engine`."""
        return await watch_sources.score_source(self._preparation, self.concepts, column, field=field)

    async def steering(
        self, interventions: Sequence[Intervention], *, field: str
    ) -> tuple[Intervention, ...]:
        """Edits that a watch may steer with; see `Engine`."""
        return await watch_sources.steering(self._preparation, self.concepts, interventions, field=field)

    # -- requests ------------------------------------------------------------------------------------------------

    async def generate(
        self, request: GenerationRequest, watch: RequestWatch | None = None
    ) -> AsyncGenerator[Sequence[GenerationEvent], None]:
        """Events in batches; see `Engine`."""
        self._preparation.check_tokens(request.prompt, max_tokens=request.max_tokens, field="input")
        self._admit(queued=self.status().queued, most=self._limits.max_queued)
        n_fed = len(request.prompt) + request.max_tokens - 1
        self._check_cache(n_fed)
        concepts = await look_up(self.concepts, request.interventions, request.readouts, request.abort_when)
        prompt, check = request.prompt, self._preparation
        edits = check.edits(request.interventions, prompt=prompt, n_fed=n_fed, concepts=concepts)
        readouts = check.readouts(request.readouts, prompt=prompt, n_fed=n_fed, concepts=concepts)
        check.check_bytes(readouts, n_fed=n_fed, field="readouts")
        abort_when = check.abort_when(request.abort_when, prompt=prompt, n_fed=n_fed, concepts=concepts)
        if watch is not None:
            prepare_steering(watch, lambda some: check.edits(some, prompt=prompt, n_fed=n_fed))
        stream: EventStream[GenerationEvent] = self._stream()
        row = GenerationRow(
            request,
            edits=edits,
            readouts=readouts,
            codec=self.codec,
            eos_token_ids=self._info.eos_token_ids,
            stream=stream,
            watch=watch,
            abort_when=abort_when,
        )
        async with aclosing(self._submit(row, stream)) as batches:
            async for batch in batches:
                yield batch

    async def score(self, request: ScoreRequest) -> ScoreResult:
        """Teacher-forced log-probabilities; see `Engine`."""
        self._preparation.check_tokens(request.tokens, max_tokens=0, field="input")
        if not 0 <= request.top_k <= self._info.vocab_size:
            raise InvalidArgument(
                f"top_k {request.top_k} is not between 0 and the vocabulary size {self._info.vocab_size}",
                reason=reasons.VALUE_OUT_OF_RANGE,
                field="top_k",
                value=request.top_k,
                remedy="ask for fewer alternatives",
            )
        self._admit(queued=len(self._scheduler.jobs), most=_MAX_JOBS)
        edits = self._preparation.edits(
            request.interventions,
            prompt=request.tokens,
            n_fed=len(request.tokens),
            concepts=await look_up(self.concepts, request.interventions),
        )
        stream: EventStream[ScoreResult] = self._stream()
        item = BulkInput(index=0, prompt=Prompt(tokens=request.tokens, edits=edits, readouts=()))
        job = ScoreJob(self._model, item, request.top_k, stream)
        async with aclosing(self._submit(job, stream)) as batches:
            results = [result async for batch in batches for result in batch]
        return results[0]

    async def extract(self, request: ExtractionRequest) -> AsyncGenerator[ExtractedInput, None]:
        """Each input as it is done; see `Engine`."""
        self._admit(queued=len(self._scheduler.jobs), most=_MAX_JOBS)
        concepts = await look_up(self.concepts, request.interventions)
        # Thousands of inputs, each with its own checks: not on the event loop.
        inputs = await asyncio.to_thread(
            lambda: [self._bulk_input(request, index, concepts) for index in range(len(request.inputs))]
        )
        stream: EventStream[ExtractedInput] = self._stream()
        job = ExtractionJob(self._model, inputs, stream)
        async with aclosing(self._submit(job, stream)) as batches:
            async for batch in batches:
                for extracted in batch:
                    yield extracted

    def _bulk_input(self, request: ExtractionRequest, index: int, concepts: Concepts) -> BulkInput:
        tokens, check = request.inputs[index], self._preparation
        check.check_tokens(tokens, max_tokens=0, field=f"inputs[{index}]")
        edits = check.edits(request.interventions, prompt=tokens, n_fed=len(tokens), concepts=concepts)
        readouts = check.extraction(request.hook_points, request.positions, request.dtype, prompt=tokens)
        check.check_bytes(readouts, n_fed=len(tokens), field="hook_points")
        return BulkInput(index=index, prompt=Prompt(tokens=tokens, edits=edits, readouts=readouts))

    def _admit(self, *, queued: int, most: int) -> None:
        if self._stopping or self._failure:
            raise unavailable(self._failure or "the engine has stopped")
        if queued >= most:
            raise ResourceExhausted(
                f"{queued} requests wait already, {most} may",
                reason=reasons.QUEUE_FULL,
                value=queued,
                remedy="try again in a moment",
                retry_after_s=1.0,
            )

    def _check_cache(self, n_fed: int) -> None:
        if n_fed > self._settings.max_cached_positions:
            raise ResourceExhausted(
                f"{n_fed} positions are more than the cache holds, {self._settings.max_cached_positions}",
                reason=reasons.MEMORY_BUDGET,
                field="max_tokens",
                value=n_fed,
                remedy="ask for fewer tokens; the operator sets limits.max_cache_bytes",
            )

    def _stream(self) -> EventStream[Any]:
        return EventStream(
            max_events=self._limits.max_buffered_events,
            max_bytes=self._limits.max_buffered_bytes + self._limits.max_readout_bytes,
            wake_engine=self._signal,
        )

    async def _submit(
        self, item: GenerationRow | AnyJob, stream: EventStream[T]
    ) -> AsyncGenerator[Sequence[T], None]:
        self._inbox.append(item)
        self._signal()
        async with aclosing(stream.batches()) as batches:
            async for batch in batches:
                yield batch

    # -- the engine's thread -------------------------------------------------------------------------------------

    def _signal(self) -> None:
        with self._wake:
            self._signalled = True
            self._wake.notify()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._take_inbox()
                if self._scheduler.idle:
                    with self._wake:
                        self._wake.wait_for(lambda: self._signalled)
                        self._signalled = False
                    continue
                self._scheduler.step()
                self._hand_over()
            reason = "the engine was stopped"
        except BaseException as error:
            _log.exception("engine_failed", error=str(error))
            reason = self._failure = "the engine failed and has stopped"
        self._take_inbox()
        self._scheduler.fail_all(unavailable(reason))
        self._hand_over()

    def _take_inbox(self) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            self._streams.append(item.stream)
            if isinstance(item, GenerationRow):
                self._scheduler.waiting.append(item)
            else:
                self._scheduler.jobs.append(item)

    def _hand_over(self) -> None:
        over = hand_over(self._streams)
        if over:
            self._streams = [stream for stream in self._streams if stream not in over]
