"""Our trellis sources for GPUs, run lane by lane on the CPU, store and unpack the same bits as the C reference."""

from __future__ import annotations

import numpy as np
import pytest
from lanes_tools import CUDA, LANES, Device, command, compiler, each_device, load

from turbo_gguf import tools
from turbo_gguf.codec import oracle
from turbo_gguf.codec.tables import LEVEL_STEPS, QK_TRELLIS, TRELLIS, TrellisType

FLT_MAX = np.finfo(np.float32).max

ENCODERS = {"many blocks": "lanes_encode", "few blocks": "lanes_encode_wide"}

each_encoder = pytest.mark.parametrize("encoder", ENCODERS)
each_type = pytest.mark.parametrize("t", TRELLIS, ids=lambda t: t.name)


def gaussian(blocks: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((blocks, QK_TRELLIS)).astype(np.float32)


def all_blocks(t: TrellisType, count: int) -> np.ndarray:
    """Ordinary and heavy-tailed ones, ties of levels and of whole paths, all sizes, and what is no number."""
    rng = np.random.default_rng(5)
    spikes = np.zeros((5, QK_TRELLIS))
    spikes[range(5), [0, 1, 31, 32, 63]] = [1, -1, 1e30, -1e-5, 3]
    levels = np.concatenate([*t.codebooks]) / LEVEL_STEPS
    on_levels = levels[rng.integers(0, len(levels), (count // 4, QK_TRELLIS))]
    midpoints = rng.integers(-300, 300, (count // 4, QK_TRELLIS)) / (8 * LEVEL_STEPS)
    few_values = rng.integers(-1, 2, (count // 4, QK_TRELLIS))
    sizes = 2.0 ** np.arange(-30, 130, 2)[:, None] * gaussian(80, seed=5)
    constant = np.full((6, QK_TRELLIS), np.array([1, -0.5, 3e-6, 65504, 0.0, -0.0])[:, None])
    alternating = np.where(np.arange(QK_TRELLIS) % 2, 1, -1) * np.array([[1], [1e-3], [FLT_MAX]])
    small = np.full((4, QK_TRELLIS), np.array([1e-45, 2.0**-18, np.nextafter(np.float32(2.0**-18), np.float32(0)), 1e-30])[:, None])
    broken = gaussian(8, seed=7)
    broken[range(8), [0, 5, 9, 40, 62, 63, 32, 31]] = [np.inf, -np.inf, FLT_MAX, -FLT_MAX, np.nan, -np.nan, np.nan, np.inf]
    kinds = [gaussian(count), rng.standard_t(1.5, (count, QK_TRELLIS)), spikes, on_levels, midpoints, few_values, sizes, constant]
    with np.errstate(over="ignore"):
        return np.concatenate([kind.astype(np.float32) for kind in [*kinds, alternating, small, broken]])


def encode(device: Device, t: TrellisType, x: np.ndarray, encoder: str) -> np.ndarray:
    packed = np.full((len(x), t.block_bytes), 0xA5, dtype=np.uint8)
    load("trellis.cpp", device).call(ENCODERS[encoder], t.type_id, x, packed, len(x))
    return packed


def check(device: Device, t: TrellisType, x: np.ndarray, encoder: str) -> None:
    wrong = np.flatnonzero((encode(device, t, x, encoder) != oracle.load().quantize_trellis(t, x)).any(axis=1))
    assert wrong.size == 0, f"{wrong.size} of {len(x)} blocks differ, the first is number {wrong[0]}, {x[wrong[0]]}"


@each_device
@each_type
@each_encoder
def test_encoder_stores_the_bits_of_the_reference(device: Device, t: TrellisType, encoder: str) -> None:
    check(device, t, all_blocks(t, 100), encoder)


@each_type
@each_encoder
def test_encoder_stores_the_bits_of_the_reference_for_many_blocks(t: TrellisType, encoder: str) -> None:
    check(CUDA, t, all_blocks(t, 1000), encoder)


@each_type
@each_encoder
def test_encoder_does_not_depend_on_which_thread_goes_first(t: TrellisType, encoder: str) -> None:
    library = load("trellis.cpp", CUDA)
    library.set_descending(True)
    try:
        check(CUDA, t, all_blocks(t, 30), encoder)
    finally:
        library.set_descending(False)


@pytest.mark.parametrize("count", [1, 7, 9])
def test_lanes_without_a_block_store_nothing(count: int) -> None:
    t = TRELLIS[1]
    check(CUDA, t, gaussian(count), "many blocks")


@each_device
@each_type
@pytest.mark.parametrize("by_quarters", [False, True], ids=["halves", "quarters"])
def test_unpacking_equals_the_reference_for_all_bit_patterns(device: Device, t: TrellisType, by_quarters: bool) -> None:
    packed = np.random.default_rng(2).integers(0, 256, (20_000, t.block_bytes), dtype=np.uint8)
    packed[:512, 0] = np.arange(512) % 256
    values = np.empty((len(packed), QK_TRELLIS), dtype=np.float32)
    load("trellis.cpp", device).call("lanes_unpack", t.type_id, packed, values, len(packed), by_quarters)
    assert np.array_equal(values, oracle.load().dequantize(t, packed), equal_nan=True)


def test_tables_of_costs_take_few_steps_to_compute() -> None:
    """They are constants, and MSVC gives up after 1,048,576 steps. Operations, which g++ counts, are more than steps."""
    if "g++" not in compiler() or "clang" in compiler():
        pytest.skip("the limit is g++'s")
    tools.capture([*command(CUDA), "-S", "-fconstexpr-ops-limit=1048576", str(LANES / "trellis.cpp"), "-o", "/dev/null"])
