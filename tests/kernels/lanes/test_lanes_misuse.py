"""The lane emulation computes what a GPU does, and reports what a GPU would leave undefined."""

from __future__ import annotations

import numpy as np
import pytest
from lanes_tools import CUDA, HIP32, HIP64, Device, LanesMisuse, each_device, load


def run(device: Device, kernel: str) -> np.ndarray:
    out = np.zeros(96, dtype=np.int32)
    load("misuse.cpp", device).call("lanes_misuse", kernel.encode(), out)
    return out


@each_device
def test_meetings_hand_over_the_right_values(device: Device) -> None:
    i = np.arange(96)
    sums = i.reshape(3, 32).sum(axis=1).repeat(32)
    up = np.where(i % 8 < 3, i, i - 3)
    wave = 64 if device is HIP64 else 32
    any_70 = i // wave == 70 // wave
    all_below_64 = i < 64
    assert np.array_equal(run(device, "correct"), sums + 10000 * up + 1000000 * any_70 + 2000000 * all_below_64 + 10000000 * 5)


@each_device
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("barrier_in_a_branch", r"__syncthreads at .*misuse.cpp:\d+ \(32 threads wait\): thread .* has ended"),
        ("two_barriers", r"is at __syncthreads .* while others of its group are at __syncthreads"),
        ("shuffle_in_a_branch", r"waits for ever, __shfl_xor_sync .* has ended"),
        ("early_end", r"thread \(7,0,0\) has ended"),
        ("two_shuffles", r"is at __shfl_xor_sync .* while others of its group are at __shfl_xor_sync"),
        ("some_lanes", "a mask of some lanes: HIP has none"),
    ],
)
def test_misuse_is_reported(device: Device, kernel: str, message: str) -> None:
    with pytest.raises(LanesMisuse, match=message):
        run(device, kernel)


def test_a_vote_covers_the_wave_and_a_shuffle_its_32_lanes() -> None:
    for device in (CUDA, HIP32, HIP64):
        run(device, "shuffle_of_half_a_wave")
    for device in (CUDA, HIP32):
        run(device, "vote_of_half_a_wave")
    with pytest.raises(LanesMisuse, match=r"__any_sync .* has ended"):
        run(HIP64, "vote_of_half_a_wave")


def test_a_missing_barrier_shows_in_one_of_both_orders() -> None:
    expected = (np.arange(96) + 1) % 96
    library = load("misuse.cpp", CUDA)
    ascending = run(CUDA, "no_barrier")
    library.set_descending(True)
    try:
        descending = run(CUDA, "no_barrier")
    finally:
        library.set_descending(False)
    assert not (np.array_equal(ascending, expected) and np.array_equal(descending, expected))
