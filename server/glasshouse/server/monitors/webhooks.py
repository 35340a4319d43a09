"""Events to an HTTP endpoint: signed, tried again, never waited for.

1. A webhook has a bounded queue and a task of its own: one that hangs holds up nobody else, and when its queue is full the
   oldest events are dropped and counted.
2. An event is one POST of a JSON object. `Glasshouse-Signature: t=SECONDS,v1=HEX`, HEX the HMAC-SHA256 of
   ``SECONDS.BODY`` under the secret: a receiver compares it, and refuses times that are long past.
   `Glasshouse-Event-Id` is the same each time that an event is tried again.
3. 2xx within the time limit is delivered. 408, 425, 429, 5xx, and no answer are tried again after pauses that double,
   with jitter; any other answer is given up at once, redirects included: an address that moved is for the owner to say.

The few lines of HTTP/1.1 are written here: one request a connection, the status line read, the rest not.
"""

from __future__ import annotations

import asyncio
import fnmatch
import hashlib
import hmac
import json
import random
import ssl
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import SplitResult, urlsplit

import structlog

from glasshouse.server.monitors.events import Event
from glasshouse.server.monitors.spec import WebhookSpec
from glasshouse.server.types.errors import FailedPrecondition, InvalidArgument
from glasshouse.wire import reasons

_log = structlog.get_logger(__name__)

MAX_URL = 2000
SIGNATURE_HEADER = "Glasshouse-Signature"
_MAX_STATUS_LINE = 4096
_TRY_AGAIN = frozenset({408, 425, 429})


@dataclass(frozen=True, kw_only=True)
class DeliverySettings:
    """How events are delivered. A try takes at most `timeout_s`; the first pause is about `first_pause_s`."""

    attempts: int = 5
    timeout_s: float = 5.0
    first_pause_s: float = 0.5
    max_queued: int = 1000


def check_url(url: str, hosts: Sequence[str], field: str) -> SplitResult:
    """The parts of a webhook's URL, to one of `hosts` (patterns such as ``*.example.com`` or ``127.0.0.1:*``).

    Raises:
        InvalidArgument: no URL that can be posted to.
        FailedPrecondition: a host that the operator has not named.
    """
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = -1
    fine = parts.scheme in ("http", "https") and parts.hostname and port != -1 and len(url) <= MAX_URL
    if not fine or parts.username or parts.password or parts.fragment or not url.isascii() or " " in url:
        raise InvalidArgument(
            f"{url[:200]!r} is not a URL that events can be posted to",
            reason=reasons.VALUE_MALFORMED,
            field=field,
            value=url,
            remedy="use http://HOST[:PORT]/PATH or https://..., in ASCII, without a name and password in it",
        )
    host = str(parts.hostname)
    where = f"{host}:{port or (443 if parts.scheme == 'https' else 80)}"
    if not any(fnmatch.fnmatch(host, pattern) or fnmatch.fnmatch(where, pattern) for pattern in hosts):
        raise FailedPrecondition(
            f"this server sends no events to {where}",
            reason=reasons.CAPABILITY_MISSING,
            field=field,
            value=url,
            remedy=f"the operator adds {host!r} to the setting monitors.webhook_hosts",
        )
    return parts


@lru_cache(maxsize=1)
def _trust() -> ssl.SSLContext:
    """The system's authorities, read once; SSL_CERT_FILE names others."""
    return ssl.create_default_context()


def sign(secret: bytes, seconds: int, body: bytes) -> str:
    """The value of the signature's header."""
    mac = hmac.new(secret, f"{seconds}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={seconds},v1={mac}"


def payload(event: Event) -> bytes:
    """An event as the JSON object that is posted; what does not apply is left out."""
    body: dict[str, Any] = {
        "id": event.id,
        "monitor": str(event.monitor),
        "event": event.kind.value,
        "action": event.action.value,
        "time": event.time.isoformat(timespec="microseconds"),
        "server": event.server,
    }
    optional: Mapping[str, Any] = {
        "request_id": event.request_id,
        "position": event.position,
        "score": event.score,
        "aggregate": event.aggregate,
        "threshold": event.threshold,
        "labels": dict(event.labels),
        "key": event.key,
        "text": event.text,
    }
    body.update({name: value for name, value in optional.items() if value not in (None, "", {})})
    if event.drift is not None:
        body["drift"] = {
            "population_stability_index": event.drift.population_stability_index,
            "ks_statistic": event.drift.ks_statistic,
            "ks_p_value": event.drift.ks_p_value,
            "live_scores": event.drift.n_live,
        }
    return json.dumps(body, ensure_ascii=False).encode()


class Webhook:
    """One endpoint, in the event loop. `tell` is told what became of each event: delivered, retried, failed, dropped."""

    def __init__(
        self,
        spec: WebhookSpec,
        parts: SplitResult,
        secret: Callable[[], bytes],
        tell: Callable[[str], None],
        settings: DeliverySettings,
    ) -> None:
        self.spec = spec
        self._parts = parts
        self._secret = secret
        self._tell = tell
        self._settings = settings
        self._queue: deque[Event] = deque()
        self._news = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._task = asyncio.create_task(self._run(), name="monitor-webhook")
        self._warned = False

    def offer(self, event: Event) -> bool:
        """Queues an event if it is of a kind that is wanted; whether an older one was dropped for it."""
        if self.spec.kinds and event.kind not in self.spec.kinds:
            return False
        full = len(self._queue) >= self._settings.max_queued
        if full:
            self._queue.popleft()
            self._tell("dropped")
        self._queue.append(event)
        self._idle.clear()
        self._news.set()
        return full

    async def close(self, grace_s: float = 0.0) -> None:
        """Ends; what is queued has `grace_s` to be delivered."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace_s)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await self._news.wait()
            while self._queue:
                # It stays queued while it is tried, so that closing waits for it.
                event = self._queue[0]
                delivered = await self._deliver(event)
                self._tell("delivered" if delivered else "failed")
                if self._queue and self._queue[0] is event:
                    self._queue.popleft()
            self._news.clear()
            self._idle.set()

    async def _deliver(self, event: Event) -> bool:
        body = payload(event)
        for attempt in range(self._settings.attempts):
            if attempt:
                self._tell("retried")
                pause = self._settings.first_pause_s * 2 ** (attempt - 1)
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            why, again = await self._try(event, body)
            if not why:
                self._warned = False
                return True
            if not again:
                break
        if not self._warned:
            # Once until it works again: a webhook that is down must not fill the log.
            _log.warning("webhook_failed", monitor=str(event.monitor), host=self._parts.netloc, why=why)
            self._warned = True
        return False

    async def _try(self, event: Event, body: bytes) -> tuple[str, bool]:
        """Why it was not delivered, empty where it was; and whether trying again may help."""
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                status = await self._post(event, body)
        except TimeoutError:
            return f"no answer within {self._settings.timeout_s:g} s", True
        except ssl.SSLCertVerificationError as error:
            return f"its certificate is not trusted ({error.verify_message})", True
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            return f"{type(error).__name__}", True
        except FailedPrecondition as error:
            return error.message, True
        if 200 <= status < 300:
            return "", False
        return f"it answered {status}", status in _TRY_AGAIN or status >= 500

    async def _post(self, event: Event, body: bytes) -> int:
        parts = self._parts
        secure = parts.scheme == "https"
        seconds = int(time.time())
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        lines = [
            f"POST {target} HTTP/1.1",
            f"Host: {parts.netloc}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "User-Agent: glasshouse",
            f"{SIGNATURE_HEADER}: {sign(self._secret(), seconds, body)}",
            f"Glasshouse-Event-Id: {event.id}",
            "Connection: close",
        ]
        reader, writer = await asyncio.open_connection(
            parts.hostname,
            parts.port or (443 if secure else 80),
            ssl=await asyncio.to_thread(_trust) if secure else None,
            limit=_MAX_STATUS_LINE,
        )
        try:
            writer.write("\r\n".join(lines).encode("ascii") + b"\r\n\r\n" + body)
            await writer.drain()
            version, _, rest = (await reader.readline()).decode("latin-1").partition(" ")
            if not version.startswith("HTTP/1."):
                raise ValueError("the answer is not HTTP")
            return int(rest[:3])
        finally:
            writer.close()
