"""What a worker pushes to the gateway: one ZMQ message a report.

Its parts: a msgpack header; the int32 index arrays one after the other; then each value array, C-contiguous, little-endian.
A large message has a frame a part. A small one, as most are, has them all in one, for a frame costs more than its copy: the
header's length as uint32, and each part from a multiple of 8 on. Arrays come out as views of the frames.

Rows are keyed by (tag, readout, position) and the last one wins: a position runs again after preemption, and
speculation runs positions that are then rejected. Hand a row out only once the token count confirms its position. The
token sampled last is never fed, so it has no row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

# Values beyond this are sent as frames of their own.
ONE_FRAME_BYTES = 1 << 16

# Why a request failed in the worker; `StepError.reason`.
PLAN_REFUSED = "plan_refused"  # the plan cannot be installed: nothing of it was applied
NOT_APPLIED = "not_applied"  # a site did not fire, or an op failed: tokens from this step on are void
READOUT_FAILED = "readout_failed"  # reading failed; edits are as they should be
OVERFLOW = "overflow"  # the gateway did not keep up, rows were dropped


@dataclass(frozen=True, kw_only=True)
class StepError:
    """A request that failed here and only here: abort it. After NOT_APPLIED its keys and values may lie unedited in
    the prefix cache under its salt: raise the `epoch` of `salt.cache_salt`.
    """

    tag: int
    reason: str
    message: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Ran:
    """What forward passes ran of hooked requests, int32 (n,) each: positions `starts`..`starts + counts` of `tags`,
    at which edits ran `applied` times in all (each edit once a position; counted by the kernels' own rows).

    `steps` passes, each of which went on where the one before it ended and applied as much; more than one only where all
    counts are 1.
    """

    tags: Array
    starts: Array
    counts: Array
    applied: Array
    steps: int = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class RowBlock:
    """Rows read: `tags`, `readouts` (index in the request) and `positions` int32 (n,); `values` (n, ...) each.

    kind "activations": (activations (n, W) in the readout's dtype,), W of all the readout's sites together
    kind "features":    (ids int32 (n, k), activations float32 (n, k)); -1 in empty slots, at the end of a row; named
                        features come in the order asked, none empty
    kind "lens":        (token ids int32 (n, k), log-probabilities float32 (n, k)), descending
    kind "probe":       (scores float32 (n, C),)
    kind "scores":      (scores float64 (n, M),) of the M watches that may steer the request; NaN where none was made
    kind "steered":     (bool (n,),), whether a conditional edit was made at a position it was applied at: `readouts`
                        holds the edit's index
    """

    kind: str
    tags: Array
    readouts: Array
    positions: Array
    values: tuple[Array, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class StepReport:
    """One message. `armed`: tags whose plan is installed from this step on (on this rank). `closed`: tags that this rank
    has let go of, for vLLM is done with them: nothing of theirs comes after.
    """

    rank: int
    step: int
    armed: tuple[int, ...] = ()
    closed: tuple[int, ...] = ()
    errors: tuple[StepError, ...] = ()
    ran: tuple[Ran, ...] = ()
    blocks: tuple[RowBlock, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _BlockHeader:
    kind: str
    n: int
    arrays: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, kw_only=True)
class _Header:
    rank: int
    step: int
    armed: tuple[int, ...]
    closed: tuple[int, ...]
    errors: tuple[tuple[int, str, str], ...]
    ran: tuple[tuple[int, int], ...]
    blocks: tuple[_BlockHeader, ...]


@cache
def _codec() -> tuple[Any, Any]:
    import msgspec

    return msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(_Header)


def pack_report(report: StepReport) -> list[Any]:
    """The frames of a message, for `socket.send_multipart`. The arrays themselves are frames, not copies."""
    indices: list[Array] = []
    for ran in report.ran:
        indices += [ran.tags, ran.starts, ran.counts, ran.applied]
    headers = []
    frames: list[Any] = []
    for block in report.blocks:
        indices += [block.tags, block.readouts, block.positions]
        arrays = [np.ascontiguousarray(array) for array in block.values]
        headers.append(
            _BlockHeader(
                kind=block.kind,
                n=len(block.tags),
                arrays=tuple((array.dtype.name, array.shape) for array in arrays),
            )
        )
        frames += [array.view(np.uint8) if array.dtype == ml_dtypes.bfloat16 else array for array in arrays]
    header = _Header(
        rank=report.rank,
        step=report.step,
        armed=report.armed,
        closed=report.closed,
        errors=tuple((error.tag, error.reason, error.message) for error in report.errors),
        ran=tuple((len(ran.tags), ran.steps) for ran in report.ran),
        blocks=tuple(headers),
    )
    index = np.concatenate(indices, dtype=np.int32) if indices else np.empty(0, np.int32)
    parts = [_codec()[0].encode(header), index, *frames]
    if sum(frame.nbytes for frame in frames) > ONE_FRAME_BYTES:
        return parts
    joined: list[Any] = [len(parts[0]).to_bytes(4, "little")]
    at = 4
    for part in parts:
        size = len(part) if isinstance(part, bytes) else part.nbytes
        joined += (part, b"\0" * (-(at + size) % 8))
        at += size + len(joined[-1])
    return [b"".join(joined)]


class _Joined:
    """The parts of a message of one frame, one after the other."""

    def __init__(self, frame: Any) -> None:
        self._view, self._at = memoryview(frame), 4

    def header(self) -> Any:
        return self.part(int.from_bytes(self._view[:4], "little"))

    def part(self, size: int) -> Any:
        begin = self._at
        self._at += size + -(begin + size) % 8
        return self._view[begin : begin + size]


def unpack_report(frames: Sequence[Any]) -> StepReport:
    """The reverse; `frames` are anything with the buffer protocol (`recv_multipart(copy=False)`: pass `frame.buffer`)."""
    part: Callable[[int], Any]
    if len(frames) == 1:
        joined = _Joined(frames[0])
        first, part = joined.header(), joined.part
    else:
        following = iter(frames)
        first, part = next(following), lambda _: next(following)
    header: _Header = _codec()[1].decode(first)
    n_indices = sum(4 * n for n, _ in header.ran) + sum(3 * block.n for block in header.blocks)
    index = np.frombuffer(part(4 * n_indices), dtype=np.int32)
    at = 0

    def take(n: int) -> Array:
        nonlocal at
        taken = index[at : at + n]
        at += n
        return taken

    ran = tuple(
        Ran(tags=take(n), starts=take(n), counts=take(n), applied=take(n), steps=steps)
        for n, steps in header.ran
    )
    blocks = []
    for block in header.blocks:
        tags, readouts, positions = take(block.n), take(block.n), take(block.n)
        values = tuple(_array(part, dtype, shape) for dtype, shape in block.arrays)
        blocks.append(
            RowBlock(kind=block.kind, tags=tags, readouts=readouts, positions=positions, values=values)
        )
    return StepReport(
        rank=header.rank,
        step=header.step,
        armed=header.armed,
        closed=header.closed,
        errors=tuple(
            StepError(tag=tag, reason=reason, message=message) for tag, reason, message in header.errors
        ),
        ran=ran,
        blocks=tuple(blocks),
    )


def _array(part: Callable[[int], Any], dtype: str, shape: tuple[int, ...]) -> Array:
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    frame = part(math.prod(shape) * kind.itemsize)
    if math.prod(shape) == 0:
        return np.empty(shape, kind)
    return np.frombuffer(frame, dtype=kind).reshape(shape)
