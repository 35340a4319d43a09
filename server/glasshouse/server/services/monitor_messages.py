"""Monitors in force and their events, as messages."""

from __future__ import annotations

from google.protobuf import timestamp_pb2

from glasshouse.server.monitors.events import Event
from glasshouse.server.monitors.running import Monitor, Published, State
from glasshouse.server.monitors.statistics import DriftState
from glasshouse.server.probes.drift import Drift
from glasshouse.v1 import monitors_pb2 as pb

from .monitor_specs import ACTION_NUMBERS, KIND_NUMBERS, spec_message

_STATES = {
    State.RUNNING: pb.MONITOR_STATE_RUNNING,
    State.DISABLED: pb.MONITOR_STATE_DISABLED,
    State.FAILED: pb.MONITOR_STATE_FAILED,
}


def monitor_message(monitor: Monitor, note: str = "") -> pb.Monitor:
    """A monitor in force, with what it has done here. `note`: what else a reader should know."""
    message = published_message(monitor.published)
    message.state = _STATES[monitor.state]
    message.state_reason = "; ".join(text for text in (monitor.reason, note) if text)
    if monitor.watch is not None:
        message.hook_points.extend(point.name for point in monitor.watch.source.points)
    counted = monitor.statistics
    message.counts.CopyFrom(
        pb.MonitorCounts(
            requests=counted.n_requests,
            scores=counted.n_scores,
            scores_not_finite=counted.n_not_finite,
            raised=counted.n_raised,
            events_dropped=counted.n_dropped,
            webhook_failures=counted.n_webhook_failures,
        )
    )
    if counted.drift is not None:
        message.drift.CopyFrom(_drift_state(counted.drift))
    return message


def published_message(published: Published) -> pb.Monitor:
    """A version as it was published, whether it is in force or not."""
    reference = published.reference
    message = pb.Monitor(
        name=str(reference),
        version=reference.version or 0,
        spec=spec_message(published.spec),
        author=published.author,
    )
    message.create_time.FromDatetime(published.created)
    return message


def event_message(event: Event) -> pb.MonitorEvent:
    """An event."""
    message = pb.MonitorEvent(
        id=event.id,
        monitor=str(event.monitor),
        kind=KIND_NUMBERS[event.kind],
        action=ACTION_NUMBERS[event.action],
        request_id=event.request_id,
        position=event.position,
        score=event.score,
        aggregate=event.aggregate,
        threshold=event.threshold,
        labels=dict(event.labels),
        key=event.key,
        text=event.text,
        server=event.server,
    )
    message.time.FromDatetime(event.time)
    if event.drift is not None:
        message.drift.CopyFrom(_drift(event.drift, event.kind.value == "drift"))
    return message


def timestamp(time: float) -> timestamp_pb2.Timestamp:
    """Seconds since 1970 as a message."""
    message = timestamp_pb2.Timestamp()
    message.FromNanoseconds(int(time * 1e9))
    return message


def _drift_state(state: DriftState) -> pb.MonitorDrift:
    return _drift(state.now, state.drifted)


def _drift(drift: Drift, drifted: bool) -> pb.MonitorDrift:
    return pb.MonitorDrift(
        population_stability_index=drift.population_stability_index,
        ks_statistic=drift.ks_statistic,
        ks_p_value=drift.ks_p_value,
        live_scores=drift.n_live,
        drifted=drifted,
    )
