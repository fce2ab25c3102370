"""Decode attention reads nothing behind the last key: K, V and the mask end where a page without access begins."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pytest
from lanes_tools import Device
from test_lanes_attn import Keys
from test_lanes_attn_mma import MmaCase, attend, batch, each_gpu

T = TypeVar("T", bound=np.generic)
PROT_NONE = 0
LENGTHS = [5, 32, 40, 64, 70, 100, 150]
"""Keys of a cache: within the first half of a tile of 64 keys, at its end, in the second half, and some tiles later."""


def before_a_guard(x: npt.NDArray[T]) -> npt.NDArray[T]:
    """A copy that ends where a page begins that may not be read."""
    size = -(-x.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    guard = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size)
    assert ctypes.CDLL(None).mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), PROT_NONE) == 0
    out = np.frombuffer(memory, x.dtype, x.size, size - x.nbytes).reshape(x.shape)
    out[...] = x
    return out


def in_a_child(function: Callable[[], bool]) -> int:
    """How a child process ends that runs ``function``: 0 if it says yes, or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        faulthandler.disable()
        ok = False
        try:
            ok = function()
        finally:
            os._exit(0 if ok else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def guarded(keys: Keys) -> Keys:
    return replace(keys, packed=(before_a_guard(keys.packed[0]), before_a_guard(keys.packed[1])), mask=before_a_guard(keys.mask))


@each_gpu
@pytest.mark.parametrize("kind", ["turbo3", "f16"])
def test_nothing_is_read_behind_the_last_key(kind: str, device: Device) -> None:
    for n_kv in LENGTHS:
        for mask in (True, False):
            case = MmaCase(kind, kind, n_q=2, n_head_kv=1, n_kv=n_kv, n_split=1, mask=mask)
            q, keys = batch(case)
            want = attend(case, device, q, keys)
            end = guarded(keys)
            assert in_a_child(lambda: np.array_equal(attend(case, device, q, end), want)) == 0, (n_kv, mask)  # noqa: B023


@each_gpu
def test_a_key_too_many_is_seen(device: Device) -> None:
    case = MmaCase(n_head_kv=1, n_kv=70, n_split=1)
    q, keys = batch(case)
    end = guarded(keys)
    assert in_a_child(lambda: np.isfinite(attend(case, device, q, end, case.n_kv + 1)).all()) == -signal.SIGSEGV
