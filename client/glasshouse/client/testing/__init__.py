"""A Glasshouse server for tests: real gRPC on a loopback port, a tiny deterministic model, failures on
demand.

::

    from glasshouse.client import Client
    from glasshouse.client.testing import Failure, FakeServer

    with FakeServer(reply="Hello.") as server, Client(server.target) as client:
        assert client.model().generate("Hi", max_tokens=10).result().text == "Hello."
        server.fail("Score", Failure("RESOURCE_EXHAUSTED", "the queue is full", retry_after_s=1.0))

It needs no torch, no weights and nothing beyond the client's own dependencies. It checks requests as a server
does, for the commonest mistakes; what its model computes means nothing but is the same every time.
"""

from glasshouse.client.testing.failures import Failure
from glasshouse.client.testing.fake_model import FakeModel
from glasshouse.client.testing.fake_server import FakeServer, RecordedCall

__all__ = ["Failure", "FakeModel", "FakeServer", "RecordedCall"]
