"""Calls of the services of directions, probes and feature labels, as the tests of them make them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from google.longrunning import operations_pb2

from glasshouse import fable
from glasshouse.server.engines.transformers.engine import TransformersEngine
from glasshouse.server.models.loading import load_model
from glasshouse.server.probes.library import ConceptLibrary
from glasshouse.server.registry.registry import Registry
from glasshouse.server.types.configuration import Settings
from glasshouse.server.types.limits import Limits
from glasshouse.v1 import (
    directions_pb2,
    directions_pb2_grpc,
    examples_pb2,
    feature_labels_pb2_grpc,
    inputs_pb2,
    probes_pb2,
    probes_pb2_grpc,
    provenance_pb2,
)

from ..serving import Served, serving

HOOK = "blocks.2.hook_resid_post"
LAYERS = tuple(f"blocks.{layer}.hook_resid_post" for layer in range(6))


def load_fable() -> Any:
    torch.set_num_threads(2)
    return load_model(fable.model_path(), dtype="float32", device="cpu", name="fable")


@asynccontextmanager
async def concepts(
    loaded: Any, folder: Path, *, settings: Settings | None = None, built_in: bool = True
) -> AsyncIterator[tuple[Served, ConceptLibrary]]:
    """A server over the real engine on fable, with a registry of its own."""
    engine = TransformersEngine(loaded, limits=Limits())
    await engine.start()
    registry = Registry.at(folder)
    library = ConceptLibrary(registry)
    if built_in:
        library.add_built_in(fable.concepts_path(), "fable")
    library.start()
    try:
        async with serving(engine, settings=settings, library=library) as served:  # type: ignore[arg-type]
            yield served, library
    finally:
        library.stop()
        registry.close()
        await engine.stop()


def directions(served: Served) -> Any:
    return directions_pb2_grpc.DirectionServiceStub(served.channel)


def probes(served: Served) -> Any:
    return probes_pb2_grpc.ProbeServiceStub(served.channel)


def labels(served: Served) -> Any:
    return feature_labels_pb2_grpc.FeatureLabelServiceStub(served.channel)


def example(text: str, *labels: str, held_out: bool = False) -> examples_pb2.LabelledExample:
    return examples_pb2.LabelledExample(input=inputs_pb2.Input(text=text), labels=labels, held_out=held_out)


def pair(positive: str, negative: str) -> examples_pb2.ExamplePair:
    return examples_pb2.ExamplePair(
        positive=inputs_pb2.Input(text=positive), negative=inputs_pb2.Input(text=negative)
    )


def labelled(name: str, n: int | None = None) -> list[examples_pb2.LabelledExample]:
    """A packaged labelled set, its test half held out."""
    records = fable.labelled(name)[:n]
    return [example(r["text"], r["label"], held_out=r["split"] == "test") for r in records]


def named(name: str, **options: Any) -> provenance_pb2.Publication:
    return provenance_pb2.Publication(name=name, **options)


def compute(served: Served, *messages: Any, **first: Any) -> Any:
    """A call of ComputeDirections: one message, or `messages` after it."""
    return directions(served).ComputeDirections(
        _all(directions_pb2.ComputeDirectionsRequest(**first), messages)
    )


def train(served: Served, *messages: Any, **first: Any) -> Any:
    """A call of TrainProbe."""
    return probes(served).TrainProbe(_all(probes_pb2.TrainProbeRequest(**first), messages))


async def ended(served: Served, call: Any) -> operations_pb2.Operation:
    """An operation, once it is over."""
    operation = await call
    wait = served.channel.unary_unary(
        "/google.longrunning.Operations/WaitOperation",
        request_serializer=operations_pb2.WaitOperationRequest.SerializeToString,
        response_deserializer=operations_pb2.Operation.FromString,
    )
    while not operation.done:
        operation = await wait(operations_pb2.WaitOperationRequest(name=operation.name))
    return operation


async def computed(served: Served, **first: Any) -> directions_pb2.ComputeDirectionsResponse:
    """The result of a computation that works."""
    operation = await ended(served, compute(served, **first))
    assert not operation.HasField("error"), operation.error
    response = directions_pb2.ComputeDirectionsResponse()
    assert operation.response.Unpack(response)
    return response


async def trained(served: Served, **first: Any) -> probes_pb2.TrainProbeResponse:
    """The result of a training that works."""
    operation = await ended(served, train(served, **first))
    assert not operation.HasField("error"), operation.error
    response = probes_pb2.TrainProbeResponse()
    assert operation.response.Unpack(response)
    return response


def _all(first: Any, rest: Sequence[Any]) -> Iterator[Any]:
    yield first
    yield from rest
