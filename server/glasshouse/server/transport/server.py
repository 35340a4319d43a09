"""The server: bound first, serving when its engines are ready, drained before it stops."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from glasshouse.server.monitors.room import MonitorRoom
from glasshouse.server.operations.manager import OperationManager, OperationSettings
from glasshouse.server.probes.library import ConceptLibrary
from glasshouse.server.probes.model_concepts import ModelConcepts
from glasshouse.server.services.activations import ActivationServicer
from glasshouse.server.services.attribution import AttributionServicer
from glasshouse.server.services.catalogue import Catalogue
from glasshouse.server.services.dictionaries import DictionaryServicer
from glasshouse.server.services.directions import DirectionServicer
from glasshouse.server.services.feature_labels import FeatureLabelServicer
from glasshouse.server.services.generation import GenerationServicer
from glasshouse.server.services.models import ModelServicer
from glasshouse.server.services.monitors import MonitorServicer
from glasshouse.server.services.operations import OperationServicer
from glasshouse.server.services.probes import ProbeServicer
from glasshouse.server.types.configuration import Settings

from .gate import Gate
from .keys import KeyRing
from .listening import UNIX_PREFIX, Address, ListenError, check_exposure, credentials, parse_address
from .logs import Logger
from .methods import METHODS, SERVICES
from .metrics import Metrics
from .standard import NOT_SERVING, SERVING, HealthServicer, health_handlers, reflection_handlers
from .status import rich_status

if TYPE_CHECKING:
    from glasshouse.server.engines.engine import Engine

_HEALTH_INTERVAL_S = 0.5
# What answers need to reach their callers once everything is over.
_LAST_WORDS_S = 1.0
# How long a watcher that does not read may hold up a change of health.
_HEALTH_CHANGE_S = 1.0


@dataclass(frozen=True, kw_only=True)
class _Running:
    gate: Gate
    engines: tuple[Engine, ...]
    operations: OperationManager
    attribution: AttributionServicer
    monitors: MonitorRoom
    watch: asyncio.Task[None]


class Server:
    """A gRPC server over engines.

    It is bound when it is made, so that a taken port is known before a model is loaded; callers that connect
    then wait until `start`. Made and used within one running event loop.

    Raises:
        ListenError: an address that may not or cannot be listened on, or TLS files that cannot be used.
        KeyFileError: keys that cannot be read.
    """

    def __init__(self, settings: Settings, log: Logger) -> None:
        self._settings = settings
        self._log = log
        self._keys = KeyRing.load(settings.keys)
        self._engines: tuple[Engine, ...] = ()
        self._running: _Running | None = None
        self._health: Any = HealthServicer()
        self.metrics = Metrics((method.name for method in METHODS), self._queue_depth, self._engine_counts)
        self._server = grpc.aio.server(options=_options(settings))
        self.address = self._bind(parse_address(settings.server.listen))

    async def start(self, engines: Sequence[Engine], library: ConceptLibrary | None = None) -> None:
        """Serves `engines`, which have been started, and what `library` holds of directions and probes, which whoever
        made it starts and stops; without one nothing can be published. Health answers SERVING when this returns.
        """
        library = library or ConceptLibrary()
        settings, limits = self._settings, self._settings.limits
        self._engines = tuple(engines)
        for engine in self._engines:
            engine.use_concepts(ModelConcepts(library, model=engine.info.name, revision=engine.info.revision))
        catalogue = Catalogue(self._engines)
        operations = OperationManager(OperationSettings())
        monitors = MonitorRoom(library, self._engines, settings.monitors, settings.secrets)
        await monitors.start()
        self.metrics.monitors = monitors
        attribution = AttributionServicer(catalogue, limits, operations, settings.attribution)
        servicers = {
            "glasshouse.v1.ModelService": ModelServicer(catalogue, limits),
            "glasshouse.v1.GenerationService": GenerationServicer(
                catalogue, limits, settings.streams, monitors
            ),
            "glasshouse.v1.ActivationService": ActivationServicer(catalogue, limits),
            "glasshouse.v1.DictionaryService": DictionaryServicer(
                catalogue, limits, operations, monitors, library
            ),
            "glasshouse.v1.DirectionService": DirectionServicer(catalogue, limits, operations, library),
            "glasshouse.v1.ProbeService": ProbeServicer(catalogue, limits, operations, library),
            "glasshouse.v1.FeatureLabelService": FeatureLabelServicer(catalogue, library),
            "glasshouse.v1.AttributionService": attribution,
            "glasshouse.v1.MonitorService": MonitorServicer(catalogue, limits, monitors),
            "google.longrunning.Operations": OperationServicer(
                operations, lambda error: rich_status(error, "")
            ),
        }
        gate = Gate(keys=self._keys, limits=limits, metrics=self.metrics, log=self._log)
        for service in SERVICES:
            handlers = {
                method.method: gate.handler(method, getattr(servicers[service], method.method))
                for method in METHODS
                if method.service == service
            }
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        self._server.add_generic_rpc_handlers(health_handlers(self._health))
        if settings.server.reflection:
            self._server.add_generic_rpc_handlers(reflection_handlers())
        await self._set_health(self._healthy())
        await self._server.start()
        self._running = _Running(
            gate=gate,
            engines=self._engines,
            operations=operations,
            attribution=attribution,
            monitors=monitors,
            watch=asyncio.create_task(self._watch_engines()),
        )

    async def drain(self) -> bool:
        """Takes no new requests and waits for those in flight; whether they were done in time."""
        if self._running is None:
            return True
        self._running.watch.cancel()
        # Health first: whoever balances load is to know before a request is refused.
        with suppress(TimeoutError):
            await asyncio.wait_for(self._health.enter_graceful_shutdown(), _HEALTH_CHANGE_S)
        self._running.gate.draining = True
        self._running.monitors.end_watches()
        timeout_s = self._settings.server.drain_timeout_s
        self._log.info("draining", in_flight=self.metrics.active_requests, timeout_s=timeout_s)
        try:
            await asyncio.wait_for(self._running.gate.idle(), timeout_s)
        except TimeoutError:
            self._log.warning("drain timeout", in_flight=self.metrics.active_requests)
            return False
        return True

    async def stop(self) -> None:
        """Ends what is left and stops listening. Engines are stopped by whoever started them."""
        if self._running is not None:
            self._running.watch.cancel()
            await self._running.operations.stop()
            await self._running.monitors.stop()
            self._running.attribution.stop()
        await self._server.stop(_LAST_WORDS_S)
        if self.address.is_unix:
            _remove_socket(self.address)

    def _bind(self, address: Address) -> Address:
        check_exposure(address, self._settings.server, self._settings.tls)
        secure = credentials(self._settings.tls)
        try:
            if secure is None:
                port = self._server.add_insecure_port(str(address))
            else:
                port = self._server.add_secure_port(str(address), secure)
        except RuntimeError as error:
            raise ListenError(
                f"cannot listen on {address}; is the port taken? Choose another with --listen, or 0"
            ) from error
        if port == 0:
            raise ListenError(f"cannot listen on {address}: the certificate or its key cannot be used")
        return address if address.is_unix else Address(host=address.host, port=port)

    def _queue_depth(self) -> int:
        return sum(engine.status().queued for engine in self._engines)

    def _engine_counts(self) -> Mapping[str, int]:
        total: Counter[str] = Counter()
        for engine in self._engines:
            total.update(dataclasses.asdict(engine.status().counts))
        return total

    def _healthy(self) -> bool:
        return all(engine.status().healthy for engine in self._engines)

    async def _set_health(self, serving: bool) -> None:
        for service in ("", *SERVICES):
            with suppress(TimeoutError):
                change = self._health.set(service, SERVING if serving else NOT_SERVING)
                await asyncio.wait_for(change, _HEALTH_CHANGE_S)

    async def _watch_engines(self) -> None:
        """Health follows the engines'."""
        was = True
        while True:
            now = self._healthy()
            if now != was:
                broken = [
                    status.reason for engine in self._engines if not (status := engine.status()).healthy
                ]
                self._log.error("health", serving=now, reasons=broken)
                await self._set_health(now)
                was = now
            await asyncio.sleep(_HEALTH_INTERVAL_S)


def _remove_socket(address: Address) -> None:
    Path(address.host.removeprefix(UNIX_PREFIX)).unlink(missing_ok=True)


def _options(settings: Settings) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", settings.limits.max_message_bytes),
        # Services keep their messages small; the gate refuses answers that are not.
        ("grpc.max_send_message_length", -1),
        # Otherwise a second server would share a taken port without a word.
        ("grpc.so_reuseport", 0),
        # A caller that is gone without a goodbye is noticed within a minute.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]
