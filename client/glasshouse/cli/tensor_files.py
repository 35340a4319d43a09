"""Arrays in files: .npy and .safetensors in, .npz and .safetensors out. No pickles.

A .npz is written as its arrays come, so it holds more than memory does; a .safetensors starts with the table
of all its tensors, so it is gathered first. Both appear under their name only when whole.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from glasshouse.wire.tensors import BFLOAT16

_MAX_HEADER_BYTES: Final = 100_000_000  # The limit of the safetensors format.
_SAFETENSORS: Final[dict[str, np.dtype[Any]]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
}


class TensorFileError(ValueError):
    """A file that does not hold what it should."""


def read_one(path: Path) -> NDArray[Any]:
    """The array of a .npy file, or the only tensor of a .safetensors file.

    Raises OSError where the file cannot be read and TensorFileError where it holds anything else.
    """
    if path.suffix == ".npy":
        try:
            return np.asarray(np.load(path, allow_pickle=False))
        except (ValueError, EOFError) as error:
            raise TensorFileError(f"{path} is not a .npy file of numbers: {error}") from None
    if path.suffix == ".safetensors":
        return _only_safetensor(path)
    raise TensorFileError(f"{path}: expected a .npy or a .safetensors file")


def _only_safetensor(path: Path) -> NDArray[Any]:
    data = path.read_bytes()
    n_header = int.from_bytes(data[:8], "little")
    try:
        if len(data) < 8 or n_header > min(_MAX_HEADER_BYTES, len(data) - 8):
            raise ValueError("its header is cut off")
        header = json.loads(data[8 : 8 + n_header])
        names = [name for name in header if name != "__metadata__"]
        if len(names) != 1:
            raise ValueError(f"it holds {len(names)} tensors, and one is needed")
        entry = header[names[0]]
        start, stop = entry["data_offsets"]
        body = data[8 + n_header :]
        if not 0 <= start <= stop <= len(body):
            raise ValueError("its tensor lies outside the file")
        return np.frombuffer(body[start:stop], dtype=_SAFETENSORS[entry["dtype"]]).reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TensorFileError(f"{path} is not a .safetensors file of one tensor: {error}") from None


class ArrayWriter:
    """Writes named arrays to a .npz or .safetensors file; used as a context manager, it appears when the
    block ends.

    Raises TensorFileError for another suffix, and for bfloat16 in .npz, which numpy cannot read back.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        if path.suffix not in (".npz", ".safetensors"):
            raise TensorFileError(f"{path}: expected a .npz or a .safetensors file")
        if path.suffix == ".npz" and dtype == "bfloat16":
            raise TensorFileError(f"{path}: .npz has no bfloat16; write .safetensors, or take float16")
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._part = path.with_name(path.name + ".part")
        self._gathered: dict[str, NDArray[Any]] = {}
        self._archive: zipfile.ZipFile | None = None

    def __enter__(self) -> ArrayWriter:
        if self.path.suffix == ".npz":
            self._archive = zipfile.ZipFile(self._part, "w", zipfile.ZIP_STORED)
        else:
            self._part.touch()  # Fails now rather than after the work.
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._archive is not None:
                self._archive.close()
            elif error is None:
                self._write_safetensors()
            if error is None:
                self._part.replace(self.path)
        finally:
            self._part.unlink(missing_ok=True)

    def add(self, name: str, array: NDArray[Any]) -> None:
        """Adds an array under a new name."""
        self.shapes[name] = array.shape
        if self._archive is None:
            self._gathered[name] = array
        else:
            with self._archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                write_array: Any = np.lib.format.write_array  # typed by some releases of numpy alone
                write_array(member, array, allow_pickle=False)

    def _write_safetensors(self) -> None:
        codes = {dtype: code for code, dtype in _SAFETENSORS.items()}
        header, offset = {}, 0
        for name, array in self._gathered.items():
            stop = offset + array.nbytes
            header[name] = {
                "dtype": codes[array.dtype],
                "shape": list(array.shape),
                "data_offsets": [offset, stop],
            }
            offset = stop
        table = json.dumps(header).encode()
        table += b" " * (-len(table) % 8)
        with self._part.open("wb") as file:
            file.write(len(table).to_bytes(8, "little") + table)
            for array in self._gathered.values():
                file.write(np.ascontiguousarray(array).tobytes())
