"""Tensors in requests as checked float32 arrays, and arrays in answers as tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from glasshouse.server.types.errors import InvalidArgument
from glasshouse.server.types.interventions import FloatArray
from glasshouse.v1 import tensors_pb2 as pb
from glasshouse.wire import reasons
from glasshouse.wire.tensors import TensorError, unpack, wire_dtype

from . import fields

_FLOATING = frozenset({pb.DTYPE_F32, pb.DTYPE_F16, pb.DTYPE_BF16, pb.DTYPE_F64})


def vector(message: pb.Tensor, present: bool, field: str, *, nonzero: bool = False) -> FloatArray:
    """A float32 array of shape (width,). The width is the engine's to check."""
    array = floats(message, present, field)
    if array.ndim != 1:
        raise _malformed(field, "shape", "one dimension, (width,)", f"{array.ndim} of shape {array.shape}")
    if nonzero and not array.any():
        raise InvalidArgument(
            f"{field} is zero and has no direction",
            reason=reasons.VALUE_OUT_OF_RANGE,
            field=field,
            value="0",
            remedy="give a vector with at least one element that is not zero",
        )
    return array


def floats(message: pb.Tensor, present: bool, field: str) -> FloatArray:
    """A float32 array of any shape, finite and not empty."""
    if not present:
        raise fields.required(field, "a tensor", "send the tensor with its dtype, shape and data")
    try:
        array = unpack(message)
    except TensorError as error:
        raise _malformed(field, error.field, error.expected, error.found) from error
    if message.dtype not in _FLOATING:
        raise _malformed(field, "dtype", "a floating type", pb.DType.Name(message.dtype))
    if array.size == 0:
        raise _malformed(field, "shape", "at least one element", f"shape {array.shape}")
    with np.errstate(over="ignore"):
        converted: FloatArray = array.astype(np.float32)
    check_finite(array, converted, field)
    return converted


def check_finite(given: NDArray[Any], converted: FloatArray, field: str) -> None:
    """Refuses NaN, infinity, and numbers that float32 cannot hold, naming the first."""
    fine = np.isfinite(converted)
    if fine.all():
        return
    at = int(np.flatnonzero(~fine.reshape(-1))[0])
    value = given.reshape(-1)[at]
    raise InvalidArgument(
        f"{field}: element {at} is {value}, which is not a finite float32",
        reason=reasons.VALUE_NOT_FINITE,
        field=field,
        value=value,
        remedy="send finite numbers only",
        metadata={"element": str(at)},
    )


def fill(message: pb.Tensor, array: NDArray[Any]) -> int:
    """Writes `array` into `message`, with one copy of the elements; returns their bytes.

    `wire.tensors.pack` makes a message of its own, which would have to be copied into its place.
    """
    message.dtype = wire_dtype(array.dtype)
    message.shape.extend(array.shape)
    message.data = array.tobytes()
    return int(array.nbytes)


def _malformed(field: str, part: str, expected: str, found: str) -> InvalidArgument:
    path = f"{field}.{part}"
    return InvalidArgument(
        f"{path}: expected {expected}, found {found}",
        reason=reasons.TENSOR_MALFORMED,
        field=path,
        value=found,
        remedy=f"send {expected}",
    )
