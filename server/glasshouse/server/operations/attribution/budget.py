"""What an operation will take, known before it starts, and its refusal where that is over the server's budget.

Seconds come from passes timed on the very input, memory from the sizes of what is held. Memory is an upper bound; seconds
are what is to be expected, and what is refused, with an upper bound apart where the two may lie far from one another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

from glasshouse.server.types.configuration import AttributionSettings
from glasshouse.server.types.errors import ResourceExhausted
from glasshouse.wire import reasons


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """`passes`: forward passes, or rows of backward passes. `size`: nodes or edges at most. `stored_bytes`: of the
    result. The upper bounds of seconds and passes are 0 where they are those expected.
    """

    memory_bytes: int
    seconds: float
    passes: int
    size: int
    active_features: int = 0
    stored_bytes: int = 0
    seconds_upper_bound: float = 0.0
    passes_upper_bound: int = 0


def check(estimate: Estimate, settings: AttributionSettings, *, seconds: float | None = None) -> None:
    """Refuses what is over the budget, with the numbers.

    Raises:
        ResourceExhausted: naming the setting that is in the way.
    """
    refusal = refused(estimate, settings, seconds=seconds)
    if refusal is not None:
        raise refusal


def refused(
    estimate: Estimate, settings: AttributionSettings, *, seconds: float | None = None
) -> ResourceExhausted | None:
    """The refusal that `check` would raise. `seconds`: in place of `settings.max_seconds`."""
    numbers = {
        "memory_bytes": str(estimate.memory_bytes),
        "seconds": f"{estimate.seconds:.1f}",
        "passes": str(estimate.passes),
    }
    if estimate.memory_bytes > settings.max_memory_bytes:
        return ResourceExhausted(
            f"it would take about {estimate.memory_bytes:,} bytes, {settings.max_memory_bytes:,} are allowed",
            reason=reasons.MEMORY_BUDGET,
            value=estimate.memory_bytes,
            remedy="use a shorter input, fewer nodes, or ask the operator to raise attribution.max_memory_bytes",
            metadata=numbers
            | {"limit": str(settings.max_memory_bytes), "setting": "attribution.max_memory_bytes"},
        )
    setting = "max_seconds" if seconds is None else "max_call_seconds"
    most = settings.max_seconds if seconds is None else seconds
    if estimate.seconds > most:
        return ResourceExhausted(
            f"it would take about {estimate.seconds:,.0f} s, {most:,.0f} are allowed",
            reason=reasons.LIMIT_EXCEEDED,
            value=f"{estimate.seconds:.1f}",
            remedy=f"use a shorter input, fewer passes, or ask the operator to raise attribution.{setting}",
            metadata=numbers | {"limit": f"{most:g}", "setting": f"attribution.{setting}"},
        )
    return None


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes the second time: the first pays for what is made once."""
    work()
    started = perf_counter()
    work()
    return perf_counter() - started
