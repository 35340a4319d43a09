"""Deliveries to real HTTP endpoints: signed, tried again, bounded, and nobody's burden."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import trustme

from glasshouse.server.monitors import webhooks
from glasshouse.server.monitors.events import Event, new_id
from glasshouse.server.monitors.secret_references import SecretReferences
from glasshouse.server.monitors.spec import EventKind, WebhookSpec
from glasshouse.server.monitors.webhooks import DeliverySettings, Webhook, check_url
from glasshouse.server.registry.names import Kind, Reference
from glasshouse.server.types.conditions import MonitorAction
from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument

from ..serving import until
from .endpoints import BROKEN, MOVED, OK, REFUSED, Endpoint, endpoint

SECRET = b"sixteen bytes or more"
FAST = DeliverySettings(attempts=4, timeout_s=2.0, first_pause_s=0.01, max_queued=8)


def event(index: int = 0, kind: EventKind = EventKind.RAISED, text: str = "") -> Event:
    now = datetime.now(tz=UTC)
    monitor = Reference(kind=Kind.MONITOR, model="fable", name="sad", version=3)
    return Event(
        id=new_id(now), monitor=monitor, kind=kind, action=MonitorAction.FLAG, time=now,
        request_id=f"r-{index}", position=7, score=0.75, aggregate=0.5, threshold=0.25, text=text,
        labels={"tenant": "ä"}, server="here",
    )  # fmt: skip


@asynccontextmanager
async def webhook(
    url: str, settings: DeliverySettings = FAST, kinds: tuple[EventKind, ...] = ()
) -> AsyncIterator[tuple[Webhook, Counter[str]]]:
    told: Counter[str] = Counter()
    spec = WebhookSpec(url=url, secret="pager", kinds=kinds)
    parts = check_url(url, ["*"], "url")
    made = Webhook(spec, parts, lambda: SECRET, lambda outcome: told.update([outcome]), settings)
    try:
        yield made, told
    finally:
        await made.close()


def genuine(header: str, body: bytes) -> bool:
    """As a receiver checks it, written from the page alone."""
    parts = dict(part.split("=", 1) for part in header.split(","))
    expected = hmac.new(SECRET, f"{parts['t']}.".encode() + body, hashlib.sha256).hexdigest()
    return hmac.compare_digest(expected, parts["v1"]) and abs(time.time() - int(parts["t"])) < 60


async def test_an_event_arrives_signed_and_whole() -> None:
    async with endpoint(OK) as there, webhook(there.url) as (hook, told):
        sent = event(text="Once…")
        hook.offer(sent)
        await until(lambda: told["delivered"])
    (post,) = there.posts
    assert post.path == "/hook?a=1" and post.headers["content-type"] == "application/json"
    assert genuine(post.headers["glasshouse-signature"], post.body)
    assert not genuine(post.headers["glasshouse-signature"], post.body + b" ")
    assert post.headers["glasshouse-event-id"] == sent.id == post.json["id"]
    assert post.json["monitor"] == "models/fable/monitors/sad@3" and post.json["event"] == "raised"
    assert (post.json["position"], post.json["aggregate"], post.json["text"]) == (7, 0.5, "Once…")
    assert post.json["labels"] == {"tenant": "ä"} and "drift" not in post.json


async def test_trouble_is_tried_again_with_the_same_id() -> None:
    async with endpoint(BROKEN, "not http at all\r\n\r\n", OK) as there, webhook(there.url) as (hook, told):
        hook.offer(event())
        await until(lambda: told["delivered"])
    assert told == {"retried": 2, "delivered": 1}
    assert len({post.headers["glasshouse-event-id"] for post in there.posts}) == 1


@pytest.mark.parametrize("answer", [REFUSED, MOVED])
async def test_a_refusal_is_final_and_nothing_is_followed(answer: str) -> None:
    async with endpoint(answer, OK) as there, webhook(there.url) as (hook, told):
        hook.offer(event(1))
        await until(lambda: told["failed"])
        hook.offer(event(2))
        await until(lambda: told["delivered"])
    assert told == {"failed": 1, "delivered": 1} and len(there.posts) == 2


async def test_an_endpoint_that_is_not_there_is_given_up() -> None:
    async with endpoint(OK) as gone:
        pass
    async with webhook(gone.url) as (hook, told):
        hook.offer(event())
        await until(lambda: told["failed"])
    assert told == {"retried": 3, "failed": 1}


async def test_one_that_hangs_fills_its_own_queue_and_closes_at_once() -> None:
    settings = DeliverySettings(attempts=2, timeout_s=60.0, first_pause_s=0.01, max_queued=4)
    async with endpoint(None) as there, endpoint(OK) as fine:
        async with webhook(there.url, settings) as (hook, told), webhook(fine.url) as (other, heard):
            for index in range(10):
                hook.offer(event(index))
                if index == 0:
                    await until(lambda: there.posts)
            other.offer(event())
            await until(lambda: heard["delivered"])
            assert told["dropped"] == 6
            before = time.monotonic()
        assert time.monotonic() - before < 30, "closing does not wait for an answer"


async def test_only_the_kinds_that_are_wanted() -> None:
    async with endpoint(OK) as there, webhook(there.url, kinds=(EventKind.DRIFT,)) as (hook, told):
        hook.offer(event())
        hook.offer(event(kind=EventKind.DRIFT))
        await until(lambda: told["delivered"])
    assert [post.json["event"] for post in there.posts] == ["drift"]


async def test_closing_gives_what_is_queued_a_moment() -> None:
    async with endpoint(OK) as there, webhook(there.url) as (hook, told):
        for index in range(5):
            hook.offer(event(index))
        await hook.close(grace_s=20.0)
    assert told["delivered"] == len(there.posts) == 5


async def test_https_needs_a_certificate_that_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    secure = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(secure)
    there = Endpoint([OK])
    server = await asyncio.start_server(there._serve, "127.0.0.1", 0, ssl=secure)
    url = f"https://localhost:{server.sockets[0].getsockname()[1]}/"
    async with webhook(url) as (hook, told):
        hook.offer(event())
        await until(lambda: told["failed"])
    assert not there.posts
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    monkeypatch.setattr(webhooks, "_trust", lambda: trusting)
    async with webhook(url) as (hook, told):
        hook.offer(event())
        await until(lambda: told["delivered"])
    assert len(there.posts) == 1
    server.close()


@pytest.mark.parametrize(
    "url",
    ["", "example.com", "ftp://example.com", "http://", "http://u:p@h/", "http://h:99999/", "http://h/#f",
     "http://h/\r\nX: y", "http://h/a b", "http://ü/"],
)  # fmt: skip
def test_urls_that_cannot_be_posted_to(url: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        check_url(url, ["*"], "spec.webhook.url")
    assert refused.value.field == "spec.webhook.url"


@pytest.mark.parametrize(
    ("url", "hosts", "fine"),
    [
        ("https://alerts.example.com/x", ["alerts.example.com"], True),
        ("https://alerts.example.com/x", ["*.example.com"], True),
        ("https://example.com.evil.net/x", ["*.example.com", "example.com"], False),
        ("http://127.0.0.1:9000/", ["127.0.0.1:*"], True),
        ("http://127.0.0.1:9000/", ["127.0.0.1:80"], False),
        ("http://127.0.0.1/", ["127.0.0.1:80"], True),
        ("http://169.254.169.254/latest", [], False),
    ],
)
def test_hosts_are_the_operators_to_name(url: str, hosts: list[str], fine: bool) -> None:
    if fine:
        check_url(url, hosts, "url")
    else:
        with pytest.raises(FailedPrecondition, match="sends no events"):
            check_url(url, hosts, "url")


def test_secrets_are_found_where_they_are_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "secret"
    kept.write_bytes(b"a secret of many bytes\n")
    monkeypatch.setenv("PAGER_SECRET", "another secret of many bytes")
    monkeypatch.setenv("SHORT", "short")
    places: dict[str, Any] = {
        "file": f"file:{kept}", "env": "env:PAGER_SECRET", "short": "env:SHORT", "none": "env:NOT_SET",
        "gone": f"file:{tmp_path / 'gone'}",
    }  # fmt: skip
    secrets = SecretReferences(places)
    assert secrets.read("file") == b"a secret of many bytes"
    assert secrets.read("env") == b"another secret of many bytes"
    kept.write_bytes(b"changed without a restart")
    assert secrets.read("file") == b"changed without a restart"
    for name in ("short", "none", "gone", "unknown"):
        with pytest.raises(FailedPrecondition) as refused:
            secrets.read(name, field="spec.webhook.secret")
        assert refused.value.field == "spec.webhook.secret" and "short" not in refused.value.message[16:]
