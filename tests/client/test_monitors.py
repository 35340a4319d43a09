"""Monitors through the client against a fake server: what is sent, what is made of the answers, watches that break."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from glasshouse.client import (
    AlreadyExistsError,
    AsyncClient,
    Client,
    DriftLimits,
    InvalidArgumentError,
    Model,
    NotFoundError,
    ScoreHistogram,
    Webhook,
    add_vector,
    prompt,
)
from glasshouse.client.testing import Failure, FakeServer

VOWELS, CONSONANTS = "aeiou aeiou", "bcdfg hjklm"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer(reply="ok") as server:
        yield server


@pytest.fixture
def model(server: FakeServer) -> Iterator[Model]:
    with Client(server.target) as client:
        yield client.model()


def say(model: Model, text: str) -> list[str]:
    stream = model.generate(text, max_tokens=2)
    stream.result()
    return [flag.monitor for flag in stream.flags]


def test_what_is_said_is_what_is_sent(model: Model, server: FakeServer) -> None:
    vector = np.ones(model.info.d_model, np.float32)
    made = model.create_monitor(
        "sad",
        probe="mood",
        label="sad",
        above=0.9,
        clear_below=0.4,
        min_tokens=3,
        aggregation="exponential",
        weight=0.5,
        positions=prompt().excluding_bos(),
        action="steer",
        interventions=[add_vector("blocks.0.hook_resid_post", vector, 2.0)],
        steer_while_on=True,
        keys=["alice"],
        labels={"tenant": "a"},
        sampling_rate=0.25,
        calibration=["one", "two"],
        drift_limits=DriftLimits(max_ks_statistic=0.5),
        webhook=Webhook(url="https://x/y", secret="pager", kinds=("raised",)),
        include_text=True,
        description="why",
    )
    spec = server.calls[-1].request.spec
    assert (spec.probe.probe, spec.probe.label) == ("mood", "sad")
    assert (spec.threshold.on_above, spec.threshold.off_below, spec.threshold.min_tokens) == (0.9, 0.4, 3)
    assert spec.aggregation.weight == 0.5 and not spec.aggregation.HasField("level")
    assert spec.positions.exclude_bos and len(spec.interventions) == 1 and spec.steer_while_on
    assert list(spec.filter.keys) == ["alice"] and spec.filter.sampling_rate == 0.25
    assert [one.text for one in spec.drift.calibration_inputs] == ["one", "two"]
    assert spec.drift.max_ks_statistic == 0.5 and not spec.drift.HasField("half_life")
    info = made.info
    assert (info.name, info.version, info.action, info.scored, info.label) == (
        "sad",
        1,
        "steer",
        "mood",
        "sad",
    )
    assert (info.aggregation, info.above, info.clear_below, info.positions) == (
        "exponential",
        0.9,
        0.4,
        "prompt",
    )
    assert info.webhook == Webhook(url="https://x/y", secret="pager", kinds=("raised",))
    assert info.labels == {"tenant": "a"} and info.n_interventions == 1 and made.state == "running"


def test_features_and_histograms(model: Model, server: FakeServer) -> None:
    histogram = ScoreHistogram(edges=(0.5,), counts=(3, 4))
    made = model.create_monitor("f", feature=("sae", 7), above=2.0, calibration=histogram)
    assert made.info.scored == "sae/7" and made.info.calibration == histogram
    assert model.monitor("f").info == made.info


def test_updates_complete_what_they_change(model: Model, server: FakeServer) -> None:
    made = model.create_monitor("sad", probe="mood", above=0.5, clear_below=0.2, labels={"tenant": "a"})
    assert made.update(above=0.75).version == 2
    sent = server.calls[-1].request
    assert list(sent.update_mask.paths) == ["threshold"] and sent.name.endswith("sad@1")
    assert (sent.spec.threshold.on_above, sent.spec.threshold.off_below) == (0.75, 0.2)
    assert made.info.above == 0.75 and made.info.labels == {"tenant": "a"}
    made.update(sampling_rate=0.5)
    assert server.calls[-1].request.spec.filter.labels == {"tenant": "a"}
    assert made.disable().state == "disabled" and not made.info.enabled
    assert made.enable().state == "running"
    assert [(one.name, one.version) for one in model.monitors()] == [("sad", 5)]
    assert model.monitor("sad@1").info.above == 0.5


def test_refusals_have_their_classes(model: Model) -> None:
    model.create_monitor("sad", probe="mood", above=0.5)
    with pytest.raises(AlreadyExistsError) as taken:
        model.create_monitor("sad", probe="mood", above=0.5)
    assert taken.value.next_version == 2
    with pytest.raises(NotFoundError):
        model.monitor("sat")
    with pytest.raises(InvalidArgumentError) as missing:
        model.create_monitor("x", above=0.5)
    assert missing.value.field == "spec.score"
    with pytest.raises(TypeError, match="probe must be a handle"):
        model.create_monitor("x", probe=3, above=0.5)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="explode"):
        model.create_monitor("x", probe="p", above=0.5, action="explode")  # type: ignore[arg-type]


def test_pages_are_turned(model: Model) -> None:
    for index in range(7):
        model.create_monitor(f"m{index}", probe="mood", above=0.5)
    assert [one.name for one in model.monitors()] == [f"m{index}" for index in range(7)]
    for _ in range(8):
        say(model, VOWELS)
    assert len(model.monitor("m0").events()) == 8
    assert len(model.monitor("m0").events(limit=5)) == 5


def test_flags_and_watches(model: Model) -> None:
    made = model.create_monitor("vowels", probe="mood", above=0.5, action="flag", include_text=True)
    with made.watch() as watch:
        assert say(model, VOWELS) == [made.resource_name]
        assert say(model, CONSONANTS) == []
        model.generate(VOWELS, max_tokens=2, labels={"tenant": "a"}, allow_text_in_events=True).result()
        first, second = next(watch), next(watch)
    assert (first.kind, first.action, first.aggregate, first.text) == ("raised", "flag", 1.0, "")
    assert second.labels == {"tenant": "a"} and second.text == VOWELS
    assert second.id > first.id and first.time.tzinfo is not None
    assert list(watch) == [], "closed"
    assert [event.id for event in made.events()] == [second.id, first.id]
    with model.watch_monitors(after=first) as again:
        assert next(again).id == second.id
    made.delete()
    assert model.monitors() == []


def test_a_watch_that_breaks_goes_on_from_its_last_event(
    model: Model, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glasshouse.client.monitors.calls.RECONNECT_S", 0.0)
    model.create_monitor("vowels", probe="mood", above=0.5)
    say(model, VOWELS)
    # Ends once, early, as a server does that is stopped.
    server.fail("WatchMonitor", Failure("UNAVAILABLE", "gone"), after_events=2)
    with model.watch_monitors() as watch:
        say(model, VOWELS)
        say(model, VOWELS)
        found = [next(watch).id for _ in range(2)]
    assert found == sorted(found) and len(set(found)) == 2
    asked = [call.request for call in server.calls if call.method == "WatchMonitor"]
    assert len(asked) == 2 and asked[0].after_event == "" and asked[1].after_event != ""


def test_closing_ends_a_reader_that_waits(model: Model) -> None:
    watch = model.watch_monitors()
    seen: list[object] = []
    reader = threading.Thread(target=lambda: seen.extend(watch))
    reader.start()
    watch.close()
    reader.join(10)
    assert not reader.is_alive() and seen == []


async def test_the_async_twin(server: FakeServer) -> None:
    async with AsyncClient(server.target) as client:
        model = await client.model()
        made = await model.create_monitor("vowels", probe="mood", above=0.5, action="flag")
        async with made.watch() as watch:
            stream = model.generate(VOWELS, max_tokens=2, labels={"tenant": "b"})
            await stream.result()
            assert [flag.monitor for flag in stream.flags] == [made.resource_name]
            event = await asyncio.wait_for(anext(watch), 10)
        assert event.labels == {"tenant": "b"}
        assert [one async for one in watch] == []
        assert [one.name for one in await model.monitors()] == ["vowels"]
        assert (await made.disable()).state == "disabled"
        assert (await made.refresh()).version == 2
        assert len(await made.events()) == 1
        await made.delete()
