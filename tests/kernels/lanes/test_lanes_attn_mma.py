"""Decode attention by matrix instructions (NVIDIA's sm_80 and later, AMD's RDNA3, RDNA4 and CDNA3), run lane by lane on the CPU, against
numpy and against itself."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from lanes_tools import CUDA, GFX11, GFX12, GFX942, Device, Library, load
from test_lanes_attn import NMSE_F16, NMSE_INT8, Case, Floats, Keys, expected, nmse, pack
from test_lanes_attn_faults import NAN_SCALE

from turbo_gguf.codec import tables

SCALAR = [t.name for t in tables.SCALAR]
TRELLIS = [t.name for t in tables.TRELLIS]
PACKED = [*SCALAR, *TRELLIS]
PAIRS = [
    *((t, t) for t in PACKED),
    ("turbo4", "turbo3"),
    ("turbo3t", "turbo4t"),
    ("turbo4t", "turbo3t"),
    *((k, t) for k in ("f16", "q8_0") for t in PACKED),
    ("q8_0", "q8_0"),
]
WIDE = [(512, 512), (576, 512)]  # whose channels the warps of a block divide; on RDNA3 those of 256, too
SIZES = [(64, 64), (128, 128), (256, 256), *WIDE]
each_size = pytest.mark.parametrize("size", [(128, 128), (512, 512)], ids=str)
each_gpu = pytest.mark.parametrize("device", [CUDA, GFX11, GFX12, GFX942], ids=lambda d: d.name)
# What RDNA3 has otherwise than RDNA4 are fragments: test_lanes_wmma.py has them for all types.
each_maker = pytest.mark.parametrize("device", [CUDA, GFX12, GFX942], ids=lambda d: d.name)


@dataclass
class MmaCase(Case):
    """As ``Case``; a block has 8 or 16 columns."""

    n_cols: int = 8

    def library(self, device: Device) -> Library:
        types = (f"LANES_K=GGML_TYPE_{tables.enum_of(self.type_k)}", f"LANES_V=GGML_TYPE_{tables.enum_of(self.type_v)}")
        sizes = (f"LANES_DK={self.head_size[0]}", f"LANES_DV={self.head_size[1]}", f"LANES_COLS={self.n_cols}")
        return load("attn.cpp", device, "LANES_MMA=1", *types, *sizes, *(("LANES_SECOND=1",) if self.n_exact else ()))


def check(case: MmaCase, device: Device) -> None:
    assert nmse(case, device) < (NMSE_F16 if case.type_k == "f16" else NMSE_INT8)


@each_maker
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pairs(pair: tuple[str, str], device: Device) -> None:
    check(MmaCase(*pair), device)


@each_maker
@pytest.mark.parametrize("kind", [k for k in PACKED if k != "turbo3"])
def test_wide_heads(kind: str, device: Device) -> None:
    check(MmaCase(kind, kind, (512, 512), n_kv=100), device)


@each_gpu
@pytest.mark.parametrize("head_size", SIZES, ids=str)
@pytest.mark.parametrize("pair", [("turbo3", "turbo3"), ("turbo2", "turbo4t"), ("turbo3t", "turbo2t"), ("f16", "turbo4")], ids="-".join)
def test_head_sizes(pair: tuple[str, str], head_size: tuple[int, int], device: Device) -> None:
    check(MmaCase(*pair, head_size, n_kv=200, n_cols=16, gqa_ratio=12), device)


OPTIONS = {
    "sequences and sinks": MmaCase(n_q=3, gqa_ratio=3, n_kv=300, n_seq=2, n_split=3, sinks=True, n_cols=16),
    "soft cap": MmaCase(gqa_ratio=8, n_kv=999, softcap=10.0),
    "alibi": MmaCase(n_q=2, gqa_ratio=1, n_head_kv=6, n_kv=256, max_bias=8.0),
    "no mask": MmaCase(n_q=1, gqa_ratio=1, mask=False, n_split=1),
    "16 queries": MmaCase(n_q=16, gqa_ratio=3, n_kv=1024, n_cols=16, n_split=4),
    "5 keys": MmaCase(n_kv=5, n_split=1),
    "8-byte copies": MmaCase(n_kv=256),
    "rows off the grid": MmaCase(n_kv=256, aligned=False),
}


@each_gpu
@pytest.mark.parametrize("case", OPTIONS.values(), ids=OPTIONS)
def test_options(case: MmaCase, device: Device) -> None:
    check(case, device)


@each_maker
@pytest.mark.parametrize("name", ["sequences and sinks", "soft cap", "alibi", "no mask", "5 keys", "rows off the grid"])
def test_options_with_wide_heads(name: str, device: Device) -> None:
    """At least 8 rows: the error of the int8 query in fewer is a matter of luck."""
    case = OPTIONS[name]
    heads = max(case.n_head_kv, 8 // (case.n_q * case.gqa_ratio))
    check(replace(case, head_size=(512, 512), n_head_kv=heads, n_kv=min(case.n_kv, 150)), device)


SEGMENTS = [
    MmaCase(n_exact=70),
    MmaCase(n_exact=70, hidden=(0, 99)),
    MmaCase(n_exact=70, hidden=(99, 0)),
    MmaCase("turbo3t", "turbo3t", n_q=4, n_seq=2, n_exact=300, hidden=(1, 1), n_cols=16),
    MmaCase("f16", "f16", n_exact=128, softcap=10.0, n_split=3),
    MmaCase(head_size=(512, 512), n_exact=70, hidden=(1, 1)),
]


@each_gpu
@pytest.mark.parametrize("case", SEGMENTS, ids=["turbo3", "first hidden", "second hidden", "trellis, half hidden", "f16, soft cap", "wide"])
def test_a_second_segment(case: MmaCase, device: Device) -> None:
    check(case, device)


@each_gpu
@pytest.mark.parametrize("kind", ["turbo3", "turbo3t", "f16"])
def test_a_wrong_k_is_seen(kind: str, device: Device) -> None:
    assert nmse(MmaCase(kind, kind), device, broken=True) > 0.1


@each_gpu
@each_size
@pytest.mark.parametrize("kind", ["turbo3", "f16"])
@pytest.mark.parametrize("rise", [12, 60], ids=lambda n: f"by e^{n}")
def test_maxima_that_move(kind: str, rise: int, size: tuple[int, int], device: Device) -> None:
    """Each tile has larger scores than those before. By e^12 the sums of an earlier tile still count. By e^60 f16 does not hold
    what follows from the first maximum."""
    case = MmaCase(kind, "turbo3", size, n_q=2, n_head_kv=1, n_kv=256, n_split=1)
    rng = np.random.default_rng(5)
    n = size[0]
    signs = rng.choice(np.float32([-1, 1]), n)
    q = np.broadcast_to(signs, (1, case.n_q, case.gqa_ratio, n)) * rng.uniform(1, 2, (1, case.n_q, case.gqa_ratio, 1))
    q = q.astype(np.float32)  # of one magnitude in a head, so int8 has all of it
    keys = Keys.random(case, rng, case.n_kv, (kind, "turbo3"))
    keys.mask[:] = 0
    k = np.linspace(0, rise / np.sqrt(n), case.n_kv)[None, :, None, None] * signs + 0.1 * rng.standard_normal((1, case.n_kv, 1, n))
    packed, k = pack(kind, k.astype(np.float32))
    keys.packed[0][...] = packed
    want = expected(case, q, (k, keys.values[1]), keys.mask.astype(np.float32), np.zeros(case.gqa_ratio, np.float32))
    got = attend(case, device, q, keys)
    assert ((got - want) ** 2).sum() / (want**2).sum() < NMSE_F16


#
# the same result in every batch
#


def attend(case: MmaCase, device: Device, q: Floats, keys: Keys, n_kv: int | None = None) -> Floats:
    """Results [seq, q, head, DV] of the first queries of ``q``, over the first ``n_kv`` keys."""
    (_, n_q, n_head, _), dv = q.shape, case.head_size[1]
    out = np.full((case.n_seq, n_q, n_head, dv), np.nan, np.float32)
    args = keys.arguments(replace(case, n_q=n_q), q, None, out, True)
    args.n_kv = n_kv or args.n_kv
    case.library(device).call("lanes_decode", ctypes.byref(args), None, case.n_seq, case.n_split)
    return out


def batch(case: MmaCase) -> tuple[Floats, Keys]:
    """Queries whose scores differ in size, so that maxima move at different keys."""
    rng = np.random.default_rng(3)
    shape = (1, case.n_q, case.n_head_kv * case.gqa_ratio, case.head_size[0])
    q = rng.standard_normal(shape, np.float32) * np.exp(rng.uniform(-1, 2, (1, case.n_q, 1, 1))).astype(np.float32)
    return q, Keys.random(case, rng, case.n_kv, (case.type_k, case.type_v))


def check_widths(case: MmaCase, device: Device, widths: Sequence[int]) -> None:
    q, keys = batch(case)
    want = attend(case, device, q, keys)
    for width in widths:
        for n_cols in (8, 16):
            got = attend(replace(case, n_cols=n_cols), device, np.ascontiguousarray(q[:, :width]), keys)
            assert np.array_equal(got, want[:, :width]), (width, n_cols)


@each_maker
@pytest.mark.parametrize("kind", [*PACKED, "q8_0", "f16"])
def test_widths_of_a_batch(kind: str, device: Device) -> None:
    """A token's result is the same, bit for bit, with 0 to 15 others beside it, in blocks of 8 and of 16 columns."""
    check_widths(MmaCase(kind, kind, n_q=16, n_head_kv=1, gqa_ratio=4, n_kv=200, n_cols=16), device, (1, 2, 3, 5, 8, 11, 16))


@each_maker
@pytest.mark.parametrize("size", WIDE, ids=str)
@pytest.mark.parametrize("kind", ["turbo3", "f16"])
def test_widths_of_a_batch_with_wide_heads(kind: str, size: tuple[int, int], device: Device) -> None:
    check_widths(MmaCase(kind, kind, size, n_q=16, n_head_kv=1, gqa_ratio=4, n_kv=200, n_cols=16), device, (1, 3, 16))


@each_gpu
@pytest.mark.parametrize("gqa_ratio", [1, 3, 5, 7, 12, 16])
def test_widths_of_a_batch_with_groups_of_heads(gqa_ratio: int, device: Device) -> None:
    """Columns of a query begin anywhere in a block, and may be in two."""
    check_widths(MmaCase("turbo3", "turbo3t", n_q=16, n_head_kv=1, gqa_ratio=gqa_ratio, n_kv=200, n_cols=16), device, (1, 2, 3, 5, 16))


@each_gpu
@each_size
def test_hidden_keys_do_not_count(size: tuple[int, int], device: Device) -> None:
    """A longer cache whose new keys a query does not see changes none of its bits, with splits for each tile and with few."""
    case = MmaCase(head_size=size, n_q=2, n_kv=512)
    q, keys = batch(case)
    keys.mask[:, :, 256:] = -np.inf
    one_each = (8, 16) if size in WIDE else (2, 4)  # tiles for all warps of a block, or for each
    for few, many in (one_each, (1, 1)):
        short = attend(replace(case, n_split=few), device, q, keys, 256)
        assert np.array_equal(short, attend(replace(case, n_split=many), device, q, keys)), (few, many)


@each_gpu
@each_size
def test_what_is_not_a_number_shows(size: tuple[int, int], device: Device) -> None:
    case = MmaCase(head_size=size, mask=False, n_split=1)
    q, keys = batch(case)
    q[0, 0, 3, 5] = np.nan
    out = attend(case, device, q, keys)
    bad = np.isnan(out).all(-1)
    assert bad[0, 0, 3]
    assert bad.sum() == 1


@each_maker
@pytest.mark.parametrize("side", [0, 1], ids=["k", "v"])
@pytest.mark.parametrize("kind", [*NAN_SCALE])
def test_nan_in_the_cache_is_in_the_result(kind: str, side: int, device: Device) -> None:
    case = MmaCase(kind if side == 0 else "turbo3", kind if side else "turbo3")
    q, keys = batch(case)
    keys.mask[:] = 0
    keys.packed[side][0, 100, 0, slice(*NAN_SCALE[kind])] = 255
    out = attend(case, device, q, keys)
    assert np.isnan(out[:, :, : case.gqa_ratio]).any(axis=-1).all(), "heads without NaN"
    assert np.isfinite(out[:, :, case.gqa_ratio :]).all()


@each_maker
@pytest.mark.parametrize("kind", [*NAN_SCALE])
@pytest.mark.parametrize("n_q", [1, 4])
def test_nan_in_a_key_that_is_masked_is_not_seen(kind: str, n_q: int, device: Device) -> None:
    case = MmaCase(kind, "turbo3", n_q=n_q)
    q, keys = batch(case)
    keys.mask[:] = 0
    keys.mask[..., 100] = -np.inf
    want = attend(case, device, q, keys)
    keys.packed[0][0, 100, 0, slice(*NAN_SCALE[kind])] = 255
    assert np.array_equal(attend(case, device, q, keys), want)
