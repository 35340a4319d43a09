"""The metrics of the contract, kept as plain numbers and rendered when the page is asked for.

All are written from the event loop's thread and read by the page's: a number may be one behind, never torn.
The time between tokens is observed for every token of every stream, so a histogram is a `bisect` and two
additions here, without locks; and no `_created` series are written, for the contract has none.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from glasshouse.server.monitors.room import MonitorRoom

from .monitor_metrics import monitor_families

REQUEST_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
FIRST_TOKEN_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
INTER_TOKEN_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Distribution:
    """A histogram: counts by upper bound, and the sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, n: int = 1) -> None:
        """`n` observations of `value`."""
        self._counts[bisect_left(self._bounds, value)] += n
        self._sum += value * n

    def family(self, name: str, text: str) -> Metric:
        """As Prometheus has it: cumulative."""
        total = 0
        buckets: list[tuple[str, float]] = []
        for bound, n in zip((*self._bounds, float("inf")), tuple(self._counts), strict=True):
            total += n
            buckets.append(("+Inf" if bound == float("inf") else str(float(bound)), total))
        return HistogramMetricFamily(name, text, buckets=buckets, sum_value=self._sum)


class Metrics(Collector):
    """What the server counts. `methods` are the only values that the label `method` takes."""

    def __init__(
        self,
        methods: Iterable[str],
        queue_depth: Callable[[], int] = lambda: 0,
        engine_counts: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        self._methods = frozenset(methods)
        self._queue_depth = queue_depth
        self._engine_counts = engine_counts
        self._requests: Counter[tuple[str, str]] = Counter()
        self._interventions: Counter[str] = Counter()
        self._request_seconds = Distribution(REQUEST_BUCKETS_S)
        self._first_token = Distribution(FIRST_TOKEN_BUCKETS_S)
        self._inter_token = Distribution(INTER_TOKEN_BUCKETS_S)
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._readout_bytes = 0
        self.active_requests = 0
        self._open_streams = 0
        # Set when the server starts: before, there are none.
        self.monitors: MonitorRoom | None = None
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    # What services tell (services.call.Meter).

    def prompt_tokens(self, n: int) -> None:
        self._prompt_tokens += n

    def generated_tokens(self, n: int) -> None:
        self._generated_tokens += n

    def time_to_first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def inter_token(self, seconds: float, n: int) -> None:
        self._inter_token.observe(seconds, n)

    def intervention(self, edit: str) -> None:
        self._interventions[edit] += 1

    def readout_bytes(self, n: int) -> None:
        self._readout_bytes += n

    @property
    def open_streams(self) -> int:
        return self._open_streams

    # What the gate tells.

    def begin(self, *, stream: bool) -> None:
        """A request is being served."""
        self.active_requests += 1
        self._open_streams += stream

    def end(self, *, stream: bool) -> None:
        """It is not any more."""
        self.active_requests -= 1
        self._open_streams -= stream

    def request(self, method: str, code: str, seconds: float) -> None:
        """A request was answered."""
        assert method in self._methods, f"the label method is bounded; {method} is not a method of ours"
        self._requests[method, code] += 1
        self._request_seconds.observe(seconds)

    def _of_engines(self) -> Iterable[Metric]:
        counts = self._engine_counts()
        yield GaugeMetricFamily(
            "glasshouse_edit_slots", "Edit slots in use in workers.", value=counts.get("edit_slots", 0)
        )
        for name, text in (
            ("hooked_steps", "Steps in which workers ran edits or readouts."),
            ("report_bytes", "Bytes of workers' reports."),
            ("joins_late", "Tokens that waited for what was read before them."),
            ("captures_failed", "Requests that a worker failed, or whose report did not come."),
        ):
            yield CounterMetricFamily(f"glasshouse_{name}", text, value=counts.get(name, 0))

    def collect(self) -> Iterable[Metric]:
        """Every metric of the contract, in its order."""
        requests = CounterMetricFamily(
            "glasshouse_requests", "Requests answered, by method and status code.", labels=["method", "code"]
        )
        for (method, code), n in sorted(self._requests.copy().items()):
            requests.add_metric([method, code], n)
        yield requests
        yield self._request_seconds.family(
            "glasshouse_request_seconds", "Seconds from a request's arrival to its status."
        )
        yield self._first_token.family(
            "glasshouse_time_to_first_token_seconds",
            "Seconds from a generation's arrival to its first token.",
        )
        yield self._inter_token.family(
            "glasshouse_inter_token_seconds", "Seconds between the tokens of a stream."
        )
        yield CounterMetricFamily(
            "glasshouse_generated_tokens", "Tokens generated.", value=self._generated_tokens
        )
        yield CounterMetricFamily(
            "glasshouse_prompt_tokens",
            "Tokens fed by callers: prompts, scored and read inputs.",
            value=self._prompt_tokens,
        )
        yield GaugeMetricFamily(
            "glasshouse_active_requests", "Requests being served.", value=self.active_requests
        )
        yield GaugeMetricFamily(
            "glasshouse_queue_depth", "Requests waiting for the engine.", value=self._queue_depth()
        )
        yield from self._of_engines()
        interventions = CounterMetricFamily(
            "glasshouse_interventions", "Interventions of accepted requests, by edit.", labels=["edit"]
        )
        for edit, n in sorted(self._interventions.copy().items()):
            interventions.add_metric([edit], n)
        yield interventions
        yield CounterMetricFamily(
            "glasshouse_readout_bytes", "Bytes of activations and readouts sent.", value=self._readout_bytes
        )
        yield from monitor_families(self.monitors)
