"""The metrics page: a small HTTP server on a thread of its own."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from prometheus_client import CollectorRegistry, start_http_server

from .listening import Address, ListenError


class MetricsPage:
    """Serves `registry` at http://HOST:PORT/metrics from construction to `close`."""

    def __init__(self, address: Address, registry: CollectorRegistry) -> None:
        try:
            self._server, self._thread = start_http_server(address.port, addr=address.host, registry=registry)
        except OSError as error:
            raise ListenError(
                f"the metrics page cannot listen on {address}: {error.strerror or error}; "
                "free the port or choose another with --metrics"
            ) from error
        self.address = Address(host=address.host, port=self._server.server_port)

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://{self.address}/metrics"

    def close(self) -> None:
        """Stops serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
