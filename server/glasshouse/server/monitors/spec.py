"""What a monitor is, checked as far as that goes without a model."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from glasshouse.server.probes.aggregation import Aggregation, Rule
from glasshouse.server.probes.drift import ScoreHistogram
from glasshouse.server.types.conditions import FeatureColumn, MonitorAction, ProbeColumn
from glasshouse.server.types.errors import InvalidArgument
from glasshouse.server.types.interventions import Intervention
from glasshouse.server.types.selectors import NamedPositions, Selector
from glasshouse.wire import reasons

MAX_KEYS = 100
MAX_LABELS = 16
MAX_LABEL_BYTES = 256
MAX_DESCRIPTION = 1000
MAX_INTERVENTIONS = 16
_LABEL = re.compile(r"[A-Za-z0-9._-]{1,64}")

# Special tokens are left out: activations at the first position are unlike any other.
WATCHED_POSITIONS = Selector(named=NamedPositions.ALL, exclude_special=True)


class EventKind(Enum):
    """What happened; the value is the name in the registry's log."""

    RAISED = "raised"
    CLEARED = "cleared"
    DRIFT = "drift"
    DRIFT_CLEARED = "drift_cleared"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A request, as monitors know it. `key`: whom the caller's key belongs to; `tell_text`: whether its text may be in an
    event.
    """

    request_id: str
    key: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    tell_text: bool = False


@dataclass(frozen=True, kw_only=True)
class MonitorFilter:
    """Which requests are watched: all of what is given must hold."""

    keys: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    sampling_rate: float = 1.0

    def chooses(self, subject: Subject, monitor: str) -> bool:
        """Whether `monitor` (its name, without a version) watches the request."""
        if self.keys and subject.key not in self.keys:
            return False
        if any(subject.labels.get(name) != value for name, value in self.labels.items()):
            return False
        return self.sampling_rate >= 1.0 or sampled(subject.request_id, monitor) < self.sampling_rate


def sampled(request_id: str, monitor: str) -> float:
    """A number in [0, 1), uniform over requests, the same for the same request and monitor on every server."""
    digest = hashlib.blake2b(f"{monitor}\0{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


@dataclass(frozen=True, kw_only=True)
class DriftSpec:
    """When scores count as moved from `calibration`. `half_life` and `min_scores` in scores."""

    calibration: ScoreHistogram
    max_population_stability_index: float = 0.25
    max_ks_statistic: float = 0.2
    half_life: float = 20_000.0
    min_scores: int = 1000


@dataclass(frozen=True, kw_only=True)
class WebhookSpec:
    """Where events are sent. `secret`: the name of a secret of the server's; `kinds`: empty for every kind."""

    url: str
    secret: str
    kinds: tuple[EventKind, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class MonitorSpec:
    """A monitor. Its source's names carry versions once it is published."""

    source: ProbeColumn | FeatureColumn
    rule: Rule
    positions: Selector = WATCHED_POSITIONS
    filter: MonitorFilter = MonitorFilter()
    action: MonitorAction = MonitorAction.OBSERVE
    interventions: tuple[Intervention, ...] = ()
    steer_while_on: bool = False
    drift: DriftSpec | None = None
    webhook: WebhookSpec | None = None
    include_text: bool = False
    enabled: bool = True
    description: str = ""

    @property
    def on_prompt(self) -> bool:
        """Whether the prompt's positions are scored."""
        return self.positions.named in (NamedPositions.ALL, NamedPositions.PROMPT)

    @property
    def on_generated(self) -> bool:
        """Whether generated positions are scored."""
        return self.positions.named in (NamedPositions.ALL, NamedPositions.GENERATED)

    def check(self, field: str = "spec") -> MonitorSpec:
        """Returns itself; raises `InvalidArgument` for what no monitor can be."""
        self.rule.check(f"{field}.threshold")
        self._check_threshold(field)
        self._check_positions(f"{field}.positions", self.positions)
        self._check_filter(f"{field}.filter")
        self._check_steering(field)
        if self.drift is not None:
            _check_drift(self.drift, f"{field}.drift")
        if len(self.description) > MAX_DESCRIPTION:
            raise _out_of_range(
                f"{field}.description", f"{len(self.description)} characters", f"at most {MAX_DESCRIPTION}"
            )
        return self

    def _check_threshold(self, field: str) -> None:
        rule = self.rule
        share = rule.aggregation is Aggregation.FRACTION_ABOVE
        probability = isinstance(self.source, ProbeColumn) and self.source.output.value == "score"
        if (share or probability) and not 0.0 <= rule.on_above < 1.0:
            raise _out_of_range(
                f"{field}.threshold.on_above",
                rule.on_above,
                "in [0, 1): nothing goes above anything else here",
            )

    def _check_positions(self, field: str, positions: Selector) -> None:
        if positions.named is None or positions.named is NamedPositions.LAST:
            raise _out_of_range(
                field, "these positions", "all, prompt or generated: a monitor sees requests of every length"
            )

    def _check_filter(self, field: str) -> None:
        chosen = self.filter
        if len(chosen.keys) > MAX_KEYS:
            raise _out_of_range(f"{field}.keys", f"a list of {len(chosen.keys)}", f"at most {MAX_KEYS} keys")
        check_labels(chosen.labels, f"{field}.labels")
        if not 0.0 < chosen.sampling_rate <= 1.0:
            raise _out_of_range(f"{field}.sampling_rate", chosen.sampling_rate, "above 0 and at most 1")

    def _check_steering(self, field: str) -> None:
        path = f"{field}.interventions"
        if self.action is not MonitorAction.STEER:
            if self.interventions or self.steer_while_on:
                raise InvalidArgument(
                    f"{path} are for the action steer, this is {self.action.value}",
                    reason=reasons.FIELD_CONFLICT,
                    field=path if self.interventions else f"{field}.steer_while_on",
                    value=self.action.value,
                    remedy="set the action, or leave them out",
                )
            return
        if not 1 <= len(self.interventions) <= MAX_INTERVENTIONS:
            raise _out_of_range(
                path, f"a list of {len(self.interventions)}", f"1 to {MAX_INTERVENTIONS} edits"
            )
        for index, intervention in enumerate(self.interventions):
            where = f"{path}[{index}]"
            self._check_positions(f"{where}.positions", intervention.positions)
            if intervention.condition is not None:
                raise InvalidArgument(
                    "a monitor's edits are under its own threshold, they take no condition",
                    reason=reasons.FIELD_CONFLICT,
                    field=f"{where}.condition",
                    remedy="leave it out",
                )


def check_labels(labels: Mapping[str, str], field: str) -> None:
    """Raises `InvalidArgument` for labels that a request cannot carry."""
    if len(labels) > MAX_LABELS:
        raise _out_of_range(field, f"{len(labels)} labels", f"at most {MAX_LABELS}")
    for name, value in labels.items():
        if not _LABEL.fullmatch(name):
            raise _out_of_range(
                field, f"the label {name[:80]!r}", "1 to 64 letters, digits, '.', '_' and '-'"
            )
        if len(value.encode()) > MAX_LABEL_BYTES:
            raise _out_of_range(
                f"{field}.{name}",
                f"a value of {len(value.encode())} bytes",
                f"at most {MAX_LABEL_BYTES} bytes",
            )


def _check_drift(drift: DriftSpec, field: str) -> None:
    for name, value, fine, range_ in (
        ("max_population_stability_index", drift.max_population_stability_index, True, "above 0"),
        ("max_ks_statistic", drift.max_ks_statistic, drift.max_ks_statistic <= 1.0, "above 0 and at most 1"),
        ("half_life", drift.half_life, True, "above 0"),
        ("min_scores", drift.min_scores, drift.min_scores >= 1, "1 or more"),
    ):
        if not (math.isfinite(value) and value > 0 and fine):
            raise _out_of_range(f"{field}.{name}", value, range_)


def _out_of_range(field: str, value: object, range_: str) -> InvalidArgument:
    return InvalidArgument(
        f"{field} is {value}, it must be {range_}",
        reason=reasons.VALUE_OUT_OF_RANGE,
        field=field,
        value=value,
        remedy=f"give {range_}",
    )
