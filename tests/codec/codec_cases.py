"""Inputs and compiled variants that the codec tests share."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from turbo_gguf.codec import oracle
from turbo_gguf.codec.tables import QK_SCALAR, SCALAR, T_MAX, TURBO4, ScalarType, Scale

FLT_MAX = np.finfo(np.float32).max
FLT_DENORMAL = np.float32(1e-45)

# bits of d: zeros, denormals, the smallest and the largest normal numbers, ordinary ones; infinity, quiet and signalling NaN
FINITE_SCALES = (0x0000, 0x8000, 0x0001, 0x8001, 0x0003, 0x03FF, 0x0400, 0x3C00, 0xBC00, 0x2E66, 0x7BFF, 0xFBFF)
OTHER_SCALES = (0x7C00, 0xFC00, 0x7E00, 0xFE01, 0x7C01)

X86 = platform.machine() in ("x86_64", "AMD64")


def cpu_has(flag: str) -> bool:
    try:
        return f" {flag} " in Path("/proc/cpuinfo").read_text().replace("\n", " ")
    except OSError:
        return False


# -march=native lets the compiler fuse multiplications and additions; the results must not depend on it
VARIANTS = {
    "portable": ("-Werror",),
    "native": ("-Werror", "-march=native"),
    "avx2": ("-Werror", "-mavx2", "-mfma", "-mf16c"),
}
HAS_AVX2 = X86 and cpu_has("avx2") and cpu_has("fma") and cpu_has("f16c")
needs_avx2 = pytest.mark.skipif(not HAS_AVX2, reason="this CPU has no AVX2, FMA and F16C")

each_type = pytest.mark.parametrize("t", SCALAR, ids=lambda t: t.name)
each_scale = pytest.mark.parametrize("scale", Scale, ids=lambda s: s.name.lower())
each_search = pytest.mark.parametrize("search", [True, False], ids=["search", "plain"])
each_variant = pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=needs_avx2 if name == "avx2" else ()) for name in VARIANTS], ids=str
)


def load(variant: str) -> oracle.Oracle:
    return oracle.load(*VARIANTS[variant])


def gaussian_blocks(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, QK_SCALAR)).astype(np.float32)


def adversarial_blocks() -> np.ndarray:
    """Blocks that have broken quantizers before, or that sit exactly on a decision of ours; shape (blocks, 32)."""
    rng = np.random.default_rng(7)
    noise = rng.standard_normal(QK_SCALAR).astype(np.float32)
    alternating = np.where(np.arange(QK_SCALAR) % 2, 1, -1).astype(np.float32)
    one_hot = np.eye(QK_SCALAR, dtype=np.float32)
    rows: list[np.ndarray] = [np.zeros(QK_SCALAR), -np.zeros(QK_SCALAR), *one_hot[[0, 15, 16, 31]], *(-one_hot[[3, 24]])]
    for magnitude in (
        1.0,
        FLT_MAX,
        FLT_DENORMAL,
        np.finfo(np.float32).tiny,
        2.0**-40,
        np.nextafter(np.float32(2.0**-40), 0),
        65504.0 * 104,
    ):
        rows += [np.full(QK_SCALAR, magnitude), alternating * magnitude, one_hot[5] * magnitude]
    rows += [noise * np.float32(10.0**exponent) for exponent in range(-44, 38)]
    rows += [np.where(np.arange(QK_SCALAR) == 9, FLT_MAX, noise), np.where(np.arange(QK_SCALAR) == 9, 1e30, noise * 1e-30)]
    rows += [np.where(np.arange(QK_SCALAR) == i, bad, noise) for i in (0, 17, 31) for bad in (np.nan, -np.nan, np.inf, -np.inf)]
    rows += [np.full(QK_SCALAR, bad) for bad in (np.nan, np.inf, -np.inf)]
    rows.append(np.where(np.arange(QK_SCALAR) % 3 == 0, np.nan, np.inf))
    rows += _threshold_blocks()
    rows += _tied_blocks()
    return np.array(rows, dtype=np.float32)


def _threshold_blocks() -> list[np.ndarray]:
    """With max|x| = T_MAX the encoder's integers are the values themselves: put them on, beside and between thresholds."""
    rows = []
    for t in SCALAR:
        for thresholds in (*t.thresholds, t.plain_thresholds):
            near = np.array([edge + delta for edge in thresholds for delta in (-1, -0.5, 0, 0.5, 1)], dtype=np.float32)
            row = np.resize(near, QK_SCALAR) * np.where(np.arange(QK_SCALAR) % 2, 1, -1)
            row[0] = T_MAX
            rows.append(row)
    return rows


def _tied_blocks() -> list[np.ndarray]:
    """Blocks for which turbo2's steps choose different indices with exactly the same gain: the first step must win."""
    ties = [(5, 6, 3901, 585), (2, 4, 3426, 1076), (2, 2, 3108, 741), (8, 7, 4257, 243)]
    return [np.repeat([T_MAX, middle, low], [n, m, QK_SCALAR - n - m]) for n, m, middle, low in ties]


def random_blocks(count: int, seed: int = 3) -> np.ndarray:
    """Random bit patterns: every exponent, denormals, NaN and infinity; most blocks finite."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, (count, QK_SCALAR), dtype=np.uint32)
    narrow = (bits & np.uint32(0x807FFFFF)) | (rng.integers(1, 255, (count, 1), dtype=np.uint32) << np.uint32(23))
    mixed = np.where(rng.random((count, 1)) < 0.8, narrow, bits)
    return mixed.astype(np.uint32).view(np.float32)


def with_scale(body: np.ndarray, bits: int) -> np.ndarray:
    """Blocks of turbo3 or turbo4 from what follows ``d``, and from the bits of ``d``."""
    d = np.full(len(body), bits, dtype="<u2")
    return np.concatenate([d.view(np.uint8).reshape(-1, 2), body], axis=1)


def blocks_with_scales(t: ScalarType, scales: Iterable[int], count: int = 50) -> np.ndarray:
    """For each scale, blocks of random indices."""
    rng = np.random.default_rng(17)
    return np.concatenate([with_scale(rng.integers(0, 256, (count, t.block_bytes - 2), dtype=np.uint8), bits) for bits in scales])


def blocks_of_equal_bytes(t: ScalarType) -> np.ndarray:
    """All blocks whose bytes of low bits are equal and, in turbo3, whose bytes of signs are equal: all pairs of levels among them."""
    byte = np.arange(256, dtype=np.uint8).reshape(-1, 1)
    if t is TURBO4:
        return with_scale(np.repeat(byte, 16, axis=1), 0x3C00)
    qs, signs = np.repeat(np.repeat(byte, 8, axis=1), 256, axis=0), np.tile(np.repeat(byte, 4, axis=1), (256, 1))
    return with_scale(np.concatenate([qs, signs], axis=1), 0x3C00)


def stored_blocks(t: ScalarType) -> np.ndarray:
    """What decay may meet."""
    random = np.random.default_rng(19).integers(0, 256, (4000, t.block_bytes), dtype=np.uint8)
    return np.concatenate([blocks_of_equal_bytes(t), blocks_with_scales(t, (*FINITE_SCALES, *OTHER_SCALES)), random])
