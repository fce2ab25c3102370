"""SET_ROWS, GET_ROWS, CPY, decay and conversions of the GPU backend, run lane by lane on the CPU, against the C reference."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from lanes_tools import CUDA, Device, LanesMisuse, each_device, load

from turbo_gguf.codec import oracle
from turbo_gguf.codec.tables import ALL, SCALAR, TRELLIS, ScalarType, Scale, TrellisType, TurboType

sys.path.append(str(Path(__file__).resolve().parents[2] / "codec"))
from codec_cases import FINITE_SCALES, OTHER_SCALES, blocks_with_scales, stored_blocks

OPS = {"dup": 1, "cpy": 2, "cont": 3, "get_rows": 8, "set_rows": 9, "mul_mat": 10, "map_custom1": 12}
FLOATS = {"f32": 0, "f16": 1, "bf16": 30}
INDEX_TYPES = {np.dtype(np.int32): 26, np.dtype(np.int64): 27}

each_type = pytest.mark.parametrize("t", ALL, ids=lambda t: t.name)
each_scalar_type = pytest.mark.parametrize("t", SCALAR, ids=lambda t: t.name)
each_float = pytest.mark.parametrize("floats", FLOATS)


class CTensor(ctypes.Structure):
    """``ggml_tensor`` of lanes/include/ggml.h."""


CTensor._fields_ = [
    ("type", ctypes.c_int),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("src", ctypes.POINTER(CTensor) * 10),
    ("data", ctypes.c_void_p),
    ("view_src", ctypes.c_void_p),
    ("flags", ctypes.c_int32),
]


@dataclass
class Tensor:
    """Memory, and how it is looked at: numpy's order of dimensions, slowest first."""

    type_id: int
    array: np.ndarray  # of values (floats, indices) or of bytes (turbo: the last dimension is a row's bytes)
    t: TurboType | None = None

    def permuted(self, *axes: int) -> Tensor:
        return Tensor(self.type_id, self.array.transpose(axes), self.t)

    def c(self, *sources: Tensor) -> CTensor:
        shape, strides = list(self.array.shape), list(self.array.strides)
        if self.t:
            shape[-1] = shape[-1] // self.t.block_bytes * self.t.block
            strides[-1] = self.t.block_bytes
        missing = 4 - len(shape)
        shape, strides = [1] * missing + shape, [strides[0] * shape[0]] * missing + strides
        out = CTensor(self.type_id, tuple(reversed(shape)), tuple(reversed(strides)))
        out.data = self.array.ctypes.data
        for i, source in enumerate(sources):
            out.src[i] = ctypes.pointer(source.c())
        return out


def compute(device: Device, op: str, dst: Tensor, *sources: Tensor, scale: Scale = Scale.MATCHED_NORM) -> None:
    load("ops.cpp", device).call("lanes_compute", OPS[op], ctypes.byref(dst.c(*sources)), int(scale))


def turbo_tensor(t: TurboType, packed: np.ndarray) -> Tensor:
    return Tensor(t.type_id, packed, t)


def indices(array: np.ndarray) -> Tensor:
    return Tensor(INDEX_TYPES[array.dtype], array)


def gaussian(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def float_tensor(floats: str, values: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """A tensor of that type, and what it holds as f32."""
    if floats == "f32":
        return Tensor(FLOATS[floats], values), values
    if floats == "f16":
        half = values.astype(np.float16)
        return Tensor(FLOATS[floats], half), half.astype(np.float32)
    bits = to_bf16(values)
    return Tensor(FLOATS[floats], bits), from_bf16(bits)


def to_bf16(values: np.ndarray) -> np.ndarray:
    u = values.view(np.uint32)
    return ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(floats: str, values: np.ndarray) -> np.ndarray:
    return {"f32": values, "f16": values.astype(np.float16), "bf16": to_bf16(values)}[floats]


def quantized(t: TurboType, values: np.ndarray, scale: Scale = Scale.MATCHED_NORM) -> np.ndarray:
    if isinstance(t, TrellisType):
        return oracle.load().quantize_trellis(t, values)
    return oracle.load().quantize(t, values, scale=scale)


def row_bytes(t: TurboType, n: int) -> int:
    return n // t.block * t.block_bytes


#
# SET_ROWS
#


@each_device
@each_type
@pytest.mark.parametrize("floats", ["f32", "f16"])
@pytest.mark.parametrize("index_type", [np.int32, np.int64], ids=["i32", "i64"])
@pytest.mark.parametrize("blocks", [1, 3, 16])
def test_set_rows(device: Device, t: TurboType, floats: str, index_type: type, blocks: int) -> None:
    """Indices repeat over dimensions 2 and 3; only the named rows change."""
    n = blocks * t.block
    source, values = float_tensor(floats, gaussian(3, 4, 5, n))
    rows = np.stack([np.random.default_rng(i).permutation(11)[:5] for i in range(2)])[None].astype(index_type)
    dst = np.full((3, 4, 11, row_bytes(t, n)), 0x5A, dtype=np.uint8)
    expected = dst.copy()
    for i3, i2 in np.ndindex(3, 4):
        expected[i3, i2, rows[0, i2 % 2]] = quantized(t, values[i3, i2])
    compute(device, "set_rows", turbo_tensor(t, dst), source, indices(rows))
    assert np.array_equal(dst, expected)


@each_scalar_type
@pytest.mark.parametrize("scale", Scale, ids=lambda s: s.name.lower())
def test_set_rows_takes_the_scale_rule_of_the_process(t: ScalarType, scale: Scale) -> None:
    values = gaussian(3, 64)
    dst = np.zeros((3, row_bytes(t, 64)), dtype=np.uint8)
    compute(CUDA, "set_rows", turbo_tensor(t, dst), Tensor(0, values), indices(np.arange(3)), scale=scale)
    assert np.array_equal(dst, quantized(t, values, scale))


@each_type
def test_set_rows_of_views(t: TurboType) -> None:
    """Rows apart, indices apart, and a destination that is part of longer rows."""
    n, size = t.block, t.block_bytes
    values = gaussian(6, 5 * n)[::2, n : 4 * n]
    rows = np.array([4, 9, 1, 9, 0, 9], dtype=np.int64)[::2]
    dst = np.zeros((5, 8 * size), dtype=np.uint8)
    part = dst[:, 2 * size : 5 * size]
    compute(CUDA, "set_rows", turbo_tensor(t, part), Tensor(0, values), indices(rows))
    assert np.array_equal(part[rows], quantized(t, values))
    assert not dst[:, : 2 * size].any() and not dst[:, 5 * size :].any() and not dst[[2, 3]].any()


#
# GET_ROWS
#


@each_device
@each_type
def test_get_rows(device: Device, t: TurboType) -> None:
    n = 3 * t.block
    packed = quantized(t, gaussian(2, 3, 9, n))
    rows = np.random.default_rng(4).integers(0, 9, (2, 3, 7), dtype=np.int32)
    out = np.zeros((2, 3, 7, n), dtype=np.float32)
    compute(device, "get_rows", Tensor(0, out), turbo_tensor(t, packed), indices(rows))
    expected = np.stack([[oracle.load().dequantize(t, packed[a, b, rows[a, b]]) for b in range(3)] for a in range(2)])
    assert np.array_equal(out, expected)


@each_type
def test_get_rows_of_more_rows_than_a_grid_is_high(t: TurboType) -> None:
    n = t.block
    packed = quantized(t, gaussian(5, n))
    rows = np.random.default_rng(4).integers(0, 5, 70_000, dtype=np.int32)
    out = np.zeros((70_000, n), dtype=np.float32)
    compute(CUDA, "get_rows", Tensor(0, out), turbo_tensor(t, packed), indices(rows))
    assert np.array_equal(out, oracle.load().dequantize(t, packed)[rows])


@each_type
def test_get_rows_of_nan_and_zero_blocks(t: TurboType) -> None:
    values = np.zeros((3, t.block), dtype=np.float32)
    values[1, 5] = np.nan
    packed = quantized(t, values)
    out = np.ones((3, t.block), dtype=np.float32)
    compute(CUDA, "get_rows", Tensor(0, out), turbo_tensor(t, packed), indices(np.arange(3, dtype=np.int32)))
    assert np.isnan(out[1]).all() and not out[[0, 2]].any()


#
# CPY, CONT, DUP
#


@each_device
@each_type
@each_float
@pytest.mark.parametrize("op", ["cpy", "cont"])
def test_copy_from_floats(device: Device, t: TurboType, floats: str, op: str) -> None:
    source, values = float_tensor(floats, gaussian(2, 3, 5, 64))
    dst = np.zeros((2, 5, 3, row_bytes(t, 64)), dtype=np.uint8)
    compute(device, op, turbo_tensor(t, dst), source.permuted(0, 2, 1, 3))
    assert np.array_equal(dst, quantized(t, values.transpose(0, 2, 1, 3)))


@each_device
@each_type
@each_float
def test_copy_to_floats(device: Device, t: TurboType, floats: str) -> None:
    packed = quantized(t, gaussian(2, 3, 5, 64))
    values = oracle.load().dequantize(t, packed).transpose(0, 2, 1, 3)
    dst, _ = float_tensor(floats, np.zeros((2, 5, 3, 64), dtype=np.float32))
    compute(device, "cpy", dst, turbo_tensor(t, packed).permuted(0, 2, 1, 3))
    assert np.array_equal(dst.array, rounded(floats, values))


@each_type
@each_float
@pytest.mark.parametrize("aligned", [False, True], ids=["not aligned", "every other value"])
def test_copy_to_floats_that_are_not_neighbours(t: TurboType, floats: str, aligned: bool) -> None:
    n = t.block
    packed = quantized(t, gaussian(5, n))
    whole, _ = float_tensor(floats, np.zeros((5, 2 * n), dtype=np.float32))
    part = np.s_[:, ::2] if aligned else np.s_[:, 1 : n + 1]
    view = whole.array[part]
    compute(CUDA, "cpy", Tensor(whole.type_id, view), turbo_tensor(t, packed))
    expected = np.zeros_like(whole.array)
    expected[part] = rounded(floats, oracle.load().dequantize(t, packed))
    assert np.array_equal(whole.array, expected)


@each_type
def test_copy_of_transposed_floats(t: TurboType) -> None:
    values = gaussian(3 * t.block, 5)
    dst = np.zeros((5, 3 * t.block_bytes), dtype=np.uint8)
    compute(CUDA, "cpy", turbo_tensor(t, dst), Tensor(0, values.T))
    assert np.array_equal(dst, quantized(t, np.ascontiguousarray(values.T)))


@each_type
def test_copy_to_another_shape(t: TurboType) -> None:
    n = t.block
    values = gaussian(6, 2 * n)
    dst = np.zeros((4, 3 * t.block_bytes), dtype=np.uint8)
    compute(CUDA, "cpy", turbo_tensor(t, dst), Tensor(0, values))
    assert np.array_equal(dst, quantized(t, values.reshape(4, 3 * n)))
    back = np.zeros((12, n), dtype=np.float32)
    compute(CUDA, "cpy", Tensor(0, back), turbo_tensor(t, dst))
    assert np.array_equal(back, oracle.load().dequantize(t, dst).reshape(12, n))


@each_device
@each_type
@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3)], ids=str)
def test_copy_of_blocks(device: Device, t: TurboType, axes: tuple[int, ...]) -> None:
    packed = np.random.default_rng(3).integers(0, 256, (2, 3, 7, 3 * t.block_bytes), dtype=np.uint8)
    expected = np.ascontiguousarray(packed.transpose(axes))
    dst = np.zeros_like(expected)
    compute(device, "dup", turbo_tensor(t, dst), turbo_tensor(t, packed).permuted(*axes))
    assert np.array_equal(dst, expected)


#
# decay
#

each_decaying_type = pytest.mark.parametrize("t", [t for t in SCALAR if t.decays], ids=lambda t: t.name)
each_scale = pytest.mark.parametrize("scale", Scale, ids=lambda s: s.name.lower())


def decay(device: Device, t: ScalarType, packed: np.ndarray, scale: Scale = Scale.MATCHED_NORM) -> None:
    """In place."""
    dst = turbo_tensor(t, packed)
    tensor = dst.c(dst)
    tensor.op_params[0] = 1
    load("ops.cpp", device).call("lanes_compute", OPS["map_custom1"], ctypes.byref(tensor), int(scale))


@each_device
@each_decaying_type
@each_scale
def test_decay_stores_the_bits_of_the_reference(device: Device, t: ScalarType, scale: Scale) -> None:
    packed = stored_blocks(t)[::7].copy()
    expected = oracle.load().decay(t, packed, scale=scale)
    assert not np.array_equal(packed, expected)
    decay(device, t, packed, scale)
    wrong = np.flatnonzero((packed != expected).any(axis=1))
    assert wrong.size == 0, f"{wrong.size} of {len(packed)} blocks differ, the first is {packed[wrong[0]].tobytes().hex()}"


@each_device
@each_decaying_type
def test_decay_does_not_depend_on_which_thread_goes_first(device: Device, t: ScalarType) -> None:
    packed = blocks_with_scales(t, (*FINITE_SCALES, *OTHER_SCALES), 3)
    expected = oracle.load().decay(t, packed, scale=Scale.MATCHED_NORM)
    library = load("ops.cpp", device)
    library.set_descending(True)
    try:
        decay(device, t, packed)
    finally:
        library.set_descending(False)
    assert np.array_equal(packed, expected)


@each_decaying_type
@pytest.mark.parametrize("n", [32, 96, 1024])
def test_decay_of_some_rows(t: ScalarType, n: int) -> None:
    cache = quantized(t, gaussian(3, 11, n))
    expected = cache.copy()
    expected[1, 2:9] = oracle.load().decay(t, cache[1, 2:9], scale=Scale.MATCHED_NORM)
    decay(CUDA, t, cache[1, 2:9])
    assert np.array_equal(cache, expected)


def test_decay_of_no_rows_launches_nothing() -> None:
    t = SCALAR[-1]
    decay(CUDA, t, np.zeros((0, row_bytes(t, 64)), dtype=np.uint8))


#
# conversions, support
#


@each_device
@each_type
@pytest.mark.parametrize("floats", ["f32", "f16"])
def test_slice_of_a_cache_to_floats(device: Device, t: TurboType, floats: str) -> None:
    """K as attention sees it: heads of a key beside each other, some of the keys."""
    cache = quantized(t, gaussian(40, 4, 64))
    keys = cache[8:29].transpose(1, 0, 2)  # heads, keys, bytes
    out = rounded(floats, np.zeros((4, 21, 64), dtype=np.float32))
    load("ops.cpp", device).call("lanes_to_floats", FLOATS[floats], ctypes.byref(turbo_tensor(t, keys).c()), out)
    assert np.array_equal(out, rounded(floats, oracle.load().dequantize(t, keys)))


def test_empty_tensors_launch_nothing() -> None:
    t = SCALAR[1]
    dst = np.zeros((4, row_bytes(t, 64)), dtype=np.uint8)
    compute(CUDA, "set_rows", turbo_tensor(t, dst), Tensor(0, gaussian(0, 64)), indices(np.zeros(0, dtype=np.int64)))
    assert not dst.any()


@pytest.mark.parametrize(("t", "other"), [(SCALAR[1], SCALAR[0]), (TRELLIS[1], SCALAR[1])], ids=["scalar", "trellis"])
def test_what_is_not_supported_is_refused(t: TurboType, other: ScalarType) -> None:
    packed = quantized(t, gaussian(4, 64))
    refused = [
        ("cpy", turbo_tensor(other, np.zeros((4, row_bytes(other, 64)), dtype=np.uint8)), turbo_tensor(t, packed)),
        ("cpy", Tensor(8, np.zeros((4, 64), dtype=np.float32)), turbo_tensor(t, packed)),
        ("cpy", turbo_tensor(t, packed), Tensor(0, gaussian(16, 16))),
        ("map_custom1", turbo_tensor(t, packed), turbo_tensor(t, packed)),
        ("set_rows", turbo_tensor(t, packed), Tensor(0, gaussian(4, t.block // 2))),
        ("mul_mat", Tensor(0, np.zeros((4, 4), dtype=np.float32)), turbo_tensor(t, packed)),
    ]
    for op, dst, source in refused:
        with pytest.raises(LanesMisuse, match="not supported"):
            compute(CUDA, op, dst, source, indices(np.arange(4)))
