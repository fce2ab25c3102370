"""Single instructions on the emulator against expectations from exact arithmetic.

The expectations share no code with the emulator: they work on Python's integers and fractions, one lane at a time.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from emulator_kernels import LANES, Kernels, signed

pytestmark = pytest.mark.emulated

M32 = 0xFFFFFFFF
LANE = range(LANES)
RNG = np.random.default_rng(1)
BITS = [RNG.integers(0, 1 << 32, LANES, dtype=np.uint32) for _ in range(3)]
FLOATS = [(RNG.standard_normal(LANES) * 10.0 ** RNG.integers(-6, 6, LANES)).astype(np.float32) for _ in range(3)]
HALVES = [RNG.standard_normal(2 * LANES).astype(np.float16) for _ in range(3)]


def nearest(x: Fraction, digits: int, lowest: int) -> float:
    """The float with so many binary digits and such a lowest exponent that is nearest to a fraction; ties go to even."""
    if x == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(x)))
    while abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, lowest) - digits + 1)
    return math.copysign(float(round(x / unit) * unit), x)


def f32(x: Fraction) -> float:
    """Nearest float32."""
    return nearest(x, 24, -126)


def f16(x: Fraction) -> float:
    """Nearest float16."""
    return nearest(x, 11, -14)


def bits32(x: float) -> int:
    """The bits of a float32."""
    return int(struct.unpack("<I", struct.pack("<f", x))[0])


def halves(x: int) -> tuple[float, float]:
    """Two float16 in a dword."""
    low, high = struct.unpack("<2e", struct.pack("<I", x))
    return low, high


def pack_halves(low: float, high: float) -> int:
    """The inverse."""
    return int(struct.unpack("<I", struct.pack("<2e", low, high))[0])


def perm(a: int, b: int, selector: int) -> int:
    """v_perm_b32 from its description."""
    pool = struct.pack("<II", b, a)
    result = 0
    for k in range(4):
        choice = selector >> 8 * k & 255
        if choice < 8:
            byte = pool[choice]
        elif choice < 12:
            byte = 255 * (pool[2 * (choice - 8) + 1] >> 7)
        else:
            byte = 0 if choice == 12 else 255
        result |= byte << 8 * k
    return result


def dot4(a: int, b: int, c: int) -> int:
    """Signed bytes."""
    left, right = (struct.unpack("<4b", struct.pack("<I", x)) for x in (a, b))
    return (sum(x * y for x, y in zip(left, right, strict=True)) + c) & M32


def u8_dot4(a: int, b: int, c: int) -> int:
    """Unsigned bytes."""
    return (sum(x * y for x, y in zip(struct.pack("<I", a), struct.pack("<I", b), strict=True)) + c) & M32


def pk(function: Callable[..., Fraction], *operands: int) -> int:
    """A packed float16 operation on both halves."""
    pairs = [halves(x) for x in operands]
    return pack_halves(*(f16(function(*(Fraction(pair[k]) for pair in pairs))) for k in (0, 1)))


SELECTORS = np.array([0x03020100, 0x07060504, 0x0C0D0A08, 0x090B0E00], np.uint32)
OFFSETS = RNG.integers(0, 32, LANES, dtype=np.uint32)
WIDTHS = RNG.integers(0, 32, LANES, dtype=np.uint32)

INTEGER = {
    "v_add_nc_u32 v20, v10, v11": lambda a, b, c: a + b,
    "v_sub_nc_u32 v20, v10, v11": lambda a, b, c: a - b,
    "v_mul_lo_u32 v20, v10, v11": lambda a, b, c: a * b,
    "v_mul_hi_u32 v20, v10, v11": lambda a, b, c: a * b >> 32,
    "v_mul_hi_i32 v20, v10, v11": lambda a, b, c: signed(a) * signed(b) >> 32,
    "v_mul_i32_i24 v20, v10, v11": lambda a, b, c: signed(a, 24) * signed(b, 24),
    "v_mad_u32_u24 v20, v10, v11, v12": lambda a, b, c: (a & 0xFFFFFF) * (b & 0xFFFFFF) + c,
    "v_mad_i32_i24 v20, v10, v11, v12": lambda a, b, c: signed(a, 24) * signed(b, 24) + signed(c),
    "v_and_or_b32 v20, v10, v11, v12": lambda a, b, c: a & b | c,
    "v_xad_u32 v20, v10, v11, v12": lambda a, b, c: (a ^ b) + c,
    "v_bfi_b32 v20, v10, v11, v12": lambda a, b, c: a & b | ~a & c,
    "v_lshl_add_u32 v20, v10, 5, v12": lambda a, b, c: (a << 5) + c,
    "v_lshl_or_b32 v20, v10, v11, v12": lambda a, b, c: a << (b & 31) & M32 | c,
    "v_lshrrev_b32 v20, v10, v11": lambda a, b, c: b >> (a & 31),
    "v_ashrrev_i32 v20, v10, v11": lambda a, b, c: signed(b) >> (a & 31),
    "v_alignbit_b32 v20, v10, v11, 11": lambda a, b, c: (a << 32 | b) >> 11,
    "v_alignbyte_b32 v20, v10, v11, 3": lambda a, b, c: (a << 32 | b) >> 24,
    "v_bcnt_u32_b32 v20, v10, v11": lambda a, b, c: a.bit_count() + b,
    "v_bfrev_b32 v20, v10": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "v_clz_i32_u32 v20, v10": lambda a, b, c: 32 - a.bit_length() if a else -1,
    "v_ctz_i32_b32 v20, v10": lambda a, b, c: (a & -a).bit_length() - 1,
    "v_med3_i32 v20, v10, v11, v12": lambda a, b, c: sorted(map(signed, (a, b, c)))[1],
    "v_min3_u32 v20, v10, v11, v12": min,
    "v_cvt_pk_i16_i32 v20, v10, v11": lambda a, b, c: sum((min(max(signed(x), -32768), 32767) & 0xFFFF) << s for x, s in ((a, 0), (b, 16))),
    "v_mad_u64_u32 v[20:21], s9, v10, v11, v[12:13]": lambda a, b, c: a * b + c,
    "v_dot4_i32_iu8 v20, v10, v11, v12 neg_lo:[1,1,0]": dot4,
    "v_dot4_i32_iu8 v20, v10, v11, v12": u8_dot4,
    "v_dot4_u32_u8 v20, v10, v11, v12": u8_dot4,
    "v_dot4_i32_iu8 v20, v10, v11, 0x7fffffff neg_lo:[1,1,0] clamp": lambda a, b, c: min(signed(dot4(a, b, 0)) + 0x7FFFFFFF, 0x7FFFFFFF),
    "v_sub_nc_u32 v20, v10, v11 clamp": lambda a, b, c: max(a - b, 0),
    "v_add_nc_i32 v20, v10, v11 clamp": lambda a, b, c: min(max(signed(a) + signed(b), -(1 << 31)), (1 << 31) - 1),
    "v_pk_add_u16 v20, v10, v11": lambda a, b, c: (a + b & 0xFFFF) | ((a >> 16) + (b >> 16) & 0xFFFF) << 16,
    "v_pk_mul_lo_u16 v20, v10, v11 op_sel:[1,0] op_sel_hi:[0,1]": (
        lambda a, b, c: ((a >> 16) * (b & 0xFFFF) & 0xFFFF) | ((a & 0xFFFF) * (b >> 16) & 0xFFFF) << 16
    ),
    "v_pk_add_i16 v20, v10, 1": lambda a, b, c: (a + 1 & 0xFFFF) | (a & 0xFFFF0000),  # the constant's upper half is 0
    "v_pk_add_i16 v20, v10, -1": lambda a, b, c: (a - 1 & 0xFFFF) | ((a >> 16) - 1 & 0xFFFF) << 16,
    "v_add_nc_u16 v20.l, v10.h, v11.l": lambda a, b, c: (a >> 16) + b & 0xFFFF,
    "v_mov_b16 v20.h, v10.l": lambda a, b, c: (a & 0xFFFF) << 16,
    "s_mov_b32 s10, 0x12345678\ns_bfe_i32 s10, s10, 0x70009\nv_mov_b32 v20, s10": lambda *_: signed(0x12345678 >> 9, 7),
    "s_mov_b32 s10, 0xff000001\ns_lshl4_add_u32 s10, s10, 7\nv_mov_b32 v20, s10": lambda *_: 0xF0000017,
    "v_readfirstlane_b32 s10, v10\nv_mov_b32 v20, s10": lambda a, b, c: int(BITS[0][0]),
    "v_readlane_b32 s10, v10, 7\nv_mov_b32 v20, s10": lambda a, b, c: int(BITS[0][7]),
    "v_mov_b32 v20, 5\nv_swap_b32 v20, v10": lambda a, b, c: a,
    "v_cmp_gt_i32 vcc_lo, v10, v11\nv_cndmask_b32 v20, v10, v11, vcc_lo": lambda a, b, c: b if signed(a) > signed(b) else a,
    "v_cmp_gt_u32 s10, v10, v11\nv_cndmask_b32 v20, v10, v11, s10": lambda a, b, c: b if a > b else a,
    "v_add_co_u32 v21, vcc_lo, v10, v11\nv_add_co_ci_u32 v20, vcc_lo, v12, v12, vcc_lo": lambda a, b, c: c + c + (a + b >> 32),
    "v_sub_co_u32 v21, vcc_lo, v10, v11\nv_sub_co_ci_u32 v20, vcc_lo, v12, v10, vcc_lo": lambda a, b, c: c - a - (a < b),
}


INTEGER_KERNELS = Kernels("integer", INTEGER)


@pytest.mark.parametrize("body", INTEGER)
def test_integer(body: str) -> None:
    got = INTEGER_KERNELS.run(body, *BITS)[0]
    want = [INTEGER[body](*(int(x[k]) for x in BITS)) & M32 for k in LANE]
    if "b16" in body or ("u16" in body and "pk" not in body):
        want = [x & 0xFFFF0000 if ".h," in body.split()[1] else x & 0xFFFF for x in want]
    assert [hex(x) for x in got] == [hex(x) for x in want]


def test_wide_results_have_their_upper_half() -> None:
    got = INTEGER_KERNELS.run("v_mad_u64_u32 v[20:21], s9, v10, v11, v[12:13]", *BITS)
    want = [int(BITS[0][k]) * int(BITS[1][k]) + int(BITS[2][k]) for k in LANE]
    assert [int(low) | int(high) << 32 for low, high in zip(got[0], got[1], strict=True)] == want


FIELDS = {
    "v_bfe_u32 v20, v10, v11, v12": lambda a, o, w: a >> o & (1 << w) - 1,
    "v_bfe_i32 v20, v10, v11, v12": lambda a, o, w: signed(a >> o, w) if w and o + w <= 32 else signed(signed(a) >> o, w) if w else 0,
    "v_bfm_b32 v20, v11, v12": lambda a, o, w: ((1 << o) - 1) << w,
}


FIELDS_KERNELS = Kernels("fields", FIELDS)


@pytest.mark.parametrize("body", FIELDS)
def test_bit_fields(body: str) -> None:
    got = FIELDS_KERNELS.run(body, BITS[0], OFFSETS, WIDTHS)[0]
    assert [int(x) for x in got] == [FIELDS[body](int(BITS[0][k]), int(OFFSETS[k]), int(WIDTHS[k])) & M32 for k in LANE]


PERM = "v_perm_b32 v20, v10, v11, v12"


PERM_KERNELS = Kernels("perm", [PERM])


def test_perm() -> None:
    got = PERM_KERNELS.run(PERM, BITS[0], BITS[1], SELECTORS)[0]
    assert [int(x) for x in got] == [perm(int(BITS[0][k]), int(BITS[1][k]), int(SELECTORS[k % 4])) for k in LANE]


FLOAT = {
    "v_add_f32 v20, v10, v11": lambda a, b, c: a + b,
    "v_sub_f32 v20, |v10|, v11": lambda a, b, c: abs(a) - b,
    "v_mul_f32 v20, v10, -v11 mul:2": lambda a, b, c: Fraction(f32(a * -b)) * 2,
    "v_fma_f32 v20, v10, v11, -|v12|": lambda a, b, c: a * b - abs(c),
    "v_fmac_f32 v12, v10, v11\nv_mov_b32 v20, v12": lambda a, b, c: a * b + c,
    "v_fmaak_f32 v20, v10, v11, 0x40490fdb": lambda a, b, c: a * b + Fraction(struct.unpack("<f", struct.pack("<I", 0x40490FDB))[0]),
    "v_fmamk_f32 v20, v10, 0x40490fdb, v11": lambda a, b, c: a * Fraction(struct.unpack("<f", struct.pack("<I", 0x40490FDB))[0]) + b,
    "v_max3_f32 v20, v10, v11, v12": max,
    "v_med3_f32 v20, v10, v11, v12": lambda a, b, c: sorted((a, b, c))[1],
    "v_dual_mul_f32 v20, v10, v11 :: v_dual_add_f32 v21, v12, v13": lambda a, b, c: a * b,
    "v_dual_mov_b32 v10, v11 :: v_dual_fmac_f32 v13, v10, v12\nv_mov_b32 v20, v13": lambda a, b, c: a * c,
    "v_rcp_f32 v20, v10": lambda a, b, c: 1 / a,
    "v_ldexp_f32 v20, v10, -3": lambda a, b, c: a / 8,
    "v_cvt_f32_i32 v20, v10": None,
    "v_floor_f32 v20, v10": lambda a, b, c: Fraction(math.floor(a)),
    "v_rndne_f32 v20, v10": lambda a, b, c: Fraction(round(a)),
    (
        "v_div_scale_f32 v30, null, v11, v11, v10\nv_rcp_f32 v31, v30\nv_div_scale_f32 v32, vcc_lo, v10, v11, v10\n"
        "v_mul_f32 v33, v32, v31\nv_div_fmas_f32 v31, v33, v31, v33\nv_div_fixup_f32 v20, v31, v11, v10"
    ): lambda a, b, c: a / b,
}


FLOAT_KERNELS = Kernels("float", FLOAT)


@pytest.mark.parametrize("body", [body for body, function in FLOAT.items() if function])
def test_float(body: str) -> None:
    got = FLOAT_KERNELS.run(body, *FLOATS)[0].view(np.float32)
    want = [f32(FLOAT[body](*(Fraction(float(x[k])) for x in FLOATS))) for k in LANE]
    assert got.tolist() == want


def test_integer_to_float() -> None:
    got = FLOAT_KERNELS.run("v_cvt_f32_i32 v20, v10", BITS[0])[0].view(np.float32)
    assert got.tolist() == [f32(Fraction(signed(int(x)))) for x in BITS[0]]


HALF = {
    "v_pk_add_f16 v20, v10, v11": lambda a, b, c: pk(lambda x, y: x + y, a, b),
    "v_pk_mul_f16 v20, v10, v11": lambda a, b, c: pk(lambda x, y: x * y, a, b),
    "v_pk_fma_f16 v20, v10, v11, v12": lambda a, b, c: pk(lambda x, y, z: x * y + z, a, b, c),
    "v_pk_fma_f16 v20, v10, v11, v12 op_sel:[0,1,0] op_sel_hi:[1,1,1]": (
        lambda a, b, c: pk(lambda x, y, z: x * y + z, a, b >> 16 | b & 0xFFFF0000, c)
    ),
    "v_pk_mul_f16 v20, v10, v11 neg_lo:[1,0] neg_hi:[0,1]": lambda a, b, c: pk(lambda x, y: x * y, a ^ 0x8000, b ^ 0x80000000),
    "v_pk_mul_f16 v20, v10, 2.0 op_sel_hi:[1,0]": lambda a, b, c: pk(lambda x: x * 2, a),
    "v_pk_mul_f16 v20, v10, 2.0": lambda a, b, c: pk(lambda x: x * 2, a) & 0xFFFF | (a >> 31 << 31),  # the constant's upper half is 0
    "v_pk_max_f16 v20, v10, v11": lambda a, b, c: pk(max, a, b),
    "v_pk_fmac_f16 v12, v10, v11\nv_mov_b32 v20, v12": lambda a, b, c: pk(lambda x, y, z: x * y + z, a, b, c),
    "v_add_f16 v20.h, v10.l, v11.h": lambda a, b, c: pack_halves(0, f16(Fraction(halves(a)[0]) + Fraction(halves(b)[1]))),
    "v_fma_f16 v20.l, v10.h, v11.l, -v12.h": (
        lambda a, b, c: pack_halves(f16(Fraction(halves(a)[1]) * Fraction(halves(b)[0]) - Fraction(halves(c)[1])), 0)
    ),
    "v_fma_mix_f32 v20, v10, v11, v12 op_sel:[1,0,0] op_sel_hi:[1,1,0]": (
        lambda a, b, c: bits32(
            f32(Fraction(halves(a)[1]) * Fraction(halves(b)[0]) + Fraction(struct.unpack("<f", struct.pack("<I", c))[0]))
        )
    ),
    "v_fma_mix_f32 v20, -v10, |v11|, v12 op_sel:[0,1,1] op_sel_hi:[1,1,1]": (
        lambda a, b, c: bits32(f32(-Fraction(halves(a)[0]) * abs(Fraction(halves(b)[1])) + Fraction(halves(c)[1])))
    ),
    "v_fma_mixhi_f16 v20, v10, v11, v12 op_sel_hi:[1,1,1]": (
        lambda a, b, c: pack_halves(0, f16(Fraction(f32(Fraction(halves(a)[0]) * Fraction(halves(b)[0]) + Fraction(halves(c)[0])))))
    ),
    "v_cvt_f32_f16 v20, v10.h": lambda a, b, c: bits32(halves(a)[1]),
    "v_cvt_f16_f32 v20.h, v10": lambda a, b, c: pack_halves(0, f16(Fraction(struct.unpack("<f", struct.pack("<I", a))[0]))),
    "v_pack_b32_f16 v20, v10.h, v11.l": lambda a, b, c: a >> 16 | (b & 0xFFFF) << 16,
    "v_mov_b32 v30, 0xbfffffff\nv_cvt_pk_rtz_f16_f32 v20, 0x3fffffff, v30": lambda a, b, c: 0xBFFF3FFF,  # +-(2 - 2^-23) towards zero
}


DOT2 = "v_dot2_f32_f16 v20, v10, v11, v12"
HALF_KERNELS = Kernels("half", [*HALF, DOT2])


@pytest.mark.parametrize("body", HALF)
def test_half(body: str) -> None:
    words = [np.abs(x).view(np.uint32) if "fma_mix_f32 v20, v10" in body else x.view(np.uint32) for x in HALVES]
    got = HALF_KERNELS.run(body, *words)[0]
    assert [hex(x) for x in got] == [hex(HALF[body](*(int(x[k]) for x in words)) & M32) for k in LANE]


def test_dot2() -> None:
    got = HALF_KERNELS.run(DOT2, *HALVES[:2], FLOATS[2])[0].view(np.float32)
    a, b = (x.astype(np.float64).reshape(-1, 2) for x in HALVES[:2])
    assert np.allclose(got, (a * b).sum(1) + FLOATS[2], rtol=1e-6)


CONVERT = {
    "v_cvt_i32_f32 v20, v10": [0, 0, 2, -2, 0x7FFFFFFF, -0x80000000, 0x7FFFFFFF, -0x80000000, 0],
    "v_cvt_u32_f32 v20, v10": [0, 0, 2, 0, 3000000000, 0, 0xFFFFFFFF, 0, 0],
}


CONVERT_KERNELS = Kernels("convert", CONVERT)


@pytest.mark.parametrize("body", CONVERT)
def test_conversions_saturate(body: str) -> None:
    values = np.array([0.9, -0.9, 2.5, -2.5, 3e9, -3e9, np.inf, -np.inf, np.nan], np.float32)
    got = CONVERT_KERNELS.run(body, values)[0][: len(values)]
    assert got.tolist() == [x & M32 for x in CONVERT[body]]


def row(k: int, at: int) -> int:
    """A lane of the same row of sixteen."""
    return k & 16 | at


DPP: dict[str, Callable[[int], int | None]] = {
    "quad_perm:[3,2,1,0]": lambda k: k & ~3 | 3 - k & 3,
    "row_shl:3": lambda k: k + 3 if k % 16 + 3 < 16 else None,
    "row_shr:1": lambda k: k - 1 if k % 16 else None,
    "row_ror:5": lambda k: row(k, (k - 5) % 16),
    "row_mirror": lambda k: row(k, 15 - k % 16),
    "row_half_mirror": lambda k: k & ~7 | 7 - k % 8,
    "row_share:9": lambda k: row(k, 9),
    "row_xmask:6": lambda k: k ^ 6,
}


def dpp_body(control: str, fill: bool) -> str:
    """A register with -7 in it, over which other lanes' values are moved."""
    return f"v_mov_b32 v20, -7\nv_mov_b32_dpp v20, v10 {control} row_mask:0xf bank_mask:0xf{' bound_ctrl:1' if fill else ''}"


DPP_KERNELS = Kernels("dpp", [dpp_body(control, fill) for control in DPP for fill in (False, True)])


@pytest.mark.parametrize("control", DPP)
@pytest.mark.parametrize("fill", [False, True])
def test_dpp(control: str, fill: bool) -> None:
    got = DPP_KERNELS.run(dpp_body(control, fill), BITS[0])[0]
    sources = [DPP[control](k) for k in LANE]
    assert got.tolist() == [int(BITS[0][s]) if s is not None else 0 if fill else -7 & M32 for s in sources]


LANE_MOVES = {
    # lanes that are off give nothing to DPP
    "v_mov_b32 v20, -7\ns_mov_b32 exec_lo, 0xffff\nv_mov_b32_dpp v20, v10 row_xmask:1 row_mask:0x1 bank_mask:0xe\ns_mov_b32 exec_lo, -1": (
        lambda k: int(BITS[0][k ^ 1]) if k < 16 and k % 16 >= 4 else -7 & M32
    ),
    "v_add_nc_u32_dpp v20, v10, v11 row_xmask:1 row_mask:0xf bank_mask:0xf": lambda k: int(BITS[0][k ^ 1]) + int(BITS[1][k]) & M32,
    "v_xor_b32 v30, 60, v1\nds_bpermute_b32 v20, v30, v10\ns_waitcnt lgkmcnt(0)": lambda k: int(BITS[0][k ^ 15]),
    "ds_swizzle_b32 v20, v10 offset:swizzle(SWAP,8)\ns_waitcnt lgkmcnt(0)": lambda k: int(BITS[0][k ^ 8]),
    "s_mov_b32 s10, 0x76543210\ns_mov_b32 s11, 0xfedcba98\nv_permlanex16_b32 v20, v10, s10, s11": lambda k: int(BITS[0][k ^ 16]),
    "s_mov_b32 s10, 0x01234567\ns_mov_b32 s11, 0x89abcdef\nv_permlane16_b32 v20, v10, s10, s11": (
        lambda k: int(BITS[0][row(k, 7 - k % 16 if k % 16 < 8 else 15 - (k % 16 - 8))])
    ),
    "v_mov_b32 v20, v10\nv_writelane_b32 v20, 3, 30": lambda k: 3 if k == 30 else int(BITS[0][k]),
    "v_mbcnt_lo_u32_b32 v20, -1, 0\nv_mbcnt_hi_u32_b32 v20, -1, v20": lambda k: k,
    "v_cmpx_gt_u32 16, v0\nv_mov_b32 v20, 1\ns_mov_b32 exec_lo, -1": lambda k: int(k < 16),
    "v_cmp_gt_u32 vcc_lo, 9, v0\ns_and_saveexec_b32 s10, vcc_lo\nv_mov_b32 v20, 1\ns_xor_b32 exec_lo, exec_lo, s10\nv_mov_b32 v20, 2\n"
    "s_mov_b32 exec_lo, s10": lambda k: 1 if k < 9 else 2,
    "s_mov_b32 m0, 1\nv_movrels_b32 v20, v10": lambda k: int(BITS[1][k]),
}


LANES_KERNELS = Kernels("lanes", LANE_MOVES)


@pytest.mark.parametrize("body", LANE_MOVES)
def test_lane_moves(body: str) -> None:
    assert LANES_KERNELS.run(body, *BITS)[0].tolist() == [LANE_MOVES[body](k) for k in LANE]
