"""Arrays survive the wire bit for bit, and what is damaged is refused before anything is allocated."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from glasshouse.v1.tensors_pb2 import DType, Tensor, TensorChunk
from glasshouse.wire.tensors import (
    NUMPY_DTYPES,
    WIRE_DTYPES,
    TensorAssembler,
    TensorError,
    chunks,
    numpy_dtype,
    pack,
    unpack,
    wire_dtype,
)

SHAPES = [(), (1,), (0,), (7,), (3, 5), (2, 0, 4), (2, 3, 4, 5), (1,) * 8]


def sample(dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    bits = np.random.default_rng(0).integers(0, 256, size=(*shape, dtype.itemsize), dtype=np.uint8)
    if dtype == np.bool_:
        bits %= 2
    return bits.reshape(-1).view(dtype).reshape(shape)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def assembled(pieces: list[TensorChunk]) -> np.ndarray:
    assembler = TensorAssembler()
    completions = [assembler.add(piece) for piece in pieces]
    assert completions == [False] * (len(pieces) - 1) + [True]
    return assembler.result()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", NUMPY_DTYPES.values(), ids=str)
def test_round_trip_keeps_every_bit(dtype: np.dtype, shape: tuple[int, ...]) -> None:
    array = sample(dtype, shape)
    assert same_bits(unpack(pack(array)), array)
    for chunk_bytes in (1, 3, 64, 1 << 20):
        assert same_bits(assembled(list(chunks(array, chunk_bytes))), array)


def test_every_dtype_has_one_number() -> None:
    assert set(NUMPY_DTYPES) == set(DType.values()) - {DType.DTYPE_UNSPECIFIED}
    assert {wire_dtype(numpy_dtype(n)) for n in NUMPY_DTYPES} == set(NUMPY_DTYPES)
    assert len(WIRE_DTYPES) == len(NUMPY_DTYPES)


def test_nan_payloads_and_signed_zero_survive() -> None:
    bits = np.array([0x7FC0, 0xFFC1, 0x7F80, 0x8000], dtype=np.uint16)
    assert unpack(pack(bits.view(ml_dtypes.bfloat16))).view(np.uint16).tolist() == bits.tolist()
    singles = np.array([np.nan, -0.0, np.inf, -np.inf], dtype=np.float32)
    assert unpack(pack(singles)).tobytes() == singles.tobytes()


def test_layout_and_byte_order_do_not_matter() -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    for view in (array.T, array[::2, ::-1], array.astype(">f4"), np.asfortranarray(array)):
        assert np.array_equal(unpack(pack(view)), view)
        assert np.array_equal(assembled(list(chunks(view, 10))), view)
    assert unpack(pack(array.astype(">f4"))).dtype == np.dtype("<f4")


def test_unpack_does_not_copy_and_is_read_only() -> None:
    array = unpack(pack(np.arange(4.0)))
    assert not array.flags.owndata
    assert not array.flags.writeable


def test_assembled_array_is_the_callers_own() -> None:
    array = assembled(list(chunks(np.arange(10, dtype=np.int32), 7)))
    array += 1
    assert array.tolist() == list(range(1, 11))


def test_header_travels_once_and_offsets_follow() -> None:
    pieces = list(chunks(np.arange(5, dtype=np.int32), 8))
    assert [piece.byte_offset for piece in pieces] == [0, 8, 16]
    assert [len(piece.data) for piece in pieces] == [8, 8, 4]
    assert list(pieces[0].shape) == [5]
    assert not pieces[1].shape and pieces[1].dtype == DType.DTYPE_UNSPECIFIED


F32 = DType.DTYPE_F32
HOSTILE = [
    (Tensor(shape=[1], data=b"1234"), "dtype"),
    (Tensor(dtype=99, shape=[1], data=b"1234"), "dtype"),  # type: ignore[arg-type]
    (Tensor(dtype=F32, shape=[2], data=b"1234"), "data"),
    (Tensor(dtype=F32, shape=[1], data=b"12345"), "data"),
    (Tensor(dtype=F32, shape=[], data=b""), "data"),
    (Tensor(dtype=F32, shape=[-1], data=b""), "shape[0]"),
    (Tensor(dtype=F32, shape=[-1, -1], data=b"1234"), "shape[0]"),
    (Tensor(dtype=F32, shape=[1] * 9, data=b"1234"), "shape"),
    (Tensor(dtype=F32, shape=[2**62, 2**62], data=b""), "shape[0]"),
    (Tensor(dtype=F32, shape=[2**32, 2**32], data=b""), "shape"),
    (Tensor(dtype=F32, shape=[2**39, 2**39, 0], data=b""), "shape"),
    (Tensor(dtype=F32, shape=[2**40 + 1, 0], data=b""), "shape[0]"),
    (Tensor(dtype=DType.DTYPE_BOOL, shape=[3], data=b"\x00\x01\x02"), "data"),
]


@pytest.mark.parametrize(("tensor", "field"), HOSTILE, ids=lambda value: str(value).replace("\n", " ")[:60])
def test_hostile_tensors_are_refused_with_their_field(tensor: Tensor, field: str) -> None:
    with pytest.raises(TensorError, match=r"expected .*, found") as caught:
        unpack(tensor)
    assert caught.value.field == field
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("array", [np.zeros(2, np.complex64), np.array(["a"]), np.zeros(2, np.uint8)])
def test_what_the_wire_lacks_is_refused(array: np.ndarray) -> None:
    with pytest.raises(TensorError, match="dtype: expected one of float32"):
        pack(array)
    with pytest.raises(TensorError, match="dtype"):
        chunks(array)


def test_too_many_dimensions_are_refused_before_packing() -> None:
    with pytest.raises(TensorError, match="at most 8 dimensions, found 9"):
        pack(np.zeros((1,) * 9, np.float32))
    with pytest.raises(TensorError, match="at most 8 dimensions, found 9"):
        chunks(np.zeros((1,) * 9, np.float32))
    with pytest.raises(ValueError, match="chunk_bytes"):
        chunks(np.zeros(1, np.float32), 0)


def piece(offset: int, data: bytes, **header: object) -> TensorChunk:
    return TensorChunk(byte_offset=offset, data=data, **header)  # type: ignore[arg-type]


FIRST = piece(0, b"12345678", dtype=F32, shape=[4])
MISUSES = [
    ([piece(4, b"1234", dtype=F32, shape=[4])], "byte_offset", "0 in the first piece, found 4"),
    ([FIRST, piece(12, b"1234")], "byte_offset", "8, where the last piece ended, found 12"),
    ([FIRST, piece(4, b"1234")], "byte_offset", "8, where the last piece ended, found 4"),
    ([FIRST, piece(8, b"1234", dtype=F32, shape=[4])], "shape", "first piece only"),
    ([FIRST, piece(8, b"123456789")], "data", "at most 8 bytes at 8, found 9 bytes"),
    ([FIRST, piece(8, b"")], "data", "some of the 8 bytes left"),
    ([FIRST, piece(8, b"12345678"), piece(16, b"")], "byte_offset", "no further piece"),
    ([piece(0, b"", dtype=F32, shape=[2**40])], "shape", "at most"),
    ([piece(0, b"", dtype=F32, shape=[-2])], "shape[0]", "found -2"),
    ([piece(0, b"1234")], "dtype", "DTYPE_UNSPECIFIED"),
]


@pytest.mark.parametrize(("pieces", "field", "words"), MISUSES, ids=[words for _, _, words in MISUSES])
def test_assembler_says_what_is_wrong(pieces: list[TensorChunk], field: str, words: str) -> None:
    assembler = TensorAssembler()
    with pytest.raises(TensorError) as caught:
        for each in pieces:
            assembler.add(each)
    assert caught.value.field == field
    assert words in str(caught.value)


def test_assembler_bounds_what_a_header_may_allocate() -> None:
    with pytest.raises(TensorError, match="at most 1024 bytes, found 4000 bytes"):
        TensorAssembler(max_bytes=1024).add(piece(0, b"1234", dtype=F32, shape=[1000]))


def test_an_incomplete_tensor_has_no_result() -> None:
    assembler = TensorAssembler()
    assert assembler.total_bytes is None
    with pytest.raises(TensorError, match="at least one piece"):
        assembler.result()
    assembler.add(FIRST)
    assert (assembler.received_bytes, assembler.total_bytes, assembler.complete) == (8, 16, False)
    with pytest.raises(TensorError, match="16 bytes, found 8 bytes"):
        assembler.result()


def test_a_chunked_bool_must_be_0_or_1() -> None:
    assembler = TensorAssembler()
    assembler.add(piece(0, b"\x07", dtype=DType.DTYPE_BOOL, shape=[1]))
    with pytest.raises(TensorError, match="7 at element 0"):
        assembler.result()
