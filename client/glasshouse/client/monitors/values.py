"""What is known of monitors: plain frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, TypeAlias

Action: TypeAlias = Literal["observe", "flag", "steer", "abort"]
"""What a monitor does where its threshold is passed."""

Aggregation: TypeAlias = Literal["max", "mean", "exponential", "fraction_above"]
"""What a request's scores are made into, token by token."""

EventKind: TypeAlias = Literal["raised", "cleared", "drift", "drift_cleared"]
"""What happened."""

State: TypeAlias = Literal["running", "disabled", "failed", "unknown"]
"""Whether a monitor does its work on the server that was asked; "unknown" of a version that is not in force."""


@dataclass(frozen=True, kw_only=True)
class Webhook:
    """Where events are posted. `secret`: the name of a secret in the server's configuration, which events are signed
    with. `kinds`: empty for every kind.
    """

    url: str
    secret: str
    kinds: tuple[EventKind, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ScoreHistogram:
    """Bin i holds edges[i - 1] <= score < edges[i]; `counts` are one more than `edges`."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class DriftLimits:
    """When scores count as moved from the calibration set; None leaves the server's default."""

    max_population_stability_index: float | None = None
    max_ks_statistic: float | None = None
    half_life: float | None = None
    min_scores: int | None = None


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How far live scores have moved. A population stability index below 0.1 is steady by custom, above 0.25 moved."""

    population_stability_index: float
    ks_statistic: float
    ks_p_value: float
    live_scores: float
    drifted: bool


@dataclass(frozen=True, kw_only=True)
class MonitorCounts:
    """What a monitor has done on the server that was asked, since it came into force there."""

    requests: int = 0
    scores: int = 0
    scores_not_finite: int = 0
    raised: int = 0
    events_dropped: int = 0
    webhook_failures: int = 0


@dataclass(frozen=True, kw_only=True)
class MonitorInfo:
    """A monitor, as one server runs it. `scored`: the probe's resource name, or `DICTIONARY/FEATURE`; `positions`: "all",
    "prompt" or "generated".
    """

    resource_name: str
    version: int
    state: State
    state_reason: str
    action: Action
    scored: str
    label: str
    aggregation: Aggregation
    above: float
    clear_below: float
    min_tokens: int
    positions: str
    keys: tuple[str, ...]
    labels: Mapping[str, str]
    sampling_rate: float
    n_interventions: int
    webhook: Webhook | None
    include_text: bool
    description: str
    author: str
    created: datetime | None
    hook_points: tuple[str, ...]
    counts: MonitorCounts
    calibration: ScoreHistogram | None
    drift: Drift | None

    @property
    def name(self) -> str:
        """Its short name, without the version."""
        return self.resource_name.rpartition("/")[2].partition("@")[0]

    @property
    def enabled(self) -> bool:
        """Whether it is to watch."""
        return self.state != "disabled"


@dataclass(frozen=True, kw_only=True)
class MonitorEvent:
    """Something a monitor noticed. `position`, `score`, `aggregate` and `threshold` are None of drift, whose figures are
    in `drift`. `text` is empty unless the monitor asks for it and the request allowed it.
    """

    id: str
    monitor: str
    kind: EventKind
    action: Action
    time: datetime
    request_id: str = ""
    position: int | None = None
    score: float | None = None
    aggregate: float | None = None
    threshold: float | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    key: str = ""
    text: str = ""
    drift: Drift | None = None
    server: str = ""
