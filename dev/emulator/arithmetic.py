"""Vector instructions whose result depends on the same lane of their operands only: name -> (kinds, function).

The kinds are ``result:operands``, letters as in :mod:`operands`. The names are without the suffix of the encoding. Functions get and return
arrays of these kinds. Transcendental functions and reciprocals are exact here and within 1 ulp on hardware.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Function = Callable[..., Array]

U32, I32, U64, I64, F16, F32, F64 = np.uint32, np.int32, np.uint64, np.int64, np.float16, np.float32, np.float64


def fma32(a: Array, b: Array, c: Array) -> Array:
    """a * b + c: the product is exact in float64, and rounding twice differs from once in about one of 2^29 cases."""
    wide = np.multiply(a, b, dtype=F64)
    wide += c
    return wide.astype(F32)


def fma16(a: Array, b: Array, c: Array) -> Array:
    """The same for float16."""
    wide = np.multiply(a, b, dtype=F32).astype(F64)
    return (wide + c).astype(F16)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """In extended precision: not exact, but better than two roundings to float64."""
    wide: Array = a.astype(np.longdouble) * b + c
    return wide.astype(F64)


def sign_extend(x: Array, bits: int) -> Array:
    """The lowest ``bits`` bits as int64."""
    shift = I64(64 - bits)
    return (x.astype(I64) << shift) >> shift


def count_bits(x: Array) -> Array:
    """Number of ones in each dword."""
    x = x - ((x >> U32(1)) & U32(0x55555555))
    x = (x & U32(0x33333333)) + ((x >> U32(2)) & U32(0x33333333))
    x = (x + (x >> U32(4))) & U32(0x0F0F0F0F)
    return (x * U32(0x01010101)) >> U32(24)


def leading_zeros(x: Array) -> Array:
    """Number of zeros above the highest one; 32 for 0."""
    return (32 - np.frexp(x.astype(F64))[1]).astype(U32)


def trailing_zeros(x: Array) -> Array:
    """Number of zeros below the lowest one; 32 for 0."""
    return count_bits(~x & (x - U32(1)))


def reverse_bits(x: Array) -> Array:
    """The bits in opposite order."""
    for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF)):
        x = ((x >> U32(shift)) & U32(mask)) | ((x & U32(mask)) << U32(shift))
    return x


def to_integer(x: Array, kind: Any) -> Array:
    """Convert towards zero; values out of range saturate, NaN becomes 0."""
    info = np.iinfo(kind)
    wide = np.nan_to_num(x.astype(F64), nan=0.0, posinf=float(info.max), neginf=float(info.min))
    return np.clip(np.trunc(wide), info.min, info.max).astype(I64).astype(kind)


def towards_zero_f16(x: Array) -> Array:
    """Round float32 towards zero to float16."""
    nearest = x.astype(F16)
    beyond = np.abs(nearest.astype(F32)) > np.abs(x)
    beyond &= np.isfinite(x)
    return np.where(beyond, nearest.view(np.uint16) - np.uint16(1), nearest.view(np.uint16)).view(F16)


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """v_perm_b32: each selector byte chooses a byte of ``b`` (0 to 3), of ``a`` (4 to 7), a sign (8 to 11), 0x00 (12) or 0xff."""
    both = (a.astype(U64) << U64(32)) | b
    result: Array = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), U32)
    for k in range(4):
        choice = (selector >> U32(8 * k)) & U32(255)
        byte = ((both >> ((choice & U32(7)).astype(U64) << U64(3))) & U64(255)).astype(U32)
        if (choice > 7).any():
            odd = (choice & U32(3)).astype(U64) * U64(16) + U64(15)
            sign = ((both >> odd) & U64(1)).astype(U32) * U32(255)
            byte = np.where(choice < 8, byte, np.where(choice < 12, sign, np.where(choice == 12, U32(0), U32(255))))
        result |= byte << U32(8 * k)
    return result


def bit_field(x: Array, offset: Array, width: Array) -> Array:
    """v_bfe_u32."""
    mask = (U32(1) << (width & U32(31))) - U32(1)
    return (x >> (offset & U32(31))) & mask


def signed_bit_field(x: Array, offset: Array, width: Array) -> Array:
    """v_bfe_i32."""
    size = (width & U32(31)).astype(I64)
    up = 64 - size
    field = ((x.astype(I64) >> (offset & U32(31)).astype(I64)) << np.minimum(up, 63)) >> np.minimum(up, 63)
    return np.where(size == 0, 0, field).astype(I32)


def _shift32(count: Array) -> Array:
    return count & U32(31)


def _shift16(count: Array) -> Array:
    return count & np.uint16(15)


def _low(x: Array, bits: int = 24) -> Array:
    return x & U32((1 << bits) - 1)


def _high_product(a: Array, b: Array) -> Array:
    return ((a.astype(U64) * b) >> U64(32)).astype(U32)


def _median(a: Array, b: Array, c: Array) -> Array:
    low, high = (np.fmin, np.fmax) if a.dtype.kind == "f" else (np.minimum, np.maximum)
    return high(low(a, b), low(high(a, b), c))


def _in_f32(function: Function) -> Function:
    """A float16 function through float32."""
    return lambda *values: function(*(value.astype(F32) for value in values)).astype(F16)


def _sixteen(a: Array, b: Array) -> Array:
    return a.astype(np.uint16).astype(U32) | (b.astype(np.uint16).astype(U32) << U32(16))


def _pack_halves(a: Array, b: Array) -> Array:
    return _sixteen(a.view(np.uint16), b.view(np.uint16))


def _saturating_pack(a: Array, b: Array, low: int, high: int) -> Array:
    return _sixteen(np.clip(a, low, high), np.clip(b, low, high))


FLOATS: dict[str, tuple[str, Function]] = {
    "ADD": ("xx", np.add),
    "SUB": ("xx", np.subtract),
    "SUBREV": ("xx", lambda a, b: b - a),
    "MUL": ("xx", np.multiply),
    "MAX": ("xx", np.fmax),
    "MIN": ("xx", np.fmin),
    "MAX3": ("xxx", lambda a, b, c: np.fmax(np.fmax(a, b), c)),
    "MIN3": ("xxx", lambda a, b, c: np.fmin(np.fmin(a, b), c)),
    "MED3": ("xxx", _median),
    "MAXMIN": ("xxx", lambda a, b, c: np.fmin(np.fmax(a, b), c)),
    "MINMAX": ("xxx", lambda a, b, c: np.fmax(np.fmin(a, b), c)),
    "RNDNE": ("x", np.rint),
    "TRUNC": ("x", np.trunc),
    "FLOOR": ("x", np.floor),
    "CEIL": ("x", np.ceil),
    "FRACT": ("x", lambda a: a - np.floor(a)),
    "FREXP_MANT": ("x", lambda a: np.frexp(a)[0]),
}
"""For float16, float32 and float64 alike; x is the kind."""

THROUGH_F32: dict[str, Function] = {
    "RCP": lambda a: F32(1) / a,
    "RSQ": lambda a: F32(1) / np.sqrt(a),
    "SQRT": np.sqrt,
    "EXP": np.exp2,
    "LOG": np.log2,
    "SIN": lambda a: np.sin(a.astype(F64) * (2 * np.pi)).astype(F32),
    "COS": lambda a: np.cos(a.astype(F64) * (2 * np.pi)).astype(F32),
}

INTEGERS: dict[str, tuple[str, Function]] = {
    "V_MOV_B32": ("u:u", lambda a: a),
    "V_NOT_B32": ("u:u", np.invert),
    "V_BFREV_B32": ("u:u", reverse_bits),
    "V_CLZ_I32_U32": ("u:u", lambda a: np.where(a == 0, U32(0xFFFFFFFF), leading_zeros(a))),
    "V_CTZ_I32_B32": ("u:u", lambda a: np.where(a == 0, U32(0xFFFFFFFF), trailing_zeros(a))),
    "V_BCNT_U32_B32": ("u:uu", lambda a, b: count_bits(a) + b),
    "V_ADD_NC_U32": ("u:uu", np.add),
    "V_SUB_NC_U32": ("u:uu", np.subtract),
    "V_SUBREV_NC_U32": ("u:uu", lambda a, b: b - a),
    "V_ADD_NC_I32": ("u:uu", np.add),
    "V_SUB_NC_I32": ("u:uu", np.subtract),
    "V_AND_B32": ("u:uu", np.bitwise_and),
    "V_OR_B32": ("u:uu", np.bitwise_or),
    "V_XOR_B32": ("u:uu", np.bitwise_xor),
    "V_XNOR_B32": ("u:uu", lambda a, b: ~(a ^ b)),
    "V_LSHLREV_B32": ("u:uu", lambda a, b: b << _shift32(a)),
    "V_LSHRREV_B32": ("u:uu", lambda a, b: b >> _shift32(a)),
    "V_ASHRREV_I32": ("i:ui", lambda a, b: b >> _shift32(a).view(I32)),
    "V_LSHLREV_B64": ("U:uU", lambda a, b: b << (a & U32(63)).astype(U64)),
    "V_LSHRREV_B64": ("U:uU", lambda a, b: b >> (a & U32(63)).astype(U64)),
    "V_ASHRREV_I64": ("I:uI", lambda a, b: b >> (a & U32(63)).astype(I64)),
    "V_MAX_I32": ("i:ii", np.maximum),
    "V_MIN_I32": ("i:ii", np.minimum),
    "V_MAX_U32": ("u:uu", np.maximum),
    "V_MIN_U32": ("u:uu", np.minimum),
    "V_MUL_LO_U32": ("u:uu", np.multiply),
    "V_MUL_HI_U32": ("u:uu", _high_product),
    "V_MUL_HI_I32": ("i:ii", lambda a, b: ((a.astype(I64) * b) >> I64(32)).astype(I32)),
    "V_MUL_U32_U24": ("u:uu", lambda a, b: _low(a) * _low(b)),
    "V_MUL_HI_U32_U24": ("u:uu", lambda a, b: _high_product(_low(a), _low(b))),
    "V_MUL_I32_I24": ("u:uu", lambda a, b: (sign_extend(a, 24) * sign_extend(b, 24)).astype(U32)),
    "V_MUL_HI_I32_I24": ("u:uu", lambda a, b: ((sign_extend(a, 24) * sign_extend(b, 24)) >> I64(32)).astype(U32)),
    "V_MAD_I32_I24": ("u:uuu", lambda a, b, c: (sign_extend(a, 24) * sign_extend(b, 24)).astype(U32) + c),
    "V_MAD_U32_U24": ("u:uuu", lambda a, b, c: _low(a) * _low(b) + c),
    "V_MAD_U32_U16": ("u:wwu", lambda a, b, c: a.astype(U32) * b + c),
    "V_MAD_I32_I16": ("i:ssi", lambda a, b, c: a.astype(I32) * b + c),
    "V_MAD_U64_U32": ("U:uuU", lambda a, b, c: a.astype(U64) * b + c),
    "V_LSHL_OR_B32": ("u:uuu", lambda a, b, c: (a << _shift32(b)) | c),
    "V_LSHL_ADD_U32": ("u:uuu", lambda a, b, c: (a << _shift32(b)) + c),
    "V_ADD_LSHL_U32": ("u:uuu", lambda a, b, c: (a + b) << _shift32(c)),
    "V_ADD3_U32": ("u:uuu", lambda a, b, c: a + b + c),
    "V_OR3_B32": ("u:uuu", lambda a, b, c: a | b | c),
    "V_XOR3_B32": ("u:uuu", lambda a, b, c: a ^ b ^ c),
    "V_AND_OR_B32": ("u:uuu", lambda a, b, c: (a & b) | c),
    "V_XAD_U32": ("u:uuu", lambda a, b, c: (a ^ b) + c),
    "V_BFI_B32": ("u:uuu", lambda a, b, c: (a & b) | (~a & c)),
    "V_BFM_B32": ("u:uu", lambda a, b: ((U32(1) << _shift32(a)) - U32(1)) << _shift32(b)),
    "V_BFE_U32": ("u:uuu", bit_field),
    "V_BFE_I32": ("i:iuu", signed_bit_field),
    "V_ALIGNBIT_B32": ("u:uuu", lambda a, b, c: ((a.astype(U64) << U64(32) | b) >> _shift32(c).astype(U64)).astype(U32)),
    "V_ALIGNBYTE_B32": ("u:uuu", lambda a, b, c: ((a.astype(U64) << U64(32) | b) >> (c & U32(3)).astype(U64) * U64(8)).astype(U32)),
    "V_PERM_B32": ("u:uuu", permute_bytes),
    **{
        f"V_{name}3_{t}32": (f"{k}:{k * 3}", f)
        for t, k in (("I", "i"), ("U", "u"))
        for name, f in (
            ("MAX", lambda a, b, c: np.maximum(np.maximum(a, b), c)),
            ("MIN", lambda a, b, c: np.minimum(np.minimum(a, b), c)),
            ("MED", _median),
        )
    },
    **{
        f"V_{name}_{t}32": (f"{k}:{k * 3}", f)
        for t, k in (("I", "i"), ("U", "u"))
        for name, f in (
            ("MAXMIN", lambda a, b, c: np.minimum(np.maximum(a, b), c)),
            ("MINMAX", lambda a, b, c: np.maximum(np.minimum(a, b), c)),
        )
    },
}

SHORTS: dict[str, tuple[str, Function]] = {
    "V_MOV_B16": ("w:w", lambda a: a),
    "V_NOT_B16": ("w:w", np.invert),
    "V_AND_B16": ("w:ww", np.bitwise_and),
    "V_OR_B16": ("w:ww", np.bitwise_or),
    "V_XOR_B16": ("w:ww", np.bitwise_xor),
    "V_LSHLREV_B16": ("w:ww", lambda a, b: b << _shift16(a)),
    "V_LSHRREV_B16": ("w:ww", lambda a, b: b >> _shift16(a)),
    "V_ASHRREV_I16": ("s:ws", lambda a, b: b >> _shift16(a).view(np.int16)),
    **{f"V_{op}_NC_{t}16": ("w:ww", f) for t in "UI" for op, f in (("ADD", np.add), ("SUB", np.subtract))},
    "V_MUL_LO_U16": ("w:ww", np.multiply),
    "V_MAD_U16": ("w:www", lambda a, b, c: a * b + c),
    "V_MAD_I16": ("w:www", lambda a, b, c: a * b + c),
    "V_MAX_I16": ("s:ss", np.maximum),
    "V_MIN_I16": ("s:ss", np.minimum),
    "V_MAX_U16": ("w:ww", np.maximum),
    "V_MIN_U16": ("w:ww", np.minimum),
    "V_PACK_B32_F16": ("u:hh", _pack_halves),
    "V_FMA_F16": ("h:hhh", fma16),
    "V_LDEXP_F16": ("h:hs", lambda a, b: np.ldexp(a.astype(F32), b.astype(I32)).astype(F16)),
    "V_DIV_FIXUP_F16": ("h:hhh", lambda a, b, c: (c.astype(F32) / b.astype(F32)).astype(F16)),
}

CONVERSIONS: dict[str, tuple[str, Function]] = {
    "V_CVT_F32_F16": ("f:h", lambda a: a.astype(F32)),
    "V_CVT_F16_F32": ("h:f", lambda a: a.astype(F16)),
    "V_CVT_F32_I32": ("f:i", lambda a: a.astype(F32)),
    "V_CVT_F32_U32": ("f:u", lambda a: a.astype(F32)),
    "V_CVT_F16_I16": ("h:s", lambda a: a.astype(F16)),
    "V_CVT_F16_U16": ("h:w", lambda a: a.astype(F16)),
    "V_CVT_I16_F16": ("s:h", lambda a: to_integer(a, np.int16)),
    "V_CVT_U16_F16": ("w:h", lambda a: to_integer(a, np.uint16)),
    "V_CVT_I32_F32": ("i:f", lambda a: to_integer(a, I32)),
    "V_CVT_U32_F32": ("u:f", lambda a: to_integer(a, U32)),
    "V_CVT_NEAREST_I32_F32": ("i:f", lambda a: to_integer(np.floor(a + F32(0.5)), I32)),
    "V_CVT_FLOOR_I32_F32": ("i:f", lambda a: to_integer(np.floor(a), I32)),
    "V_CVT_F64_F32": ("d:f", lambda a: a.astype(F64)),
    "V_CVT_F32_F64": ("f:d", lambda a: a.astype(F32)),
    "V_CVT_F64_I32": ("d:i", lambda a: a.astype(F64)),
    "V_CVT_F64_U32": ("d:u", lambda a: a.astype(F64)),
    "V_CVT_I32_F64": ("i:d", lambda a: to_integer(a, I32)),
    "V_CVT_U32_F64": ("u:d", lambda a: to_integer(a, U32)),
    "V_CVT_I32_I16": ("i:s", lambda a: a.astype(I32)),
    "V_CVT_U32_U16": ("u:w", lambda a: a.astype(U32)),
    **{f"V_CVT_F32_UBYTE{k}": ("f:u", lambda a, k=k: ((a >> U32(8 * k)) & U32(255)).astype(F32)) for k in range(4)},
    "V_CVT_PK_RTZ_F16_F32": ("u:ff", lambda a, b: _pack_halves(towards_zero_f16(a), towards_zero_f16(b))),
    "V_CVT_PK_I16_I32": ("u:ii", lambda a, b: _saturating_pack(a, b, -0x8000, 0x7FFF)),
    "V_CVT_PK_U16_U32": ("u:uu", lambda a, b: _saturating_pack(a, b, 0, 0xFFFF)),
    "V_CVT_PK_I16_F32": ("u:ff", lambda a, b: _sixteen(to_integer(a, np.int16), to_integer(b, np.int16))),
    "V_CVT_PK_U16_F32": ("u:ff", lambda a, b: _sixteen(to_integer(a, np.uint16), to_integer(b, np.uint16))),
    "V_FREXP_EXP_I32_F32": ("i:f", lambda a: np.frexp(a)[1].astype(I32)),
    "V_FREXP_EXP_I32_F64": ("i:d", lambda a: np.frexp(a)[1].astype(I32)),
    "V_FREXP_EXP_I16_F16": ("s:h", lambda a: np.frexp(a.astype(F32))[1].astype(np.int16)),
}

WIDE: dict[str, tuple[str, Function]] = {
    "V_FMA_F32": ("f:fff", fma32),
    "V_MUL_DX9_ZERO_F32": ("f:ff", lambda a, b: np.where((a == 0) | (b == 0), F32(0), a * b)),
    "V_LDEXP_F32": ("f:fi", np.ldexp),
    "V_RCP_IFLAG_F32": ("f:f", lambda a: F32(1) / a),
    # The compiler's division: scale, approximate, correct, and fix up. The last step alone gives the rounded quotient.
    "V_DIV_FMAS_F32": ("f:fff", fma32),
    "V_DIV_FIXUP_F32": ("f:fff", lambda a, b, c: c / b),
    "V_FMA_F64": ("d:ddd", fma64),
    "V_LDEXP_F64": ("d:di", np.ldexp),
    "V_RCP_F64": ("d:d", lambda a: 1 / a),
    "V_RSQ_F64": ("d:d", lambda a: 1 / np.sqrt(a)),
    "V_SQRT_F64": ("d:d", np.sqrt),
    "V_DIV_FMAS_F64": ("d:ddd", fma64),
    "V_DIV_FIXUP_F64": ("d:ddd", lambda a, b, c: c / b),
}


def _table() -> dict[str, tuple[str, Function]]:
    table = {**INTEGERS, **SHORTS, **CONVERSIONS, **WIDE}
    for kind, suffix in (("f", "F32"), ("h", "F16"), ("d", "F64")):
        for name, (sources, function) in FLOATS.items():
            table[f"V_{name}_{suffix}"] = (f"{kind}:{sources.replace('x', kind)}", function)
    for name, function in THROUGH_F32.items():
        table[f"V_{name}_F32"] = ("f:f", function)
        table[f"V_{name}_F16"] = ("h:h", _in_f32(function))
    return table


TABLE = _table()


def _saturating(function: Function, kind: Any) -> Function:
    info = np.iinfo(kind)
    return lambda a, b: np.clip(function(a.astype(I64), b.astype(I64)), info.min, info.max).astype(kind)


SATURATING: dict[str, tuple[str, Function]] = {
    f"V_{name}_NC_{letter}{bits}": (f"{kind}:{kind}{kind}", _saturating(function, dtype))
    for letter, bits, kind, dtype in (("U", 32, "u", U32), ("I", 32, "i", I32), ("U", 16, "w", np.uint16), ("I", 16, "s", np.int16))
    for name, function in (("ADD", np.add), ("SUB", np.subtract), ("SUBREV", lambda a, b: b - a))
}
"""What integer additions do with the clamp bit set."""

COMPARE: dict[str, Function] = {
    "F": lambda a, b: np.zeros(np.broadcast_shapes(a.shape, b.shape), np.bool_),
    "LT": np.less,
    "EQ": np.equal,
    "LE": np.less_equal,
    "GT": np.greater,
    "LG": lambda a, b: (a < b) | (a > b),
    "NE": np.not_equal,
    "GE": np.greater_equal,
    "O": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "U": lambda a, b: np.isnan(a) | np.isnan(b),
    "NGE": lambda a, b: ~(a >= b),
    "NLG": lambda a, b: ~((a < b) | (a > b)),
    "NGT": lambda a, b: ~(a > b),
    "NLE": lambda a, b: ~(a <= b),
    "NEQ": np.not_equal,
    "NLT": lambda a, b: ~(a < b),
    "T": lambda a, b: np.ones(np.broadcast_shapes(a.shape, b.shape), np.bool_),
}


def is_class(x: Array, wanted: Array) -> Array:
    """v_cmp_class: whether the class of a float is among the bits that are wanted.

    From bit 0: signalling NaN, quiet NaN, -infinity, -normal, -denormal, -0, +0, +denormal, +normal, +infinity.
    """
    size = x.dtype.itemsize
    mantissa = {2: 10, 4: 23, 8: 52}[size]
    bits = np.ascontiguousarray(x).view(f"u{size}").astype(U64)
    exponent_mask = (1 << (8 * size - 1 - mantissa)) - 1
    exponent = (bits >> U64(mantissa)) & U64(exponent_mask)
    fraction = bits & U64((1 << mantissa) - 1)
    negative = (bits >> U64(8 * size - 1)) == 1
    kind = np.select([exponent == exponent_mask, exponent > 0, fraction > 0], [9, 8, 7], 6)
    kind = np.where(negative, 11 - kind, kind)
    quiet = (fraction >> U64(mantissa - 1)) == 1
    kind = np.where((exponent == exponent_mask) & (fraction > 0), np.where(quiet, 1, 0), kind)
    return ((wanted.astype(U32) >> kind.astype(U32)) & U32(1)) == 1
