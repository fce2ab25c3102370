"""Kernels beside attention, compiled for gfx1100 and run on the emulator: unpacking of slices, and the merge with exact tokens.

The ops of test-backend-ops use them, too. Here they run without a build of the backend, and instructions are counted.
"""

from __future__ import annotations

import struct

import emulated_tools
import numpy as np
import pytest
from emulator.codeobject import CodeObject
from emulator.machine import Call, Machine, Statistics
from emulator.memory import Memory

from turbo_gguf.codec import oracle
from turbo_gguf.codec.tables import ALL, TrellisType, TurboType

pytestmark = pytest.mark.emulated

N_KEYS = 32


def launch(
    memory: Memory, source: str, name: str, grid: tuple[int, int, int], block: tuple[int, int, int], *arguments: bytes
) -> Statistics:
    """Run the kernel whose mangled name has this part."""
    code = CodeObject(emulated_tools.code_object(source), memory)
    (kernel,) = (found for found in code.kernels if name in found)
    return Machine(memory).launch(code, Call(kernel, grid, block, list(arguments)))


def packed(t: TurboType, values: np.ndarray) -> np.ndarray:
    return oracle.load().quantize_trellis(t, values) if isinstance(t, TrellisType) else oracle.load().quantize(t, values)


MOST_INSTRUCTIONS = {"turbo2": 4.7, "turbo3": 5.2, "turbo4": 5.7, "turbo2t": 8.0, "turbo3t": 9.6, "turbo4t": 12.7}
"""For a value: a tenth more than there were."""


@pytest.mark.parametrize("t", ALL, ids=lambda t: t.name)
@pytest.mark.parametrize(("n_heads", "head_size"), [(8, 128), (16, 64)], ids=["128", "64"])
def test_a_slice_is_unpacked(t: TurboType, n_heads: int, head_size: int) -> None:
    keys = packed(t, np.random.default_rng(1).standard_normal((N_KEYS, n_heads, head_size), np.float32))
    memory = Memory.of_size(1 << 22)
    x, y = memory.place(keys), memory.place(np.full((n_heads, N_KEYS, head_size), np.nan, np.float16))

    blocks, stride = head_size // t.block, keys.strides[0]
    shift = (blocks - 1).bit_length()  # upstream's init_fastdiv_values()
    division = ((1 << 32) * ((1 << shift) - blocks) // blocks + 1, shift, blocks)
    arguments = struct.pack("<2Q2q3I4i4x", x, y, stride, keys.nbytes, *division, blocks * n_heads, n_heads, N_KEYS, head_size)
    lanes = n_heads * head_size // 32
    grid = (lanes // 32, N_KEYS // 16, 1)
    statistics = launch(memory, "turbo-unpack.cu", f"turbo_unpack_keysIL9ggml_type{t.type_id}E", grid, (32, 4, 1), arguments)

    want = oracle.load().dequantize(t, keys).astype(np.float16).transpose(1, 0, 2)
    assert np.array_equal(memory.read(y, want.shape, np.float16), want)
    assert 32 * statistics.wave_instructions / want.size < MOST_INSTRUCTIONS[t.name]


@pytest.mark.parametrize(
    ("n_exact", "hidden"), [(96, ()), (40, range(7, 30)), (1, ()), (64, range(64))], ids=["96", "some hidden", "one", "all hidden"]
)
def test_exact_tokens_are_attended_by_the_merge(n_exact: int, hidden: range | tuple[()]) -> None:
    head_size, n_head, n_parts = 128, 4, 3
    rng = np.random.default_rng(2)
    q, parts = rng.standard_normal((n_head, head_size), np.float32), rng.standard_normal((n_head, n_parts, head_size), np.float32)
    k, v = (rng.standard_normal((n_exact, head_size)).astype(np.float16) for _ in range(2))
    mask = np.where(np.isin(np.arange(n_exact), hidden), -np.inf, rng.random(n_exact)).astype(np.float16)
    k[list(hidden)] = np.nan  # cells that were never written
    meta = np.stack([rng.standard_normal((n_head, n_parts)), 1 + rng.random((n_head, n_parts))], -1).astype(np.float32)

    memory = Memory.of_size(1 << 21)
    dst = memory.place(np.full((n_head, head_size), np.nan, np.float32))
    places = [memory.place(x) for x in (q, k, v, mask)]
    arguments = struct.pack("<4Q", *places) + struct.pack("<3Q", 0, memory.place(parts), memory.place(meta))
    arguments += struct.pack("<7i", 1, n_head, n_head, n_exact, 1, n_parts, n_parts)
    arguments += struct.pack("<7i4q", 0, q.strides[0], k.strides[0], 0, v.strides[0], 0, 0, 0, 0, 0, 0)
    arguments += struct.pack("<5fI?7x", head_size**-0.5, 0.0, 0.0, 1.0, 1.0, n_head, True)
    launch(memory, "turbo-attn-merge-exact.cu", "Li128ELi128E", (n_head, 1, 1), (head_size, 1, 1), arguments, struct.pack("<Q", dst))

    seen = np.isfinite(mask)
    scores = (q @ k[seen].astype(np.float32).T / head_size**0.5 + mask[seen].astype(np.float32)) * np.log2(np.e)
    # of the parts values are relative to the maximum and 3 more, the slack of decode attention
    weights = np.concatenate([np.exp2(scores), np.exp2(meta[..., 0] + 3)], 1)
    values = np.concatenate([np.broadcast_to(v[seen].astype(np.float32), (n_head, seen.sum(), head_size)), parts], 1)
    sums = np.concatenate([np.ones_like(scores), meta[..., 1]], 1)
    want = np.einsum("hk,hkd->hd", weights, values) / (weights * sums).sum(1, keepdims=True)
    np.testing.assert_allclose(memory.read(dst, want.shape, np.float32), want, rtol=1e-4, atol=1e-5)
