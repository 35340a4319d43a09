"""Dense arrays on the wire: numpy <-> `Tensor`, and large arrays in `TensorChunk` pieces.

Row-major, little-endian, packed without gaps (the rules of safetensors). What comes off the wire is checked
against its own header before a byte is allocated; anything that does not hold raises `TensorError`, which
names the field, what was expected there and what was found.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from glasshouse.v1.tensors_pb2 import DType, Tensor, TensorChunk

BFLOAT16: Final[np.dtype[Any]] = np.dtype(ml_dtypes.bfloat16)

NUMPY_DTYPES: Final[dict[int, np.dtype[Any]]] = {
    DType.DTYPE_F32: np.dtype("<f4"),
    DType.DTYPE_F16: np.dtype("<f2"),
    DType.DTYPE_BF16: BFLOAT16,
    DType.DTYPE_I32: np.dtype("<i4"),
    DType.DTYPE_I64: np.dtype("<i8"),
    DType.DTYPE_U32: np.dtype("<u4"),
    DType.DTYPE_BOOL: np.dtype(np.bool_),
    DType.DTYPE_F64: np.dtype("<f8"),
}
"""`DType` number -> numpy dtype, little-endian."""

WIRE_DTYPES: Final[dict[np.dtype[Any], DType.ValueType]] = {
    dtype.newbyteorder("="): DType.ValueType(number) for number, dtype in NUMPY_DTYPES.items()
}
"""numpy dtype in native byte order -> `DType`."""

MAX_DIMENSIONS: Final = 8
MAX_TENSOR_BYTES: Final = 1 << 40
"""No tensor of the protocol is this large: a header that claims more is damaged or hostile."""
CHUNK_BYTES: Final = 1 << 20
"""Default size of a `TensorChunk`'s data."""

_LITTLE_ENDIAN_HOST: Final = sys.byteorder == "little"


class TensorError(ValueError):
    """A tensor that does not hold together: the message's `field`, what was `expected` there and `found`."""

    def __init__(self, field: str, expected: str, found: str) -> None:
        super().__init__(f"{field}: expected {expected}, found {found}")
        self.field = field
        self.expected = expected
        self.found = found


def wire_dtype(dtype: np.dtype[Any]) -> DType.ValueType:
    """The `DType` of a numpy dtype of any byte order. Raises TensorError where the wire has none."""
    try:
        return WIRE_DTYPES[dtype.newbyteorder("=")]
    except KeyError:
        names = ", ".join(str(known) for known in WIRE_DTYPES)
        raise TensorError("dtype", f"one of {names}", str(dtype)) from None


def numpy_dtype(dtype: int) -> np.dtype[Any]:
    """The numpy dtype of a `DType` number. Raises TensorError for UNSPECIFIED and unknown numbers."""
    try:
        return NUMPY_DTYPES[dtype]
    except KeyError:
        raise TensorError(
            "dtype", "one of " + ", ".join(DType.Name(n) for n in _numbers()), _name(dtype)
        ) from None


def pack(array: NDArray[Any]) -> Tensor:
    """An array of any shape, byte order and memory layout as a `Tensor`.

    Raises TensorError for a dtype or a number of dimensions that the wire does not carry.
    """
    dtype = wire_dtype(array.dtype)
    if array.ndim > MAX_DIMENSIONS:
        raise TensorError("shape", f"at most {MAX_DIMENSIONS} dimensions", f"{array.ndim}")
    return Tensor(dtype=dtype, shape=array.shape, data=_packed(array).tobytes())


def unpack(tensor: Tensor) -> NDArray[Any]:
    """The array a `Tensor` holds: read-only, a view of the message's bytes (no copy of the elements).

    Raises TensorError for an unknown dtype, an impossible shape, or data of another size than the two say.
    """
    dtype = numpy_dtype(tensor.dtype)
    shape = tuple(tensor.shape)
    n_bytes = _n_bytes(shape, dtype)
    data = tensor.data
    if len(data) != n_bytes:
        raise TensorError("data", f"{n_bytes} bytes for {dtype} of shape {shape}", f"{len(data)} bytes")
    if dtype == np.bool_:
        _check_bools(data)
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def chunks(array: NDArray[Any], chunk_bytes: int = CHUNK_BYTES) -> Iterator[TensorChunk]:
    """The pieces of `array` in order, each of at most `chunk_bytes`; an empty array is one empty piece.

    The elements are copied only into the messages; once more where the array is not contiguous and
    little-endian. Raises TensorError as `pack` does, and ValueError for a chunk_bytes below 1.
    """
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be at least 1, not {chunk_bytes}")
    dtype = wire_dtype(array.dtype)
    if array.ndim > MAX_DIMENSIONS:
        raise TensorError("shape", f"at most {MAX_DIMENSIONS} dimensions", f"{array.ndim}")
    # A view of raw bytes: bfloat16 has no buffer protocol of its own.
    view = _packed(array).reshape(-1).view(np.uint8).data
    first = TensorChunk(dtype=dtype, shape=array.shape, data=bytes(view[:chunk_bytes]))
    return _pieces(first, view, chunk_bytes)


def _pieces(first: TensorChunk, view: memoryview, chunk_bytes: int) -> Iterator[TensorChunk]:
    yield first
    for offset in range(chunk_bytes, len(view), chunk_bytes):
        yield TensorChunk(byte_offset=offset, data=bytes(view[offset : offset + chunk_bytes]))


class TensorAssembler:
    """Puts the pieces of one tensor back together, in one buffer allocated when the first arrives.

    The first piece carries dtype and shape; each must start where the one before ended. `max_bytes` bounds
    what a header may make us allocate.
    """

    def __init__(self, max_bytes: int = MAX_TENSOR_BYTES) -> None:
        self._max_bytes = max_bytes
        self._array: NDArray[Any] | None = None
        self._bytes = memoryview(b"")
        self._filled = 0

    @property
    def received_bytes(self) -> int:
        """Bytes put in place so far."""
        return self._filled

    @property
    def total_bytes(self) -> int | None:
        """Bytes of the whole tensor; None before the first piece."""
        return None if self._array is None else len(self._bytes)

    @property
    def complete(self) -> bool:
        """Whether every byte is in place."""
        return self._array is not None and self._filled == len(self._bytes)

    def add(self, chunk: TensorChunk) -> bool:
        """Puts a piece in its place; whether the tensor is complete. TensorError where it does not fit."""
        offset = chunk.byte_offset
        if self._array is None:
            if offset != 0:
                raise TensorError("byte_offset", "0 in the first piece", str(offset))
            self._allocate(numpy_dtype(chunk.dtype), tuple(chunk.shape))
        elif offset != self._filled or self.complete:
            expected = "no further piece" if self.complete else f"{self._filled}, where the last piece ended"
            raise TensorError("byte_offset", expected, str(offset))
        elif chunk.dtype or chunk.shape:
            raise TensorError(
                "shape", "dtype and shape in the first piece only", f"them again at byte {offset}"
            )
        data = chunk.data
        end = offset + len(data)
        if end > len(self._bytes):
            raise TensorError(
                "data", f"at most {len(self._bytes) - offset} bytes at {offset}", f"{len(data)} bytes"
            )
        if not data and not self.complete:
            raise TensorError("data", f"some of the {len(self._bytes) - offset} bytes left", "none")
        self._bytes[offset:end] = data
        self._filled = end
        return self.complete

    def result(self) -> NDArray[Any]:
        """The whole array, writable and owned by the caller. Raises TensorError where pieces are missing."""
        if self._array is None:
            raise TensorError("data", "at least one piece", "none")
        if not self.complete:
            raise TensorError("data", f"{len(self._bytes)} bytes", f"{self._filled} bytes")
        if self._array.dtype == np.bool_:
            _check_bools(self._bytes)
        return self._array

    def _allocate(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        n_bytes = _n_bytes(shape, dtype, self._max_bytes)
        raw = np.empty(n_bytes, dtype=np.uint8)
        self._array = raw.view(dtype).reshape(shape)
        self._bytes = raw.data


def _packed(array: NDArray[Any]) -> NDArray[Any]:
    """The array in the wire's memory layout: itself where it already is."""
    contiguous = np.ascontiguousarray(array)
    order = contiguous.dtype.byteorder
    if contiguous.dtype.itemsize == 1 or order == "<" or (order in "=|" and _LITTLE_ENDIAN_HOST):
        return contiguous
    return contiguous.astype(contiguous.dtype.newbyteorder("<"))


def _n_bytes(shape: Sequence[int], dtype: np.dtype[Any], max_bytes: int = MAX_TENSOR_BYTES) -> int:
    """Bytes of such a tensor, in unbounded integers. Raises TensorError for a shape that cannot be."""
    if len(shape) > MAX_DIMENSIONS:
        raise TensorError("shape", f"at most {MAX_DIMENSIONS} dimensions", str(len(shape)))
    for index, size in enumerate(shape):
        if size < 0:
            raise TensorError(f"shape[{index}]", "a size of 0 or more", str(size))
        # Beside a 0 any size makes an empty tensor, but numpy still multiplies the others.
        if size > MAX_TENSOR_BYTES:
            raise TensorError(f"shape[{index}]", f"at most {MAX_TENSOR_BYTES}", str(size))
    elements = math.prod(shape)
    positive = math.prod(size for size in shape if size)
    n_bytes = elements * dtype.itemsize
    if n_bytes > max_bytes or positive * dtype.itemsize > MAX_TENSOR_BYTES:
        raise TensorError(
            "shape", f"at most {max_bytes} bytes", f"{n_bytes or positive * dtype.itemsize} bytes"
        )
    return n_bytes


def _check_bools(data: bytes | memoryview) -> None:
    values = np.frombuffer(data, dtype=np.uint8)
    wrong = np.flatnonzero(values > 1)
    if wrong.size:
        raise TensorError("data", "bytes of 0 or 1", f"{values[wrong[0]]} at element {wrong[0]}")


def _numbers() -> list[DType.ValueType]:
    return [DType.ValueType(number) for number in NUMPY_DTYPES]


def _name(number: int) -> str:
    return DType.Name(DType.ValueType(number)) if number in DType.values() else str(number)
