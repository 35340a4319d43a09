"""ActivationService: activations of many inputs and hook points, streamed as they are computed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

from glasshouse.server.types.errors import InvalidArgument
from glasshouse.server.types.generation import ExtractedInput, ExtractionRequest
from glasshouse.server.types.limits import Limits
from glasshouse.server.types.selectors import NamedPositions, Selector
from glasshouse.v1 import activations_pb2 as pb
from glasshouse.wire import reasons

from . import fields
from .call import Call
from .catalogue import Catalogue
from .inputs import InputReader
from .interventions import interventions, receipts
from .prefetch import ahead
from .readouts import wire_dtype
from .selectors import selector
from .tensor_messages import chunk_messages
from .token_strings import TokenStrings

# Inputs computed before the one being sent is through.
_AHEAD = 2


class ActivationServicer:
    """Serves `glasshouse.v1.ActivationService`."""

    def __init__(self, catalogue: Catalogue, limits: Limits) -> None:
        self._catalogue = catalogue
        self._limits = limits

    async def ExtractActivations(
        self, request: pb.ExtractActivationsRequest, call: Call
    ) -> AsyncIterator[pb.ExtractActivationsResponse | bytes]:
        """For each input its event and its tensors, the latter as serialised messages; then the end."""
        model = self._catalogue.find(request.model, "model")
        limits = self._limits
        hook_points = _hook_points(request.hook_points, limits)
        positions = _positions(request, limits)
        dtype = wire_dtype(request.dtype, "dtype")
        edits = interventions(request.interventions, limits)
        if not request.inputs:
            raise fields.required("inputs", "what to read", "send at least one input")
        inputs = await InputReader(model, limits).prompts(request.inputs, "inputs")
        wanted = ExtractionRequest(
            inputs=inputs,
            hook_points=hook_points,
            positions=positions,
            dtype=dtype,
            interventions=edits,
            request_id=call.request_id,
        )
        n_tokens = n_bytes = 0
        async with aclosing(ahead(model.engine.extract(wanted), _AHEAD)) as done:
            async for extracted in done:
                tokens = inputs[extracted.index]
                call.accepted(len(tokens), () if n_tokens else [edit.edit.kind for edit in edits])
                n_tokens += len(tokens)
                yield _begin(extracted, tokens, model.strings)
                for index, array in enumerate(extracted.activations):
                    for message in chunk_messages(extracted.index, index, array):
                        yield message
                    n_bytes += array.nbytes
                    call.read(array.nbytes)
        yield pb.ExtractActivationsResponse(finished=pb.ExtractionFinished(tokens=n_tokens, bytes=n_bytes))


def _begin(
    extracted: ExtractedInput, tokens: Sequence[int], strings: TokenStrings
) -> pb.ExtractActivationsResponse:
    return pb.ExtractActivationsResponse(
        input=pb.ExtractedInput(
            index=extracted.index,
            token_ids=tokens,
            positions=extracted.positions,
            receipt=receipts(extracted.receipt),
            tokens=strings.of(tokens),
        )
    )


def _hook_points(names: Sequence[str], limits: Limits) -> tuple[str, ...]:
    if not names:
        raise fields.required(
            "hook_points", "what to read", "name readable hook points; ListHookPoints lists them"
        )
    fields.count(len(names), "hook_points", limits.max_hook_points, "max_hook_points", "hook points")
    first_at: dict[str, int] = {}
    for index, name in enumerate(names):
        field = f"hook_points[{index}]"
        if not name:
            raise fields.required(field, "a name", "name a readable hook point; ListHookPoints lists them")
        if name in first_at:
            raise InvalidArgument(
                f"{field} repeats hook_points[{first_at[name]}]",
                reason=reasons.FIELD_CONFLICT,
                field=field,
                value=name,
                remedy="name each hook point once",
            )
        first_at[name] = index
    return tuple(names)


def _positions(request: pb.ExtractActivationsRequest, limits: Limits) -> Selector:
    positions = selector(request.positions, request.HasField("positions"), "positions", limits)
    if positions.named is NamedPositions.GENERATED:
        raise fields.out_of_range(
            "positions.named", "generated", "all, prompt or last: an extraction generates nothing"
        )
    return positions
