"""Chunks of an extraction, encoded by hand: a tensor's bytes are copied once, from the array to the message.

Through message objects they would be copied four times more (into a chunk, into its parent, into the
serialised parent), and an extraction is little else than such copies. What is made here is byte for byte
what protobuf makes of

::

    ExtractActivationsResponse(chunk=ExtractedChunk(input=i, hook_point=h, piece=piece))

for each `piece` of `wire.tensors.chunks(array)`; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasshouse.v1 import activations_pb2 as pb
from glasshouse.v1 import tensors_pb2
from glasshouse.wire.tensors import CHUNK_BYTES, wire_dtype

_LENGTH_DELIMITED = 2


def _tag(field_number: int) -> bytes:
    assert field_number < 16, "one byte holds the tag of the first 15 fields"
    return bytes([field_number << 3 | _LENGTH_DELIMITED])


_CHUNK = _tag(pb.ExtractActivationsResponse.CHUNK_FIELD_NUMBER)
_PIECE = _tag(pb.ExtractedChunk.PIECE_FIELD_NUMBER)
_DATA = _tag(tensors_pb2.TensorChunk.DATA_FIELD_NUMBER)


def chunk_messages(
    input_index: int, hook_point_index: int, array: NDArray[Any], chunk_bytes: int = CHUNK_BYTES
) -> Iterator[bytes]:
    """Serialised `ExtractActivationsResponse`s that carry `array`, in order."""
    place = pb.ExtractedChunk(input=input_index, hook_point=hook_point_index).SerializeToString()
    # A view of raw bytes: bfloat16 has no buffer protocol of its own.
    view = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    header = tensors_pb2.TensorChunk(dtype=wire_dtype(array.dtype), shape=array.shape)
    for offset in range(0, max(len(view), 1), chunk_bytes):
        if offset:
            header = tensors_pb2.TensorChunk(byte_offset=offset)
        yield _message(place, header.SerializeToString(), view[offset : offset + chunk_bytes])


def _message(place: bytes, header: bytes, data: memoryview) -> bytes:
    before = header + _DATA + _varint(len(data)) if len(data) else header
    piece_size = len(before) + len(data)
    opening = place + _PIECE + _varint(piece_size)
    return b"".join((_CHUNK, _varint(len(opening) + piece_size), opening, before, data))


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
