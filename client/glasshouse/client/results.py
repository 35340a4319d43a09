"""What calls return: frozen dataclasses over numpy arrays, no protobuf."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from glasshouse.client.arrays import Array, as_torch
from glasshouse.client.features import FeatureActivations, FeatureRows
from glasshouse.client.probe_readings import ProbeReading, ProbeReadings

NONE: Final[Mapping[str, Any]] = MappingProxyType({})
"""The mapping of what was not asked for."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """A served model. `name` is what `client.model(name)` takes; `eos_token_ids` end a generation."""

    name: str
    family: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    vocab_size: int
    context_length: int
    dtype: str
    device: str
    engine: str
    has_chat_template: bool
    eos_token_ids: list[int]
    bos_token_id: int | None
    capabilities: list[str]


@dataclass(frozen=True, kw_only=True)
class HookPointInfo:
    """A place in the forward pass.

    `width` is the elements a position, 0 for attention maps; `layer` is None outside the blocks; `n_heads` is
    0 where `width` is not per head; `note` says what the name means on this architecture, where that needs
    saying.
    """

    name: str
    module_path: str
    width: int
    readable: bool
    writable: bool
    layer: int | None = None
    n_heads: int = 0
    note: str = ""


@dataclass(frozen=True)
class Tokens:
    """Token ids and their strings, one each."""

    ids: list[int]
    strings: list[str]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as the model reads it."""

    text: str
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class TopTokens:
    """The likeliest tokens in descending order, with natural log-probabilities."""

    token_ids: list[int]
    logprobs: list[float]
    tokens: list[str]

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, kw_only=True)
class InterventionReceipt:
    """What was done for one intervention.

    `index` is its place in the request; `content_hash` is a SHA-256 over the edit, its tensors, its positions and its
    condition. Under a condition `positions_applied` were decided on and `positions_steered` edited; without one the two
    are equal. `resources`: the named directions and probes it used, with their versions.
    """

    index: int
    edit: str
    hook_point: str
    positions_applied: int
    hook_points: list[str]
    content_hash: str
    positions_steered: int = 0
    resources: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Abort:
    """What ended a generation before its time: `condition`, an index in its `abort_when`, or a `monitor`'s resource name.

    `score` passed `threshold` at `position`; the token which that position's forward pass predicted was not sent.
    """

    condition: int | None = None
    monitor: str = ""
    position: int
    score: float
    threshold: float


@dataclass(frozen=True, kw_only=True)
class MonitorFlag:
    """A monitor's aggregate `score` passed its `threshold` at `position`. `action`: "flag", "steer" or "abort"."""

    monitor: str
    position: int
    score: float
    threshold: float
    action: str


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a generation took; times count from the request's arrival at the server."""

    prompt_tokens: int
    generated_tokens: int
    queue_seconds: float
    time_to_first_token_seconds: float
    total_seconds: float


class _Arrays(Mapping[str, Array]):
    """Hook point -> array."""

    _arrays: Mapping[str, Array]

    def __getitem__(self, hook_point: str) -> Array:
        return self._arrays[hook_point]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def torch(self, hook_point: str) -> Any:
        """The array as a torch tensor of the same dtype. Raises ImportError where torch is not installed."""
        return as_torch(self[hook_point])


class Activations(_Arrays):
    """Hook point -> activations of one input: (n_pos, width), or (n_heads, n_pos, n_tokens) for attention
    maps.

    Row i belongs to `positions[i]`, an index into `token_ids` and `tokens`. float32, or the dtype asked for
    (bfloat16 as `ml_dtypes.bfloat16`).
    """

    def __init__(
        self,
        arrays: Mapping[str, Array],
        *,
        token_ids: list[int],
        tokens: list[str],
        positions: list[int],
        receipt: Sequence[InterventionReceipt] = (),
    ) -> None:
        self._arrays = arrays
        self.token_ids = token_ids
        self.tokens = tokens
        self.positions = positions
        self.receipt = list(receipt)

    def __repr__(self) -> str:
        arrays = ", ".join(f"{name}: {array.shape} {array.dtype}" for name, array in self.items())
        return f"Activations({arrays}; {len(self.token_ids)} tokens)"


@dataclass(frozen=True)
class Progress:
    """How far an extraction has come."""

    bytes_received: int
    inputs_done: int
    inputs_total: int


@dataclass(frozen=True)
class LensReadout:
    """A logit lens over a prompt: `top[i]` belongs to `positions[i]`."""

    positions: list[int]
    top: list[TopTokens]


class PromptReadouts(_Arrays):
    """What the readouts saw over a prompt.

    Hook point -> (n_pos, width), or (n_heads, n_pos, n_prompt) for attention maps. Row i of `[hook_point]`
    belongs to `positions[hook_point][i]`. `logit_lens` maps a hook point to its `LensReadout`, `features` a
    dictionary's short name to its `FeatureRows`, `probes` a probe's short name to its `ProbeReadings`.
    """

    def __init__(
        self,
        arrays: Mapping[str, Array],
        positions: Mapping[str, list[int]],
        logit_lens: Mapping[str, LensReadout],
        features: Mapping[str, FeatureRows] = NONE,
        probes: Mapping[str, ProbeReadings] = NONE,
    ) -> None:
        self._arrays = arrays
        self.positions = positions
        self.logit_lens = logit_lens
        self.features = features
        self.probes = probes

    def __repr__(self) -> str:
        arrays = ", ".join(f"{name}: {array.shape}" for name, array in self.items())
        return f"PromptReadouts({arrays}; {self._others()})"

    def _others(self) -> str:
        found = {"logit_lens": self.logit_lens, "features": self.features, "probes": self.probes}
        return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in found.items())


@dataclass(frozen=True, slots=True, repr=False)
class GeneratedToken:
    """A new token, and what was read at `position` - 1, the forward pass that predicted it.

    `text` is the text this token completes: empty while it may still be part of a stop string or of a
    character. `logprob` is natural, at temperature 1, before truncation. `activations` maps a hook point to
    (width,), or (n_heads, n_keys) for attention maps; `logit_lens` to its top tokens; `features` maps a
    dictionary's short name to its FeatureActivations, `probes` a probe's to its ProbeReading. `top_logprobs` is None
    unless asked for.
    """

    position: int
    token_id: int
    text: str
    logprob: float
    activations: Mapping[str, Array] = field(default_factory=lambda: NONE)
    features: Mapping[str, FeatureActivations] = field(default_factory=lambda: NONE)
    probes: Mapping[str, ProbeReading] = field(default_factory=lambda: NONE)
    top_logprobs: TopTokens | None = None
    logit_lens: Mapping[str, TopTokens] = field(default_factory=lambda: NONE)

    def __repr__(self) -> str:
        head = f"position={self.position}, token_id={self.token_id}, text={self.text!r}"
        return f"GeneratedToken({head}, logprob={self.logprob:.4f})"


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """A finished generation.

    `finish_reason` is "length", "stop_token", "stop_string" (then `stop_string` is the one found; the text
    ends before it) or "aborted" (then `abort` says by what). `seed` is the one used; `flags` are the monitors that
    passed their threshold.
    """

    text: str
    token_ids: list[int]
    tokens: list[GeneratedToken] = field(repr=False)
    finish_reason: str
    stop_string: str
    usage: Usage
    receipt: list[InterventionReceipt]
    seed: int
    prompt: list[int] = field(repr=False)
    prompt_readouts: PromptReadouts = field(repr=False)
    abort: Abort | None = None
    flags: list[MonitorFlag] = field(default_factory=list)


@dataclass(frozen=True)
class Score:
    """Teacher-forced log-probabilities of one sequence.

    logprobs: (n_pos,) float32, of the token at p given those before it; NaN at 0, which nothing predicts.
    `top` is empty unless asked for, else one entry a position, that of 0 empty.
    """

    token_ids: list[int]
    logprobs: NDArray[np.float32]
    top: list[TopTokens]
    tokens: list[str]
    receipt: list[InterventionReceipt]
