"""Attention of the CPU: every implementation, compiled by itself, against binary64.

A bound is what was measured over all cases and implementations, with its headroom.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from attn_cases import (
    INTEGER_KEYS,
    TRELLIS,
    TURBO,
    Answer,
    Case,
    Inputs,
    answer,
    attend,
    decode,
    expected,
    inputs,
    largest_error,
    nmse,
    random_rows,
    run,
)
from variants import VARIANTS, Variant, each_variant

from turbo_gguf.codec.tables import LEVEL_STEPS, QK_SCALAR, QK_TRELLIS

pytestmark = pytest.mark.native

KV = [(k, v) for k in ("turbo2", "turbo3", "turbo4", "q8_0", "q4_0", "f16") for v in ("turbo2", "turbo3", "turbo4", "q8_0", "q4_0", "f16")]
SLOW_TYPES = ("f32", "bf16", "q4_1", "q5_0", "q5_1")
CACHE_TYPES = (*TURBO, *TRELLIS, "q8_0", "q4_0", "f16", *SLOW_TYPES)

CASES = {
    **{f"{k}-{v}": Case(k, v) for k, v in KV if k in TURBO or v in TURBO},
    **{f"{t}-{t} prefill": Case(t, t, n_q=20) for t in (*TURBO, *TRELLIS)},
    **{f"{k}-{v}": Case(k, v) for t in TRELLIS for k, v in ((t, t), (t, "turbo4"), ("turbo2", t), (t, "f16"), ("q8_0", t))},
    **{f"{t}, head 64, {n_q} queries": Case(t, t, 64, 64, n_q=n_q, threads=3) for t in TRELLIS for n_q in (1, 9)},
    **{f"{t}, head 192, {n_q} queries": Case(t, t, 192, 192, n_q=n_q, threads=3) for t in TRELLIS for n_q in (1, 9)},
    **{f"{k}-turbo3": Case(k, "turbo3", 64, 64, n_q=2, n_k=130) for k in SLOW_TYPES},
    **{f"turbo3-{v}": Case("turbo3", v, 64, 64, n_q=2, n_k=130) for v in SLOW_TYPES},
    "9 queries": Case("turbo3", "turbo2", n_q=9),
    "head 32": Case("turbo4", "turbo4", 32, 32, n_q=40, threads=1),
    "head 80 of f16 K": Case("f16", "turbo3", 80, 128, n_q=40, softcap=10.0, threads=3),
    "head 96, 40 of f16 V": Case("turbo3", "f16", 96, 40, threads=3),
    "head 192": Case("turbo4", "q4_0", 192, 192, 1, 16, 3, 333),
    "head 192, 128": Case("turbo2", "turbo4", 192, 128, n_q=3, threads=3),
    "head 256, soft cap, sinks": Case("turbo3", "turbo4", 256, 256, 2, 2, 35, 250, softcap=10.0, sinks=True, threads=3),
    "head 576, 512": Case("turbo4", "turbo3", 576, 512, 1, 20, 5, 200, threads=1),
    "head 576, 512 of f16 K": Case("f16", "turbo3", 576, 512, 1, 40, 5, 150, threads=3),
    "head 1 of f16 K": Case("f16", "turbo4", 1, 32, 2, 1, 70, 200, threads=3),
    "head 1 of f16 V": Case("turbo4", "f16", 32, 1, 2, 1, 70, 200, threads=3),
    "3 heads of 3": Case("q5_0", "turbo2", 64, 64, 3, 3, 7, 100, threads=5),
    "1 head of 128": Case("turbo4", "turbo4", 64, 64, 1, 128, 5, 200, threads=3),
    "8 heads of 1": Case("turbo4", "turbo4", heads_kv=8, gqa=1, n_q=3, threads=3),
    "1 key": Case("turbo3", "turbo2", 64, 64, 2, 1, 1, 1, threads=1),
    "5 keys": Case("turbo4", "turbo4", mask="none", n_k=5, threads=1),
    "64 keys": Case("turbo4", "turbo4", mask="none", n_k=64, threads=1),
    "65 keys": Case("turbo3", "f32", 64, 64, 2, 1, 2, 65, threads=3),
    "129 keys, no mask": Case(mask="none", n_q=5, n_k=129, threads=5),
    "fewer tiles than threads": Case(n_k=40, threads=5),
    "alibi": Case("turbo3", "turbo4", 128, 128, 2, 3, 35, 300, max_bias=8.0),
    "alibi, soft cap, sinks, sequences": Case(
        "turbo3", "turbo4", 128, 128, 2, 3, 7, 300, seqs=3, max_bias=8.0, softcap=10.0, sinks=True, threads=5
    ),
    "sequences": Case("turbo4", "turbo4", 128, 128, 3, 3, 40, 300, seqs=3),
    "sequences, masks of heads": Case("turbo4", "q8_0", seqs=4, n_q=3, mask_heads=2),
    "hidden tiles and rows": Case("turbo2", "turbo3", n_q=12, mask="random", mask_heads=4, hidden=70, more_cells=9, threads=3),
    "hidden, alibi": Case("turbo2", "turbo3", n_q=3, gqa=3, mask="random", mask_heads=6, max_bias=8.0, seqs=2, hidden=1, threads=1),
    "hidden, f16 K": Case("f16", "turbo3", n_q=3, gqa=3, mask="random", hidden=30, more_cells=1),
    "hidden, f16 V": Case("turbo4", "f16", n_q=9, gqa=3, mask="random", hidden=30, more_cells=1),
    **{
        f"{t}, {gqa} rows": Case(t, t, 96, 96, gqa=gqa, n_k=203, mask="random", hidden=30, threads=3, setting="all")
        for t in ("f16", "bf16", "f32")
        for gqa in (1, 4, 7, 12, 13)
    },
    "f16, few rows, head 40": Case("f16", "f16", 40, 40, n_k=131, threads=1, setting="all"),
    "f16, few rows, no mask": Case("f16", "f16", gqa=2, mask="none", n_k=70, threads=1, setting="all"),
    "hidden, sinks": Case("turbo3", "turbo3", n_q=3, gqa=3, mask="random", sinks=True, threads=3),
    "hidden by the lowest number": Case("turbo3", "turbo4", n_q=3, gqa=3, mask="lowest", n_k=200, threads=3),
    "20,000 keys": Case("turbo3", "turbo4", 32, 32, 1, 2, n_k=20_000, threads=3),
    "peaked": Case("turbo4", "turbo4", n_k=1500, peak=8.0, threads=3),
    "peaked prefill": Case("turbo4", "turbo4", n_k=700, n_q=40, peak=8.0),
    "whole units": Case("turbo4", "turbo3", 64, 64, 8, 4, 17, 200, threads=1, hidden=20),
    **{f"two segments, {t}": Case(t, t, n_k=200, second=90) for t in CACHE_TYPES},
    "two segments, prefill": Case("turbo3", "turbo4", n_q=70, n_k=300, second=130, threads=3),
    "two segments, whole units": Case("turbo4t", "turbo3t", 64, 64, 8, 4, 17, 200, second=150, threads=1),
    "two segments, alibi, soft cap, sinks, sequences": Case(
        "turbo3", "turbo4", 128, 128, 2, 3, 7, 200, seqs=3, second=100, max_bias=8.0, softcap=10.0, sinks=True, threads=5
    ),
    "two segments, masks of heads": Case("q8_0", "turbo4", seqs=2, n_q=3, mask="random", mask_heads=4, second=70),
    "two segments, the first hidden": Case("turbo3t", "turbo3t", n_q=3, second=100, first_hidden=True, threads=3),
    "two segments, the second of one key": Case("turbo4", "turbo4", n_q=3, second=1, threads=3),
    "two segments, few keys": Case("turbo4", "turbo4", n_k=60, second=60),
    "two segments, head 576, 512": Case("turbo4", "turbo3", 576, 512, 1, 20, 5, 200, second=70, threads=1),
    "two segments, head 80 of f16": Case("f16", "f16", 80, 80, second=70, threads=3),
    "two segments, reference wanted": Case("q5_0", "q5_0", second=70, use_ref=True),
    "two segments, switched off": Case("turbo3", "turbo3", second=70, setting="0"),
    "several passes": Case("turbo4", "turbo3", 128, 128, 8, 4, 16, 200, threads=3),
}
each_case = pytest.mark.parametrize("name", CASES)

# NMSE and largest error. With Q as int8 in the oracle too, measured 2.8e-12 and 2.8e-6 with sums of floats ...
FLOATS = (6e-12, 6e-6)
# ... and 1.6e-7 and 2.5e-4 where weights and values are int16.
PAIRS = (3e-7, 5e-4)
# Between numbers of threads, int16 differs by what rounds otherwise: measured 1.1e-10 and 2.0e-5.
PAIRS_APART = (3e-10, 5e-5)
# What int8 costs: measured 5.8e-5, and 5.9e-4 for scores with a standard deviation of 8.
INT8, INT8_PEAKED = 1e-4, 1e-3

ROWS_OF_UNIT = 64


def check_close(out: np.ndarray, want: np.ndarray, bounds: tuple[float, float]) -> None:
    relative, largest = nmse(out, want), largest_error(out, want)
    assert relative < bounds[0]
    assert largest < bounds[1]


def bounds_of(variant: Variant, case: Case) -> tuple[float, float]:
    units = -(-case.rows // ROWS_OF_UNIT)
    pairs = variant.pairs_above is not None and -(-case.rows // units) > variant.pairs_above
    return PAIRS if pairs else FLOATS


def check_ours(a: Answer, case: Case) -> None:
    """The op was taken by every thread, nothing was allocated, and nothing outside of the buffers was written."""
    assert (a.taken, a.allocations, a.intact) == (case.threads, 0, True)


@each_variant
def test_the_expected_implementation_is_active(variant: Variant) -> None:
    assert run(variant, Case(), None).isa == variant.isa


@each_variant
@each_case
def test_result(variant: Variant, name: str) -> None:
    case = CASES[name]
    a = answer(variant, case)
    check_ours(a, case)
    check_close(a.out, expected(case, int8=True), bounds_of(variant, case))
    if case.k in INTEGER_KEYS:
        cost_of_int8 = nmse(a.out, expected(case, int8=False))
        assert cost_of_int8 < (INT8 if case.peak == 1 else INT8_PEAKED)


#
# what integers decide is exact
#


@each_variant
@pytest.mark.parametrize("kind", [*TURBO, *TRELLIS, "q8_0", "q4_0", "f16"])
def test_decoded_values_are_those_of_the_reference(variant: Variant, kind: str) -> None:
    """A query that sees one key returns its value: all levels, scales of any size."""
    case = Case("turbo3", kind, 32, 256, heads_kv=16, gqa=1, n_q=4, n_k=4, seqs=3)
    x = inputs(case)
    own_key = np.where(np.eye(4), 0, -np.inf).astype(np.float16)
    x = replace(x, mask=np.tile(own_key, (3, 1, 1, 1)), v_bytes=x.v_bytes.copy())
    if kind in TRELLIS:
        blocks = x.v_bytes.reshape(3, 4, 16, 256 // QK_TRELLIS, -1)
        blocks[..., 0] = np.random.default_rng(2).choice([0x00, 0x03, 0x08, 0x48, 0x78, 0xB4, 0xF7], blocks.shape[:-1])
    elif kind != "f16":
        blocks = x.v_bytes.reshape(3, 4, 16, 256 // QK_SCALAR, -1)
        blocks[..., 1] = np.random.default_rng(2).choice([0x00, 0x80, 0x03, 0x24, 0x3C, 0xBC, 0x5A, 0x7B, 0xFB], blocks.shape[:-1])
    a = run(variant, case, x)
    check_ours(a, case)
    assert np.array_equal(a.out, decode(kind, x.v_bytes))


@each_variant
@pytest.mark.parametrize("kind", INTEGER_KEYS)
def test_dot_products_are_those_of_integers(variant: Variant, kind: str) -> None:
    """Values that are a unit matrix show the weights, and their logarithms the dot products: to the last unit, the largest too."""
    rng = np.random.default_rng(3)
    width, unit = (QK_TRELLIS, 1 / LEVEL_STEPS) if kind in TRELLIS else (QK_SCALAR, 1)
    case = Case(kind, "f32", width, 64, heads_kv=8, gqa=1, n_k=64, mask="none", threads=1, setting="all")
    q = rng.integers(-127, 128, (1, 1, 8, width))
    q[..., ::QK_SCALAR] = 127  # so that the scale of Q is one
    q[:, :, :2] = np.array([[1], [-1]]) * 127
    k = random_rows(kind, rng, (1, 64, 8, width)).reshape(1, 64, 8, -1)
    k[:, 0, :, 2:], k[:, 1, :, 2:] = (0x7F, 0x80) if kind == "q8_0" else (0x00, 0xFF)  # the smallest and largest levels
    if kind in TRELLIS:
        k[..., 0] = np.array(1.0, np.float16).view(np.uint16) >> 7
        k[:, :2, :, 1] = 0xFF
    else:
        k[..., :2] = np.array([1.0], np.float16).view(np.uint8)
    levels = decode(kind, k)
    exact = np.einsum("hd,khd->hk", q[0, 0].astype(np.int64), (levels[0] / unit).astype(np.int64))
    case = replace(case, scale=float(np.float32(11 / unit / np.ptp(exact, axis=1).max())))  # no weight is small enough to be left out
    eye = np.repeat(np.eye(64, dtype=np.float32)[None, :, None], 8, 2)
    a = run(variant, case, Inputs(q.astype(np.float32), k, levels, eye.view(np.uint8), eye, None, None))
    check_ours(a, case)
    found = np.log(a.out[0, 0].astype(np.float64)) / case.scale / unit
    found += (exact - found)[:, :1]
    assert np.array_equal(np.rint(found), exact)


#
# threads and memory
#

THREADS = (1, 2, 3, 5)
# Work is split by units as long as there are four for each thread and they have more than 32 rows, else by keys.
SPLITS = {
    "by keys": (Case("turbo3", "turbo4", n_k=700), ()),
    "by keys, prefill": (Case("turbo2", "turbo3", n_q=9, n_k=700, softcap=10.0, sinks=True), ()),
    "by keys, several passes": (Case("turbo4", "turbo3", heads_kv=8, n_q=16, n_k=200, mask="random"), (1, 2)),
    "by units": (Case("turbo4", "turbo2", 64, 64, 8, 4, 17, 200, hidden=20), (1, 2, 3)),
}


@each_variant
@pytest.mark.parametrize("name", SPLITS)
def test_threads_agree(variant: Variant, name: str) -> None:
    case, same_bits = SPLITS[name]
    answers = {n: answer(variant, replace(case, threads=n)) for n in THREADS}
    bounds = bounds_of(variant, case)
    for n, a in answers.items():
        check_ours(a, replace(case, threads=n))
        check_close(a.out, expected(case, int8=True), bounds)
        check_close(a.out, answers[1].out, PAIRS_APART if bounds is PAIRS else bounds)
    for n in same_bits:
        assert np.array_equal(answers[n].out, answers[1].out)
    again = replace(case, threads=THREADS[-1])
    assert np.array_equal(run(variant, again, inputs(again)).out, answers[THREADS[-1]].out)


@each_variant
def test_memory_does_not_grow_with_keys(variant: Variant) -> None:
    """That nothing else is used is part of each test: no allocation, no byte around the work buffer."""

    def planned(n_k: int, threads: int = 1) -> int:
        return run(variant, Case(n_k=n_k, threads=threads), None).work_size

    assert planned(1) == planned(64) == planned(65) == planned(10_000_000) <= 164_000
    assert [planned(4096, n) for n in THREADS] == [n * planned(4096) for n in THREADS]


#
# keys that are left out
#


@each_variant
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("n_k", "below"), [(128, True), (4096, True), (128, False)], ids=["below", "below, many", "above"])
def test_values_without_weight_are_left_out(variant: Variant, below: bool, n_k: int, threads: int) -> None:
    """The worst case: all keys but the first are just below the limit, and their values point the other way.

    A thread that does not see the first key does not know that the others don't matter. (Of 4,096 keys just above the limit, a sum of
    floats loses as much by itself.)
    """
    limit = 2.0**-13
    case = Case("f32", "turbo4", 1, QK_SCALAR, 1, 1, n_k=n_k, mask="none", scale=1.0, threads=threads)
    k = np.full((1, n_k, 1, 1), np.log(limit / n_k * (0.99 if below else 1.01)), np.float32)
    k[:, 0] = 0
    t = TURBO["turbo4"]
    v_bytes = np.full((1, n_k, 1, t.block_bytes), 0xFF, np.uint8)
    v_bytes[:, 0] = 0
    v_bytes[..., :2] = np.array([1.0], np.float16).view(np.uint8)
    x = Inputs(np.ones((1, 1, 1, 1), np.float32), k.view(np.uint8), k, v_bytes, decode("turbo4", v_bytes), None, None)
    a = run(variant, case, x)
    check_ours(a, case)
    changes = np.abs(a.out - attend(case, x, int8=True)) / max(t.codebook) / limit
    assert changes.max() <= 1
    if threads == 1 and below:
        assert changes.min() > 0.98 * (n_k - 1) / n_k
    elif not below:
        assert changes.max() < 0.05


#
# controls
#

CONTROL = Case("turbo3", "turbo4", n_q=2, gqa=2, seqs=2, max_bias=8.0, softcap=10.0, sinks=True)


def flipped(values: np.ndarray) -> np.ndarray:
    """A copy with the sign of one block of one key turned."""
    copy = values.copy()
    copy[0, 50, 1, :QK_SCALAR] *= -1
    return copy


WRONG = {
    "scale": lambda case, x: (replace(case, scale=1.01 * case.dk**-0.5), x),
    "no soft cap": lambda case, x: (replace(case, softcap=0.0), x),
    "alibi": lambda case, x: (replace(case, max_bias=8.1), x),
    "no sinks": lambda case, x: (case, replace(x, sinks=None)),
    "sign of a block of K": lambda case, x: (case, replace(x, k=flipped(x.k))),
    "sign of a block of V": lambda case, x: (case, replace(x, v=flipped(x.v))),
    "one key hidden": lambda case, x: (case, replace(x, mask=np.where(np.arange(case.n_k) == 200, -np.inf, x.mask).astype(np.float16))),
}


@each_variant
@pytest.mark.parametrize("n_q", [2, 20])
@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_beyond_the_bound(variant: Variant, what: str, n_q: int) -> None:
    case = replace(CONTROL, n_q=n_q)
    a = answer(variant, case)
    bounds = bounds_of(variant, case)
    check_close(a.out, expected(case, int8=True), bounds)
    wrong_case, wrong_inputs = WRONG[what](case, inputs(case))
    wrong = nmse(a.out, attend(wrong_case, wrong_inputs, int8=True))
    assert wrong > 10 * bounds[0]


@pytest.mark.parametrize(
    ("case", "ours"),
    [
        (Case("f16", "f16"), False),
        (Case("f16", "f16", setting="all"), True),
        (Case("q8_0", "q8_0", setting="all"), True),
        (Case(setting="0"), False),
        (Case(use_ref=True), False),
        (Case("turbo3", "f16", 32, 4096, 1, 1, n_k=70), True),
        (Case("turbo3", "f16", 32, 4128, 1, 1, n_k=70), False),
    ],
    ids=["f16", "f16, all", "q8_0, all", "never", "reference", "head 4096", "head 4128"],
)
def test_what_is_left_to_upstream(case: Case, ours: bool) -> None:
    a = answer(VARIANTS[0], case)
    assert a.taken == (case.threads if ours else 0)
    error = nmse(a.out, expected(case, int8=False))
    assert error < INT8
