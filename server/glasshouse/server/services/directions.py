"""DirectionService: directions computed, named, kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import numpy as np
import torch
from google.longrunning import operations_pb2

from glasshouse.server.operations.compute_directions import (
    ComputedDirections,
    DirectionsRequest,
    check_publication,
    compute,
    publish,
)
from glasshouse.server.operations.examples import labelling
from glasshouse.server.operations.gathering import GatherOptions
from glasshouse.server.operations.manager import OperationManager, Progress
from glasshouse.server.probes.directions import DirectionMethod
from glasshouse.server.probes.examples import FloatRows
from glasshouse.server.probes.library import ConceptLibrary
from glasshouse.server.probes.saved import DirectionAt, Origin, SavedDirection
from glasshouse.server.registry.names import Kind
from glasshouse.server.registry.records import Provenance
from glasshouse.server.types.errors import InvalidArgument, ResourceExhausted
from glasshouse.server.types.hook_points import HookPoint
from glasshouse.server.types.limits import Limits
from glasshouse.v1 import directions_pb2 as pb
from glasshouse.wire import reasons

from . import fields, tensors
from .call import Call
from .catalogue import Catalogue, ServedModel
from .concept_messages import hook_points, listed, named, pooling, publication, vector_point
from .direction_messages import DICTIONARY_FEATURE, METHODS, RAW, direction_message
from .example_messages import ExampleReader, read_positions
from .operations import operation_message

# What the rest of a message with vectors may take.
_OVERHEAD_BYTES = 256 << 10
_MOST_CLUSTERS = 64
_PAIRED = frozenset({DirectionMethod.CAA, DirectionMethod.PCA, DirectionMethod.PCA_CENTRED})


class DirectionServicer:
    """Serves `glasshouse.v1.DirectionService`."""

    def __init__(
        self, catalogue: Catalogue, limits: Limits, operations: OperationManager, library: ConceptLibrary
    ) -> None:
        self._catalogue = catalogue
        self._limits = limits
        self._operations = operations
        self._library = library

    async def ComputeDirections(
        self, requests: AsyncIterator[pb.ComputeDirectionsRequest], call: Call
    ) -> operations_pb2.Operation:
        """Starts a computation."""
        first = await anext(aiter(requests), None)
        if first is None:
            raise fields.required("model", "a request", "send at least one message")
        model = self._catalogue.find(first.model, "model")
        positions = read_positions(first.positions, first.HasField("positions"), "positions", self._limits)
        options = GatherOptions(
            pooling=pooling(first.pooling),
            held_out_share=share(first.held_out_share if first.HasField("held_out_share") else None),
            seed=fields.whole(first.seed, "seed", 0, 2**32 - 1),
            max_bytes=self._limits.max_readout_bytes,
        )
        wanted = publication(first.publication, first.HasField("publication"), required=False)
        vectors, points = self._places(model, first)
        self._check_size(points)
        if wanted is not None:
            await asyncio.to_thread(
                check_publication, self._library, Kind.DIRECTION, model.engine.info.name, wanted
            )
        reader = ExampleReader(model, self._limits, positions)
        await reader.add(first.examples, first.pairs)
        async for more in requests:
            only_examples(more)
            await reader.add(more.examples, more.pairs)
        method = _method(first.method, reader, bool(vectors))
        prepared = DirectionsRequest(
            hook_points=points,
            options=options,
            method=method,
            made_by=method.value if method else DICTIONARY_FEATURE if first.HasField("feature") else RAW,
            vectors=vectors,
            examples=tuple(reader.examples),
            labelling=labelling(reader.examples, positive=first.positive_label, must_say_positive=True)
            if reader.examples
            else None,
            pairs=tuple(reader.pairs),
            positions=positions,
            inverse_l2=positive_number(
                first.inverse_l2 if first.HasField("inverse_l2") else 1.0, "inverse_l2"
            ),
            n_clusters=fields.whole(first.n_clusters or 2, "n_clusters", 2, _MOST_CLUSTERS),
            publication=wanted,
            best_only=first.publish_best_only,
            author=call.caller,
        )

        async def work(progress: Progress) -> ComputedDirections:
            return await compute(model.engine, self._library, prepared, progress)

        return operation_message(self._operations.submit("ComputeDirections", work))

    async def CreateDirection(
        self, request: pb.CreateDirectionRequest, call: Call
    ) -> pb.CreateDirectionResponse:
        """Publishes vectors as they are."""
        model = self._catalogue.find(request.model, "model")
        wanted = publication(request.publication, request.HasField("publication"), required=True)
        assert wanted is not None
        if request.HasField("feature") == bool(request.vectors):
            given = "both" if request.vectors else "neither"
            raise InvalidArgument(
                f"give either vectors or a feature, not {given}",
                reason=reasons.FIELD_CONFLICT if request.vectors else reasons.FIELD_REQUIRED,
                field="vectors",
                value=given,
                remedy="send vectors with their hook points, or a dictionary's feature",
            )
        vectors = _given(model, request) if request.vectors else _decoder_row(model, request.feature)
        points = tuple(model.engine.hook_point(name) for name in vectors)
        self._check_size(points)
        made_by = RAW if request.vectors else DICTIONARY_FEATURE
        direction = SavedDirection(
            method=made_by,
            at=tuple(
                DirectionAt(
                    hook_point=name, width=len(vector), norm=float(np.linalg.norm(vector)), vector=vector
                )
                for name, vector in vectors.items()
            ),
            best=next(iter(vectors)),
            positive_label=request.positive_label or "positive",
            origin=Origin(
                provenance=Provenance(
                    model_revision=model.engine.info.revision,
                    hook_points=tuple(vectors),
                    method=made_by,
                    author=call.caller,
                )
            ),
        )
        published = await asyncio.to_thread(publish, self._library, direction, model.engine.info.name, wanted)
        return pb.CreateDirectionResponse(direction=_without_vectors(direction_message(published)))

    async def GetDirection(self, request: pb.GetDirectionRequest, call: Call) -> pb.GetDirectionResponse:
        """One version, with its vectors."""
        _, reference = named(self._catalogue, request.name, Kind.DIRECTION)
        found = self._library.held(reference)
        if not isinstance(found, SavedDirection):
            found = await asyncio.to_thread(self._library.direction, reference)
        return pb.GetDirectionResponse(direction=direction_message(found))

    async def ListDirections(
        self, request: pb.ListDirectionsRequest, call: Call
    ) -> pb.ListDirectionsResponse:
        """A page of directions, without their vectors."""
        model = self._catalogue.find(request.model, "model")
        found, token = await asyncio.to_thread(
            listed,
            self._library,
            Kind.DIRECTION,
            model=model.engine.info.name,
            name_prefix=request.name_prefix,
            every_version=request.every_version,
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return pb.ListDirectionsResponse(
            directions=[
                _without_vectors(direction_message(item))
                for item in found
                if isinstance(item, SavedDirection)
            ],
            next_page_token=token,
        )

    async def DeleteDirection(
        self, request: pb.DeleteDirectionRequest, call: Call
    ) -> pb.DeleteDirectionResponse:
        """Deletes a version, or every version."""
        _, reference = named(self._catalogue, request.name, Kind.DIRECTION)
        deleted = await asyncio.to_thread(self._library.delete, reference)
        return pb.DeleteDirectionResponse(deleted=[str(record.reference) for record in deleted])

    def _places(
        self, model: ServedModel, request: pb.ComputeDirectionsRequest
    ) -> tuple[Mapping[str, FloatRows], tuple[HookPoint, ...]]:
        """Given vectors by hook point, where there are any, and the hook points of the request."""
        of_feature = request.method == pb.DIRECTION_METHOD_DICTIONARY_FEATURE
        raw = request.method == pb.DIRECTION_METHOD_RAW
        for field, present, belongs in (
            ("feature", request.HasField("feature"), of_feature),
            ("vectors", bool(request.vectors), raw),
        ):
            if present != belongs:
                raise InvalidArgument(
                    f"{field} belongs to one method, which takes nothing else",
                    reason=reasons.FIELD_CONFLICT if present else reasons.FIELD_REQUIRED,
                    field=field,
                    value=pb.DirectionMethod.Name(request.method),
                    remedy=f"give {field} with its own method only",
                )
        if of_feature:
            vectors = _decoder_row(model, request.feature)
            if request.hook_points:
                only = {point.name for point in hook_points(model, request.hook_points, self._limits)}
                vectors = {name: vector for name, vector in vectors.items() if name in only}
                if not vectors:
                    raise fields.out_of_range(
                        "hook_points", ", ".join(sorted(only)), "hook points that the dictionary writes"
                    )
        elif raw:
            if request.hook_points:
                raise InvalidArgument(
                    "raw vectors name their hook points themselves",
                    reason=reasons.FIELD_CONFLICT,
                    field="hook_points",
                    value=len(request.hook_points),
                    remedy="leave hook_points out",
                )
            vectors = _given(model, request)
        else:
            names = list(request.hook_points) or [
                point.name for point in model.engine.hook_points if point.name.endswith("hook_resid_post")
            ]
            if not names:
                raise fields.required("hook_points", "where", "name readable hook points")
            return {}, hook_points(model, names, self._limits)
        return vectors, tuple(model.engine.hook_point(name) for name in vectors)

    def _check_size(self, points: tuple[HookPoint, ...]) -> None:
        n_bytes = 4 * sum(point.width for point in points)
        most = self._limits.max_message_bytes - _OVERHEAD_BYTES
        if n_bytes > most:
            raise ResourceExhausted(
                f"the vectors of {len(points)} hook points take {n_bytes:,} bytes, a message holds {most:,}",
                reason=reasons.MESSAGE_TOO_LARGE,
                field="hook_points",
                value=n_bytes,
                remedy="ask for fewer hook points at a time",
                metadata={"limit": str(most)},
            )


def share(value: float | None) -> float:
    """The share of examples that is held out."""
    if value is None:
        return 0.25
    if not 0.0 < value < 1.0:
        raise fields.out_of_range("held_out_share", value, "between 0 and 1")
    return value


def positive_number(value: float, field: str) -> float:
    """A finite number above 0."""
    fields.finite(value, field)
    if value <= 0:
        raise fields.out_of_range(field, value, "above 0")
    return value


def only_examples(message: Any) -> None:
    """Refuses a message after the first that holds more than examples."""
    for known, _ in message.ListFields():
        if known.name not in ("examples", "pairs"):
            raise InvalidArgument(
                f"{known.name} stands in a message after the first",
                reason=reasons.FIELD_CONFLICT,
                field=known.name,
                remedy="say everything but examples in the first message",
            )


def _method(number: int, reader: ExampleReader, vectors: bool) -> DirectionMethod | None:
    if reader.examples and reader.pairs:
        raise InvalidArgument(
            "there are labelled examples and pairs",
            reason=reasons.FIELD_CONFLICT,
            field="pairs",
            value=f"{len(reader.examples)} examples, {len(reader.pairs)} pairs",
            remedy="give one or the other",
        )
    if vectors:
        return None
    if not reader.examples and not reader.pairs:
        raise fields.required("examples", "what to learn from", "give labelled examples or pairs")
    if number == pb.DIRECTION_METHOD_UNSPECIFIED:
        return DirectionMethod.CAA if reader.pairs else DirectionMethod.DIFFERENCE_IN_MEANS
    method = METHODS.get(number)
    if method is None:
        raise fields.out_of_range("method", number, "a known DirectionMethod")
    if method in _PAIRED and not reader.pairs:
        raise InvalidArgument(
            f"{method.value} compares pairs, the examples are single",
            reason=reasons.FIELD_CONFLICT,
            field="method",
            value=method.value,
            remedy="give pairs, or use difference in means",
        )
    return method


def _given(
    model: ServedModel, request: pb.ComputeDirectionsRequest | pb.CreateDirectionRequest
) -> dict[str, FloatRows]:
    found: dict[str, FloatRows] = {}
    for index, message in enumerate(request.vectors):
        field = f"vectors[{index}]"
        point = vector_point(model, message.hook_point, f"{field}.hook_point")
        vector = tensors.vector(message.vector, message.HasField("vector"), f"{field}.vector", nonzero=True)
        if len(vector) != point.width:
            raise InvalidArgument(
                f"{field}.vector has {len(vector)} elements, {point.name} is {point.width} wide",
                reason=reasons.WRONG_WIDTH,
                field=f"{field}.vector",
                value=len(vector),
                remedy=f"give shape ({point.width},)",
            )
        if point.name in found:
            raise InvalidArgument(
                f"{field} is a second vector at {point.name}",
                reason=reasons.FIELD_CONFLICT,
                field=f"{field}.hook_point",
                value=message.hook_point,
                remedy="give one vector a hook point",
            )
        found[point.name] = vector.astype(np.float64)
    return found


def _decoder_row(model: ServedModel, message: pb.DictionaryFeature) -> dict[str, FloatRows]:
    """What a feature writes, by hook point."""
    if not message.dictionary:
        raise fields.required("feature.dictionary", "whose feature", "name a dictionary that is loaded")
    held = model.engine.dictionaries.get(message.dictionary, field="feature.dictionary")
    held.attached("feature.dictionary")
    chosen = torch.tensor([message.feature])
    held.dictionary.check_feature_ids(chosen, field="feature.feature")
    rows = held.dictionary.decoder_rows(chosen).float().cpu().numpy().astype(np.float64)
    rows = rows.reshape(len(held.points_out), -1)
    found = {
        point.name: row for point, row in zip(held.points_out, rows, strict=True) if np.abs(row).max() > 0
    }
    if not found:
        raise fields.out_of_range(
            "feature.feature", message.feature, "a feature whose decoder row is not zero"
        )
    return found


def _without_vectors(message: pb.Direction) -> pb.Direction:
    for at in message.at:
        at.ClearField("vector")
    return message
