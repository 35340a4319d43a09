"""Requests that an engine serves, and the events it answers with. Token ids throughout: engines see no text forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from .conditions import Abort, Condition, MonitorFlag
from .interventions import Intervention, InterventionReceipt
from .readouts import Array, PromptReadout, Readout, ReadoutValue, TopTokens, WireDType
from .selectors import EVERYWHERE, Selector


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen: `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep everything."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A generation. `prompt`: token ids, at least one."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int = 0
    interventions: tuple[Intervention, ...] = ()
    readouts: tuple[Readout, ...] = ()
    abort_when: tuple[Condition, ...] = ()
    request_id: str = ""


class FinishReason(Enum):
    """Why a generation ended."""

    LENGTH = "length"
    STOP_TOKEN = "stop_token"
    STOP_STRING = "stop_string"
    ABORTED = "aborted"


@dataclass(frozen=True, kw_only=True)
class Prefilled:
    """The prompt has been computed: the first event. Its readouts cover the prompt's selected positions."""

    readouts: tuple[PromptReadout, ...] = ()


@dataclass(frozen=True, kw_only=True)
class NewToken:
    """A new token. `position` is where it will be fed; `readouts` are those of `position` - 1."""

    position: int
    token_id: int
    text: str
    logprob: float
    top_logprobs: TopTokens | None = None
    readouts: Mapping[int, ReadoutValue] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a request took; seconds since arrival."""

    prompt_tokens: int
    generated_tokens: int
    queue_s: float
    time_to_first_token_s: float
    total_s: float


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The end: the last event."""

    reason: FinishReason
    stop_string: str = ""
    trailing_text: str = ""
    usage: Usage
    receipt: tuple[InterventionReceipt, ...] = ()
    seed: int = 0
    abort: Abort | None = None
    flags: tuple[MonitorFlag, ...] = ()


GenerationEvent = Prefilled | NewToken | Finished


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """Teacher-forced scoring of `tokens`, with the `top_k` likeliest alternatives at each position."""

    tokens: tuple[int, ...]
    interventions: tuple[Intervention, ...] = ()
    top_k: int = 0
    request_id: str = ""


@dataclass(frozen=True, kw_only=True)
class ScoreResult:
    """`logprobs` float32 (n_positions,), NaN at 0; `top` one entry a position from 1 on, empty when not asked."""

    logprobs: Array
    top: tuple[TopTokens, ...] = ()
    receipt: tuple[InterventionReceipt, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExtractionRequest:
    """Activations of `hook_points` over `inputs` (token ids), at `positions` of each."""

    inputs: tuple[tuple[int, ...], ...]
    hook_points: tuple[str, ...]
    positions: Selector = EVERYWHERE
    dtype: WireDType = "float32"
    interventions: tuple[Intervention, ...] = ()
    request_id: str = ""


@dataclass(frozen=True, kw_only=True)
class ExtractedInput:
    """One input done: `activations[i]` belongs to `hook_points[i]`: (n_positions, width), or (n_heads, n_positions,
    n_tokens) for attention maps, in the request's dtype.
    """

    index: int
    positions: tuple[int, ...]
    activations: tuple[Array, ...]
    receipt: tuple[InterventionReceipt, ...] = ()
