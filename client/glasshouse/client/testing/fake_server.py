"""A fake server's transport: sockets, keys, recorded calls, injected failures, health."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc

from glasshouse.client.testing.failures import Failure, RefusedError, refused
from glasshouse.client.testing.fake_attribution_services import FakeAttributionServices
from glasshouse.client.testing.fake_concept_services import FakeConceptServices
from glasshouse.client.testing.fake_dictionary_services import FakeDictionaryServices
from glasshouse.client.testing.fake_methods import (
    FakeMethod,
    attribution_methods,
    concept_methods,
    dictionary_methods,
    model_methods,
    monitor_methods,
    operation_methods,
)
from glasshouse.client.testing.fake_model import FakeModel
from glasshouse.client.testing.fake_monitor_services import FakeMonitorServices
from glasshouse.client.testing.fake_operations import FakeOperations
from glasshouse.client.testing.fake_services import FakeServices
from glasshouse.wire import reasons
from glasshouse.wire.tensors import CHUNK_BYTES

_SERVING, _NOT_SERVING = b"\x08\x01", b"\x08\x02"


@dataclass(frozen=True)
class RecordedCall:
    """A call that arrived. `method` is its short name, such as "Generate"; `metadata` what came beside it."""

    method: str
    request: Any
    metadata: dict[str, str | bytes]
    timeout_s: float | None


@dataclass
class _Planned:
    failure: Failure
    times: int
    after_events: int


class FakeServer:
    """A server in this process, on a free loopback port: `with FakeServer() as server:
    Client(server.target)`.

    `reply` is what every generation says; without it the text is deterministic letters. `token_delay_s`
    passes before each event of a stream. `unavailable_first` calls are refused with a bare UNAVAILABLE before
    any is served. `api_key` is asked for where given; `credentials` make it a TLS server; `models` replace
    the one called "fake". `chunk_bytes` and `tokens_per_event` shape the streams. An operation is done after
    `operation_polls` polls. `serving` False answers health checks NOT_SERVING until `set_serving(True)`.
    """

    def __init__(
        self,
        *,
        reply: str | None = None,
        models: Sequence[FakeModel] | None = None,
        unavailable_first: int = 0,
        token_delay_s: float = 0.0,
        tokens_per_event: int = 1,
        chunk_bytes: int = CHUNK_BYTES,
        operation_polls: int = 3,
        api_key: str | None = None,
        credentials: grpc.ServerCredentials | None = None,
        serving: bool = True,
        max_concurrent: int = 64,
        port: int = 0,
    ) -> None:
        self.calls: list[RecordedCall] = []
        self._services = FakeServices(models or [FakeModel(reply=reply)], chunk_bytes, tokens_per_event)
        self._operations = FakeOperations(operation_polls)
        self._dictionaries = FakeDictionaryServices(self._services.model, self._operations)
        self._monitors = FakeMonitorServices(self._services.model)
        self._services.flags = self._monitors.flags
        self._attribution = FakeAttributionServices(self._services.model, self._operations)
        self._concepts = FakeConceptServices(self._services.model, self._operations)
        self.token_delay_s = token_delay_s
        self._api_key = api_key
        self._credentials = credentials
        self._serving = serving
        self._max_concurrent = max_concurrent
        self._port = port
        self._lock = threading.Condition()
        self._planned: dict[str, list[_Planned]] = defaultdict(list)
        self._unavailable = unavailable_first
        self._n_active = self._n_cancelled = 0
        self._server: grpc.Server | None = None

    def __enter__(self) -> FakeServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def target(self) -> str:
        """What a Client takes; once started."""
        return f"localhost:{self._port}"

    @property
    def active_calls(self) -> int:
        """Calls under way."""
        with self._lock:
            return self._n_active

    def start(self) -> None:
        """Listens. Raises RuntimeError where the port is taken."""
        # The default lets two servers share a port; a test would then talk to either.
        self._server = grpc.server(
            ThreadPoolExecutor(self._max_concurrent, thread_name_prefix="fake-server"),
            options=[("grpc.so_reuseport", 0)],
        )
        self._server.add_generic_rpc_handlers(self._handlers())
        address = f"127.0.0.1:{self._port}"
        if self._credentials is None:
            self._port = self._server.add_insecure_port(address)
        else:
            self._port = self._server.add_secure_port(address, self._credentials)
        self._server.start()

    def stop(self) -> None:
        """Ends every call and closes the port."""
        if self._server is not None:
            self._server.stop(None).wait()
            self._server = None

    def set_serving(self, serving: bool) -> None:
        """What health checks answer from now on."""
        self._serving = serving

    def fail(self, method: str, failure: Failure, *, times: int = 1, after_events: int = 0) -> None:
        """The next `times` calls of a method, such as "Generate", fail after that many events of their
        stream."""
        with self._lock:
            self._planned[method].append(_Planned(failure, times, after_events))

    def wait_cancelled(self, n: int = 1, timeout: float = 10.0) -> None:
        """Waits until `n` calls in all were ended by their callers or deadlines. Raises TimeoutError."""
        with self._lock:
            if not self._lock.wait_for(lambda: self._n_cancelled >= n, timeout):
                raise TimeoutError(f"{self._n_cancelled} of {n} calls were cancelled within {timeout:g} s")

    def fail_operation(self, failure: Failure) -> None:
        """The next operation to start ends in that failure."""
        self._operations.plan(failure)

    def _handlers(self) -> tuple[Any, ...]:
        services = (
            *model_methods(self._services),
            *dictionary_methods(self._dictionaries),
            *concept_methods(self._concepts),
            *monitor_methods(self._monitors),
            *attribution_methods(self._attribution),
            *operation_methods(self._operations),
        )
        handlers = []
        for service, methods in services:
            table = {each.name: self._handler(each) for each in methods}
            handlers.append(grpc.method_handlers_generic_handler(service, table))
        check = grpc.unary_unary_rpc_method_handler(lambda _, __: _SERVING if self._serving else _NOT_SERVING)
        handlers.append(grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check}))
        return tuple(handlers)

    def _handler(self, method: FakeMethod) -> Any:
        name, answer, parse = method.name, method.answer, method.request.FromString
        if method.streams:
            return grpc.unary_stream_rpc_method_handler(self._stream(name, answer), parse, _serialize)
        unary = self._unary(name, answer)
        if not method.takes_stream:
            return grpc.unary_unary_rpc_method_handler(unary, parse, _serialize)

        def gather(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
            whole = method.request()
            for request in requests:
                whole.MergeFrom(request)
            return unary(whole, context)

        return grpc.stream_unary_rpc_method_handler(gather, parse, _serialize)

    def _unary(self, method: str, answer: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
        def handle(request: Any, context: grpc.ServicerContext) -> Any:
            try:
                planned = self._admit(method, request, context)
                if planned is not None:
                    raise RefusedError(planned.failure)
                return answer(request)
            except RefusedError as error:
                _abort(context, error.failure)

        return handle

    def _stream(
        self, method: str, answer: Callable[[Any], Iterator[Any]]
    ) -> Callable[[Any, Any], Iterator[Any]]:
        def handle(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            over = threading.Event()
            context.add_callback(over.set)
            with self._lock:
                self._n_active += 1
            finished = False
            try:
                planned = self._admit(method, request, context)
                for n, event in enumerate(answer(request)):
                    if planned is not None and n >= planned.after_events:
                        raise RefusedError(planned.failure)
                    if over.wait(self.token_delay_s) if self.token_delay_s else over.is_set():
                        return
                    yield event
                finished = True
            except RefusedError as error:
                finished = True
                _abort(context, error.failure)
            finally:
                with self._lock:
                    self._n_active -= 1
                    self._n_cancelled += not finished
                    self._lock.notify_all()

        return handle

    def _admit(self, method: str, request: Any, context: grpc.ServicerContext) -> _Planned | None:
        """Records a call and checks its key; the failure that is planned for it."""
        metadata: dict[str, str | bytes] = dict(context.invocation_metadata())
        with self._lock:
            self.calls.append(RecordedCall(method, request, metadata, context.time_remaining()))
            if self._unavailable > 0:
                self._unavailable -= 1
                raise refused("UNAVAILABLE", "not yet")
            if self._api_key is not None and metadata.get("authorization") != f"Bearer {self._api_key}":
                missing = "authorization" not in metadata
                reason = reasons.KEY_MISSING if missing else reasons.KEY_UNKNOWN
                raise refused("UNAUTHENTICATED", "a key is needed", reason=reason, remedy="Pass api_key=")
            planned = self._planned[method]
            if not planned:
                return None
            planned[0].times -= 1
            return planned.pop(0) if planned[0].times <= 0 else planned[0]


def _abort(context: grpc.ServicerContext, failure: Failure) -> None:
    metadata = dict(context.invocation_metadata())
    context.set_trailing_metadata(failure.trailing_metadata(str(metadata.get("x-request-id", ""))))
    context.abort(failure.status_code, failure.message)


def _serialize(message: Any) -> bytes:
    serialized: bytes = message.SerializeToString()
    return serialized
