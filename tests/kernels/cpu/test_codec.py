"""Encoders, integer dot products and the Hadamard transform of the CPU: every implementation stores and returns the same bits."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
from codec_cases import FINITE_SCALES, OTHER_SCALES, adversarial_blocks, each_scale, each_type, gaussian_blocks, random_blocks
from trellis_cases import blocks_of_all_kinds, gaussian
from variants import PROGRAMS, Variant, runner

from turbo_gguf.codec import oracle, scalar, trellis
from turbo_gguf.codec.tables import QK_SCALAR, QK_TRELLIS, SCALAR, T_MAX, TRELLIS, ScalarType, Scale, TrellisType

pytestmark = pytest.mark.native

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

each_trellis_type = pytest.mark.parametrize("t", TRELLIS, ids=lambda t: t.name)
each_variant = pytest.mark.parametrize("variant", PROGRAMS["codec"], ids=lambda v: v.name)


def ask(variant: Variant, line: str, data: list[npt.NDArray[np.generic]], answer_bytes: int) -> tuple[int, bytes]:
    """Threads for which the op was taken, and the result; nothing around the buffers was written, by the implementation expected."""
    words, result = runner("codec", variant).ask(line, [part.tobytes() for part in data], answer_bytes)
    assert (words[0], words[2]) == (variant.codec_isa, "1")
    return int(words[1]), result


@each_variant
def test_the_expected_implementation_is_active(variant: Variant) -> None:
    ask(variant, "encode turbo3 0 0 32", [], 0)


#
# encoder
#


def encode(variant: Variant, t: ScalarType, scale: Scale, x: Floats) -> Bytes:
    rows, n = x.shape
    size = x.size // QK_SCALAR * t.block_bytes
    _, result = ask(variant, f"encode {t.name} {int(scale)} {rows} {n}", [x], size)
    return np.frombuffer(result, np.uint8).reshape(rows, -1)


def every_integer() -> Floats:
    """With max|x| = T_MAX the integers of a block are its values: all there are, of both signs, and what lies halfway between them."""
    values = np.arange(T_MAX)
    rows = np.concatenate([values, -values, values + 0.5])
    rows = np.pad(rows, (0, -rows.size % (QK_SCALAR - 1)))
    return np.insert(rows.reshape(-1, QK_SCALAR - 1), 0, T_MAX, axis=1).astype(np.float32)


def nearly_tied_blocks() -> Floats:
    """Two steps of turbo2 have the same gain or neighbouring ones: which is best changes if a gain is rounded otherwise."""
    ties = [(4, 8, 3590, 470), (1, 9, 3296, 1455), (5, 11, 3803, 319), (5, 3, 3737, 280), (7, 7, 4257, 625)]
    return np.array([np.repeat([T_MAX, middle, low], [n, m, QK_SCALAR - n - m]) for n, m, middle, low in ties], np.float32)


@cache
def blocks() -> Floats:
    """Gaussian, heavy-tailed, constant, tiny, huge, NaN, infinite, zero, -0, exactly on a threshold and halfway between integers."""
    heavy = np.random.default_rng(5).standard_t(2, (1000, QK_SCALAR)).astype(np.float32)
    x = np.concatenate([adversarial_blocks(), nearly_tied_blocks(), every_integer(), random_blocks(1500), gaussian_blocks(1500), heavy])
    return np.concatenate([x, gaussian_blocks(-len(x) % 32, seed=9)])  # whole rows of 1024


@cache
def expected_blocks(t: ScalarType, scale: Scale) -> Bytes:
    return scalar.quantize(t, blocks(), scale=scale)


@each_variant
@each_type
@each_scale
@pytest.mark.parametrize("n", [32, 64, 128, 1024])
def test_encoder_is_the_reference(variant: Variant, t: ScalarType, scale: Scale, n: int) -> None:
    x = blocks()
    found = encode(variant, t, scale, x.reshape(-1, n)).reshape(len(x), -1)
    wrong = np.flatnonzero((found != expected_blocks(t, scale)).any(axis=1))
    assert wrong.size == 0, f"{wrong.size} blocks differ, the first is {x[wrong[0]]!r}"


@cache
def trellis_blocks() -> Floats:
    return np.concatenate([blocks_of_all_kinds(), gaussian(2000, seed=20)])


@cache
def expected_trellis_blocks(t: TrellisType) -> Bytes:
    return trellis.quantize(t, trellis_blocks())


@each_variant
@each_trellis_type
@pytest.mark.parametrize("n_blocks", [1, 3, 16, 31])
def test_trellis_encoder_is_the_reference(variant: Variant, t: TrellisType, n_blocks: int) -> None:
    """Whatever blocks share a vector."""
    x = trellis_blocks()
    x = x[: len(x) // n_blocks * n_blocks].reshape(-1, n_blocks * QK_TRELLIS)
    if variant.isa == "generic" or variant.machine != platform.machine():
        x = x[: 600 // n_blocks]  # slow
    size = x.size // QK_TRELLIS * t.block_bytes
    _, result = ask(variant, f"encode {t.name} 0 {len(x)} {x.shape[1]}", [x], size)
    found = np.frombuffer(result, np.uint8).reshape(-1, t.block_bytes)
    wrong = np.flatnonzero((found != expected_trellis_blocks(t)[: len(found)]).any(axis=1))
    assert wrong.size == 0, f"{wrong.size} blocks differ, the first is {x.reshape(-1, QK_TRELLIS)[wrong[0]]!r}"


#
# dot product
#


def dot(variant: Variant, t: ScalarType, x: Bytes, y: npt.NDArray[np.void]) -> Floats:
    """Of packed rows, shape (rows, blocks, bytes), with Q8_0 blocks, shape (rows, blocks)."""
    rows, n = y.shape
    _, result = ask(variant, f"dot {t.name} {rows} {n * QK_SCALAR}", [x, y], 4 * rows)
    return np.frombuffer(result, np.float32)


def exact_dot(t: ScalarType, x: Bytes, y: npt.NDArray[np.void]) -> Floats:
    """Integers within a block, and the order of sums that turbo.c tells."""
    ones = x.copy()
    ones[..., :2] = np.array([1.0], np.float16).view(np.uint8)
    levels = scalar.dequantize(t, ones.reshape(*ones.shape[:2], -1)).astype(np.int64)
    integers = (levels * y["qs"]).sum(axis=2)
    with np.errstate(invalid="ignore"):
        d = (x[..., :2].copy().view(np.float16)[..., 0].astype(np.float32) * y["d"].astype(np.float32)).astype(np.float64)
        products = d * integers
        acc = np.zeros((4, len(y)))
        for i in range(y.shape[1]):
            acc[i % 4] += products[:, i]
        return ((acc[0] + acc[2]) + (acc[1] + acc[3])).astype(np.float32)


def rows_to_multiply(t: ScalarType, n_blocks: int, count: int = 60) -> tuple[Bytes, npt.NDArray[np.void]]:
    """Random blocks. The first rows have the smallest and the largest sums, in the next ones large blocks cancel, so that the order of
    sums shows, and the last ones have scales that are not finite.
    """
    rng = np.random.default_rng(n_blocks)
    x = rng.integers(0, 256, (count, n_blocks, t.block_bytes), dtype=np.uint8)
    y = np.zeros((count, n_blocks), oracle.Q8_0)
    y["qs"] = rng.integers(-127, 128, (*y.shape, QK_SCALAR))
    y["d"] = rng.uniform(0.001, 0.1, y.shape)
    scales = rng.choice(np.array(FINITE_SCALES, np.uint16), y.shape)
    scales[-10:] = rng.choice(np.array((*FINITE_SCALES, *OTHER_SCALES), np.uint16), (10, n_blocks))
    for row, (byte, level) in enumerate([(0xFF, 127), (0xFF, -127), (0x00, 127), (0x00, -127)]):
        x[row], y["qs"][row], scales[row] = byte, level, 0x3C00
    x[..., :2] = scales[..., None].view(np.uint8)
    for row in range(4, 20):
        a, b = rng.permutation(n_blocks)[:2] if n_blocks > 1 else (0, 0)
        y["d"][row, a] = 60000
        y[row, b], x[row, b] = y[row, a], x[row, a]
        x[row, b, 1] ^= 0x80  # the sign of d
    return x, y


@each_variant
@each_type
@pytest.mark.parametrize("n_blocks", [1, 2, 3, 4, 5, 6, 8, 18])
def test_dot_product_is_that_of_integers(variant: Variant, t: ScalarType, n_blocks: int) -> None:
    x, y = rows_to_multiply(t, n_blocks)
    found, wanted = dot(variant, t, x, y), exact_dot(t, x, y)
    nan = np.isnan(wanted)
    assert not nan[:-10].any()
    assert np.array_equal(np.isnan(found), nan)
    assert np.array_equal(found[~nan].view(np.uint32), wanted[~nan].view(np.uint32))


@each_variant
@each_trellis_type
@pytest.mark.parametrize("n_blocks", [1, 2, 3, 9])
def test_trellis_dot_product_is_that_of_integers(variant: Variant, t: TrellisType, n_blocks: int) -> None:
    rng = np.random.default_rng(n_blocks)
    x = rng.integers(0, 256, (60, n_blocks, t.block_bytes), dtype=np.uint8)
    x[..., 0] = rng.choice([0x00, 0x03, 0x08, 0x40, 0x78, 0xB0, 0xF7], x.shape[:2])
    y = np.zeros((60, 2 * n_blocks), oracle.Q8_0)
    y["qs"] = rng.integers(-127, 128, (*y.shape, QK_SCALAR))
    y["d"] = rng.uniform(0.001, 0.1, y.shape)
    x[:2, :, 2:], x[:2, :, 0], y["qs"][0], y["qs"][1] = 0xFF, 0x78, 127, -127
    values = trellis.dequantize(t, x.reshape(60, -1)).astype(np.float64)
    exact = np.zeros(60)
    for half in range(2 * n_blocks):  # one after the other, each exact
        products = values[:, half * QK_SCALAR : (half + 1) * QK_SCALAR] * y["qs"][:, half]
        exact += products.sum(axis=1) * y["d"][:, half].astype(np.float64)
    _, result = ask(variant, f"dot {t.name} 60 {n_blocks * QK_TRELLIS}", [x, y], 4 * 60)
    assert np.array_equal(np.frombuffer(result, np.float32), exact.astype(np.float32))


#
# Hadamard transform
#


@dataclass(frozen=True)
class Transform:
    """Of rows of n values, shape (ne[2], ne[1], ne[0], n), with a gap behind each; then the axes are permuted as ggml_permute does."""

    n: int
    gap: int = 0
    ne: tuple[int, int, int] = (5, 3, 2)
    axes: tuple[int, int, int, int] = (0, 1, 2, 3)
    kind: str = "f32"
    hint: int = 1
    use_ref: int = 0
    upstream: int = 0
    threads: int = 1


LANES = {"avx512-vnni": 16, "avx2-vnni": 8, "avx2": 8, "neon-dotprod": 4, "generic": 8}
"""Values of a vector, by the implementation that variants.Variant.isa names; shorter rows are left to upstream."""


@cache
def source(case: Transform) -> npt.NDArray[np.floating]:
    """Values of all sizes, what lies in the gaps is NaN."""
    rng = np.random.default_rng(case.n)
    shape = (*case.ne[::-1], case.n + case.gap)
    x = rng.standard_normal(shape) * 2.0 ** rng.integers(-12, 12, shape)
    x[..., case.n :] = np.nan
    return x.astype(np.float16 if case.kind == "f16" else np.float32)


def butterflies(case: Transform) -> Floats:
    """In binary32, in upstream's order."""
    to = [3 - axis for axis in case.axes[::-1]]  # numpy counts from the slowest; ggml_permute says where an axis goes
    x = source(case)[..., : case.n].transpose(np.argsort(to)).astype(np.float32)
    n = x.shape[-1]
    y = x * (np.float32(1) / np.sqrt(np.float32(n)))
    length = 1
    while length < n:
        pairs = y.reshape(*y.shape[:-1], -1, 2, length)
        u, v = pairs[..., 0, :], pairs[..., 1, :]
        y = np.stack([u + v, u - v], axis=-2).reshape(y.shape)
        length *= 2
    return y


def transform(variant: Variant, case: Transform) -> tuple[int, Floats]:
    """Threads that took the op, and the result."""
    numbers = (case.n, case.gap, *case.ne, *case.axes, case.hint, case.use_ref, case.upstream, case.threads)
    wanted = butterflies(case)
    taken, result = ask(variant, f"fwht {case.kind} {' '.join(map(str, numbers))}", [source(case)], wanted.nbytes)
    return taken, np.frombuffer(result, np.float32).reshape(wanted.shape)


def check_same_bits(found: Floats, wanted: Floats) -> None:
    assert np.array_equal(found.view(np.uint32), wanted.view(np.uint32))


@each_variant
@pytest.mark.parametrize("n", [2**i for i in range(10)])
def test_transform_has_the_bits_of_butterflies(variant: Variant, n: int) -> None:
    case = Transform(n)
    taken, found = transform(variant, case)
    if n < LANES[variant.isa]:
        assert taken == 0
        assert (found.view(np.uint32) == 0xFFFFFFFF).all()  # nothing was done
    else:
        assert taken == 1
        check_same_bits(found, butterflies(case))
    check_same_bits(transform(variant, replace(case, upstream=1))[1], butterflies(case))


@each_variant
@pytest.mark.parametrize(
    "case",
    [
        Transform(64, gap=3),
        Transform(128, gap=1, ne=(1, 1, 1)),
        Transform(32, axes=(0, 2, 1, 3)),
        Transform(256, gap=5, ne=(4, 3, 2), axes=(0, 3, 1, 2)),
    ],
    ids=["gap", "one row", "heads and tokens", "all axes"],
)
def test_rows_are_found(variant: Variant, case: Transform) -> None:
    taken, found = transform(variant, case)
    assert taken == 1
    check_same_bits(found, butterflies(case))


@each_variant
@pytest.mark.parametrize("ne", [(5, 3, 2), (1, 1, 1)], ids=["30 rows", "1 row"])
@pytest.mark.parametrize("threads", [1, 2, 3, 4, 5])
def test_threads_share_the_rows(variant: Variant, threads: int, ne: tuple[int, int, int]) -> None:
    case = Transform(128, ne=ne, threads=threads)
    taken, found = transform(variant, case)
    assert taken == threads
    check_same_bits(found, butterflies(case))


@each_variant
@pytest.mark.parametrize(
    "case",
    [
        Transform(64, hint=0),
        Transform(64, use_ref=1),
        Transform(64, kind="f16"),
        Transform(64, ne=(64, 3, 2), axes=(1, 0, 2, 3)),
    ],
    ids=["no hint", "reference", "f16", "transposed"],
)
def test_what_is_left_to_upstream(variant: Variant, case: Transform) -> None:
    taken, found = transform(variant, case)
    assert taken == 0
    assert (found.view(np.uint32) == 0xFFFFFFFF).all()


def test_oracle_is_a_hadamard_matrix() -> None:
    case = Transform(64, ne=(1, 1, 1))
    matrix = np.ones((1, 1))
    while len(matrix) < case.n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    exact = matrix @ source(case)[0, 0, 0].astype(np.float64) / 8
    assert np.allclose(butterflies(case)[0, 0, 0], exact, rtol=0, atol=1e-6 * np.abs(exact).max())


def test_integers_reach_every_threshold() -> None:
    """The blocks have a value on and one above each threshold of each type."""
    values = np.abs(every_integer())
    for t in SCALAR:
        for edge in np.ravel(t.thresholds):
            assert {edge, edge + 1} <= set(values.ravel())
