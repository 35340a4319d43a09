"""What monitors count, as metrics: read from the room when the page is asked for, in the page's thread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from glasshouse.server.monitors.hearing import MonitorCounts
from glasshouse.server.monitors.room import MonitorRoom
from glasshouse.server.monitors.running import Monitor, State
from glasshouse.server.monitors.statistics import ScoreCounts

OUTCOMES = ("delivered", "retried", "failed", "dropped")


def monitor_families(room: MonitorRoom | None) -> Iterable[Metric]:
    """Every metric of monitors; without a room, with nothing in them."""
    monitors = [] if room is None else room.in_force.everywhere()
    counts = MonitorCounts() if room is None else room.hearing.counts()
    yield _scores(monitors)
    events = CounterMetricFamily(
        "glasshouse_monitor_events", "Events of monitors, by the action taken.", labels=["monitor", "action"]
    )
    # A monitor's series is there from its beginning: an increase from nothing is none to Prometheus.
    quiet = {(m.published.name, m.published.spec.action.value): 0 for m in monitors}
    drifting = {(m.published.name, "drift"): 0 for m in monitors if m.published.spec.drift is not None}
    for (name, action), n in sorted({**quiet, **drifting, **counts.events}.items()):
        events.add_metric([name, action], n)
    yield events
    states = Counter(monitor.state for monitor in monitors)
    state = GaugeMetricFamily("glasshouse_monitors", "Monitors of this server, by state.", labels=["state"])
    if room is not None:
        for one in State:
            state.add_metric([one.value], states[one])
    yield state
    requests = CounterMetricFamily(
        "glasshouse_monitor_requests", "Requests that a monitor watched.", labels=["monitor"]
    )
    not_finite = CounterMetricFamily(
        "glasshouse_monitor_scores_not_finite",
        "Scores that were not finite, and counted for nothing else.",
        labels=["monitor"],
    )
    for monitor in monitors:
        requests.add_metric([monitor.published.name], monitor.statistics.n_requests)
        not_finite.add_metric([monitor.published.name], monitor.statistics.n_not_finite)
    yield requests
    yield not_finite
    yield from _drift(monitors)
    deliveries = CounterMetricFamily(
        "glasshouse_monitor_webhook_deliveries",
        "Events to webhooks: delivered, tried again (retried), given up (failed), or dropped from a full queue.",
        labels=["monitor", "outcome"],
    )
    hooked = {
        (m.published.name, outcome): 0 for m in monitors if m.webhook is not None for outcome in OUTCOMES
    }
    for (name, outcome), n in sorted({**hooked, **counts.webhooks}.items()):
        deliveries.add_metric([name, outcome], n)
    yield deliveries
    dropped = CounterMetricFamily(
        "glasshouse_monitor_events_dropped",
        "Events dropped from a full queue: on their way to the registry, or to a reader of a watch.",
        labels=["queue"],
    )
    for queue, n in sorted(counts.dropped.items()):
        dropped.add_metric([queue], n)
    yield dropped
    registry = GaugeMetricFamily(
        "glasshouse_registry_up", "1 while the registry's database answers, 0 while it does not."
    )
    if room is not None and room.has_registry:
        registry.add_metric([], float(room.away_since is None))
    yield registry


def _scores(monitors: Iterable[Monitor]) -> Metric:
    family = HistogramMetricFamily(
        "glasshouse_probe_score",
        "Scores that monitors took, by probe, or by dictionary and feature.",
        labels=["probe"],
    )
    merged: dict[tuple[str, tuple[float, ...]], ScoreCounts] = {}
    for monitor in monitors:
        found = monitor.statistics.scores
        if not found.bounds:
            continue
        key = (monitor.scored, found.bounds)
        total = merged.setdefault(key, ScoreCounts(found.bounds))
        total.counts = total.counts + found.counts
        total.total += found.total
    for (probe, bounds), total in sorted(merged.items()):
        running = np.cumsum(total.counts).tolist()
        names = [*(str(float(bound)) for bound in bounds), "+Inf"]
        family.add_metric([probe], buckets=list(zip(names, running, strict=True)), sum_value=total.total)
    return family


def _drift(monitors: Iterable[Monitor]) -> Iterable[Metric]:
    index = GaugeMetricFamily(
        "glasshouse_monitor_drift_psi",
        "Population stability index of a monitor's scores against its calibration set.",
        labels=["monitor"],
    )
    distance = GaugeMetricFamily(
        "glasshouse_monitor_drift_ks",
        "Kolmogorov-Smirnov statistic of a monitor's scores against its calibration set.",
        labels=["monitor"],
    )
    drifted = GaugeMetricFamily(
        "glasshouse_monitor_drifted",
        "1 where a monitor's scores have moved beyond its limits.",
        labels=["monitor"],
    )
    for monitor in monitors:
        state = monitor.statistics.drift
        if state is not None:
            name = monitor.published.name
            index.add_metric([name], state.now.population_stability_index)
            distance.add_metric([name], state.now.ks_statistic)
            drifted.add_metric([name], float(state.drifted))
    yield index
    yield distance
    yield drifted
