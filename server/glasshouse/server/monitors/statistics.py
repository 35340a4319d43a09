"""What the scores of monitors add up to: histograms for the metrics page, drift, counts.

The engine's thread only appends arrays to a log (`engines.watching.ScoreLog`). A thread here takes them once an interval
and counts them in bulk: nothing of this is paid for within a step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import structlog

from glasshouse.server.engines.watching import Roster
from glasshouse.server.monitors.spec import DriftSpec
from glasshouse.server.probes.drift import Drift, DriftWatch

_log = structlog.get_logger(__name__)

INTERVAL_S = 0.5
PROBABILITY_BOUNDS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
ACTIVATION_BOUNDS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)
MARGIN_BOUNDS = (-10.0, -5.0, -2.5, -1.0, -0.5, 0.0, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(eq=False)
class ScoreCounts:
    """A histogram of scores, as the metrics page has it: `counts` one more than `bounds` (upper, inclusive)."""

    bounds: tuple[float, ...]
    total: float = 0.0
    counts: np.ndarray[Any, np.dtype[np.int64]] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        self.counts = np.zeros(len(self.bounds) + 1, dtype=np.int64)

    def add(self, scores: np.ndarray[Any, np.dtype[np.float64]]) -> None:
        """Counts finite scores (n,)."""
        places = np.searchsorted(np.array(self.bounds), scores, side="left")
        self.counts += np.bincount(places, minlength=len(self.counts))
        self.total += float(scores.sum())


class DriftState:
    """One monitor's drift: what was counted, and whether a limit is passed."""

    def __init__(self, spec: DriftSpec) -> None:
        self._spec = spec
        self._watch = DriftWatch(spec.calibration, half_life=spec.half_life)
        self.now = self._watch.read()
        self.drifted = False
        self._n_seen = 0

    def add(self, scores: np.ndarray[Any, np.dtype[np.float64]]) -> bool | None:
        """Counts scores; what `drifted` became where it changed, else None."""
        self._watch.add(scores)
        self._n_seen += len(scores)
        self.now = self._watch.read()
        if self._n_seen < self._spec.min_scores:
            return None
        # Back below nine tenths of a limit before it counts as over: at the limit it would flutter.
        slack = 0.9 if self.drifted else 1.0
        moved = (
            self.now.population_stability_index > slack * self._spec.max_population_stability_index
            or self.now.ks_statistic > slack * self._spec.max_ks_statistic
        )
        if moved == self.drifted:
            return None
        self.drifted = moved
        return moved


@dataclass(eq=False)
class MonitorStatistics:
    """What one version of a monitor has done on this server. Numbers are written by one thread each."""

    scores: ScoreCounts
    drift: DriftState | None = None
    n_requests: int = 0
    n_scores: int = 0
    n_not_finite: int = 0
    n_raised: int = 0
    n_dropped: int = 0
    n_webhook_failures: int = 0


# (index of the watch, how its drift stands, whether it has moved)
DriftChange = tuple[int, Drift, bool]


def count(roster: Roster, statistics: list[MonitorStatistics]) -> list[DriftChange]:
    """Counts what a roster's log holds; `statistics` one a watch. Returns what moved."""
    parts = roster.log.drain()
    if not parts:
        return []
    scores = np.concatenate([scores for scores, _ in parts])
    use = np.concatenate([use for _, use in parts])
    changes: list[DriftChange] = []
    for index, entry in enumerate(statistics):
        taken = scores[use[:, index], index]
        finite = taken[np.isfinite(taken)]
        entry.n_scores += len(taken)
        entry.n_not_finite += len(taken) - len(finite)
        if not len(finite):
            continue
        entry.scores.add(finite)
        if entry.drift is not None:
            moved = entry.drift.add(finite)
            if moved is not None:
                changes.append((index, entry.drift.now, moved))
    return changes


class Counter:
    """The thread that counts: calls `work` every `interval_s` until it is stopped, and once more."""

    def __init__(self, work: Callable[[], None], interval_s: float = INTERVAL_S) -> None:
        self._work = work
        self._interval_s = interval_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="monitor-statistics", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends it; returns when it has ended."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_s):
            self._guarded()
        self._guarded()

    def _guarded(self) -> None:
        try:
            self._work()
        except Exception:
            _log.exception("monitor_statistics_failed")
