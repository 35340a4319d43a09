"""The vLLM engine: the interface of every engine around vLLM's asynchronous one.

1. `create` outlines the model without its weights: names, tokenizer and hook points are known before vLLM starts.
2. `start` starts vLLM with workers of ours (`worker`), which connect to the report channel and say which hook points they
   reach; then the dictionaries are loaded, measured here and held by every worker.
3. A request is checked exactly as the transformers engine checks it, made into a plan, and sent to vLLM with it. Its
   tokens come from vLLM, what was read and applied from the workers; `gateway.join` puts them together.
4. Leaving a request aborts it. A request that a worker fails is aborted and says why; vLLM goes on. When vLLM itself is
   gone, all that runs ends with Unavailable and so does what comes.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
import structlog
import torch

from glasshouse.server.attribution.twin import twin_of
from glasshouse.server.dictionaries.store import DictionaryStore, HeldDictionary
from glasshouse.server.engines import dictionaries as loading
from glasshouse.server.engines import watch_sources
from glasshouse.server.engines.concepts import Concepts, look_up
from glasshouse.server.engines.engine import Engine, EngineCounts, EngineStatus
from glasshouse.server.engines.preparation import Preparation
from glasshouse.server.engines.transcript import Ending, Transcript
from glasshouse.server.engines.watching import RequestWatch
from glasshouse.server.hooks.table import HookTable
from glasshouse.server.interventions.edits import PreparedIntervention
from glasshouse.server.models import head
from glasshouse.server.models.loaded import LoadedModel
from glasshouse.server.models.loading import load_model, outline_model
from glasshouse.server.models.revision import revision_of_model
from glasshouse.server.models.tokenizer import TextCodec
from glasshouse.server.readouts.prepared import PreparedReadout
from glasshouse.server.readouts.score_columns import ColumnSource
from glasshouse.server.types.conditions import FeatureColumn, ProbeColumn
from glasshouse.server.types.configuration import EngineSettings
from glasshouse.server.types.errors import (
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    ServingError,
    Unavailable,
)
from glasshouse.server.types.generation import (
    ExtractedInput,
    ExtractionRequest,
    GenerationEvent,
    GenerationRequest,
    ScoreRequest,
    ScoreResult,
)
from glasshouse.server.types.hook_points import HookPoint
from glasshouse.server.types.interventions import FloatArray, Intervention, InterventionReceipt
from glasshouse.server.types.models import ModelInfo
from glasshouse.server.types.readouts import Array, ReadoutValue, TopTokens
from glasshouse.wire import reasons

from .contract import (
    BootReport,
)
from .contract.settings import CONNECT, LOAD_DICTIONARY, SERVER_PROCESS
from .gateway import arguments, environment
from .gateway.admission import EditSlots, Gate
from .gateway.bulk import windowed
from .gateway.channel import ReportChannel
from .gateway.join import JoinSettings
from .gateway.looking import Looking
from .gateway.reach import with_reach
from .gateway.sampling import forward_params, generation_params, top_tokens
from .gateway.statistics import Statistics
from .gateway.submission import Submission, ended_early, fed, receipt_of
from .gateway.watching import WatchedRequest, check_steering

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
# Below this a model is computed on one thread: see the transformers engine.
_SMALL_PARAMETERS = 50_000_000
_SHUTDOWN_S = 3.0
NOTHING: Mapping[int, ReadoutValue] = {}


def create(settings: EngineSettings) -> VllmEngine:
    """The engine of `settings`, not yet started.

    Raises:
        ModuleNotFoundError: vLLM is not installed.
        FailedPrecondition: a release of it, or a model, that cannot be served.
        InvalidArgument: settings that cannot be.
    """
    version = environment.vllm_version()
    device = _device(settings)
    outlined = outline_model(
        settings.model,
        name=settings.name,
        dtype=settings.dtype,
        device=device,
        allow_remote_code=settings.allow_remote_code,
    )
    n_parameters = sum(parameter.numel() for parameter in outlined.model.parameters())
    threads = settings.threads or (1 if n_parameters < _SMALL_PARAMETERS else None)
    environment.prepare(threads=threads if device == "cpu" else None)
    return VllmEngine(outlined, settings, version)


def _device(settings: EngineSettings) -> str:
    """The kind of device that the installed vLLM was built for."""
    kind = "cpu" if environment.built_for_cpu() else "cuda"
    if settings.device not in ("auto", kind):
        raise FailedPrecondition(
            f"the installed vLLM runs on {kind}, not on {settings.device}",
            reason=reasons.MODEL_NOT_SUPPORTED,
            field="model.device",
            value=settings.device,
            remedy="leave --device out, or install the other build of vLLM; CUDA_VISIBLE_DEVICES chooses GPUs",
        )
    return kind


class VllmEngine(Engine):
    """vLLM's continuous batching, in processes of its own."""

    def __init__(self, outlined: LoadedModel, settings: EngineSettings, version: str) -> None:
        self._outlined, self._settings, self._version = outlined, settings, version
        self._limits = settings.limits
        self._info = ModelInfo(
            name=outlined.name,
            family=outlined.family.name,
            n_layers=outlined.n_layers,
            d_model=outlined.d_model,
            n_heads=outlined.n_heads,
            n_kv_heads=outlined.n_kv_heads,
            d_head=outlined.d_head,
            d_mlp=outlined.d_mlp,
            vocab_size=outlined.vocab_size,
            context_length=arguments.context_length(settings, outlined),
            dtype=str(outlined.dtype).removeprefix("torch."),
            device=str(outlined.device),
            engine="vllm",
            has_chat_template=outlined.tokenizer.has_chat_template,
            eos_token_ids=outlined.eos_token_ids,
            bos_token_id=outlined.bos_token_id,
            special_token_ids=outlined.special_token_ids,
            capabilities=CAPABILITIES,
            final_logit_softcap=outlined.family.final_logit_softcap,
            revision=revision_of_model(outlined),
        )
        self._dictionaries = DictionaryStore(self._limits.max_dictionary_bytes)
        self._generation = 0
        self._statistics = Statistics()
        self._vllm = Submission(
            gate=Gate(max_running=self._limits.max_running, max_queued=self._limits.max_queued),
            slots=EditSlots(max_edits=settings.vllm.max_edits, max_vectors=settings.vllm.max_vectors),
            statistics=self._statistics,
            max_resident_vectors=arguments.worker_settings(settings).max_resident_vectors,
            unavailable=self._unavailable,
        )
        self._reach(frozenset())
        self._llm: Any = None
        self._stopping = False
        self._failure = ""
        self._twin: LoadedModel | None = None
        self._twin_lock = threading.Lock()
        self._head_lock = threading.Lock()
        self._head_ready = False

    def _reach(self, sites: frozenset[str]) -> None:
        """Takes the hook points that the workers reach."""
        self._table = HookTable(with_reach(self._outlined, sites))
        self._preparation = Preparation(
            info=self._info,
            table=self._table,
            # Plans are made on the host; vectors go to the workers' device with them.
            device=torch.device("cpu"),
            dictionaries=self._dictionaries,
            max_readout_bytes=self._limits.max_readout_bytes,
        )

    # -- facts ---------------------------------------------------------------------------------------------------

    @property
    def info(self) -> ModelInfo:
        """Facts of the model."""
        return self._info

    @property
    def codec(self) -> TextCodec:
        """Its tokenizer."""
        return self._outlined.tokenizer

    @property
    def hook_points(self) -> Sequence[HookPoint]:
        """Its hook points; those that are not reached here can be neither read nor edited."""
        return self._table.points

    @property
    def dictionaries(self) -> DictionaryStore:
        """The dictionaries that requests may name."""
        return self._dictionaries

    def status(self) -> EngineStatus:
        """The engine now."""
        if self._llm is not None and self._llm.errored and not self._failure and not self._stopping:
            self._failure = "the vLLM engine has died; its log says why"
            _log.error("engine_failed", error=self._failure)
        return EngineStatus(
            running=self._vllm.gate.n_started,
            queued=self._vllm.gate.n_queued,
            healthy=self._llm is not None and not self._stopping and not self._failure,
            reason=self._failure,
            counts=EngineCounts(
                edit_slots=self._vllm.slots.edits_in_use,
                hooked_steps=self._statistics.hooked_steps,
                report_bytes=self._statistics.report_bytes,
                joins_late=self._statistics.joins_late,
                captures_failed=self._statistics.captures_failed,
            ),
        )

    @property
    def hooks_everything(self) -> bool:
        """Only some of the family's hook points are reached; see `Engine`."""
        return False

    @property
    def statistics(self) -> Statistics:
        """What it has counted."""
        return self._statistics

    # -- life ----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Starts vLLM, connects its workers, and loads the dictionaries it was made with."""
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        known = arguments.argument_names(AsyncEngineArgs)
        given = arguments.engine_arguments(self._settings, self._outlined, known)
        if self._report_host() is None:
            # Processes of other machines could not see this one.
            os.environ[SERVER_PROCESS] = str(os.getpid())
        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**given))
        channel = ReportChannel(host=self._report_host(), statistics=self._statistics)
        self._vllm.connect(self._llm, channel)
        answers = await self._vllm.on_workers(CONNECT, (channel.endpoint,))
        self._connected([BootReport.from_plain(answer) for answer in answers])
        warm_up = GenerationRequest(prompt=(self._info.bos_token_id or 0,), max_tokens=2)
        async for _ in self.generate(warm_up):
            pass
        sample = loading.Sample(self)
        for name, path in self._settings.dictionaries.items():
            await self._load_dictionary(name, path, sample)

    def _report_host(self) -> str | None:
        """Where workers on other machines reach this one; None where all are here."""
        if self._settings.vllm.distributed_executor != "ray":
            return None
        from vllm.utils.network_utils import get_ip

        host: str = get_ip()
        return host

    def _connected(self, boots: Sequence[BootReport]) -> None:
        refusals = {boot.refusal for boot in boots if not boot.hooks}
        if refusals:
            _log.warning("no_hook_points", why="; ".join(sorted(refusals)))
        reporters = {boot.rank: frozenset(boot.sites) for boot in boots if boot.reports and boot.hooks}
        self._reach(frozenset[str]().union(*reporters.values()))
        self._vllm.join_settings = JoinSettings(
            reporters=reporters,
            timeout_s=self._settings.vllm.join_timeout_s,
            max_rows=self._limits.max_buffered_events,
            max_bytes=self._limits.max_buffered_bytes + self._limits.max_readout_bytes,
            speculating=bool(self._settings.vllm.speculative),
        )
        first = boots[0]
        _log.info(
            "vllm_started",
            version=self._version,
            runner=first.runner,
            compiled=first.compiled,
            workers=len(boots),
            hook_points=sum(map(len, reporters.values())),
        )

    def token_contributions(self, directions: FloatArray) -> FloatArray:
        """Logit contributions of directions; see `Engine`. The head's weights are read from the checkpoint when they are
        first asked for.
        """
        with self._head_lock:
            if not self._head_ready:
                head.materialise_head(self._outlined)
                self._head_ready = True
        host: FloatArray = head.token_contributions(self._outlined, torch.from_numpy(directions)).numpy()
        return host

    def gradient_twin(self) -> LoadedModel:
        """The same checkpoint in this process, in float32 and with gradients; see `Engine`. Loaded by the first call."""
        with self._twin_lock:
            if self._twin is None:
                settings = self._settings
                loaded = load_model(
                    settings.model,
                    name=settings.name,
                    dtype="float32",
                    device="cpu",
                    allow_remote_code=settings.allow_remote_code,
                )
                self._twin = twin_of(loaded)
            return self._twin

    async def score_source(self, column: ProbeColumn | FeatureColumn, *, field: str) -> ColumnSource:
        """What scores a column; see `Engine`."""
        return await watch_sources.score_source(self._preparation, self.concepts, column, field=field)

    async def steering(
        self, interventions: Sequence[Intervention], *, field: str
    ) -> tuple[Intervention, ...]:
        """Edits that a watch may steer with; see `Engine`."""
        if interventions and self._vllm.join_settings is not None:
            check_steering(
                speculating=self._vllm.join_settings.speculating,
                n_stages=len(self._vllm.join_settings.reporters),
                field=field,
            )
        return await watch_sources.steering(self._preparation, self.concepts, interventions, field=field)

    async def load_dictionary(self, name: str, path: str) -> Sequence[HeldDictionary]:
        """Loads, fits and measures a dictionary (see `engines.dictionaries`), here and in every worker."""
        return await self._load_dictionary(name, path, loading.Sample(self))

    async def _load_dictionary(
        self, name: str, path: str, sample: loading.Sample
    ) -> Sequence[HeldDictionary]:
        held = await loading.load(self, self._table, name, path, sample)
        if any(not (item.detached or item.unreached) for item in held):
            self._generation += 1
            try:
                answers = await self._vllm.on_workers(LOAD_DICTIONARY, (name, path, self._generation))
            except Exception:
                for item in held:
                    self._dictionaries.remove(item.name)
                raise
            self._vllm.dictionary_keys |= dict(answers[0])
        return held

    async def stop(self) -> None:
        """Stops vLLM; what still runs ends with Unavailable."""
        self._stopping = True
        llm, self._llm = self._llm, None
        if llm is not None:
            from vllm.v1.engine.exceptions import EngineDeadError

            llm.output_processor.propagate_error(EngineDeadError())
            if llm.output_handler is not None:
                # It would take the end of its process for a failure.
                llm.output_handler.cancel()
            await asyncio.to_thread(llm.shutdown, _SHUTDOWN_S)
        self._vllm.disconnect()

    # -- requests ------------------------------------------------------------------------------------------------

    async def generate(
        self, request: GenerationRequest, watch: RequestWatch | None = None
    ) -> AsyncGenerator[Sequence[GenerationEvent], None]:
        """Events in batches; see `Engine`."""
        self._check_open()
        check, prompt = self._preparation, request.prompt
        check.check_tokens(prompt, max_tokens=request.max_tokens, field="input")
        self._vllm.gate.check()
        n_fed = len(prompt) + request.max_tokens - 1
        concepts = await look_up(self.concepts, request.interventions, request.readouts, request.abort_when)
        edits = check.edits(request.interventions, prompt=prompt, n_fed=n_fed, concepts=concepts)
        readouts = check.readouts(request.readouts, prompt=prompt, n_fed=n_fed, concepts=concepts)
        check.check_bytes(readouts, n_fed=n_fed, field="readouts")
        looking = Looking(
            check.abort_when(request.abort_when, prompt=prompt, n_fed=n_fed, concepts=concepts),
            None
            if watch is None
            else WatchedRequest(
                watch, prompt, n_fed, self._table, lambda some: check.edits(some, prompt=prompt, n_fed=n_fed)
            ),
        )
        events: list[GenerationEvent] = []
        transcript = Transcript(
            request,
            codec=self.codec,
            eos_token_ids=self._info.eos_token_ids,
            put=lambda event, _: events.append(event),
        )
        prepared = await self._vllm.prepared(prompt, edits, (*readouts, *looking.readouts), looking.steering)
        params = generation_params(
            request, sorted(transcript.end_tokens), prepared.extra, recompute_prompt=prepared.recompute_prompt
        )
        token_ids = list(prompt)
        ending: Ending | None = None
        async with self._vllm.opened(prompt, prepared, params) as opened:
            join = opened.join
            async for output in opened.outputs:
                if transcript.n_generated == 0:
                    opened.started()
                    transcript.started()
                    if join is not None:
                        await join.armed()
                    read_of_prompt = () if join is None else await join.prompt_readouts()
                    transcript.prefilled(looking.without_prompt(read_of_prompt))
                    abort = looking.over_prompt(read_of_prompt)
                    if abort is not None:
                        ending = transcript.aborted(abort)
                        break
                if join is not None:
                    join.check()
                completion = output.outputs[0]
                new = completion.token_ids
                if len(new) > self._limits.max_buffered_events:
                    raise _too_slow(len(new))
                for index, token in enumerate(new):
                    read = NOTHING
                    if join is not None and join.reads:
                        read = await join.before(len(token_ids), token_ids[-1])
                        if looking.looks and len(token_ids) > len(prompt):
                            abort = looking.at(len(token_ids) - 1, token_ids[-1], read)
                            if abort is not None:
                                ending = transcript.aborted(abort)
                                break
                        read = looking.without(read)
                    entry = completion.logprobs[index]
                    top = top_tokens(entry, request.top_logprobs) if request.top_logprobs else None
                    ending = transcript.push(token, entry[token].logprob, top, read)
                    token_ids.append(token)
                    if ending is not None:
                        break
                if ending is not None:
                    break
                if output.finished:
                    raise ended_early(completion.finish_reason)
                yield events
                events = []
            assert ending is not None, "vLLM's outputs end with the generation"
            # The last token is never fed; of a generation that was aborted it was not taken.
            n_fed = len(token_ids) - (ending.abort is None)
            receipt: tuple[InterventionReceipt, ...] = ()
            if join is not None:
                # The account comes once vLLM is done with the request, which it need not be yet.
                await opened.outputs.aclose()
                receipt = await join.receipt(token_ids, n_fed, looking.steered, looking.n_seen)
            transcript.finish(ending, receipt, flags=looking.flags)
            yield events

    async def score(self, request: ScoreRequest) -> ScoreResult:
        """Teacher-forced log-probabilities; see `Engine`."""
        self._check_open()
        check, tokens = self._preparation, request.tokens
        check.check_tokens(tokens, max_tokens=0, field="input")
        if not 0 <= request.top_k <= self._info.vocab_size:
            raise InvalidArgument(
                f"top_k {request.top_k} is not between 0 and the vocabulary size {self._info.vocab_size}",
                reason=reasons.VALUE_OUT_OF_RANGE,
                field="top_k",
                value=request.top_k,
                remedy="ask for fewer alternatives",
            )
        self._vllm.gate.check()
        concepts = await look_up(self.concepts, request.interventions)
        edits = check.edits(request.interventions, prompt=tokens, n_fed=len(tokens), concepts=concepts)
        prepared = await self._vllm.prepared(tokens, edits, ())
        params = forward_params(prepared.extra, prompt_logprobs=request.top_k, recompute_prompt=True)
        async with self._vllm.opened(tokens, prepared, params) as opened:
            output = await fed(opened)
            receipt = await receipt_of(opened, tokens)
        logprobs = np.full(len(tokens), np.nan, dtype=np.float32)
        top: list[TopTokens] = []
        for position in range(1, len(tokens)):
            entry = output.prompt_logprobs[position]
            logprobs[position] = entry[tokens[position]].logprob
            if request.top_k:
                top.append(top_tokens(entry, request.top_k))
        return ScoreResult(logprobs=logprobs, top=tuple(top), receipt=receipt)

    async def extract(self, request: ExtractionRequest) -> AsyncGenerator[ExtractedInput, None]:
        """Each input as it is done; see `Engine`."""
        self._check_open()
        self._vllm.gate.check()
        concepts = await look_up(self.concepts, request.interventions)
        # Thousands of inputs, each with its own checks: not on the event loop.
        checked = await asyncio.to_thread(
            lambda: [self._checked_input(request, index, concepts) for index in range(len(request.inputs))]
        )

        async def compute(index: int) -> ExtractedInput:
            tokens = request.inputs[index]
            prepared = await self._vllm.prepared(tokens, *checked[index])
            params = forward_params(prepared.extra, recompute_prompt=prepared.recompute_prompt)
            async with self._vllm.opened(tokens, prepared, params) as opened:
                await fed(opened)
                assert opened.join is not None, "an extraction reads something"
                read = await opened.join.prompt_readouts()
                receipt = await receipt_of(opened, tokens)
            arrays: list[Array] = [part.values for part in read if isinstance(part.values, np.ndarray)]
            return ExtractedInput(
                index=index, positions=read[0].positions, activations=tuple(arrays), receipt=receipt
            )

        async with aclosing(windowed([len(tokens) for tokens in request.inputs], compute)) as results:
            async for extracted in results:
                yield extracted

    def _checked_input(
        self, request: ExtractionRequest, index: int, concepts: Concepts
    ) -> tuple[tuple[PreparedIntervention, ...], tuple[PreparedReadout, ...]]:
        tokens, check = request.inputs[index], self._preparation
        check.check_tokens(tokens, max_tokens=0, field=f"inputs[{index}]")
        edits = check.edits(request.interventions, prompt=tokens, n_fed=len(tokens), concepts=concepts)
        readouts = check.extraction(request.hook_points, request.positions, request.dtype, prompt=tokens)
        check.check_bytes(readouts, n_fed=len(tokens), field="hook_points")
        return edits, readouts

    # -- one request in vLLM -------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        status = self.status()
        if not status.healthy:
            raise self._unavailable()

    def _unavailable(self) -> Unavailable:
        return Unavailable(
            self.status().reason or "the engine has stopped",
            reason=reasons.ENGINE_STOPPED,
            remedy="try again when the server is back",
            retry_after_s=5.0,
        )


def _too_slow(n_events: int) -> ServingError:
    return ResourceExhausted(
        f"the reader is {n_events} events behind",
        reason=reasons.SLOW_CONSUMER,
        remedy="read the stream faster, or ask for fewer readouts",
    )
