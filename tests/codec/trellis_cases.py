"""Blocks that the trellis types are tested with."""

from __future__ import annotations

import numpy as np
from codec_cases import FLT_DENORMAL, FLT_MAX

from turbo_gguf.codec import tables
from turbo_gguf.codec.tables import LEVEL_STEPS, QK_TRELLIS


def gaussian(blocks: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((blocks, QK_TRELLIS)).astype(np.float32)


def blocks_of_all_kinds() -> np.ndarray:
    rng = np.random.default_rng(3)
    x = gaussian(40, seed=4)
    heavy = rng.standard_t(2, (20, QK_TRELLIS))
    spike = np.zeros((4, QK_TRELLIS))
    spike[range(4), [0, 1, 31, 63]] = [1, -1, 1e30, -1e-5]
    levels = np.array(tables.TURBO3T.codebooks[0])[rng.integers(0, 16, (6, QK_TRELLIS))] / LEVEL_STEPS  # ties between levels
    sizes = 2.0 ** np.arange(-30, 130, 4)[:, None] * gaussian(40, seed=5)
    constant = np.full((4, QK_TRELLIS), [[1], [-0.5], [3e-6], [65504]])
    halves = np.where(np.arange(QK_TRELLIS) < 32, 8, 1) * gaussian(4, seed=6)
    small = np.array([[0.0], [-0.0], [FLT_DENORMAL], [2.0**-18], [np.nextafter(np.float32(2.0**-18), np.float32(0))]]) * np.ones(QK_TRELLIS)
    extreme = gaussian(6, seed=7)
    extreme[range(6), [0, 5, 9, 40, 62, 63]] = [np.inf, -np.inf, FLT_MAX, -FLT_MAX, np.nan, -np.nan]
    steps = rng.integers(-300, 300, (10, QK_TRELLIS)) / (8 * LEVEL_STEPS)  # midpoints of levels
    all_kinds = [x, heavy, spike, levels, sizes, constant, halves, small, extreme, steps]
    with np.errstate(over="ignore"):
        return np.concatenate([kind.astype(np.float32) for kind in all_kinds])
