"""Every bar by name, in the order they are measured. A bar is a function of the workbench and the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..harness import Report
from ..workbench import Workbench
from . import (
    aborting,
    attribution,
    attribution_latency,
    concepts,
    concurrency,
    dictionaries,
    exactness,
    extraction,
    features,
    monitors,
    probes,
    startup,
    static_batch,
    steering,
    transport,
    vllm,
)

Bar = Callable[[Workbench, Report], None]

BARS: Mapping[str, Bar] = {
    "exactness": exactness.run,
    "startup": startup.run,
    "concurrency": concurrency.run,
    "static_batch": static_batch.run,
    "steering": steering.run,
    "transport": transport.run,
    "extraction": extraction.run,
    "features": features.run,
    "concepts": concepts.run,
    "probes": probes.run,
    "dictionaries": dictionaries.run,
    "attribution": attribution.run,
    "monitors": monitors.run,
    "aborting": aborting.run,
    "attribution_latency": attribution_latency.run,
    "vllm": vllm.run,
}
