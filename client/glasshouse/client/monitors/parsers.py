"""MonitorService's messages -> values."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from google.protobuf import timestamp_pb2

from glasshouse.client.monitors import builders
from glasshouse.client.monitors.values import (
    Drift,
    MonitorCounts,
    MonitorEvent,
    MonitorInfo,
    ScoreHistogram,
    Webhook,
)
from glasshouse.client.parsers import Page
from glasshouse.v1 import inputs_pb2
from glasshouse.v1 import monitors_pb2 as pb


def _words(numbers: Mapping[str, Any]) -> dict[Any, Any]:
    return {number: name for name, number in numbers.items()}


_ACTIONS: Final = _words(builders.ACTIONS)
_AGGREGATIONS: Final = _words(builders.AGGREGATIONS)
_KINDS: Final = _words(builders.KINDS)
_STATES: Final[dict[Any, Any]] = {
    pb.MONITOR_STATE_RUNNING: "running",
    pb.MONITOR_STATE_DISABLED: "disabled",
    pb.MONITOR_STATE_FAILED: "failed",
}
_POSITIONS: Final[dict[Any, str]] = {
    inputs_pb2.NAMED_POSITIONS_PROMPT: "prompt",
    inputs_pb2.NAMED_POSITIONS_GENERATED: "generated",
}


def monitor(message: pb.Monitor) -> MonitorInfo:
    """A monitor."""
    spec = message.spec
    threshold = spec.threshold
    by_feature = spec.WhichOneof("score") == "feature"
    dictionary = spec.feature.dictionary.rpartition("/dictionaries/")[2]
    return MonitorInfo(
        resource_name=message.name,
        version=message.version,
        state=_STATES.get(message.state, "unknown"),
        state_reason=message.state_reason,
        action=_ACTIONS.get(spec.action, "observe"),
        scored=f"{dictionary}/{spec.feature.feature}" if by_feature else spec.probe.probe,
        label="" if by_feature else spec.probe.label,
        aggregation=_AGGREGATIONS.get(spec.aggregation.kind, "max"),
        above=threshold.on_above,
        clear_below=threshold.off_below if threshold.HasField("off_below") else threshold.on_above,
        min_tokens=threshold.min_tokens,
        positions=_POSITIONS.get(spec.positions.named, "all"),
        keys=tuple(spec.filter.keys),
        labels=dict(spec.filter.labels),
        sampling_rate=spec.filter.sampling_rate,
        n_interventions=len(spec.interventions),
        webhook=_webhook(spec.webhook) if spec.HasField("webhook") else None,
        include_text=spec.include_text,
        description=spec.description,
        author=message.author,
        created=time(message.create_time) if message.HasField("create_time") else None,
        hook_points=tuple(message.hook_points),
        counts=MonitorCounts(
            requests=message.counts.requests,
            scores=message.counts.scores,
            scores_not_finite=message.counts.scores_not_finite,
            raised=message.counts.raised,
            events_dropped=message.counts.events_dropped,
            webhook_failures=message.counts.webhook_failures,
        ),
        calibration=(
            ScoreHistogram(
                edges=tuple(spec.drift.calibration.edges), counts=tuple(spec.drift.calibration.counts)
            )
            if spec.HasField("drift")
            else None
        ),
        drift=drift(message.drift) if message.HasField("drift") else None,
    )


def arguments(message: pb.MonitorSpec) -> dict[str, Any]:
    """What `builders.spec` would make the grouped fields of a monitor from; None where nothing was said."""
    threshold, aggregation = message.threshold, message.aggregation
    return {
        "above": threshold.on_above,
        "clear_below": threshold.off_below if threshold.HasField("off_below") else None,
        "min_tokens": threshold.min_tokens,
        "aggregation": _AGGREGATIONS.get(aggregation.kind, "max"),
        "weight": aggregation.weight if aggregation.HasField("weight") else None,
        "level": aggregation.level if aggregation.HasField("level") else None,
        "keys": tuple(message.filter.keys),
        "labels": dict(message.filter.labels),
        "sampling_rate": message.filter.sampling_rate,
    }


def monitor_page(response: pb.ListMonitorsResponse) -> Page[pb.Monitor]:
    """A page of ListMonitors."""
    return Page(list(response.monitors), response.next_page_token)


def event_page(response: pb.ListMonitorEventsResponse) -> Page[MonitorEvent]:
    """A page of ListMonitorEvents."""
    return Page([event(one) for one in response.events], response.next_page_token)


def event(message: pb.MonitorEvent) -> MonitorEvent:
    """An event."""
    return MonitorEvent(
        id=message.id,
        monitor=message.monitor,
        kind=_KINDS.get(message.kind, "raised"),
        action=_ACTIONS.get(message.action, "observe"),
        time=time(message.time),
        request_id=message.request_id,
        position=message.position if message.HasField("position") else None,
        score=message.score if message.HasField("score") else None,
        aggregate=message.aggregate if message.HasField("aggregate") else None,
        threshold=message.threshold if message.HasField("threshold") else None,
        labels=dict(message.labels),
        key=message.key,
        text=message.text,
        drift=drift(message.drift) if message.HasField("drift") else None,
        server=message.server,
    )


def drift(message: pb.MonitorDrift) -> Drift:
    """How far scores have moved."""
    return Drift(
        population_stability_index=message.population_stability_index,
        ks_statistic=message.ks_statistic,
        ks_p_value=message.ks_p_value,
        live_scores=message.live_scores,
        drifted=message.drifted,
    )


def _webhook(message: pb.Webhook) -> Webhook:
    return Webhook(
        url=message.url, secret=message.secret, kinds=tuple(_KINDS[kind] for kind in message.kinds)
    )


def time(message: timestamp_pb2.Timestamp) -> datetime:
    """A time in UTC."""
    return message.ToDatetime(tzinfo=UTC)
