"""Exact tokens of a short window, attended by the kernel that merges the parts of decode attention, run lane by lane on the CPU."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest
from lanes_tools import CUDA, HIP64, Device, each_device
from test_lanes_attn import NMSE_F16, NMSE_INT8, Case, Floats, Keys, nmse
from test_lanes_attn_mma import MmaCase

from turbo_gguf.codec import tables


def check(case: Case, device: Device) -> None:
    bound = NMSE_F16 if case.type_k == "f16" else NMSE_INT8
    assert nmse(case, device, merging=True) < bound


@pytest.mark.parametrize(
    "case",
    [
        Case(n_exact=96),
        Case(n_exact=70, hidden=(0, 99)),
        Case(n_exact=70, hidden=(99, 0)),
        Case(n_q=4, n_exact=128, hidden=(1, 0), n_cols=8, n_split=1),
        Case("turbo3t", "turbo3t", n_q=4, n_seq=2, n_exact=96, hidden=(1, 1), n_cols=8),
        Case("q8_0", "q8_0", n_q=2, gqa_ratio=1, n_head_kv=6, n_exact=32, max_bias=8.0),
        Case("f16", "f16", n_exact=1, softcap=10.0, n_split=3),
        Case(mask=False, n_exact=33),
        Case("turbo2t", "turbo2t", sinks=True, n_exact=40, hidden=(0, 99)),
        MmaCase("turbo3t", "turbo3t", n_q=4, n_seq=2, n_exact=96, hidden=(1, 1), n_cols=16, sinks=True),
    ],
    ids=[
        *("plain", "first hidden", "second hidden", "one split", "both hidden", "q8_0 and alibi", "f16 and soft cap", "no mask", "sinks"),
        "matrix instructions",
    ],
)
@each_device
def test_options(case: Case, device: Device) -> None:
    if isinstance(case, MmaCase) and device is not CUDA:
        pytest.skip("NVIDIA only")
    check(case, device)


@pytest.mark.parametrize("head_size", tables.HEAD_SIZES, ids=str)
@pytest.mark.parametrize("device", [CUDA, HIP64], ids=["cuda", "hip64"])
def test_head_sizes(head_size: tuple[int, int], device: Device) -> None:
    check(Case("turbo4", "turbo2", head_size, n_kv=40, n_exact=96), device)


def attend(case: Case, q: Floats, first: Keys, second: Keys) -> Floats:
    out = np.full((*q.shape[:3], case.head_size[1]), np.pi, np.float32)
    args = first.arguments(case, q, None, out, True), second.arguments(case, q, None, out, True)
    case.library(CUDA).call("lanes_decode_merging", *(ctypes.byref(a) for a in args), case.n_seq, case.n_split)
    return out


def inputs(case: Case) -> tuple[Floats, Keys, Keys]:
    rng = np.random.default_rng(7)
    q = rng.standard_normal((1, case.n_q, case.n_head_kv * case.gqa_ratio, case.head_size[0]), np.float32)
    return q, Keys.random(case, rng, case.n_kv, (case.type_k, case.type_v)), Keys.random(case, rng, case.n_exact, ("f16", "f16"))


def test_widths_of_a_batch() -> None:
    """A token's result is the same, bit for bit, with others beside it."""
    case = MmaCase(n_q=8, n_kv=128, n_exact=96)
    q, first, second = inputs(case)
    want = attend(case, q, first, second)
    for width in (1, 3, 5):
        assert np.array_equal(attend(replace(case, n_q=width), np.ascontiguousarray(q[:, :width]), first, second), want[:, :width])


@pytest.mark.parametrize("side", [0, 1], ids=["k", "v"])
def test_nan_shows_unless_its_key_is_masked(side: int) -> None:
    case = Case(n_kv=64, n_exact=96, gqa_ratio=2)
    q, first, second = inputs(case)
    second.mask[..., 50] = -np.inf
    want = attend(case, q, first, second)
    second.packed[side][0, 50, 0, :2] = 255
    assert np.array_equal(attend(case, q, first, second), want)
    second.mask[..., 50] = 0
    out = attend(case, q, first, second)
    assert np.isnan(out[0, 0, :2]).any(axis=-1).all()
    assert np.isfinite(out[0, 0, 2:]).all()
