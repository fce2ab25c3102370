"""WMMA on the emulator: HIP kernels with the compiler's builtins against numpy, and rules of the operands in assembler.

The kernels place values as AMD's introduction to WMMA on RDNA3 does. No expectation depends on the order in which floats are added: small
integers are exact in any order, and other values are compared within the error of any order.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from emulator.errors import BadOperand, Unsupported
from emulator_kernels import LANES, HipKernels, Kernels

pytestmark = pytest.mark.emulated

Array = npt.NDArray[Any]
RNG = np.random.default_rng(3)

SOURCE = """
#define KERNEL extern "C" __attribute__((global)) void
#define DEVICE static __attribute__((device)) inline

typedef _Float16 half;
typedef half  half16 __attribute__((ext_vector_type(16)));
typedef int   int2v __attribute__((ext_vector_type(2)));
typedef int   int4v __attribute__((ext_vector_type(4)));
typedef int   int8v __attribute__((ext_vector_type(8)));
typedef float float8v __attribute__((ext_vector_type(8)));

DEVICE int column() { return __builtin_amdgcn_workitem_id_x() % 16; }
DEVICE int place(int i) { return 16 * (2 * i + __builtin_amdgcn_workitem_id_x() / 16) + column(); }

// Row column() of a matrix of 16 rows, each N values long.
template <typename V, int N, typename T> DEVICE V row(const T * values) {
    V result;
    for (int k = 0; k < N; k++) {
        result[k] = values[N * column() + k];
    }
    return result;
}

template <typename V, typename T> DEVICE V tile(const T * values) {
    V result;
    for (int i = 0; i < 8; i++) {
        result[i] = values[place(i)];
    }
    return result;
}

template <typename V, typename T> DEVICE void store(T * values, V tile) {
    for (int i = 0; i < 8; i++) {
        values[place(i)] = tile[i];
    }
}

#define IU8(A, B, CLAMP)                                                                                          \\
    KERNEL iu8_##A##B##CLAMP(const int * a, const int * b, const int * c, int * d) {                              \\
        store<int8v>(d, __builtin_amdgcn_wmma_i32_16x16x16_iu8_w32(A, row<int4v, 4>(a), B, row<int4v, 4>(b),             \\
                                                            tile<int8v>(c), CLAMP));                              \\
    }                                                                                                             \\
    KERNEL iu4_##A##B##CLAMP(const int * a, const int * b, const int * c, int * d) {                              \\
        store<int8v>(d, __builtin_amdgcn_wmma_i32_16x16x16_iu4_w32(A, row<int2v, 2>(a), B, row<int2v, 2>(b),             \\
                                                            tile<int8v>(c), CLAMP));                              \\
    }
IU8(0, 0, 0) IU8(0, 1, 0) IU8(1, 0, 0) IU8(1, 1, 0) IU8(0, 0, 1) IU8(0, 1, 1) IU8(1, 0, 1) IU8(1, 1, 1)

KERNEL f32(const half * a, const half * b, const float * c, float * d) {
    store<float8v>(d, __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(row<half16, 16>(a), row<half16, 16>(b), tile<float8v>(c)));
}

// As in a loop over keys: the sum of one product is the C of the next.
KERNEL f32_twice(const half * a, const half * b, const float * c, float * d) {
    float8v sum = tile<float8v>(c);
    for (int k = 0; k < 2; k++) {
        sum = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(row<half16, 16>(a + 256 * k), row<half16, 16>(b + 256 * k), sum);
    }
    store(d, sum);
}

// C and D in pairs of halves: pair i of a lane is in one register.
DEVICE half16 pairs(const half * values) {
    half16 result;
    for (int i = 0; i < 8; i++) {
        result[2 * i]     = values[2 * place(i)];
        result[2 * i + 1] = values[2 * place(i) + 1];
    }
    return result;
}

DEVICE void store_pairs(half * values, half16 tile) {
    for (int i = 0; i < 8; i++) {
        values[2 * place(i)]     = tile[2 * i];
        values[2 * place(i) + 1] = tile[2 * i + 1];
    }
}

KERNEL f16_low(const half * a, const half * b, const half * c, half * d) {
    store_pairs(d, __builtin_amdgcn_wmma_f16_16x16x16_f16_tied_w32(row<half16, 16>(a), row<half16, 16>(b), pairs(c), false));
}

KERNEL f16_high(const half * a, const half * b, const half * c, half * d) {
    store_pairs(d, __builtin_amdgcn_wmma_f16_16x16x16_f16_tied_w32(row<half16, 16>(a), row<half16, 16>(b), pairs(c), true));
}
"""
KERNELS = HipKernels("matrix", SOURCE)


def extended(values: Array, signed: int, bits: int) -> Array:
    """Bytes, or nibbles, as int64; each row holds sixteen."""
    if bits == 4:
        values = np.stack([values[:, :8] & 15, values[:, :8] >> 4], -1).reshape(16, 16)
    values = values.astype(np.int64)
    return values - ((values >> (bits - 1) & signed) << bits)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("sign_a", "sign_b", "clamp"), list(product((0, 1), repeat=3)))
def test_integers(bits: int, sign_a: int, sign_b: int, clamp: int) -> None:
    a, b = (RNG.integers(0, 256, (16, 16), dtype=np.uint8) for _ in "ab")
    c = RNG.integers(-(1 << 31), 1 << 31, (16, 16), dtype=np.int64)
    c[::2, ::3], c[1::2, ::3] = (1 << 31) - 1 - c[::2, ::3] % 99, -(1 << 31) + c[1::2, ::3] % 99  # sums beyond both ends
    total = extended(a, sign_a, bits) @ extended(b, sign_b, bits).T + c
    assert (total != total.astype(np.int32)).any()
    want = np.clip(total, -(1 << 31), (1 << 31) - 1) if clamp else total.astype(np.uint32).view(np.int32)
    inputs = [np.ascontiguousarray(x[:, : 2 * bits]) for x in (a, b)]
    got = KERNELS.run(f"iu{bits}_{sign_a}{sign_b}{clamp}", [*inputs, c.astype(np.int32)], np.zeros((16, 16), np.int32))
    assert np.array_equal(got, want)


def small(*shape: int) -> Array:
    """Integers of which sums of products are exact in float16 in every order."""
    return RNG.integers(-8, 9, shape).astype(np.float16)


def test_exact_floats_lie_where_they_belong() -> None:
    a, b, c = small(16, 16), small(16, 16), small(16, 16).astype(np.float32)
    got = KERNELS.run("f32", [a, b, c], np.zeros((16, 16), np.float32))
    assert np.array_equal(got, a.astype(np.float64) @ b.astype(np.float64).T + c)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_sums_are_float32(scale: float) -> None:
    a, b = (RNG.standard_normal((2, 16, 16)).astype(np.float16) for _ in "ab")
    a *= np.float16(scale)
    c = (scale * RNG.standard_normal((16, 16))).astype(np.float32)
    got = KERNELS.run("f32_twice", [a, b, c], np.zeros((16, 16), np.float32))
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    want = np.einsum("krx,kcx->rc", wide_a, wide_b) + c
    size = np.einsum("krx,kcx->rc", np.abs(wide_a), np.abs(wide_b)) + np.abs(c)
    assert (np.abs(got - want) <= 33 * 2.0**-24 * size).all()


@pytest.mark.parametrize("high", [0, 1])
def test_float16_leaves_the_other_half(high: int) -> None:
    a, b, c = small(16, 16), small(16, 16), small(16, 16, 2)
    got = KERNELS.run("f16_high" if high else "f16_low", [a, b, c], np.zeros((16, 16, 2), np.float16))
    want = c.astype(np.float64)
    want[:, :, high] += a.astype(np.float64) @ b.astype(np.float64).T
    assert np.array_equal(got, want)


LOAD = """
    v_and_b32 v30, 15, v0
    v_lshlrev_b32 v31, 5, v30
    global_load_b128 v[32:35], v31, s[4:5]
    global_load_b128 v[36:39], v31, s[4:5] offset:16
    s_add_u32 s12, s4, 512
    s_addc_u32 s13, s5, 0
    global_load_b128 v[40:43], v31, s[12:13]
    global_load_b128 v[44:47], v31, s[12:13] offset:16
"""
"""16 rows of A, then 16 columns of B, of 16 float16 each."""
FILL = "".join(f"v_mov_b32 v{48 + i}, -2.0\n" for i in range(8))
SHOW = "".join(f"v_mov_b32 v{20 + i}, v{48 + i}\n" for i in range(4))
TILE = "v[48:55], v[32:39], v[40:47]"

EVEN = np.resize([1, 0], 16)
MODIFIED: dict[str, Callable[[Array, Array], Array]] = {
    f"v_wmma_f32_16x16x16_f16 {TILE}, 1.0": lambda a, b: a @ b.T + 1,
    f"v_wmma_f32_16x16x16_f16 {TILE}, v[48:55] neg_lo:[1,0,0]": lambda a, b: (a * (1 - 2 * EVEN)) @ b.T - 2,
    f"v_wmma_f32_16x16x16_f16 {TILE}, v[48:55] neg_lo:[0,1,0] neg_hi:[0,1,0]": lambda a, b: -(a @ b.T) - 2,
    f"v_wmma_f32_16x16x16_f16 {TILE}, v[48:55] neg_hi:[1,0,0]": lambda a, b: (a * (2 * EVEN - 1)) @ b.T - 2,
    f"v_wmma_f32_16x16x16_f16 {TILE}, v[48:55] neg_lo:[0,0,1]": lambda a, b: a @ b.T + 2,
    f"v_wmma_f32_16x16x16_f16 {TILE}, v[48:55] neg_hi:[0,0,1]": lambda a, b: a @ b.T + 2,
    f"v_wmma_f32_16x16x16_f16 {TILE}, v[48:55] neg_lo:[0,0,1] neg_hi:[0,0,1]": lambda a, b: a @ b.T - 2,
}
WRONG = {
    "v_add_nc_u32 v32, v32, v0\nv_wmma_f32_16x16x16_f16 v[48:55], v[32:39], v[40:47], v[48:55]": (BadOperand, "operand A .* differs"),
    "v_add_nc_u32 v47, v47, v0\nv_wmma_f32_16x16x16_f16 v[48:55], v[32:39], v[40:47], v[48:55]": (BadOperand, "operand B .* differs"),
    "s_mov_b32 exec_lo, 0xffff\nv_wmma_f32_16x16x16_f16 v[48:55], v[32:39], v[40:47], v[48:55]": (BadOperand, "lanes that are off"),
    "v_wmma_f32_16x16x16_f16 v[46:53], v[32:39], v[40:47], v[46:53]": (BadOperand, "overlaps"),
    "v_wmma_bf16_16x16x16_bf16 v[48:55], v[32:39], v[40:47], v[48:55]": (Unsupported, "V_WMMA_BF16"),
}
BODIES = {instruction: f"{LOAD}{FILL}{instruction}\n{SHOW}" for instruction in MODIFIED} | {body: LOAD + body for body in WRONG}
ASSEMBLED = Kernels("matrix-rules", BODIES.values())


@pytest.mark.parametrize("instruction", MODIFIED)
def test_modifiers(instruction: str) -> None:
    a, b = small(16, 16), small(16, 16)
    rows = np.concatenate([a, b]).view(np.uint32).reshape(-1, LANES)
    got = ASSEMBLED.run(BODIES[instruction], *rows).view(np.float32)  # registers 0 to 3: rows 0 to 7
    want = MODIFIED[instruction](a.astype(np.float64), b.astype(np.float64))
    assert np.array_equal(got.reshape(8, 16), want[:8])


@pytest.mark.parametrize("body", WRONG)
def test_rules(body: str) -> None:
    kind, message = WRONG[body]
    with pytest.raises(kind, match=message):
        ASSEMBLED.run(BODIES[body], *np.zeros((8, LANES), np.uint32))
