"""A real server over fake engines, and what its refusals say."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from glasshouse.server.probes.library import ConceptLibrary
from glasshouse.server.transport.logs import build_logger
from glasshouse.server.transport.server import Server
from glasshouse.server.types.configuration import ListenSettings, LogSettings, Settings
from glasshouse.v1 import activations_pb2_grpc, generation_pb2_grpc, models_pb2_grpc

from .fake_engine import FakeEngine

ANSWER_S = 10.0


@dataclass
class Served:
    """A running server, a channel to it, and its log."""

    server: Server
    engine: FakeEngine
    channel: grpc.aio.Channel
    log: io.StringIO = field(repr=False)

    @property
    def models(self) -> Any:
        return models_pb2_grpc.ModelServiceStub(self.channel)

    @property
    def generation(self) -> Any:
        return generation_pb2_grpc.GenerationServiceStub(self.channel)

    @property
    def activations(self) -> Any:
        return activations_pb2_grpc.ActivationServiceStub(self.channel)

    @property
    def target(self) -> str:
        return str(self.server.address)

    def log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.getvalue().splitlines()]

    def metrics(self) -> dict[str, float]:
        """Samples by their text, such as `glasshouse_requests_total{code="OK",method="..."}`."""
        from prometheus_client import generate_latest

        lines = generate_latest(self.server.metrics.registry).decode().splitlines()
        return {
            line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
            for line in lines
            if not line.startswith("#")
        }


@asynccontextmanager
async def serving(
    *engines: FakeEngine,
    settings: Settings | None = None,
    credentials: grpc.ChannelCredentials | None = None,
    library: ConceptLibrary | None = None,
) -> AsyncIterator[Served]:
    """A server on a free port."""
    settings = settings or Settings()
    if settings.server == ListenSettings():
        settings = replace(settings, server=ListenSettings(listen="127.0.0.1:0"))
    log = io.StringIO()
    server = Server(settings, build_logger(LogSettings(format="json"), log))
    chosen = engines or (FakeEngine(),)
    await server.start(chosen, library)
    target = str(server.address)
    channel = (
        grpc.aio.secure_channel(target.replace("127.0.0.1", "localhost"), credentials)
        if credentials is not None
        else grpc.aio.insecure_channel(target)
    )
    try:
        async with channel:
            yield Served(server=server, engine=chosen[0], channel=channel, log=log)
    finally:
        await server.stop()


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A status as a client sees it."""

    code: str
    message: str
    reason: str
    field: str
    metadata: dict[str, str]
    details: tuple[Any, ...]
    trailer_bytes: int

    def detail(self, kind: type[Any]) -> Any:
        """The detail message of a kind."""
        return next(detail for detail in self.details if isinstance(detail, kind))

    @property
    def retry_after_s(self) -> float:
        delay = self.detail(error_details_pb2.RetryInfo).retry_delay
        return float(delay.seconds + delay.nanos / 1e9)


_KINDS = (
    error_details_pb2.ErrorInfo,
    error_details_pb2.BadRequest,
    error_details_pb2.ResourceInfo,
    error_details_pb2.PreconditionFailure,
    error_details_pb2.QuotaFailure,
    error_details_pb2.RetryInfo,
)


def parse_refusal(error: grpc.aio.AioRpcError) -> Refusal:
    """What an error says, in the form of the house; fails where it is not."""
    status = rpc_status.from_call(_Call(error))
    assert status is not None, f"{error.code()} without details: {error.details()}"
    details = []
    for packed in status.details:
        kind = next(kind for kind in _KINDS if packed.Is(kind.DESCRIPTOR))
        message = kind()
        packed.Unpack(message)
        details.append(message)
    info = details[0]
    assert isinstance(info, error_details_pb2.ErrorInfo)
    assert info.domain == "glasshouse"
    return Refusal(
        code=error.code().name,
        message=error.details() or "",
        reason=info.reason,
        field=info.metadata.get("field", ""),
        metadata=dict(info.metadata),
        details=tuple(details),
        trailer_bytes=sum(len(key) + len(value) for key, value in error.trailing_metadata()),
    )


async def refusal(call: Callable[[], Any]) -> Refusal:
    """How a call is refused, in bounded time. Streams are read to their end."""
    try:
        async with asyncio.timeout(ANSWER_S):
            made = call()
            if isinstance(made, Awaitable):
                await made
            else:
                async for _ in made:
                    pass
    except grpc.aio.AioRpcError as error:
        return parse_refusal(error)
    raise AssertionError("the call was answered")


async def until(holds: Callable[[], object], within_s: float = 5.0) -> None:
    """Returns once something outside holds; fails where it does not in time."""
    async with asyncio.timeout(within_s):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def events_of(stream: Any) -> list[Any]:
    """Every event of a stream."""
    return [event async for event in stream]


class _Call:
    """An error in the form that grpc_status reads."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self._error = error

    def code(self) -> Any:
        return self._error.code()

    def details(self) -> str | None:
        return self._error.details()

    def trailing_metadata(self) -> Any:
        return tuple(self._error.trailing_metadata())
