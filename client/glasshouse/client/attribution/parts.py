"""Small parts of attribution's messages -> values, and results that come as a message and named tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from glasshouse.client.arrays import Array
from glasshouse.client.attribution.values import AttributionProgress, HeldFixed
from glasshouse.client.exceptions import GlasshouseError
from glasshouse.client.results import Tokens
from glasshouse.v1 import attribution_pb2 as pb
from glasshouse.wire.tensors import TensorAssembler

T = TypeVar("T")


def tokens(message: pb.FedTokens) -> Tokens:
    """An input as it was fed."""
    return Tokens(list(message.token_ids), list(message.tokens))


def held_fixed(message: pb.HeldFixed) -> HeldFixed:
    """What was held fixed."""
    return HeldFixed(
        attention_patterns=message.attention_patterns,
        norm_scales=message.norm_scales,
        mlp_outputs=message.mlp_outputs,
        statement=message.statement,
    )


class NamedTensors:
    """Tensors that a message announced, as their pieces come."""

    def __init__(self) -> None:
        self._open: dict[str, TensorAssembler] = {}
        self._whole: dict[str, Array] = {}

    def announce(self, messages: Any) -> None:
        """Takes in which tensors there are."""
        self._open = {message.name: TensorAssembler() for message in messages}

    def feed(self, chunk: Any) -> None:
        """Takes in a piece. Raises GlasshouseError for one of no announced tensor."""
        if chunk.name not in self._open:
            raise GlasshouseError(f"the server sent a piece of {chunk.name!r}, unannounced", code="INTERNAL")
        if self._open[chunk.name].add(chunk.piece):
            self._whole[chunk.name] = self._open.pop(chunk.name).result()

    def arrays(self) -> dict[str, Array]:
        """All of them, once the stream is over. Raises GlasshouseError where it broke off."""
        if self._open:
            missing = ", ".join(self._open)
            raise GlasshouseError(f"the stream ended without {missing}", code="DATA_LOSS")
        return self._whole


class ResultState(Generic[T]):
    """A result that comes as one message, then its tensors; progress before it. `header` is the event's field."""

    def __init__(self, header: str, parse: Callable[[Any, dict[str, Array]], T]) -> None:
        self._header, self._parse = header, parse
        self._message: Any = None
        self._tensors = NamedTensors()
        self.progress = AttributionProgress(0, 0)

    def feed(self, event: Any) -> bool:
        """Takes in one event; whether it was progress."""
        kind = event.WhichOneof("event")
        if kind == "progress":
            self.progress = AttributionProgress(event.progress.done, event.progress.total)
        elif kind == self._header:
            self._message = getattr(event, kind)
            self._tensors.announce(self._message.tensors)
        elif kind == "tensor":
            self._tensors.feed(event.tensor)
        return bool(kind == "progress")

    def result(self) -> T:
        """The result, once the stream is over. Raises GlasshouseError where it broke off."""
        if self._message is None:
            raise GlasshouseError("the stream ended before its result", code="DATA_LOSS")
        return self._parse(self._message, self._tensors.arrays())
