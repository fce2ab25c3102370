"""Between upstream's kernels for prefill: a slice of a cache becomes f16, and parts of slices are merged. Run lane by lane on the CPU."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from lanes_tools import CUDA, Device, each_device, load
from test_lanes_ops import FLOATS, Tensor, gaussian, quantized, turbo_tensor

from turbo_gguf.codec import oracle
from turbo_gguf.codec.tables import ALL, SCALAR, TRELLIS, TurboType

Array = np.ndarray

each_type = pytest.mark.parametrize("t", ALL, ids=lambda t: t.name)

#
# unpacking
#


def unpack(device: Device, t: TurboType, keys: Array) -> Array | None:
    """Heads, keys, bytes to heads, keys, values; None: it is not taken for a slice."""
    out = np.full((*keys.shape[:2], keys.shape[2] // t.block_bytes * t.block), np.nan, np.float16)
    is_slice = np.full(1, -1, np.int64)
    load("ops.cpp", device).call("lanes_unpack_slice", ctypes.byref(turbo_tensor(t, keys).c()), out, is_slice)
    return out if is_slice[0] else None


def slice_of_a_cache(t: TurboType, n_heads: int, head_size: int, first: int = 8, n_keys: int = 32) -> Array:
    cache = quantized(t, gaussian(48, n_heads, head_size))
    return cache[first : first + n_keys].transpose(1, 0, 2)


@each_device
@each_type
@pytest.mark.parametrize("head_size", [64, 128, 192, 256])
@pytest.mark.parametrize("n_heads", [2, 8])
def test_slices_are_unpacked_as_the_reference_does(device: Device, t: TurboType, head_size: int, n_heads: int) -> None:
    keys = slice_of_a_cache(t, n_heads, head_size)
    want = oracle.load().dequantize(t, keys).astype(np.float16)
    assert np.array_equal(unpack(device, t, keys), want)


@pytest.mark.parametrize("t", SCALAR, ids=lambda t: t.name)
def test_pairs_of_blocks_span_heads_of_96_values(t: TurboType) -> None:
    keys = slice_of_a_cache(t, 4, 96)
    assert np.array_equal(unpack(CUDA, t, keys), oracle.load().dequantize(t, keys).astype(np.float16))


@pytest.mark.parametrize("t", [SCALAR[1], TRELLIS[1]], ids=lambda t: t.name)
def test_what_is_no_slice_is_left_to_the_general_kernel(t: TurboType) -> None:
    assert unpack(CUDA, t, slice_of_a_cache(t, 1, 256)) is not None
    assert unpack(CUDA, t, slice_of_a_cache(t, 1, t.block)) is None, "a block alone"
    assert unpack(CUDA, t, slice_of_a_cache(t, 3, t.block)) is None, "blocks of an odd number"
    assert unpack(CUDA, t, slice_of_a_cache(t, 4, 128, n_keys=21)) is None, "keys that are not a whole number of steps"
    assert unpack(CUDA, t, slice_of_a_cache(t, 8, 128)[::2]) is None, "heads that are not neighbours"
    assert unpack(CUDA, t, slice_of_a_cache(t, 4, 128).transpose(1, 0, 2)[:4]) is None, "keys as heads"


@each_device
@pytest.mark.parametrize("n_keys", [32, 21], ids=["by the kernel for slices", "by the general one"])
@pytest.mark.parametrize("t", [SCALAR[1], TRELLIS[1]], ids=lambda t: t.name)
def test_rows_behind_those_of_a_slice_are_left_as_they_are(device: Device, t: TurboType, n_keys: int) -> None:
    keys = slice_of_a_cache(t, 8, 128, n_keys=n_keys)
    out = np.full((8, n_keys + 24, 128), np.nan, np.float16)
    load("ops.cpp", device).call("lanes_to_f16_rows", ctypes.byref(turbo_tensor(t, keys).c()), out, n_keys + 24)
    assert np.array_equal(out[:, :n_keys], oracle.load().dequantize(t, keys).astype(np.float16))
    assert np.isnan(out[:, n_keys:]).all()


#
# what is copied beside a slice
#


def copy_rows(device: Device, *pairs: tuple[Array, Array]) -> bool:
    """Copy the first of each pair to the second. False: rows are not aligned."""
    tensors = [ctypes.byref(Tensor(FLOATS["f16"], x).c()) for pair in pairs for x in pair]
    is_aligned = np.full(1, -1, np.int64)
    load("ops.cpp", device).call("lanes_copy_rows", *tensors, is_aligned)
    return bool(is_aligned[0])


def random_f16(*shape: int) -> Array:
    return gaussian(*shape, seed=sum(shape)).astype(np.float16)


def unwritten(*shape: int) -> Array:
    return np.full(shape, np.nan, np.float16)


@each_device
def test_exact_keys_are_put_behind_those_of_a_slice(device: Device) -> None:
    """Before, all heads of a key are side by side; behind a slice keys of a head are."""
    pairs = [(random_f16(2, 40, 3, size).transpose(0, 2, 1, 3), unwritten(2, 3, 72, size)) for size in (128, 64)]
    assert copy_rows(device, *((exact, out[:, :, 32:]) for exact, out in pairs))
    for exact, out in pairs:
        assert np.array_equal(out[:, :, 32:], exact)
        assert np.isnan(out[:, :, :32]).all()


@each_device
def test_masks_are_put_side_by_side(device: Device) -> None:
    """That of the exact keys is one for all sequences here, and is repeated."""
    first, second, out = random_f16(3, 1, 5, 256), random_f16(1, 1, 5, 24), unwritten(3, 1, 5, 280)
    assert copy_rows(device, (first, out[..., :256]), (second, out[..., 256:]))
    assert np.array_equal(out, np.concatenate([first, np.repeat(second, 3, 0)], -1))


@pytest.mark.parametrize(("length", "begin"), [(100, 0), (64, 4)])
def test_rows_that_are_not_aligned_are_not_copied(length: int, begin: int) -> None:
    good = random_f16(1, 1, 5, 64), unwritten(1, 1, 5, 64)
    bad = random_f16(1, 1, 5, length), unwritten(1, 1, 5, 128)[..., begin : begin + length]
    for pairs in ((good, bad), (bad, good)):
        assert not copy_rows(CUDA, *pairs)
    assert np.isnan(good[1]).all()


def test_two_sequences_are_not_repeated_for_three() -> None:
    good = random_f16(1, 1, 5, 64), unwritten(1, 1, 5, 64)
    assert not copy_rows(CUDA, good, (random_f16(2, 1, 5, 64), unwritten(3, 1, 5, 64)))


#
# merging
#


def softmax_of(scores: Array, values: Array) -> Array:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("rk,rkd->rd", weights / weights.sum(-1, keepdims=True), values)


@pytest.mark.parametrize("in_place", [False, True], ids=["apart", "in place"])
@pytest.mark.parametrize("n_slices", [1, 2, 4])
@pytest.mark.parametrize("head_size", [64, 96, 512])
@each_device
def test_parts_of_slices_are_merged(device: Device, head_size: int, n_slices: int, in_place: bool) -> None:
    """Each part has seen one key: it is that key's value, and its maximum the score. in_place: the last part of the first slice."""
    n_rows, n_parts = 11, 3
    rng = np.random.default_rng(4)
    scores = 3 * rng.standard_normal((n_rows, n_slices, n_parts))
    values = rng.standard_normal((n_rows, n_slices, n_parts, head_size), np.float32)

    library = load("prefill_merge.cpp", device)
    for descending in (False, True):
        library.set_descending(descending)
        dst, state = np.full((n_rows, head_size), np.nan, np.float32), np.full((n_rows, 2), np.nan, np.float32)
        for i in range(n_slices):
            parts = values[:, i].copy()
            meta = np.stack([scores[:, i], np.ones((n_rows, n_parts))], -1).astype(np.float32)
            last = parts[:, -1].copy()
            parts[:, -1] = np.nan
            if in_place and i == 0:
                dst[:] = last
                last = dst
            library.call("lanes_merge", head_size, n_rows, dst, state, parts, last, meta, n_parts, i == 0, i + 1 == n_slices)
        want = softmax_of(scores.reshape(n_rows, -1), values.reshape(n_rows, -1, head_size))
        np.testing.assert_allclose(dst, want, rtol=1e-4, atol=1e-5)
    library.set_descending(False)


def test_a_row_that_sees_nothing_is_zero() -> None:
    dst, state = np.full((2, 64), np.nan, np.float32), np.full((2, 2), np.nan, np.float32)
    values, meta = np.zeros((2, 2, 64), np.float32), np.tile(np.float32([-1e30, 0]), (2, 2, 1))
    meta[1, 0], values[1, 0] = (2, 1), 5
    load("prefill_merge.cpp", CUDA).call("lanes_merge", 64, 2, dst, state, values, values[:, 1].copy(), meta, 2, True, True)
    assert not dst[0].any()
    assert (dst[1] == 5).all()
