"""Arrays in and out: what users have -> float32 numpy, and numpy -> torch where torch is installed."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from glasshouse.client.exceptions import InvalidArgumentError
from glasshouse.wire import reasons
from glasshouse.wire.tensors import BFLOAT16

Array: TypeAlias = NDArray[Any]


class TorchLike(Protocol):
    """A torch tensor, as far as we touch one."""

    def detach(self) -> Any:
        """The tensor without its graph."""


VectorLike: TypeAlias = "NDArray[Any] | Sequence[float] | Sequence[Sequence[float]] | TorchLike"
"""A numpy array, a torch tensor on any device, or (nested) lists of numbers."""


def as_float32(value: VectorLike, field: str) -> NDArray[np.float32]:
    """`value` as a float32 array of the same shape, the caller's own memory left alone.

    Raises InvalidArgumentError, naming `field`, for what is not an array of real numbers.
    """
    array = as_numpy(value)
    if array.dtype != BFLOAT16 and array.dtype.kind not in "fiub":
        raise InvalidArgumentError(
            f"{field} must be an array of numbers, not of {array.dtype}",
            field=field,
            reason=reasons.VALUE_MALFORMED,
            remedy="Pass a numpy array, a torch tensor or a list of floats",
        )
    with np.errstate(over="ignore"):  # What overflows becomes infinite, and the server says so.
        copy = np.array(array, dtype=np.float32)
    copy.flags.writeable = False
    return copy


def as_numpy(value: Any) -> Array:
    """Numpy from numpy, lists and torch tensors (by their methods; torch is not imported)."""
    if hasattr(value, "detach"):
        tensor = value.detach().cpu()
        return np.asarray(tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy())
    try:
        return np.asarray(value)
    except ValueError:  # Rows of different lengths: reported by the caller as not numeric.
        return np.asarray(value, dtype=object)


def as_torch(array: Array) -> Any:
    """A torch tensor of the same dtype (bfloat16 included) and shape; shares memory where the array is
    writable.

    Raises ImportError, with what to install, where torch is not there.
    """
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise ImportError("torch is not installed: pip install torch") from error
    source = array if array.flags.writeable else array.copy()
    if source.dtype == BFLOAT16:
        return torch.from_numpy(source.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(source)
