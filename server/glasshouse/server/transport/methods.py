"""The methods of our services, taken from the proto's own descriptors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google.longrunning import operations_pb2
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from glasshouse.v1 import (
    activations_pb2,
    attribution_pb2,
    dictionaries_pb2,
    directions_pb2,
    feature_labels_pb2,
    generation_pb2,
    models_pb2,
    monitors_pb2,
    probes_pb2,
)

# Methods that only keys of the role admin may call: they read the server's disk, or change what others are served.
ADMIN_METHODS = frozenset(
    {
        "DictionaryService/LoadDictionary",
        "DictionaryService/UnloadDictionary",
        "DirectionService/DeleteDirection",
        "ProbeService/DeleteProbe",
        "FeatureLabelService/DeleteFeatureLabels",
        *(
            f"MonitorService/{name}"
            for name in monitors_pb2.DESCRIPTOR.services_by_name["MonitorService"].methods_by_name
        ),
    }
)


class Malformed:
    """A request whose bytes are no message of its type."""


MALFORMED = Malformed()


@dataclass(frozen=True, kw_only=True)
class Method:
    """One RPC. `name`: what metrics and logs call it, such as "GenerationService/Generate". `streams`: whether it answers
    with a stream; `takes_stream`: whether its request is one, of messages of `request_class`.
    """

    service: str
    method: str
    request_class: type[Message]
    streams: bool
    takes_stream: bool = False

    @property
    def name(self) -> str:
        """Service and method without the package."""
        return f"{self.service.rpartition('.')[2]}/{self.method}"

    @property
    def admin(self) -> bool:
        """Whether it takes a key of the role admin."""
        return self.name in ADMIN_METHODS


def methods_of(*files: FileDescriptor) -> tuple[Method, ...]:
    """Every method of every service in `files`."""
    return tuple(
        Method(
            service=service.full_name,
            method=method.name,
            request_class=GetMessageClass(method.input_type),
            streams=method.server_streaming,
            takes_stream=method.client_streaming,
        )
        for file in files
        for service in file.services_by_name.values()
        for method in service.methods
    )


METHODS = methods_of(
    models_pb2.DESCRIPTOR,
    generation_pb2.DESCRIPTOR,
    activations_pb2.DESCRIPTOR,
    dictionaries_pb2.DESCRIPTOR,
    directions_pb2.DESCRIPTOR,
    probes_pb2.DESCRIPTOR,
    feature_labels_pb2.DESCRIPTOR,
    attribution_pb2.DESCRIPTOR,
    monitors_pb2.DESCRIPTOR,
    operations_pb2.DESCRIPTOR,
)
SERVICES = tuple(dict.fromkeys(method.service for method in METHODS))


def forgiving(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """A deserializer that answers MALFORMED where `parse` fails: grpc would make INTERNAL of an exception."""

    def deserialize(data: bytes) -> Any:
        try:
            return parse(data)
        except (DecodeError, ValueError):
            return MALFORMED

    return deserialize


def serialize(message: Message | bytes) -> bytes:
    """A message's bytes; services may hand over bytes that already are a message."""
    return message if isinstance(message, bytes) else message.SerializeToString()
