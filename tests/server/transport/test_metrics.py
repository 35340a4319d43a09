"""The metrics of the contract, and the page they stand on."""

from __future__ import annotations

import asyncio
import re
import urllib.request

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from glasshouse.server.transport.listening import Address, ListenError
from glasshouse.server.transport.methods import METHODS
from glasshouse.server.transport.metrics import Distribution, Metrics
from glasshouse.server.transport.metrics_page import MetricsPage
from glasshouse.v1 import generation_pb2 as pb

from ..fake_engine import FakeEngine
from ..serving import events_of, refusal, serving, until

CONTRACT = {
    "glasshouse_requests_total": ("counter", {"method", "code"}),
    "glasshouse_request_seconds": ("histogram", set()),
    "glasshouse_time_to_first_token_seconds": ("histogram", set()),
    "glasshouse_inter_token_seconds": ("histogram", set()),
    "glasshouse_generated_tokens_total": ("counter", set()),
    "glasshouse_prompt_tokens_total": ("counter", set()),
    "glasshouse_active_requests": ("gauge", set()),
    "glasshouse_queue_depth": ("gauge", set()),
    "glasshouse_edit_slots": ("gauge", set()),
    "glasshouse_hooked_steps_total": ("counter", set()),
    "glasshouse_report_bytes_total": ("counter", set()),
    "glasshouse_joins_late_total": ("counter", set()),
    "glasshouse_captures_failed_total": ("counter", set()),
    "glasshouse_interventions_total": ("counter", {"edit"}),
    "glasshouse_readout_bytes_total": ("counter", set()),
    "glasshouse_probe_score": ("histogram", {"probe"}),
    "glasshouse_monitor_events_total": ("counter", {"monitor", "action"}),
    "glasshouse_monitors": ("gauge", {"state"}),
    "glasshouse_monitor_requests_total": ("counter", {"monitor"}),
    "glasshouse_monitor_scores_not_finite_total": ("counter", {"monitor"}),
    "glasshouse_monitor_drift_psi": ("gauge", {"monitor"}),
    "glasshouse_monitor_drift_ks": ("gauge", {"monitor"}),
    "glasshouse_monitor_drifted": ("gauge", {"monitor"}),
    "glasshouse_monitor_webhook_deliveries_total": ("counter", {"monitor", "outcome"}),
    "glasshouse_monitor_events_dropped_total": ("counter", {"queue"}),
    "glasshouse_registry_up": ("gauge", set()),
}


def filled() -> Metrics:
    metrics = Metrics([method.name for method in METHODS], queue_depth=lambda: 3)
    metrics.request("ModelService/ListModels", "OK", 0.01)
    metrics.intervention("add_vector")
    return metrics


def test_names_kinds_and_labels_are_the_contracts() -> None:
    page = generate_latest(filled().registry).decode()
    assert dict(re.findall(r"^# TYPE (\S+) (\S+)$", page, re.MULTILINE)) == {
        name: kind for name, (kind, _) in CONTRACT.items()
    }
    for family in text_string_to_metric_families(page):
        name = family.name + ("_total" if family.type == "counter" else "")
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == CONTRACT[name][1]
    assert "_created" not in page


def test_the_method_label_is_bounded() -> None:
    with pytest.raises(AssertionError):
        filled().request("Whatever/Anyone", "OK", 1)


def test_a_distribution_is_cumulative() -> None:
    seconds = Distribution((0.1, 1))
    seconds.observe(0.1)
    seconds.observe(0.5, 3)
    seconds.observe(7)
    samples = {
        sample.labels.get("le", sample.name): sample.value for sample in seconds.family("s", "t").samples
    }
    assert samples == {"0.1": 1, "1.0": 4, "+Inf": 5, "s_count": 5, "s_sum": pytest.approx(8.6)}


async def test_counts_follow_the_requests() -> None:
    async with serving(FakeEngine(burst=4)) as served:
        request = pb.GenerateRequest(input={"text": "abc"}, max_tokens=10)
        await events_of(served.generation.Generate(request))
        await served.generation.Score(pb.ScoreRequest(input={"text": "abcdef"}))
        await refusal(lambda: served.generation.Generate(pb.GenerateRequest()))
        metrics = served.metrics()
    assert metrics['glasshouse_requests_total{code="OK",method="GenerationService/Generate"}'] == 1
    assert metrics['glasshouse_requests_total{code="OK",method="GenerationService/Score"}'] == 1
    assert (
        metrics['glasshouse_requests_total{code="INVALID_ARGUMENT",method="GenerationService/Generate"}'] == 1
    )
    assert metrics["glasshouse_request_seconds_count"] == 3
    assert metrics["glasshouse_time_to_first_token_seconds_count"] == 1
    assert metrics["glasshouse_inter_token_seconds_count"] == 9
    assert metrics["glasshouse_generated_tokens_total"] == 10
    assert metrics["glasshouse_prompt_tokens_total"] == 4 + 7


async def test_active_requests_are_those_being_served() -> None:
    engine = FakeEngine(step_s=0.005)
    async with serving(engine) as served:
        request = pb.GenerateRequest(input={"text": "abc"}, max_tokens=50)
        running = asyncio.ensure_future(events_of(served.generation.Generate(request)))
        await until(lambda: engine.running)
        assert served.metrics()["glasshouse_active_requests"] == 1
        await running
        assert served.metrics()["glasshouse_active_requests"] == 0


def test_the_page() -> None:
    with MetricsPage(Address(host="127.0.0.1", port=0), filled().registry) as page:
        assert page.address.port
        with urllib.request.urlopen(page.url, timeout=5) as answer:
            text = answer.read().decode()
        assert "glasshouse_queue_depth 3.0" in text
        with pytest.raises(ListenError, match="cannot listen"):
            MetricsPage(page.address, filled().registry)
