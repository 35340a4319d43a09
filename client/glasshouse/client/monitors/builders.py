"""Arguments of monitor methods -> request messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from google.protobuf import field_mask_pb2, timestamp_pb2

from glasshouse.client import builders
from glasshouse.client.dictionaries.names import dictionary_name
from glasshouse.client.inputs import as_inputs
from glasshouse.client.interventions import Intervention
from glasshouse.client.monitors.values import DriftLimits, ScoreHistogram, Webhook
from glasshouse.client.positions import as_positions
from glasshouse.client.scalars import text, whole, word
from glasshouse.v1 import conditions_pb2, inputs_pb2
from glasshouse.v1 import monitors_pb2 as pb

ACTIONS: Final = {
    "observe": conditions_pb2.MONITOR_ACTION_OBSERVE,
    "flag": conditions_pb2.MONITOR_ACTION_FLAG,
    "steer": conditions_pb2.MONITOR_ACTION_STEER,
    "abort": conditions_pb2.MONITOR_ACTION_ABORT,
}
AGGREGATIONS: Final = {
    "max": pb.AGGREGATION_KIND_MAX,
    "mean": pb.AGGREGATION_KIND_MEAN,
    "exponential": pb.AGGREGATION_KIND_EXPONENTIAL,
    "fraction_above": pb.AGGREGATION_KIND_FRACTION_ABOVE,
}
KINDS: Final = {
    "raised": pb.MONITOR_EVENT_KIND_RAISED,
    "cleared": pb.MONITOR_EVENT_KIND_CLEARED,
    "drift": pb.MONITOR_EVENT_KIND_DRIFT,
    "drift_cleared": pb.MONITOR_EVENT_KIND_DRIFT_CLEARED,
}

# Arguments of `spec`, and the fields of MonitorSpec that they make.
_FIELDS: Final = {
    "probe": "score",
    "label": "score",
    "feature": "score",
    "above": "threshold",
    "clear_below": "threshold",
    "min_tokens": "threshold",
    "aggregation": "aggregation",
    "weight": "aggregation",
    "level": "aggregation",
    "keys": "filter",
    "labels": "filter",
    "sampling_rate": "filter",
    "calibration": "drift",
    "drift_limits": "drift",
}
_GROUPS: Final = {
    "threshold": ("above", "clear_below", "min_tokens"),
    "aggregation": ("aggregation", "weight", "level"),
    "filter": ("keys", "labels", "sampling_rate"),
}


def create(model: str, name: str, spec: pb.MonitorSpec) -> pb.CreateMonitorRequest:
    """A new monitor."""
    return pb.CreateMonitorRequest(model=model, monitor=text(name, "name"), spec=spec)


def update(name: str, changes: Mapping[str, Any], before: Mapping[str, Any]) -> pb.UpdateMonitorRequest:
    """A monitor changed: `changes` are arguments of `spec`; `before` are those of the version that is changed, which
    complete a field that several of them make.
    """
    fields = list(dict.fromkeys(_FIELDS.get(name, name) for name in changes))
    whole_ones = {
        name: before[name]
        for field in fields
        for name in _GROUPS.get(field, ())
        if name not in changes and before.get(name) is not None
    }
    if changes.get("aggregation", before.get("aggregation")) != before.get("aggregation"):
        # They belong to the aggregation that is left.
        whole_ones = {name: one for name, one in whole_ones.items() if name not in ("weight", "level")}
    return pb.UpdateMonitorRequest(
        name=name,
        spec=spec(**{**whole_ones, **changes}),
        update_mask=field_mask_pb2.FieldMask(paths=fields),
    )


def spec(
    *,
    probe: Any = None,
    label: str = "",
    feature: tuple[Any, int] | None = None,
    above: float | None = None,
    clear_below: float | None = None,
    min_tokens: int | None = None,
    aggregation: str = "max",
    weight: float | None = None,
    level: float | None = None,
    positions: Any = None,
    action: str = "observe",
    interventions: Sequence[Intervention] = (),
    steer_while_on: bool = False,
    keys: Iterable[str] = (),
    labels: Mapping[str, str] | None = None,
    sampling_rate: float | None = None,
    calibration: Any = None,
    drift_limits: DriftLimits | None = None,
    webhook: Webhook | None = None,
    include_text: bool = False,
    enabled: bool = True,
    description: str = "",
) -> pb.MonitorSpec:
    """A monitor's parts as they are given."""
    message = pb.MonitorSpec(
        aggregation=pb.MonitorAggregation(
            kind=word(aggregation, AGGREGATIONS, "aggregation"), weight=weight, level=level
        ),
        threshold=pb.MonitorThreshold(
            on_above=above,
            off_below=clear_below,
            min_tokens=None if min_tokens is None else whole(min_tokens, "min_tokens"),
        ),
        filter=pb.MonitorFilter(
            keys=[text(key, "keys") for key in keys],
            labels=builders.request_labels(labels or {}),
            sampling_rate=sampling_rate,
        ),
        action=word(action, ACTIONS, "action"),
        interventions=builders.edits(interventions),
        steer_while_on=steer_while_on,
        include_text=include_text,
        enabled=enabled,
        description=text(description, "description"),
    )
    if probe is not None:
        named = probe if isinstance(probe, str) else getattr(probe, "resource_name", None)
        if not isinstance(named, str):
            raise TypeError(f"probe must be a handle or its name, not {probe!r}")
        message.probe.probe, message.probe.label = text(named, "probe"), text(label, "label")
    if feature is not None:
        dictionary, index = feature
        message.feature.dictionary = text(dictionary_name(dictionary), "feature")
        message.feature.feature = whole(index, "feature")
    if positions is not None:
        message.positions.MergeFrom(
            builders.selector(as_positions(positions), "positions") or inputs_pb2.PositionSelector()
        )
    if calibration is not None or drift_limits is not None:
        message.drift.CopyFrom(_drift(calibration, drift_limits or DriftLimits()))
    if webhook is not None:
        message.webhook.CopyFrom(
            pb.Webhook(
                url=text(webhook.url, "webhook.url"),
                secret=text(webhook.secret, "webhook.secret"),
                kinds=kinds(webhook.kinds),
            )
        )
    return message


def _drift(calibration: Any, limits: DriftLimits) -> pb.DriftSettings:
    message = pb.DriftSettings(
        max_population_stability_index=limits.max_population_stability_index,
        max_ks_statistic=limits.max_ks_statistic,
        half_life=limits.half_life,
        min_scores=limits.min_scores,
    )
    if isinstance(calibration, ScoreHistogram):
        message.calibration.CopyFrom(pb.ScoreHistogram(edges=calibration.edges, counts=calibration.counts))
    elif calibration is not None:
        message.calibration_inputs.extend(builders.model_inputs(as_inputs(calibration)[0]))
    return message


def kinds(words: Iterable[str]) -> list[Any]:
    """Kinds of events."""
    return [word(one, KINDS, "kinds") for one in words]


def watch(
    name: str, model: str, after_event: str, since: datetime | None, wanted: Iterable[str]
) -> pb.WatchMonitorRequest:
    """A watch; `name` empty for every monitor of the model."""
    request = pb.WatchMonitorRequest(name=name, model=model, kinds=kinds(wanted))
    if after_event:
        request.after_event = text(after_event, "after_event")
    elif since is not None:
        request.since.CopyFrom(timestamp(since))
    return request


def events(name: str, since: datetime | None, page_size: int, page_token: str) -> pb.ListMonitorEventsRequest:
    """A page of stored events."""
    return pb.ListMonitorEventsRequest(
        name=name,
        since=None if since is None else timestamp(since),
        page_size=whole(page_size, "page_size"),
        page_token=page_token,
    )


def timestamp(time: datetime) -> timestamp_pb2.Timestamp:
    """A time; one without a zone is local."""
    message = timestamp_pb2.Timestamp()
    message.FromDatetime(time.astimezone(UTC))
    return message
