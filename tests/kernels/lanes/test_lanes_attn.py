"""Decode attention of the GPU backend, run lane by lane on the CPU, against numpy."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from lanes_tools import CUDA, HIP32, HIP64, Device, Library, each_device, load

from turbo_gguf.codec import oracle, scalar, tables

Floats = npt.NDArray[np.float32]

SCALAR = {t.name: t for t in tables.SCALAR}
TRELLIS = {t.name: t for t in tables.TRELLIS}
PLAIN = (*SCALAR, "q8_0", "f16")
PAIRS = [(k, v) for k in PLAIN for v in PLAIN if k in SCALAR or v in SCALAR]
TRELLIS_PAIRS = [*((t, t) for t in TRELLIS), ("turbo4t", "turbo3t"), ("turbo3t", "turbo4t"), ("f16", "turbo4t"), ("turbo2t", "f16")]
HEAD_SIZES = tables.HEAD_SIZES

# The int8 query has a step of 1/127 of its largest value: measured 5e-5 to 1.2e-4 of the result; with K in f16 3e-7 to 8e-7.
NMSE_INT8, NMSE_F16 = 2e-4, 2e-6

NOTHING = np.float32(-1e30)
"""A maximum below all scores, for queries that see no key."""


class CArgs(ctypes.Structure):
    """``turbo_attn_args``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("Q", "K", "V", "mask", "sinks", "dst", "meta")),
        *((name, ctypes.c_int) for name in ("n_q", "n_head", "gqa_ratio", "n_kv", "n_mask_seq", "part0", "n_parts")),
        *((name, ctypes.c_int) for name in ("nbq1", "nbq2", "nbk1", "nbk2", "nbv1", "nbv2", "nbm1")),
        *((name, ctypes.c_int64) for name in ("nbq3", "nbk3", "nbv3", "nbm3")),
        *((name, ctypes.c_float) for name in ("scale", "softcap", "max_bias", "m0", "m1")),
        ("n_head_log2", ctypes.c_uint32),
        ("aligned", ctypes.c_bool),
    ]


@dataclass
class Case:
    """Shapes and options of one attention op; Q [seq, q, head, DK], K and V [seq, key, kv head, D], mask [seq, q, key].

    ``n_exact`` more keys are a second segment, in f16. ``hidden``: the first query that sees nothing of the first segment, and that of the
    second; every other query after it is like it.
    """

    type_k: str = "turbo3"
    type_v: str = "turbo3"
    head_size: tuple[int, int] = (128, 128)
    n_cols: int = 4
    n_q: int = 1
    n_head_kv: int = 2
    gqa_ratio: int = 4
    n_kv: int = 150
    n_seq: int = 1
    n_split: int = 2
    softcap: float = 0.0
    max_bias: float = 0.0
    mask: bool = True
    sinks: bool = False
    aligned: bool = True
    n_exact: int = 0
    hidden: tuple[int, int] = (99, 99)

    def library(self, device: Device) -> Library:
        dk, dv = self.head_size
        types = (f"LANES_K=GGML_TYPE_{tables.enum_of(self.type_k)}", f"LANES_V=GGML_TYPE_{tables.enum_of(self.type_v)}")
        more = ("LANES_SECOND=1",) if self.n_exact else ()
        return load("attn.cpp", device, f"LANES_DK={dk}", f"LANES_DV={dv}", *types, f"LANES_COLS={self.n_cols}", *more)


def pack(kind: str, x: Floats) -> tuple[npt.NDArray[np.uint8], Floats]:
    """Rows as a cache stores them, and what they unpack to."""
    if kind == "f16":
        half = x.astype(np.float16)
        return half.view(np.uint8), half.astype(np.float32)
    if kind == "q8_0":
        blocks = x.reshape(*x.shape[:-1], -1, 32)
        d = (np.abs(blocks).max(-1, keepdims=True) / 127).astype(np.float16)
        q = np.rint(blocks / d.astype(np.float32)).astype(np.int8)
        packed = np.concatenate([d.view(np.uint8), q.view(np.uint8)], -1).reshape(*x.shape[:-1], -1)
        return packed, (q * d.astype(np.float32)).reshape(x.shape)
    if kind in TRELLIS:
        packed = oracle.load().quantize_trellis(TRELLIS[kind], x)
        return packed, oracle.load().dequantize(TRELLIS[kind], packed)
    packed = scalar.quantize(SCALAR[kind], x.reshape(-1, x.shape[-1]))
    return packed.reshape(*x.shape[:-1], -1), scalar.dequantize(SCALAR[kind], packed).reshape(x.shape)


def at_16(x: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """A copy whose address is a multiple of 16, as device memory is."""
    memory = np.empty(x.nbytes + 16, np.uint8)
    start = -memory.ctypes.data % 16
    out = memory[start : start + x.nbytes].reshape(x.shape)
    out[...] = x
    return out


def slopes(case: Case, n_head: int) -> tuple[int, float, float, Floats]:
    """ALiBi: n_head_log2, m0, m1 and the slope of each head."""
    n_log2 = 2 ** int(np.log2(n_head))
    m0, m1 = 2 ** (-case.max_bias / n_log2), 2 ** (-case.max_bias / 2 / n_log2)
    each = [m0 ** (h + 1) if h < n_log2 else m1 ** (2 * (h - n_log2) + 1) for h in range(n_head)]
    return n_log2, m0, m1, np.array(each, np.float32)


def expected(case: Case, q: Floats, kv: tuple[Floats, Floats], mask: Floats, sinks: Floats) -> Floats:
    n_head, (k, v) = q.shape[2], kv
    scores = np.einsum("sqhd,skhd->sqhk", q, np.repeat(k, case.gqa_ratio, 2)) / np.sqrt(q.shape[-1])
    if case.softcap:
        scores = case.softcap * np.tanh(scores / case.softcap)
    if case.mask:
        scores = scores + slopes(case, n_head)[3][None, None, :, None] * mask[:, :, None, :]
    sink = np.broadcast_to(sinks[None, None, :, None], (*scores.shape[:3], 1))
    top = np.maximum(scores.max(-1, keepdims=True), sink if case.sinks else NOTHING)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True) + (np.exp(sink - top) if case.sinks else 0)
    return np.einsum("sqhk,skhd->sqhd", weights / np.maximum(total, 1e-30), np.repeat(v, case.gqa_ratio, 2))


@dataclass
class Keys:
    """A segment of keys: rows as they are stored and what they unpack to, and the mask."""

    packed: tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]
    values: tuple[Floats, Floats]
    mask: npt.NDArray[np.float16]

    @classmethod
    def random(cls, case: Case, rng: np.random.Generator, n: int, types: tuple[str, str], in_one_run: bool = False) -> Keys:
        """Three tenths of the keys are masked, here and there or in one run."""
        shapes = [(case.n_seq, n, case.n_head_kv, size) for size in case.head_size]
        sides = [pack(kind, rng.standard_normal(shape, np.float32)) for kind, shape in zip(types, shapes, strict=True)]
        hidden = rng.random((case.n_seq, case.n_q, n)) < 0.3
        if in_one_run:
            hidden[:] = np.abs(np.arange(n) / n - 0.6) < 0.15
        mask = np.where(hidden, -np.inf, rng.random(hidden.shape))
        return cls((at_16(sides[0][0]), at_16(sides[1][0])), (sides[0][1], sides[1][1]), mask.astype(np.float16))

    def arguments(self, case: Case, q: Floats, sinks: Floats | None, out: Floats, aligned: bool) -> CArgs:
        (k, v), n_head = self.packed, q.shape[2]
        n_log2, m0, m1, _ = slopes(case, n_head)
        return CArgs(
            *(x.ctypes.data for x in (q, k, v)),
            self.mask.ctypes.data if case.mask else None,
            sinks.ctypes.data if sinks is not None else None,
            *(out.ctypes.data, None),
            *(case.n_q, n_head, case.gqa_ratio, self.mask.shape[2], case.n_seq),
            *(0, 1),
            *(q.strides[1], q.strides[2], k.strides[1], k.strides[2], v.strides[1], v.strides[2]),
            self.mask.strides[1],
            *(q.strides[0], k.strides[0], v.strides[0], self.mask.strides[0]),
            *(q.shape[-1] ** -0.5 / (case.softcap or 1), case.softcap, case.max_bias, m0, m1, n_log2),
            aligned,
        )


def nmse(case: Case, device: Device, *, broken: bool = False, merging: bool = False) -> float:
    """Run the kernel; mean squared error relative to the mean square. ``broken`` negates K, as a negative control. ``merging``: the second
    segment is attended by the kernel that merges.

    It runs with both orders of threads: a missing barrier would make a difference.
    """
    rng = np.random.default_rng(1)
    (dk, dv), n_head = case.head_size, case.n_head_kv * case.gqa_ratio
    q = 2 * rng.standard_normal((case.n_seq, case.n_q, n_head, dk), np.float32)
    segments = [Keys.random(case, rng, case.n_kv, (case.type_k, case.type_v))]
    if case.n_exact:
        segments.append(Keys.random(case, rng, case.n_exact, ("f16", "f16"), in_one_run=True))
    for segment, first_query in zip(segments, case.hidden, strict=False):
        segment.mask[:, first_query::2] = -np.inf
    sinks = 3 * rng.standard_normal(n_head, np.float32)
    out = np.full((case.n_seq, case.n_q, n_head, dv), np.nan, np.float32)

    args = [segments[0].arguments(case, q, sinks if case.sinks else None, out, case.aligned)]
    args += [segment.arguments(case, q, None, out, True) for segment in segments[1:]]
    second = ctypes.byref(args[1]) if len(args) > 1 else None
    library = case.library(device)
    results = []
    for descending in (False, True):
        library.set_descending(descending)
        function = "lanes_decode_merging" if merging else "lanes_decode"
        library.call(function, ctypes.byref(args[0]), second, case.n_seq, case.n_split)
        results.append(out.copy())
    assert np.array_equal(*results)

    k, v = (np.concatenate([segment.values[side] for segment in segments], 1) for side in (0, 1))
    mask = np.concatenate([segment.mask for segment in segments], 2).astype(np.float32)
    want = expected(case, q, (-k if broken else k, v), mask, sinks)
    return float(((out - want) ** 2).sum() / (want**2).sum())


def check(case: Case, device: Device) -> None:
    assert nmse(case, device) < (NMSE_F16 if case.type_k == "f16" else NMSE_INT8)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pairs(pair: tuple[str, str]) -> None:
    check(Case(*pair), CUDA)


@pytest.mark.parametrize("kind", ["q8_0", "f16"])
def test_pairs_beside_an_exact_segment(kind: str) -> None:
    check(Case(kind, kind), HIP32)


@pytest.mark.parametrize("pair", TRELLIS_PAIRS, ids="-".join)
@pytest.mark.parametrize("device", [CUDA, HIP64], ids=["cuda", "hip64"])
def test_pairs_of_trellis_types(pair: tuple[str, str], device: Device) -> None:
    check(Case(*pair), device)


@pytest.mark.parametrize("head_size", [size for size in HEAD_SIZES if size != (96, 96)], ids=str)
@pytest.mark.parametrize("pair", [("turbo3t", "turbo2t"), ("turbo4", "turbo4t")], ids="-".join)
def test_head_sizes_of_trellis_types(pair: tuple[str, str], head_size: tuple[int, int]) -> None:
    """Segments of one, two and three blocks, and rows that are not a whole number of words."""
    check(Case(*pair, head_size, n_kv=200), CUDA)


@pytest.mark.parametrize("head_size", HEAD_SIZES, ids=str)
@pytest.mark.parametrize("device", [CUDA, HIP32, HIP64], ids=["cuda", "hip32", "hip64"])
def test_head_sizes(head_size: tuple[int, int], device: Device) -> None:
    """What each head size changes is the way into shared memory: segments, pieces, parts of rows. HIP orders unpacked values otherwise."""
    check(Case("turbo4", "turbo2", head_size, n_kv=200), device)


@pytest.mark.parametrize("head_size", [(64, 64), (96, 96), (256, 256)], ids=str)
@pytest.mark.parametrize("pair", [("q8_0", "turbo3"), ("f16", "turbo3"), ("turbo3", "f16"), ("turbo3", "q8_0")], ids="-".join)
def test_head_sizes_of_other_types(pair: tuple[str, str], head_size: tuple[int, int]) -> None:
    check(Case(*pair, head_size), CUDA)


@pytest.mark.parametrize(
    "case",
    [
        Case(n_q=3, gqa_ratio=3, n_kv=300, n_seq=2, n_split=3, sinks=True, n_cols=8),
        Case(gqa_ratio=8, n_kv=999, n_cols=8, softcap=10.0),
        Case(n_q=2, gqa_ratio=1, n_head_kv=6, n_kv=256, max_bias=8.0),
        Case(n_q=1, gqa_ratio=1, n_cols=2, mask=False, n_split=1),
        Case(n_q=8, gqa_ratio=4, n_kv=1024, n_cols=8, n_split=4),
        Case(n_kv=5, n_split=1),
    ],
    ids=["sequences and sinks", "soft cap", "alibi", "no mask", "8 queries", "5 keys"],
)
@each_device
def test_options(case: Case, device: Device) -> None:
    check(case, device)


@pytest.mark.parametrize(
    "case",
    [
        Case(n_exact=70),
        Case(n_exact=70, hidden=(0, 99)),
        Case(n_exact=70, hidden=(99, 0)),
        Case(n_q=4, n_exact=330, hidden=(1, 0), n_cols=8, n_split=1),
        Case("turbo3t", "turbo3t", n_q=4, n_seq=2, n_exact=300, hidden=(1, 1), n_cols=8),
        Case("q8_0", "q8_0", n_q=2, gqa_ratio=1, n_head_kv=6, n_exact=256, max_bias=8.0),
        Case("f16", "f16", n_exact=128, softcap=10.0, n_split=3),
        Case("turbo2t", "turbo2t", sinks=True, n_exact=40, hidden=(0, 99)),
        Case("turbo4", "turbo3", (64, 64), n_exact=200, sinks=True),
        Case("turbo4", "turbo3", (96, 96), n_exact=200),
        Case("turbo4", "turbo3", (256, 256), n_exact=200),
    ],
    ids=[
        *("plain", "first hidden", "second hidden", "some hidden", "both hidden", "q8_0 and alibi", "f16 and soft cap", "sinks"),
        *("head size 64", "head size 96", "head size 256"),
    ],
)
@each_device
def test_two_segments(case: Case, device: Device) -> None:
    check(case, device)


def test_unaligned_rows() -> None:
    """Rows and heads that are only 2-byte aligned take the path without vectors, and give the same."""
    assert nmse(Case(n_kv=256), CUDA) == pytest.approx(nmse(Case(n_kv=256, aligned=False), CUDA))


def test_unaligned_rows_of_trellis_types() -> None:
    cases = [Case("turbo3t", "turbo4t", n_kv=256, aligned=aligned) for aligned in (True, False)]
    assert nmse(cases[0], CUDA) == pytest.approx(nmse(cases[1], CUDA))


@pytest.mark.parametrize("kind", ["turbo3", "turbo3t"])
def test_a_wrong_k_is_seen(kind: str) -> None:
    assert nmse(Case(kind, kind), CUDA, broken=True) > 0.1
