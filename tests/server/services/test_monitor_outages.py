"""What goes wrong around monitors while requests run: the database away, a webhook that hangs, readers that sleep."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.server.registry.conftest import cluster
from tests.server.registry.postgres import Cluster

from glasshouse.server.monitors import events as event_bus
from glasshouse.server.registry.registry import Registry
from glasshouse.server.types.configuration import MonitorSettings, Settings
from glasshouse.v1 import conditions_pb2 as conditions
from glasshouse.v1 import generation_pb2, inputs_pb2
from glasshouse.v1 import monitors_pb2 as pb

from ..monitors.endpoints import OK, endpoint
from ..serving import refusal, until
from .test_monitors import PROMPT, Watch, desk, fable_model, registry, spec, until_stored

__all__ = ["cluster", "fable_model", "registry"]
WAIT_S = 30.0


async def until_true(holds: Callable[[], Any]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await holds():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_a_database_that_goes_away_mid_request(
    fable_model: Any, cluster: Cluster, tmp_path: Path
) -> None:
    kept = Registry.open(cluster.new_database(), str(tmp_path / "blobs"))
    async with desk(fable_model, kept) as at:
        await at.probe()
        await at.create("sad", action=conditions.MONITOR_ACTION_FLAG)
        request = generation_pb2.GenerateRequest(
            input=inputs_pb2.Input(text=PROMPT), max_tokens=400, ignore_eos=True, sampling={"seed": 1}
        )
        stream = at.served.generation.Generate(request, metadata=(("x-request-id", "through"),))
        await stream.read()
        await asyncio.to_thread(cluster.stop)
        try:
            finished = None
            while (message := await stream.read()).ByteSize():
                if message.HasField("finished"):
                    finished = message.finished
                    break
            assert finished is not None and finished.flags

            async def is_away() -> bool:
                listed = await at.monitors.ListMonitors(pb.ListMonitorsRequest())
                return bool(listed.HasField("registry_away_since"))

            await until_true(is_away)
            # What is held goes on, and says so.
            _, during, _ = await at.generate(request_id="during")
            assert during.flags
            (monitor,) = (await at.monitors.ListMonitors(pb.ListMonitorsRequest())).monitors
            assert (
                monitor.state == pb.MONITOR_STATE_RUNNING and "has not answered since" in monitor.state_reason
            )
            assert at.served.metrics()["glasshouse_registry_up"] == 0
            for call in (
                lambda: at.monitors.CreateMonitor(pb.CreateMonitorRequest(monitor="new", spec=spec())),
                lambda: at.monitors.DeleteMonitor(pb.DeleteMonitorRequest(name="sad")),
                lambda: at.monitors.ListMonitorEvents(pb.ListMonitorEventsRequest(name="sad")),
            ):
                refused = await refusal(call)
                assert (refused.code, refused.reason) == ("UNAVAILABLE", "REGISTRY_UNAVAILABLE")
        finally:
            await asyncio.to_thread(cluster.start)

        async def is_back() -> bool:
            return not await is_away()

        await until_true(is_back)
        # Nothing was lost on the way.
        stored: set[str] = set()

        async def all_stored() -> bool:
            found = await at.monitors.ListMonitorEvents(
                pb.ListMonitorEventsRequest(name="sad", page_size=1000)
            )
            stored.update(event.request_id for event in found.events)
            return {"through", "during"} <= stored

        await until_true(all_stored)
        assert (await at.create("new")).state == pb.MONITOR_STATE_RUNNING
    kept.close()


def with_webhooks(monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("PAGER_SECRET", "sixteen bytes or more")
    return Settings(
        monitors=MonitorSettings(webhook_hosts=("127.0.0.1",), webhook_timeout_s=60.0),
        secrets={"pager": "env:PAGER_SECRET"},
    )


async def test_a_webhook_that_hangs_is_nobodys_burden(
    fable_model: Any, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with endpoint(None) as hanging, endpoint(OK) as fine:
        async with desk(fable_model, registry, with_webhooks(monkeypatch)) as at:
            await at.probe()
            for name, there in (("hangs", hanging), ("works", fine)):
                await at.create(name, webhook=pb.Webhook(url=there.url, secret="pager"))
            for index in range(5):
                _, finished, _ = await at.generate(request_id=f"r-{index}")
                assert finished.finish_reason == generation_pb2.FINISH_REASON_LENGTH
            await until(lambda: len(fine.posts) >= 5 and hanging.posts, WAIT_S)
            assert {post.json["request_id"] for post in fine.posts} == {f"r-{index}" for index in range(5)}
            await until_stored(at, "hangs", 5)
            unknown = await refusal(
                lambda: at.monitors.CreateMonitor(
                    pb.CreateMonitorRequest(
                        monitor="x", spec=spec(webhook=pb.Webhook(url=fine.url, secret="other"))
                    )
                )
            )
            assert (unknown.code, unknown.field) == ("FAILED_PRECONDITION", "spec.webhook.secret")
            # The name of the secret alone is kept.
            kept = registry.get(registry.list(_kind()).records[0].reference)
            assert "sixteen" not in str(kept.body) and "pager" in str(kept.body)
            before = time.monotonic()
        assert time.monotonic() - before < WAIT_S, "the server stops without waiting for an answer"


def _kind() -> Any:
    from glasshouse.server.registry.names import Kind

    return Kind.MONITOR


async def test_a_reader_that_sleeps_is_told_what_it_missed(
    fable_model: Any, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_bus.EventBus.__init__, "__defaults__", (4,))
    async with desk(fable_model, registry) as at:
        await at.probe()
        await at.create(
            "sad", aggregation=pb.MonitorAggregation(kind=pb.AGGREGATION_KIND_EXPONENTIAL, weight=1)
        )
        room = at.served.server._running.monitors  # type: ignore[union-attr]
        sleeping = room.hearing.bus.subscribe(lambda event: True)
        async with Watch(at.monitors, name="sad") as awake:
            for _ in range(3):
                await at.generate()
            await until(lambda: len(awake.events) + awake.dropped > 8)
        events, dropped = sleeping.take()
        assert len(events) == 4 and dropped > 4
        assert at.served.metrics()['glasshouse_monitor_events_dropped_total{queue="watch"}'] >= dropped


async def test_a_monitor_whose_dictionary_is_missing_says_so_and_comes_back(
    fable_model: Any, registry: Registry
) -> None:
    from glasshouse import fable

    async with desk(fable_model, registry) as at:
        await at.engine.load_dictionary("resid", str(fable.dictionary_path("resid-post-3")))
        await at.create(
            "feature", probe=None, feature=conditions.FeatureColumn(dictionary="resid", feature=3)
        )
    async with desk(fable_model, registry) as again:
        found = await again.get("feature")
        assert found.state == pb.MONITOR_STATE_FAILED and "resid" in found.state_reason
        assert again.served.metrics()['glasshouse_monitors{state="failed"}'] == 1
        _, finished, _ = await again.generate()
        assert finished.finish_reason == generation_pb2.FINISH_REASON_LENGTH
        await again.engine.load_dictionary("resid", str(fable.dictionary_path("resid-post-3")))

        async def is_running() -> bool:
            return bool((await again.get("feature")).state == pb.MONITOR_STATE_RUNNING)

        await until_true(is_running)


async def test_watches_end_when_the_server_drains(fable_model: Any, registry: Registry) -> None:
    async with desk(fable_model, registry) as at:
        watch = at.monitors.WatchMonitor(pb.WatchMonitorRequest())
        await watch.read()
        before = time.monotonic()
        assert await at.served.server.drain()
        assert time.monotonic() - before < WAIT_S / 2
        import grpc

        assert await watch.read() is grpc.aio.EOF
