"""What answers have in common: tokens as fed, what was held fixed, named tensors in pieces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from glasshouse.server.attribution.freezing import Freeze
from glasshouse.server.types.errors import ServingError
from glasshouse.v1 import attribution_pb2 as pb
from glasshouse.v1 import tensors_pb2
from glasshouse.wire.tensors import chunks, wire_dtype

from ..catalogue import ServedModel

Arrays = Mapping[str, NDArray[Any]]


def fed(model: ServedModel, tokens: Sequence[int]) -> pb.FedTokens:
    """Tokens and their strings."""
    return pb.FedTokens(token_ids=tokens, tokens=model.strings.of(tokens))


def freeze(message: pb.Freeze) -> Freeze:
    """What a caller asks to be held."""
    return Freeze(patterns=message.attention_patterns, norms=message.norm_scales)


def held(frozen: Freeze, method: str, *, mlps: bool = False) -> pb.HeldFixed:
    """What was held, and `method`'s own sentence."""
    parts = [
        name
        for name, is_held in (
            ("attention patterns", frozen.patterns),
            ("the scales of all norms", frozen.norms),
            ("what the MLPs write", mlps),
        )
        if is_held
    ]
    listed = ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else "".join(parts)
    whole = f"Held at the input's own values: {listed}." if parts else "Nothing was held fixed."
    return pb.HeldFixed(
        attention_patterns=frozen.patterns,
        norm_scales=frozen.norms,
        mlp_outputs=mlps,
        statement=f"{whole} {method}".strip(),
    )


def array(tensor: Tensor) -> NDArray[Any]:
    """A tensor on the host: float32, or its own whole-number type."""
    host = tensor.detach().cpu()
    found: NDArray[Any] = (host.float() if host.is_floating_point() else host).contiguous().numpy()
    return found


def announced(arrays: Arrays) -> list[tensors_pb2.NamedTensor]:
    """What says which tensors follow."""
    return [
        tensors_pb2.NamedTensor(name=name, dtype=wire_dtype(value.dtype), shape=value.shape)
        for name, value in arrays.items()
    ]


def pieces(arrays: Arrays) -> Iterator[tensors_pb2.NamedTensorChunk]:
    """The tensors, one after the other, each in pieces."""
    for name, value in arrays.items():
        for piece in chunks(value):
            yield tensors_pb2.NamedTensorChunk(name=name, piece=piece)


@contextmanager
def naming(field: str) -> Iterator[None]:
    """Errors raised within name this field of the request: the computation does not know how it was asked."""
    try:
        yield
    except ServingError as error:
        error.field = field
        raise


def token_tensor(tokens: Sequence[int]) -> Tensor:
    """(T,) int64."""
    return torch.tensor(tokens, dtype=torch.int64)
