"""MonitorService through a real server over the real engine on fable, with a registry of its own."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from google.protobuf import field_mask_pb2

from glasshouse import fable
from glasshouse.server.engines.transformers.engine import TransformersEngine
from glasshouse.server.models.loading import load_model
from glasshouse.server.monitors.spec import sampled
from glasshouse.server.probes.library import ConceptLibrary
from glasshouse.server.registry.registry import Registry
from glasshouse.server.types.configuration import KeySettings, MonitorSettings, Settings
from glasshouse.server.types.limits import Limits
from glasshouse.v1 import conditions_pb2 as conditions
from glasshouse.v1 import (
    dictionaries_pb2,
    dictionaries_pb2_grpc,
    examples_pb2,
    generation_pb2,
    inputs_pb2,
    interventions_pb2,
    monitors_pb2_grpc,
    probes_pb2,
    probes_pb2_grpc,
    provenance_pb2,
)
from glasshouse.v1 import monitors_pb2 as pb
from glasshouse.wire.tensors import pack

from ..serving import Served, refusal, serving, until

AT = "blocks.3.hook_resid_post"
PROMPT = "Once upon a time there was a little girl named Lily."
WIDTH = 192


@pytest.fixture(scope="module")
def fable_model() -> Any:
    torch.set_num_threads(2)
    return load_model(fable.model_path(), dtype="float32", device="cpu", name="fable")


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    opened = Registry.at(tmp_path / "registry")
    yield opened
    opened.close()


@dataclass
class Desk:
    """A server, what it serves with, and a caller's stubs."""

    served: Served
    engine: TransformersEngine
    monitors: Any
    registry: Registry

    async def probe(self, name: str = "mood", bias: float = 0.0, seed: int = 0) -> str:
        """A random probe, published; about half of all scores are above 0.5."""
        weights = np.random.default_rng(seed).standard_normal((WIDTH, 1)).astype(np.float32) / 4
        stub = probes_pb2_grpc.ProbeServiceStub(self.served.channel)
        made = await stub.CreateProbe(create_probe(name, weights, bias))
        return str(made.probe.name)

    async def create(self, name: str, **parts: Any) -> pb.Monitor:
        made = await self.monitors.CreateMonitor(pb.CreateMonitorRequest(monitor=name, spec=spec(**parts)))
        return made.monitor

    async def get(self, name: str) -> pb.Monitor:
        return (await self.monitors.GetMonitor(pb.GetMonitorRequest(name=name))).monitor

    async def generate(
        self, prompt: str = PROMPT, request_id: str = "", **fields: Any
    ) -> tuple[list[int], generation_pb2.FinishedEvent, list[tuple[str, str]]]:
        request = generation_pb2.GenerateRequest(
            input=inputs_pb2.Input(text=prompt),
            max_tokens=fields.pop("max_tokens", 12),
            sampling=generation_pb2.SamplingParameters(temperature=0.0),
            ignore_eos=True,
            **fields,
        )
        metadata = (("x-request-id", request_id),) if request_id else ()
        stream = self.served.generation.Generate(request, metadata=metadata)
        ids: list[int] = []
        async for event in stream:
            ids += [token.token_id for token in event.tokens.tokens]
            finished = event.finished
        return ids, finished, list(await stream.trailing_metadata())


def create_probe(name: str, weights: np.ndarray, bias: float) -> probes_pb2.CreateProbeRequest:
    layer = probes_pb2.AffineLayer(weights=pack(weights), biases=pack(np.array([bias], np.float32)))
    return probes_pb2.CreateProbeRequest(
        publication=provenance_pb2.Publication(name=name),
        labels=["calm", "sad"],
        hook_points=[AT],
        pooling=examples_pb2.POOLING_TOKEN,
        weights=probes_pb2.ProbeWeights(layers=[layer]),
    )


def spec(score: str = "mood", on: float = 0.5, **parts: Any) -> pb.MonitorSpec:
    threshold = pb.MonitorThreshold(on_above=on, **parts.pop("threshold", {}))
    parts.setdefault("probe", conditions.ProbeColumn(probe=score))
    return pb.MonitorSpec(threshold=threshold, **parts)


@asynccontextmanager
async def desk(fable_model: Any, registry: Registry, settings: Settings | None = None) -> AsyncIterator[Desk]:
    engine = TransformersEngine(fable_model, limits=Limits())
    await engine.start()
    library = ConceptLibrary(registry)
    library.start()
    try:
        async with serving(engine, settings=settings, library=library) as served:  # type: ignore[arg-type]
            stub = monitors_pb2_grpc.MonitorServiceStub(served.channel)
            yield Desk(served=served, engine=engine, monitors=stub, registry=registry)
    finally:
        await engine.stop()
        library.stop()


@pytest.fixture
async def at(fable_model: Any, registry: Registry) -> AsyncIterator[Desk]:
    async with desk(fable_model, registry) as opened:
        await opened.probe()
        yield opened


class Watch:
    """A watch in the background, from the moment that it is on."""

    def __init__(self, stub: Any, **fields: Any) -> None:
        self._call = stub.WatchMonitor(pb.WatchMonitorRequest(**fields))
        self.events: list[pb.MonitorEvent] = []
        self.dropped = 0

    async def __aenter__(self) -> Watch:
        first = await self._call.read()
        assert not first.events and not first.events_dropped
        self._task = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._call.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _read(self) -> None:
        while (message := await self._call.read()) is not grpc.aio.EOF:
            self.events += message.events
            self.dropped += message.events_dropped


def kinds(events: list[pb.MonitorEvent]) -> list[str]:
    return [pb.MonitorEventKind.Name(event.kind).removeprefix("MONITOR_EVENT_KIND_") for event in events]


async def test_a_monitor_from_publication_to_deletion(at: Desk) -> None:
    made = await at.create("sad", action=conditions.MONITOR_ACTION_FLAG, description="sad stories")
    assert made.name == "models/fable/monitors/sad@1" and made.version == 1
    assert made.state == pb.MONITOR_STATE_RUNNING and list(made.hook_points) == [AT]
    # The probe's version is written into it: what it means does not change.
    assert made.spec.probe.probe == "models/fable/probes/mood@1"
    assert made.spec.positions.exclude_special and made.spec.enabled and made.spec.filter.sampling_rate == 1
    listed = await at.monitors.ListMonitors(pb.ListMonitorsRequest())
    assert [monitor.name for monitor in listed.monitors] == [made.name]
    assert not listed.HasField("registry_away_since")

    async with Watch(at.monitors, name="sad") as watch:
        ids, finished, trailers = await at.generate(request_id="r-1", labels={"tenant": "a"})
        await until(lambda: watch.events)
    assert len(ids) == 12
    flag = finished.flags[0]
    assert flag.monitor == made.name and flag.action == conditions.MONITOR_ACTION_FLAG
    assert flag.score > 0.5 and flag.threshold == 0.5
    assert dict(trailers)["glasshouse-monitor-flag"] == (
        f"{made.name}; action=flag; position={flag.position}"
    )
    event = watch.events[0]
    assert (event.monitor, event.request_id, event.position) == (made.name, "r-1", flag.position)
    assert dict(event.labels) == {"tenant": "a"} and event.text == "" and event.server
    assert event.aggregate == pytest.approx(flag.score) and event.threshold == 0.5

    await at.monitors.DeleteMonitor(pb.DeleteMonitorRequest(name="sad"))
    _, finished, trailers = await at.generate()
    assert not finished.flags and "glasshouse-monitor-flag" not in dict(trailers)
    gone = await refusal(lambda: at.monitors.GetMonitor(pb.GetMonitorRequest(name="sad")))
    assert gone.code == "NOT_FOUND"
    # What it noticed stays for as long as events are kept.
    await until_stored(at, "sad", 1)
    # Its name is free again, its version's number is not.
    again = await at.monitors.CreateMonitor(pb.CreateMonitorRequest(monitor="sad", spec=spec()))
    assert again.monitor.version == 2
    taken = await refusal(
        lambda: at.monitors.CreateMonitor(pb.CreateMonitorRequest(monitor="sad", spec=spec()))
    )
    assert taken.code == "ALREADY_EXISTS" and taken.metadata["next_version"] == "3"


async def until_stored(at: Desk, name: str, n: int) -> list[pb.MonitorEvent]:
    for _ in range(500):
        found = await at.monitors.ListMonitorEvents(pb.ListMonitorEventsRequest(name=name))
        if len(found.events) >= n:
            return list(found.events)
        await asyncio.sleep(0.01)
    raise AssertionError(f"{len(found.events)} events of {name} are stored, not {n}")


async def test_an_abort_ends_the_stream_and_says_who_did(at: Desk) -> None:
    free, _, _ = await at.generate()
    made = await at.create(
        "stop",
        on=0.9,
        action=conditions.MONITOR_ACTION_ABORT,
        positions=inputs_pb2.PositionSelector(named=inputs_pb2.NAMED_POSITIONS_GENERATED),
    )
    ids, finished, trailers = await at.generate()
    assert finished.finish_reason == generation_pb2.FINISH_REASON_ABORTED
    assert finished.abort.monitor == made.name and finished.abort.score > 0.9
    assert len(ids) < len(free) and ids == free[: len(ids)]
    assert "action=abort" in dict(trailers)["glasshouse-monitor-flag"]
    assert at.served.metrics()['glasshouse_monitor_events_total{action="abort",monitor="stop"}'] == 1


async def test_steering_changes_what_follows(at: Desk) -> None:
    free, _, _ = await at.generate()
    vector = np.random.default_rng(1).standard_normal(WIDTH).astype(np.float32) * 20
    edit = interventions_pb2.Intervention(
        hook_point=AT, add_vector=interventions_pb2.AddVector(vector=pack(vector))
    )
    made = await at.create("steer", action=conditions.MONITOR_ACTION_STEER, interventions=[edit])
    ids, finished, _ = await at.generate()
    assert finished.finish_reason == generation_pb2.FINISH_REASON_LENGTH
    # Raised within the prompt: the first token is free, the next is made under the edit.
    assert ids[0] == free[0] and ids != free
    assert finished.flags[0].action == conditions.MONITOR_ACTION_STEER and not finished.receipt
    # Kept and read back, tensors and all.
    again = (await at.get("steer")).spec.interventions[0]
    assert again.add_vector.vector.data == vector.tobytes() and again.hook_point == AT
    assert made.spec.interventions[0] == again


async def test_filters_choose_by_label_key_and_sample(fable_model: Any, registry: Registry) -> None:
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("alice", "bob")}
    keys = KeySettings(entries=tuple(f"{name} admin {digest}" for name, digest in digests.items()))
    async with desk(fable_model, registry, Settings(keys=keys)) as at:
        alice = (("authorization", "Bearer alice"),)
        bob = (("authorization", "Bearer bob"),)
        weights = np.random.default_rng(0).standard_normal((WIDTH, 1)).astype(np.float32)
        probes = probes_pb2_grpc.ProbeServiceStub(at.served.channel)
        await probes.CreateProbe(create_probe("mood", weights, 0.0), metadata=alice)
        for name, chosen in {
            "tenant": pb.MonitorFilter(labels={"tenant": "a"}),
            "alices": pb.MonitorFilter(keys=["alice"]),
            "some": pb.MonitorFilter(sampling_rate=0.5),
        }.items():
            made = await at.monitors.CreateMonitor(
                pb.CreateMonitorRequest(monitor=name, spec=spec(filter=chosen)), metadata=alice
            )
            assert made.monitor.author == "alice"

        async def generate(key: Any, request_id: str, **labels: str) -> None:
            request = generation_pb2.GenerateRequest(
                input=inputs_pb2.Input(text=PROMPT), max_tokens=2, labels=labels
            )
            async for _ in at.served.generation.Generate(
                request, metadata=(*key, ("x-request-id", request_id))
            ):
                pass

        for index in range(20):
            await generate(bob, f"b-{index}")
        await generate(alice, "a-1", tenant="a")
        await generate(alice, "a-2", tenant="b")
        found = (await at.monitors.ListMonitors(pb.ListMonitorsRequest(), metadata=bob)).monitors
        counts = {monitor.name.rpartition("/")[2]: monitor.counts.requests for monitor in found}
        assert counts["tenant@1"] == 1 and counts["alices@1"] == 2
        names = [*(f"b-{index}" for index in range(20)), "a-1", "a-2"]
        wanted = sum(sampled(name, "some") < 0.5 for name in names)
        assert counts["some@1"] == wanted and 4 < wanted < 18


async def test_updates_are_versions_and_lost_ones_are_noticed(at: Desk) -> None:
    await at.create("sad", action=conditions.MONITOR_ACTION_FLAG)

    async def update(name: str, paths: list[str], **fields: Any) -> pb.Monitor:
        request = pb.UpdateMonitorRequest(
            name=name, spec=pb.MonitorSpec(**fields), update_mask=field_mask_pb2.FieldMask(paths=paths)
        )
        return (await at.monitors.UpdateMonitor(request)).monitor

    off = await update("sad", ["enabled"], enabled=False)
    assert (off.version, off.state) == (2, pb.MONITOR_STATE_DISABLED)
    assert off.spec.action == conditions.MONITOR_ACTION_FLAG
    _, finished, _ = await at.generate()
    assert not finished.flags
    on = await update("sad@2", ["enabled", "threshold"], threshold=pb.MonitorThreshold(on_above=0.25))
    # A field that is named and not set takes its default: enabled.
    assert (on.version, on.state, on.spec.threshold.on_above) == (3, pb.MONITOR_STATE_RUNNING, 0.25)
    lost = await refusal(lambda: at.monitors.UpdateMonitor(request_for("sad@1")))
    assert lost.code == "FAILED_PRECONDITION" and lost.metadata["version"] == "3"
    old = await at.get("sad@1")
    assert old.spec.threshold.on_above == 0.5 and old.state == pb.MONITOR_STATE_UNSPECIFIED
    unknown = await refusal(lambda: at.monitors.UpdateMonitor(request_for("sad", "colour")))
    assert unknown.field == "update_mask.paths[0]" and "threshold" in unknown.message
    version = await refusal(lambda: at.monitors.DeleteMonitor(pb.DeleteMonitorRequest(name="sad@3")))
    assert version.code == "INVALID_ARGUMENT" and version.field == "name"


def request_for(name: str, path: str = "enabled") -> pb.UpdateMonitorRequest:
    return pb.UpdateMonitorRequest(name=name, update_mask=field_mask_pb2.FieldMask(paths=[path]))


async def test_what_a_monitor_uses_stays(at: Desk) -> None:
    await at.create("sad")
    probes = probes_pb2_grpc.ProbeServiceStub(at.served.channel)
    used = await refusal(lambda: probes.DeleteProbe(probes_pb2.DeleteProbeRequest(name="mood")))
    assert used.code == "FAILED_PRECONDITION" and used.reason == "IN_USE"
    assert used.metadata["used_by"] == "models/fable/monitors/sad@1"
    (held,) = await at.engine.load_dictionary("resid", str(fable.dictionary_path("resid-post-3")))
    await at.create("feature", probe=None, feature=conditions.FeatureColumn(dictionary="resid", feature=3))
    dictionaries = dictionaries_pb2_grpc.DictionaryServiceStub(at.served.channel)
    unload = dictionaries_pb2.UnloadDictionaryRequest(name="resid")
    used = await refusal(lambda: dictionaries.UnloadDictionary(unload))
    assert used.reason == "IN_USE" and used.metadata["used_by"] == "models/fable/monitors/feature@1"
    for name in ("sad", "feature"):
        await at.monitors.DeleteMonitor(pb.DeleteMonitorRequest(name=name))
    await dictionaries.UnloadDictionary(unload)
    await probes.DeleteProbe(probes_pb2.DeleteProbeRequest(name="mood"))
    assert held is not None


BAD = {
    "no score": ({"probe": None}, "INVALID_ARGUMENT", "spec.score"),
    "no probe": ({"score": ""}, "INVALID_ARGUMENT", "spec.probe.probe"),
    "no such probe": ({"score": "moon"}, "NOT_FOUND", "spec.probe.probe"),
    "no such label": (
        {"probe": conditions.ProbeColumn(probe="mood", label="blue")}, "INVALID_ARGUMENT", "spec.probe.label",
    ),
    "no such dictionary": (
        {"probe": None, "feature": conditions.FeatureColumn(dictionary="x")}, "NOT_FOUND", "spec.feature.dictionary",
    ),
    "threshold out of reach": ({"on": 1.5}, "INVALID_ARGUMENT", "spec.threshold.on_above"),
    "threshold not finite": ({"on": float("nan")}, "INVALID_ARGUMENT", "spec.threshold.on_above"),
    "hysteresis upside down": (
        {"threshold": {"off_below": 0.9}}, "INVALID_ARGUMENT", "spec.threshold.off_below",
    ),
    "weight of another": (
        {"aggregation": pb.MonitorAggregation(kind=pb.AGGREGATION_KIND_MAX, weight=0.5)},
        "INVALID_ARGUMENT", "spec.aggregation.weight",
    ),
    "unknown aggregation": (
        {"aggregation": pb.MonitorAggregation(kind=9)}, "INVALID_ARGUMENT", "spec.aggregation.kind",
    ),
    "unknown action": ({"action": 9}, "INVALID_ARGUMENT", "spec.action"),
    "listed positions": (
        {"positions": inputs_pb2.PositionSelector(at=inputs_pb2.PositionList(positions=[3]))},
        "INVALID_ARGUMENT", "spec.positions",
    ),
    "steering without edits": (
        {"action": conditions.MONITOR_ACTION_STEER}, "INVALID_ARGUMENT", "spec.interventions",
    ),
    "edits without steering": (
        {"interventions": [interventions_pb2.Intervention(
            hook_point=AT, add_vector=interventions_pb2.AddVector(vector=pack(np.ones(WIDTH, np.float32))))]},
        "INVALID_ARGUMENT", "spec.interventions",
    ),
    "edits of another width": (
        {"action": conditions.MONITOR_ACTION_STEER, "interventions": [interventions_pb2.Intervention(
            hook_point=AT, add_vector=interventions_pb2.AddVector(vector=pack(np.ones(7, np.float32))))]},
        "INVALID_ARGUMENT", "spec.interventions[0].add_vector.vector",
    ),
    "sampling nobody": (
        {"filter": pb.MonitorFilter(sampling_rate=0.0)}, "INVALID_ARGUMENT", "spec.filter.sampling_rate",
    ),
    "no host for webhooks": (
        {"webhook": pb.Webhook(url="https://example.com/x", secret="s")},
        "FAILED_PRECONDITION", "spec.webhook.url",
    ),
    "no url": ({"webhook": pb.Webhook(url="ftp://x", secret="s")}, "INVALID_ARGUMENT", "spec.webhook.url"),
    "drift of nothing": ({"drift": pb.DriftSettings()}, "INVALID_ARGUMENT", "spec.drift.calibration_inputs"),
    "drift of too little": (
        {"drift": pb.DriftSettings(calibration_inputs=[inputs_pb2.Input(text="Hi.")])},
        "INVALID_ARGUMENT", "spec.drift.calibration_inputs",
    ),
    "a histogram that is none": (
        {"drift": pb.DriftSettings(calibration=pb.ScoreHistogram(edges=[1, 0], counts=[1, 1, 1]))},
        "INVALID_ARGUMENT", "spec.drift.calibration",
    ),
}  # fmt: skip


async def test_bad_monitors_are_refused_by_field(at: Desk) -> None:
    for what, (parts, code, field) in BAD.items():
        request = pb.CreateMonitorRequest(monitor="bad", spec=spec(**parts))
        refused = await refusal(lambda request=request: at.monitors.CreateMonitor(request))
        assert (refused.code, refused.field) == (code, field), what
        assert refused.metadata["remedy"], what
    for name in ("", "has space", "x" * 101):
        named = await refusal(
            lambda name=name: at.monitors.CreateMonitor(pb.CreateMonitorRequest(monitor=name, spec=spec()))
        )
        assert (named.code, named.field) == ("INVALID_ARGUMENT", "monitor")
    labels = await refusal(
        lambda: at.served.generation.Generate(
            generation_pb2.GenerateRequest(
                input=inputs_pb2.Input(text="a"), max_tokens=1, labels={"a b": "c"}
            )
        )
    )
    assert labels.field == "labels"
    assert not (await at.monitors.ListMonitors(pb.ListMonitorsRequest())).monitors


async def test_text_is_told_where_both_sides_agree(at: Desk) -> None:
    await at.create("told", include_text=True)
    await at.create("silent")
    await at.generate(request_id="r-1", allow_text_in_events=True)
    await at.generate(request_id="r-2")
    told = {event.request_id: event for event in await until_stored(at, "told", 2)}
    text = told["r-1"].text
    assert text and PROMPT.startswith(text) and told["r-2"].text == ""
    assert all(event.text == "" for event in await until_stored(at, "silent", 2))


async def test_the_operator_can_forbid_text(fable_model: Any, registry: Registry) -> None:
    async with desk(fable_model, registry, Settings(monitors=MonitorSettings(text="never"))) as at:
        await at.probe()
        await at.create("told", include_text=True)
        await at.generate(allow_text_in_events=True)
        assert [event.text for event in await until_stored(at, "told", 1)] == [""]


async def test_a_watch_goes_on_where_it_was_left(at: Desk) -> None:
    await at.create(
        "sad", aggregation=pb.MonitorAggregation(kind=pb.AGGREGATION_KIND_EXPONENTIAL, weight=1.0)
    )
    async with Watch(at.monitors, name="sad") as watch:
        for index in range(3):
            await at.generate(request_id=f"r-{index}")
        await until(lambda: any(event.request_id == "r-2" for event in watch.events))
        await asyncio.sleep(0.05)
    everything = list(watch.events)
    assert len(everything) > 6 and set(kinds(everything)) == {"RAISED", "CLEARED"}
    middle = everything[len(everything) // 2]
    rest = [event.id for event in everything if event.id > middle.id]
    async with Watch(at.monitors, name="sad", after_event=middle.id) as again:
        await until(lambda: len(again.events) >= len(rest))
        await at.generate(request_id="later")
        await until(lambda: again.events[-1].request_id == "later")
    assert [event.id for event in again.events][: len(rest)] == rest
    assert len({event.id for event in again.events}) == len(again.events)
    async with Watch(
        at.monitors, name="sad", kinds=[pb.MONITOR_EVENT_KIND_CLEARED], after_event=middle.id
    ) as some:
        await until(lambda: some.events)
    assert set(kinds(some.events)) == {"CLEARED"}
    bad = await refusal(lambda: at.monitors.WatchMonitor(pb.WatchMonitorRequest(name="sad", after_event="x")))
    assert bad.field == "after_event"


async def test_stored_events_come_in_pages(at: Desk) -> None:
    await at.create("sad")
    for index in range(5):
        await at.generate(request_id=f"r-{index}", max_tokens=1)
    await until_stored(at, "sad", 5)
    request = pb.ListMonitorEventsRequest(name="sad", page_size=2)
    seen: list[str] = []
    while True:
        found = await at.monitors.ListMonitorEvents(request)
        seen += [event.request_id for event in found.events]
        if not found.next_page_token:
            break
        request.page_token = found.next_page_token
    assert seen == [f"r-{index}" for index in (4, 3, 2, 1, 0)]
    bad = pb.ListMonitorEventsRequest(name="sad", page_token="nonsense")
    assert (await refusal(lambda: at.monitors.ListMonitorEvents(bad))).field == "page_token"


async def test_drift_is_an_event_and_a_metric(at: Desk) -> None:
    texts = [
        f"Once upon a time there was a little {word} named Lily." for word in ("girl", "dog", "cat", "bird")
    ]
    drift = pb.DriftSettings(
        calibration_inputs=[inputs_pb2.Input(text=text) for text in texts], min_scores=30, half_life=60
    )
    made = await at.create("sad", on=0.999, drift=drift)
    histogram = made.spec.drift.calibration
    assert len(histogram.counts) == len(histogram.edges) + 1
    assert sum(histogram.counts) == sum(
        len([t for t in at.engine.codec.encode(text) if t not in at.engine.info.special_token_ids])
        for text in texts
    )
    assert not made.spec.drift.calibration_inputs
    async with Watch(at.monitors, name="sad", kinds=[pb.MONITOR_EVENT_KIND_DRIFT]) as watch:
        # Nothing like a story.
        for index in range(8):
            await at.generate("7 7 7 7 7 = = = = ( ) ( ) ( )" + " 7" * index, max_tokens=8)
        await until(lambda: watch.events)
    event = watch.events[0]
    assert event.drift.drifted and event.drift.live_scores >= 30 and event.request_id == ""
    assert max(event.drift.population_stability_index / 0.25, event.drift.ks_statistic / 0.2) > 1
    now = await at.get("sad")
    assert now.drift.drifted
    metrics = at.served.metrics()
    assert metrics['glasshouse_monitor_drifted{monitor="sad"}'] == 1
    assert metrics['glasshouse_monitor_drift_psi{monitor="sad"}'] > 0
    assert metrics['glasshouse_monitor_events_total{action="drift",monitor="sad"}'] == 1


async def test_metrics_count_scores_and_requests(at: Desk) -> None:
    await at.create("sad", action=conditions.MONITOR_ACTION_FLAG)
    quiet = at.served.metrics()
    # There from the beginning: an increase from nothing is none to Prometheus.
    assert quiet['glasshouse_monitor_events_total{action="flag",monitor="sad"}'] == 0
    ids, _, _ = await at.generate()
    n_scores = len([t for t in at.engine.codec.encode(PROMPT) if t not in at.engine.info.special_token_ids])
    n_scores += len(ids) - 1
    name = 'glasshouse_probe_score_count{probe="mood@1"}'
    await until(lambda: at.served.metrics()[name] == n_scores)
    metrics = at.served.metrics()
    assert metrics['glasshouse_probe_score_bucket{le="+Inf",probe="mood@1"}'] == n_scores
    assert metrics['glasshouse_monitor_requests_total{monitor="sad"}'] == 1
    assert metrics['glasshouse_monitor_events_total{action="flag",monitor="sad"}'] >= 1
    assert metrics['glasshouse_monitors{state="running"}'] == 1
    assert metrics["glasshouse_registry_up"] == 1


async def test_two_servers_on_one_registry(fable_model: Any, registry: Registry) -> None:
    async with desk(fable_model, registry) as one, desk(fable_model, registry) as other:
        await one.probe()
        made = await one.create("sad", action=conditions.MONITOR_ACTION_FLAG)
        for _ in range(300):
            found = (await other.monitors.ListMonitors(pb.ListMonitorsRequest())).monitors
            if found:
                break
            await asyncio.sleep(0.01)
        assert [(m.name, m.state) for m in found] == [(made.name, pb.MONITOR_STATE_RUNNING)]
        _, finished, _ = await other.generate()
        assert finished.flags
        # Its events are there for everyone.
        assert (await until_stored(one, "sad", 1))[0].monitor == made.name


async def test_without_a_registry_nothing_is_watched(fable_model: Any) -> None:
    engine = TransformersEngine(fable_model, limits=Limits())
    await engine.start()
    try:
        async with serving(engine) as served:  # type: ignore[arg-type]
            stub = monitors_pb2_grpc.MonitorServiceStub(served.channel)
            assert not (await stub.ListMonitors(pb.ListMonitorsRequest())).monitors
            request = pb.CreateMonitorRequest(monitor="sad", spec=spec())
            assert (await refusal(lambda: stub.CreateMonitor(request))).code in (
                "NOT_FOUND", "FAILED_PRECONDITION",
            )  # fmt: skip
    finally:
        await engine.stop()


async def test_a_role_is_needed(fable_model: Any, registry: Registry) -> None:
    entry = f"bob user {hashlib.sha256(b'bob').hexdigest()}"
    async with desk(fable_model, registry, Settings(keys=KeySettings(entries=(entry,)))) as at:
        metadata = (("authorization", "Bearer bob"),)
        refused = await refusal(lambda: at.monitors.ListMonitors(pb.ListMonitorsRequest(), metadata=metadata))
        assert refused.code == "PERMISSION_DENIED"
