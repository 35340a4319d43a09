"""A scriptable engine without a model: deterministic, with the same manners as a real one.

Its vocabulary is the 256 bytes and, after them, BOS and EOS. Its text is what the bytes say, so what comes
out of a generation is known beforehand: the prompt's bytes again and again.
"""

from __future__ import annotations

import abc
import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np

from glasshouse.server.engines.engine import Engine, EngineStatus
from glasshouse.server.types.conditions import Abort, MonitorFlag
from glasshouse.server.types.errors import FailedPrecondition, NotFound, ResourceExhausted
from glasshouse.server.types.generation import (
    ExtractedInput,
    ExtractionRequest,
    Finished,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    NewToken,
    Prefilled,
    ScoreRequest,
    ScoreResult,
    Usage,
)
from glasshouse.server.types.hook_points import HookPoint
from glasshouse.server.types.interventions import Intervention, InterventionReceipt
from glasshouse.server.types.models import ModelInfo
from glasshouse.server.types.readouts import (
    FeatureActivations,
    FeatureRows,
    ProbeScoreRows,
    ProbeScores,
    PromptReadout,
    ReadActivations,
    ReadFeatures,
    Readout,
    ReadoutValue,
    ReadProbe,
    TopTokens,
)
from glasshouse.server.types.selectors import resolve
from glasshouse.wire import reasons

BOS, EOS = 256, 257
WIDTH, N_LAYERS, CONTEXT = 8, 2, 512


class FakeCodec:
    """Bytes are tokens. `calls` counts the token strings that were looked up."""

    vocab_size = 258
    has_chat_template = True

    def __init__(self) -> None:
        self.calls = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [BOS, *text.encode()] if add_special_tokens else list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        self.calls += len(ids)
        return [chr(i) if i < 128 else f"<{i}>" for i in ids]

    def render_chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        if not self.has_chat_template:
            raise FailedPrecondition("no chat template", reason=reasons.NO_CHAT_TEMPLATE, field="messages")
        turns = "".join(f"<{m['role']}>{m['content']}\n" for m in messages)
        return turns + ("<assistant>" if add_generation_prompt else "")


def playing_a_part(engine: type[Engine]) -> type[Engine]:
    """Lets a fake be made without what it does not play: those methods raise when they are called."""

    def missing(name: str) -> Any:
        def not_played(*arguments: Any, **options: Any) -> Any:
            raise NotImplementedError(f"the fake engine does not play {name}")

        return not_played

    for name in engine.__abstractmethods__:
        setattr(engine, name, missing(name))
    return abc.update_abstractmethods(engine)


@playing_a_part
class FakeEngine(Engine):
    """Generates the prompt's tokens in a circle, `step_s` apart, `burst` at a time.

    `fail_after`: raises `failure` after so many tokens. `width`: of its hook points. `abort` and `flags`: what its
    generations end with.
    """

    def __init__(self, name: str = "echo", *, step_s: float = 0.0, burst: int = 1) -> None:
        self.name = name
        self.step_s = step_s
        self.burst = burst
        self.max_running = 10_000
        self.fail_after = -1
        self.failure: Exception = RuntimeError("secret inside")
        self.healthy = True
        self.abort: Abort | None = None
        self.flags: tuple[MonitorFlag, ...] = ()
        self.width = WIDTH
        self.running = 0
        self.most_running = 0
        self.seen: list[GenerationRequest | ScoreRequest | ExtractionRequest] = []
        self.extracted: list[tuple[int, float]] = []
        self.stopped = False
        self._codec = FakeCodec()

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(
            name=self.name, family="fake", n_layers=N_LAYERS, d_model=self.width, n_heads=2, n_kv_heads=2,
            d_head=4, d_mlp=16, vocab_size=258, context_length=CONTEXT, dtype="float32", device="cpu",
            engine="fake", has_chat_template=True, eos_token_ids=(EOS,), bos_token_id=BOS,
            special_token_ids=frozenset({BOS, EOS}), capabilities=("generate", "score", "extract"),
        )  # fmt: skip

    @property
    def codec(self) -> FakeCodec:  # type: ignore[override]
        return self._codec

    @property
    def hook_points(self) -> Sequence[HookPoint]:
        return [
            HookPoint(
                name=f"blocks.{layer}.hook_resid_post", module_path=f"model.layers.{layer}", kind="residual",
                layer=layer, width=self.width, n_heads=0, d_head=0, readable=True, writable=True,
            )
            for layer in range(N_LAYERS)
        ]  # fmt: skip

    async def start(self) -> None:
        self.stopped = False

    async def stop(self) -> None:
        self.stopped = True

    def status(self) -> EngineStatus:
        return EngineStatus(running=self.running, queued=0, healthy=self.healthy, reason="fake")

    def _check(self, interventions: Sequence[Intervention], prompt: Sequence[int], n_fed: int) -> None:
        for index, intervention in enumerate(interventions):
            if intervention.hook_point:
                self._point(intervention.hook_point, f"interventions[{index}].hook_point")
            resolve(
                intervention.positions, prompt=prompt, n_fed=n_fed, bos_token_id=BOS,
                special_token_ids=frozenset({BOS, EOS}), field=f"interventions[{index}].positions",
            )  # fmt: skip

    def _point(self, name: str, field: str) -> None:
        names = [point.name for point in self.hook_points]
        if name not in names:
            raise NotFound(
                f"no hook point {name}", reason=reasons.HOOK_POINT_NOT_FOUND, resource_type="HookPoint",
                resource_name=name, closest=tuple(names), field=field, remedy="use one of the closest",
            )  # fmt: skip

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Sequence[GenerationEvent], None]:
        self.seen.append(request)
        prompt, arrival = request.prompt, perf_counter()
        self._check(request.interventions, prompt, len(prompt) + request.max_tokens - 1)
        if self.running >= self.max_running:
            raise ResourceExhausted("full", reason=reasons.QUEUE_FULL, remedy="wait", retry_after_s=0.25)
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            yield [Prefilled(readouts=tuple(self._prompt_readouts(request)))]
            made = 0
            while made < request.max_tokens:
                await asyncio.sleep(self.step_s)
                if made == self.fail_after:
                    raise self.failure
                n = min(self.burst, request.max_tokens - made)
                yield [self._token(request, made + i) for i in range(n)]
                made += n
            seconds = perf_counter() - arrival
            usage = Usage(
                prompt_tokens=len(prompt),
                generated_tokens=made,
                queue_s=0,
                time_to_first_token_s=seconds,
                total_s=seconds,
            )
            yield [
                Finished(
                    reason=FinishReason.LENGTH if self.abort is None else FinishReason.ABORTED,
                    usage=usage,
                    receipt=_receipt(request.interventions),
                    abort=self.abort,
                    flags=self.flags,
                )
            ]
        finally:
            self.running -= 1

    def _prompt_readouts(self, request: GenerationRequest) -> list[PromptReadout]:
        n = len(request.prompt)
        found: list[PromptReadout] = []
        for index, readout in enumerate(request.readouts):
            if isinstance(readout, ReadFeatures):
                k = readout.top_k or len(readout.features)
                rows = FeatureRows(
                    np.arange(n + 1, dtype=np.int64) * k,
                    np.arange(n * k, dtype=np.int32) % 50,
                    np.arange(n * k, dtype=np.float32),
                )
                found.append(PromptReadout(readout=index, positions=tuple(range(n)), values=rows))
                continue
            if isinstance(readout, ReadProbe):
                scores = np.arange(n * 2, dtype=np.float32).reshape(n, 2) / 100
                value = ProbeScoreRows(f"models/{self.name}/probes/p@2", ("sad", "happy"), scores)
                found.append(PromptReadout(readout=index, positions=tuple(range(n)), values=value))
                continue
            self._point(readout.hook_point, f"readouts[{index}].hook_point")
            if isinstance(readout, ReadActivations):
                values = np.arange(n * self.width, dtype=np.float32).reshape(n, self.width)
                found.append(PromptReadout(readout=index, positions=tuple(range(n)), values=values))
            else:
                tops = tuple(_top(readout.top_k) for _ in range(n))
                found.append(PromptReadout(readout=index, positions=tuple(range(n)), values=tops))
        return found

    def _token(self, request: GenerationRequest, made: int) -> NewToken:
        position = len(request.prompt) + made
        token = request.prompt[made % len(request.prompt)]
        return NewToken(
            position=position,
            token_id=token,
            text=self._codec.decode([token]),
            logprob=-0.5,
            top_logprobs=_top(request.top_logprobs) if request.top_logprobs else None,
            readouts={
                index: self._value(readout, position) for index, readout in enumerate(request.readouts)
            },
        )

    def _value(self, readout: Readout, position: int) -> ReadoutValue:
        match readout:
            case ReadActivations():
                return np.full(self.width, position - 1, np.float32)
            case ReadFeatures():
                return FeatureActivations(
                    np.array([7, 3], np.int32), np.array([2.0, position - 1], np.float32)
                )
            case ReadProbe():
                return ProbeScores(np.array([0.25, (position - 1) / 100], np.float32))
            case _:
                return _top(readout.top_k)

    async def score(self, request: ScoreRequest) -> ScoreResult:
        self.seen.append(request)
        self._check(request.interventions, request.tokens, len(request.tokens))
        logprobs = -np.arange(len(request.tokens), dtype=np.float32)
        logprobs[0] = np.nan
        tops = tuple(_top(request.top_k) for _ in request.tokens[1:]) if request.top_k else ()
        return ScoreResult(logprobs=logprobs, top=tops, receipt=_receipt(request.interventions))

    async def extract(self, request: ExtractionRequest) -> AsyncGenerator[ExtractedInput, None]:
        self.seen.append(request)
        for index, name in enumerate(request.hook_points):
            self._point(name, f"hook_points[{index}]")
        self.running += 1
        try:
            for index, tokens in enumerate(request.inputs):
                await asyncio.sleep(self.step_s)
                self.extracted.append((index, perf_counter()))
                n = len(tokens)
                yield ExtractedInput(
                    index=index,
                    positions=tuple(range(n)),
                    activations=tuple(
                        np.arange(n * self.width, dtype=np.float32).reshape(n, self.width) + 1000 * h
                        for h in range(len(request.hook_points))
                    ),
                    receipt=_receipt(request.interventions),
                )
        finally:
            self.running -= 1


def _top(k: int) -> TopTokens:
    return TopTokens(
        token_ids=np.arange(65, 65 + k, dtype=np.int32), logprobs=-np.arange(k, dtype=np.float32)
    )


def _receipt(interventions: Sequence[Intervention]) -> tuple[InterventionReceipt, ...]:
    return tuple(
        InterventionReceipt(
            index=index,
            edit=i.edit.kind,
            hook_points=(i.hook_point,),
            positions_applied=3,
            content_hash="0" * 64,
        )
        for index, i in enumerate(interventions)
    )
