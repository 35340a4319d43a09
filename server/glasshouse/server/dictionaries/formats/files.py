"""What a loader sees of a path: a listing, JSON configs and tensors, each failure named.

Nothing here executes what it reads. safetensors files are memory-mapped; `.pt` files are unpickled with
`weights_only=True` (a file that needs more is refused), mapped where they are zip archives; `.npz` members
that are stored uncompressed are mapped, compressed ones are inflated into memory.

Every refusal is FAILED_PRECONDITION / DICTIONARY_MALFORMED naming the file, the tensor, what was expected,
what was found and the remedy.
"""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.lib import format as npy_format
from safetensors import safe_open
from torch import Tensor

from glasshouse.server.dictionaries.parameters import malformed
from glasshouse.server.types.errors import NotFound
from glasshouse.wire import reasons

MAX_CONFIG_BYTES = 16 << 20
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".npz")
#: Tensors up to this size are searched for NaN on load; larger ones by a sample of their rows.
CHECK_WHOLE_BYTES = 16 << 20
SAMPLED_ROWS = 16
# Typed by some releases of numpy alone.
npy: Any = npy_format
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

PICKLE_REMEDY = (
    "Only plain tensors are read from pickle files, nothing in them is executed. Convert the file to "
    "safetensors where you trust it."
)


class Source:
    """A folder, or one weight file, that may hold a dictionary."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise NotFound(
                f"{path}: no such file or folder",
                reason=reasons.DICTIONARY_NOT_FOUND,
                resource_type="dictionary",
                resource_name=str(path),
                field="path",
                remedy="Give the folder (or single file) that holds the dictionary, as the server sees it.",
            )
        self.path = path
        self.is_file = path.is_file()
        self.folder = path.parent if self.is_file else path
        self._opened: dict[str, TensorFile] = {}

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def names(self) -> frozenset[str]:
        """File names of the folder itself; only its own name for a single file."""
        if self.is_file:
            return frozenset({self.path.name})
        return frozenset(entry.name for entry in self.path.iterdir() if entry.is_file())

    def has(self, *names: str) -> bool:
        return all(
            name in self.names or (not self.is_file and (self.path / name).is_file()) for name in names
        )

    def matching(self, pattern: str) -> list[str]:
        """Names that match a glob, in natural order (layer_2 before layer_10)."""
        found = [name for name in self.names if Path(name).match(pattern)]
        return sorted(found, key=natural_key)

    @property
    def weight_files(self) -> list[str]:
        return sorted((n for n in self.names if n.endswith(WEIGHT_SUFFIXES)), key=natural_key)

    def config(self, name: str) -> dict[str, Any]:
        """A JSON or YAML object; {} where there is no such file."""
        path = self.folder / name
        if not path.is_file():
            return {}
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise malformed(str(path), f"is {path.stat().st_size} bytes, too large for a config")
        try:
            text = path.read_text(encoding="utf-8")
            read: Any = yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
        except (UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError, RecursionError) as error:
            raise malformed(str(path), f"cannot be parsed: {error}") from None
        if not isinstance(read, dict):
            raise malformed(str(path), f"holds a {type(read).__name__}, expected an object")
        return read

    def tensors(self, name: str) -> TensorFile:
        """The tensors of one weight file, opened once."""
        if name not in self._opened:
            path = self.folder / name
            if not path.is_file():
                raise malformed(str(self.path), f"has no file {name}")
            self._opened[name] = TensorFile(path)
        return self._opened[name]

    def keys_of(self, name: str) -> frozenset[str]:
        """Tensor names of a file, for detection: empty where it cannot be read."""
        try:
            return frozenset(self.tensors(name).entries)
        except Exception as error:
            if getattr(error, "reason", "") != reasons.DICTIONARY_MALFORMED:
                raise
            return frozenset()


def natural_key(name: str) -> tuple[object, ...]:
    """Sorts numbers inside names by value."""
    parts: list[object] = []
    digits = ""
    for character in name + "\0":
        if character.isdigit():
            digits += character
        else:
            if digits:
                parts.append((1, int(digits)))
                digits = ""
            parts.append((0, ord(character)))
    return tuple(parts)


class TensorFile:
    """The entries of one weight file: tensors mapped where possible, and what else a state dict carries."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: Mapping[str, Any] = _read(path)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def take(self, *names: str, shape: tuple[int | None, ...] | None = None) -> Tensor:
        """The first tensor present under one of these names, checked: a float dtype, the shape, no NaN.

        `None` in `shape` matches any size.
        """
        for name in names:
            if name in self.entries:
                return self._checked(name, shape)
        raise malformed(
            str(self.path),
            f"has no tensor {' or '.join(names)}; found {', '.join(sorted(self.entries)[:20]) or 'none'}",
        )

    def maybe(self, *names: str, shape: tuple[int | None, ...] | None = None) -> Tensor | None:
        """Like `take`, None where no such entry exists."""
        return self.take(*names, shape=shape) if any(name in self.entries for name in names) else None

    def raw(self, name: str) -> Any:
        """An entry as it is, unchecked: a scalar, a string, a tensor that may be NaN. None where absent."""
        return self.entries.get(name)

    def number(self, name: str) -> float | None:
        """A scalar entry as a float."""
        value = self.entries.get(name)
        if value is None:
            return None
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise malformed(str(self.path), f"tensor {name} is {tuple(value.shape)}, expected one number")
            return float(value)
        if isinstance(value, (int, float)):
            return float(value)
        raise malformed(str(self.path), f"{name} is a {type(value).__name__}, expected one number")

    def _checked(self, name: str, shape: tuple[int | None, ...] | None) -> Tensor:
        tensor = self.entries[name]
        if not isinstance(tensor, Tensor):
            raise malformed(str(self.path), f"{name} is a {type(tensor).__name__}, expected a tensor")
        if tensor.dtype not in FLOATS:
            raise malformed(
                str(self.path),
                f"tensor {name} has dtype {tensor.dtype}, expected float32, float16, bfloat16 or float64",
                "Export the dictionary in one of these; quantised weights are not served.",
            )
        if shape is not None:
            fits = len(shape) == tensor.ndim and all(s is None or s == t for s, t in zip(shape, tensor.shape))
            if not fits:
                wanted = tuple("any" if s is None else s for s in shape)
                raise malformed(
                    str(self.path), f"tensor {name} has shape {tuple(tensor.shape)}, expected {wanted}"
                )
        if tensor.numel() == 0:
            raise malformed(str(self.path), f"tensor {name} is empty, shape {tuple(tensor.shape)}")
        check_finite(str(self.path), name, tensor)
        return tensor.detach()


def check_finite(path: str, name: str, tensor: Tensor) -> None:
    """Refuses NaN and infinite weights: all of a small tensor, a spread of rows of a large mapped one."""
    if tensor.numel() * tensor.element_size() > CHECK_WHOLE_BYTES:
        step = max(1, tensor.shape[0] // SAMPLED_ROWS)
        tensor = tensor[::step][:SAMPLED_ROWS]
    if not bool(tensor.isfinite().all()):
        raise malformed(
            path,
            f"tensor {name} holds NaN or infinite weights",
            "The training run diverged or the file is damaged: use another checkpoint.",
        )


def _read(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".npz":
        return _read_npz(path)
    return _read_pickle(path)


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise malformed(str(path), f"is not a whole safetensors file: {error}") from None


def _read_pickle(path: Path) -> Mapping[str, Any]:
    def load(mapped: bool) -> Any:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)

    try:
        state = load(zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0][:200]
        raise malformed(
            str(path), f"needs more than plain tensors to unpickle: {reason}", PICKLE_REMEDY
        ) from None
    except Exception as error:
        raise malformed(str(path), f"is not a whole PyTorch file: {str(error)[:200]}") from None
    if isinstance(state, dict) and isinstance(state.get("sae"), dict):
        state = state["sae"]
    if not isinstance(state, dict):
        raise malformed(str(path), f"holds a {type(state).__name__}, expected a state dict")
    return {str(name): value for name, value in state.items()}


def _read_npz(path: Path) -> Mapping[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if m.filename.endswith(".npy")]
            return {m.filename.removesuffix(".npy"): _read_npy(path, archive, m) for m in members}
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, struct.error) as error:
        raise malformed(str(path), f"is not a whole .npz file: {error}") from None


def _read_npy(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Tensor:
    with archive.open(member) as stream:
        version = npy.read_magic(stream)
        reader = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = reader(stream)
        if dtype.hasobject:
            raise malformed(str(path), f"array {member.filename} holds Python objects", PICKLE_REMEDY)
        header_bytes = stream.tell()
        if member.compress_type != zipfile.ZIP_STORED:
            flat = np.frombuffer(stream.read(), dtype=dtype).copy()
            return torch.from_numpy(flat.reshape(shape, order="F" if fortran else "C"))
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)
        name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
    offset = member.header_offset + 30 + name_bytes + extra_bytes + header_bytes
    mapped = np.memmap(path, dtype=dtype, mode="c", offset=offset, shape=shape, order="F" if fortran else "C")
    return torch.from_numpy(np.asarray(mapped))
