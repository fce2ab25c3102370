"""Which kernels the GPU backend takes for an attention op, and into how many splits it cuts the keys. Kernels are counted, not run."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace

import pytest
from lanes_tools import CUDA, HIP32, HIP64, Device, load

from turbo_gguf.codec import tables

TURING, AMPERE = 750, 800  # the last without decode by matrix instructions, and the first with it
RDNA2, RDNA3, RDNA4, CDNA2, CDNA3 = (0x1000000 + arch for arch in (0x1030, 0x1100, 0x1201, 0x90A, 0x942))
FLOAT_TYPES = {"f16": 1, "q8_0": 8}
TYPE_IDS = {**FLOAT_TYPES, **{t.name: t.type_id for t in tables.ALL}}


class Calls(ctypes.Structure):
    """``Calls`` of attn_host.cpp."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("decode", "decode_mma", "decode_wide", "grid", "split", "merge", "merge_exact"),
            *("unpack", "upstream", "mma", "tile", "copy"),
        )
    ]


@dataclass(frozen=True)
class Op:
    """An attention op of one sequence, and the device that it runs on."""

    cc: int = 900
    nsm: int = 132
    n_active: int = 2
    n_registers: int = 168
    n_shared: int = 26368
    n_cache: int = 0
    mma: bool = True
    type_k: str = "turbo3"
    type_v: str = "turbo3"
    head_size: tuple[int, int] = (128, 128)
    n_q: int = 1
    n_head_kv: int = 8
    gqa_ratio: int = 4
    n_kv: int = 65536
    n_exact: int = 0
    row_gap: int = 0  # bytes between rows of K


def attend(op: Op, device: Device = CUDA) -> Calls:
    calls = Calls()
    load("attn_host.cpp", device).call(
        "lanes_attend",
        *(op.cc, op.nsm, op.n_active, op.n_registers, op.n_shared, op.n_cache, op.mma),
        *(TYPE_IDS[op.type_k], TYPE_IDS[op.type_v], *op.head_size),
        *(op.n_q, op.n_head_kv, op.gqa_ratio, op.n_kv, op.n_exact, op.row_gap, ctypes.byref(calls)),
    )
    return calls


def decodes(op: Op) -> bool:
    calls = attend(op)
    slices = calls.upstream + calls.mma + calls.tile
    assert (calls.decode > 0) != (slices > 0)
    return calls.decode > 0


def test_decode_by_matrix_instructions_never_makes_way_for_slices() -> None:
    """Below 17 queries, so that a draft is attended as single tokens are."""
    for cc in (AMPERE, 900, 1200):
        for n_q in (1, 5, 16):
            calls = attend(Op(cc=cc, gqa_ratio=16, n_q=n_q))
            assert (calls.decode, calls.decode_mma, calls.mma) == (1, 1, 0)
    assert not decodes(Op(n_q=17))
    assert attend(Op(cc=TURING)).decode_mma == 0


@pytest.mark.parametrize(
    ("cc", "gqa_ratio", "n_q", "expected"),
    [
        *((cc, gqa_ratio, n_q, True) for cc in (RDNA4, CDNA3) for gqa_ratio in (1, 4) for n_q in (1, 16)),
        *((RDNA3, 4, n_q, n_q > 2) for n_q in (1, 2, 3, 16)),
        *((RDNA3, 12, n_q, True) for n_q in (1, 16)),
        *((cc, 16, 1, False) for cc in (RDNA2, CDNA2)),
    ],
)
def test_amd_decodes_by_matrix_instructions_where_they_take_fewer_cycles(cc: int, gqa_ratio: int, n_q: int, expected: bool) -> None:
    calls = attend(Op(cc=cc, gqa_ratio=gqa_ratio, n_q=n_q), HIP32)
    assert (calls.decode, calls.decode_mma) == (1, expected)


def decodes_wide(op: Op, device: Device = CUDA) -> bool:
    calls = attend(op, device)
    assert (calls.decode_mma, calls.mma) == (0, 0)
    return bool(calls.decode_wide)


@pytest.mark.parametrize("size", [(512, 512), (576, 512)], ids=str)
def test_wide_heads_have_kernels_of_their_own(size: tuple[int, int]) -> None:
    for cc in (AMPERE, 900, 1200):
        for n_q in (1, 5, 16):
            assert decodes_wide(Op(cc=cc, head_size=size, n_q=n_q))
    for cc in (RDNA4, CDNA3):
        assert decodes_wide(Op(cc=cc, head_size=size), HIP32)
    assert [decodes_wide(Op(cc=RDNA3, head_size=size, n_q=n_q), HIP32) for n_q in (2, 3)] == [False, True]
    assert not decodes_wide(Op(cc=TURING, head_size=size))
    assert not decodes_wide(Op(cc=RDNA2, head_size=size, gqa_ratio=16), HIP32)


def test_heads_of_256_are_wide_on_rdna3_only() -> None:
    """Whose registers have the sums of 128 channels."""
    large = Op(gqa_ratio=16, head_size=(256, 256))
    assert decodes_wide(replace(large, cc=RDNA3), HIP32)
    for cc in (RDNA4, CDNA3):
        calls = attend(replace(large, cc=cc), HIP32)
        assert (calls.decode_mma, calls.decode_wide) == (1, 0)
    for kinds, wide in ((("q8_0", "turbo3"), False), (("q8_0", "q8_0"), False)):
        assert decodes_wide(replace(large, cc=RDNA4, type_k=kinds[0], type_v=kinds[1]), HIP32) == wide


@pytest.mark.parametrize(
    ("pair", "size", "expected"),
    [
        (("turbo4", "turbo3"), (512, 512), True),
        (("turbo4", "turbo3"), (576, 512), False),  # one cache for both sides
        (("f16", "f16"), (576, 512), True),
        (("q8_0", "turbo3"), (512, 512), True),
        (("q8_0", "q8_0"), (512, 512), False),  # too much shared memory
    ],
)
def test_pairs_of_wide_heads(pair: tuple[str, str], size: tuple[int, int], expected: bool) -> None:
    assert decodes_wide(Op(type_k=pair[0], type_v=pair[1], head_size=size, n_exact=256)) == expected


def test_keys_of_wide_heads_are_split_in_the_same_way_for_every_number_of_queries() -> None:
    assert {attend(Op(head_size=(512, 512), n_q=n_q)).split for n_q in (1, 2, 3, 16)} == {33}
    assert attend(Op(head_size=(512, 512), n_kv=640)).split == 10


def test_amd_decodes_no_more_queries_than_16() -> None:
    assert attend(Op(cc=RDNA4, n_q=17), HIP32).decode == 0


@pytest.mark.parametrize("n_q", [1, 2, 3, 16])
def test_keys_are_split_in_the_same_way_for_every_number_of_queries(n_q: int) -> None:
    assert attend(Op(n_q=n_q)).split == 33
    assert attend(Op(n_q=n_q, n_head_kv=2, gqa_ratio=1)).split == 132


def test_f16_off_its_grid_is_not_for_matrix_instructions() -> None:
    """Packed rows are copied then, f16 is only read in vectors."""
    assert [attend(Op(type_k=kind, row_gap=2)).decode_mma for kind in ("f16", "turbo3")] == [0, 1]
    assert attend(Op(type_k="f16", row_gap=16)).decode_mma == 1


def test_both_segments_have_the_same_kind_of_kernel() -> None:
    for size, n_mma in ((128, 2), (96, 0)):
        calls = attend(Op(head_size=(size, size), n_exact=256))
        assert (calls.decode, calls.decode_mma) == (2, n_mma)


@pytest.mark.parametrize("cc", [TURING, AMPERE])
@pytest.mark.parametrize("n_kv", [100, 65536])
def test_a_short_window_of_exact_tokens_takes_no_launch(cc: int, n_kv: int) -> None:
    """The rule does not look at queries, so a draft is attended as single tokens are."""
    for n_q in (1, 2, 8):
        for n_exact, launches, exact in ((96, 1, 1), (128, 1, 1), (160, 2, 0)):
            calls = attend(Op(cc=cc, n_q=n_q, n_kv=n_kv, n_exact=n_exact))
            assert (calls.decode, calls.merge_exact, calls.merge) == (launches, exact, 1 - exact)


# Splits


@pytest.mark.parametrize(
    ("op", "device", "expected"),
    [
        (Op(), CUDA, 132 * 2),
        (Op(cc=RDNA3, nsm=48), HIP32, 48 * 4),
        (Op(cc=RDNA3, nsm=48, n_registers=250), HIP32, 48 * 4),
        (Op(cc=RDNA3, nsm=48, n_shared=42464, n_active=1), HIP32, 48 * 3),
        (Op(cc=RDNA3, nsm=48, n_active=4), HIP32, 48 * 4),
        (Op(cc=RDNA4, nsm=32), HIP32, 32 * 4),
        (Op(cc=RDNA2, nsm=40, n_registers=256, n_shared=20480, n_active=3), HIP32, 40 * 4),
        (Op(cc=CDNA3, nsm=304), HIP64, 304 * 2),
    ],
    ids=["cuda", "rdna3", "rdna3, many registers", "rdna3, much memory", "rdna3, mended driver", "rdna4", "rdna2", "cdna3"],
)
def test_keys_are_split_over_all_blocks_that_run_at_once(op: Op, device: Device, expected: int) -> None:
    """RDNA's driver divides the shared memory of half a processor."""
    calls = attend(op, device)
    assert calls.grid == expected // op.n_head_kv * op.n_head_kv


def test_a_short_cache_has_no_split_without_a_tile_for_each_warp() -> None:
    assert attend(Op(n_kv=1024)).split == 8
    assert attend(Op(n_kv=100)).split == 1


def test_more_splits_than_one_are_merged() -> None:
    assert attend(Op(n_kv=100)).merge == 0
    assert attend(Op(n_kv=1024)).merge == 1
    assert attend(Op(n_kv=100, n_exact=256)).merge == 1


# The choice of kernel


@pytest.mark.parametrize(
    ("gqa_ratio", "n_q", "expected"),
    [(1, 8, True), (4, 8, True), (4, 9, False), (8, 1, True), (8, 4, True), (8, 5, False), (16, 2, True), (16, 3, False), (64, 1, True)],
)
def test_few_queries_go_where_the_cache_is_unpacked_less_often(gqa_ratio: int, n_q: int, expected: bool) -> None:
    """The decode kernel unpacks a value for every 8 columns, slices once for all."""
    assert decodes(Op(cc=TURING, gqa_ratio=gqa_ratio, n_q=n_q)) == expected


def test_large_heads_have_fewer_columns_in_a_block() -> None:
    large = Op(cc=TURING, head_size=(512, 512), gqa_ratio=4)
    assert decodes(replace(large, n_q=4))
    assert not decodes(replace(large, n_q=5))


@pytest.mark.parametrize("n_q", [5, 8])
def test_without_matrix_cores_few_queries_are_decoded(n_q: int) -> None:
    """The tile kernel reads a slice for each head of a group by itself."""
    assert decodes(Op(cc=TURING, gqa_ratio=8, n_q=n_q, mma=False))


@pytest.mark.parametrize(("cc", "expected"), [(520, False), (600, True), (610, False), (700, True), (750, True), (900, True)])
@pytest.mark.parametrize("n_q", [1, 4])
def test_what_multiplies_half2_slowly_takes_slices(cc: int, expected: bool, n_q: int) -> None:
    assert decodes(Op(cc=cc, n_q=n_q)) == expected


def test_a_pair_without_a_decode_kernel_takes_slices() -> None:
    assert not decodes(Op(type_k="turbo2", type_v="turbo4"))


# Slices


@pytest.mark.parametrize(("n_kv", "n_slices"), [(8192, 1), (8704, 2), (65536, 8)])
def test_keys_of_a_prefill_are_unpacked_once(n_kv: int, n_slices: int) -> None:
    calls = attend(Op(n_q=256, n_kv=n_kv))
    assert (calls.unpack, calls.upstream, calls.mma, calls.tile) == (2 * n_slices, n_slices == 1, n_slices if n_slices > 1 else 0, 0)


MIB = 1024 * 1024


@pytest.mark.parametrize(
    ("n_q", "cache_mib", "slice_mib"),
    [
        *((n_q, mib, 32) for n_q in (32, 511) for mib in (0, 6, 20)),  # not known, or too small for a slice
        *((511, mib, slice_mib) for mib, slice_mib in ((40, 28), (50, 35), (72, 48), (126, 48))),
        *((n_q, mib, 144) for n_q in (512, 2048) for mib in (0, 50)),
    ],
)
def test_slices_fit_the_cache_unless_merges_weigh_more(n_q: int, cache_mib: int, slice_mib: int) -> None:
    n_kv = 262144
    calls = attend(Op(n_q=n_q, n_kv=n_kv, n_cache=cache_mib * MIB))
    bytes_of_a_key = 2 * 128 * 8 * 2
    assert calls.mma == -(-n_kv * bytes_of_a_key // (slice_mib * MIB))


def test_a_second_segment_is_the_last_slice() -> None:
    """Where the first one has several, and where it would have to be copied."""
    calls = attend(Op(n_q=512, n_kv=65536, n_exact=768))
    assert (calls.unpack, calls.copy, calls.upstream, calls.mma) == (4, 0, 0, 3)
    for type_k, type_v in (("q8_0", "q8_0"), ("f16", "turbo3"), ("turbo3", "f16")):
        calls = attend(Op(type_k=type_k, type_v=type_v, n_q=512, n_kv=8192, n_exact=768))
        assert (calls.copy, calls.upstream, calls.mma) == (0, 0, 2)


@pytest.mark.parametrize(("n_kv", "n_q"), [(256, 17), (8192, 256), (33280, 512), (36864, 2048)])
def test_both_segments_are_one_slice(n_kv: int, n_q: int) -> None:
    """By a launch of upstream's own: K and V are unpacked, masks are put side by side, and exact keys behind the others."""
    calls = attend(Op(n_q=n_q, n_kv=n_kv, n_exact=768))
    assert (calls.unpack, calls.copy, calls.upstream, calls.mma, calls.tile) == (2, 2, 1, 0, 0)


def test_what_is_not_aligned_is_the_last_slice() -> None:
    calls = attend(Op(n_q=19, n_kv=8192, n_exact=768))
    assert (calls.unpack, calls.copy, calls.upstream, calls.mma) == (2, 1, 0, 2)


@pytest.mark.parametrize(("n_kv", "joined"), [(9472, True), (9728, False)])
def test_few_heads_are_merged_rather_than_a_long_mask_copied(n_kv: int, joined: bool) -> None:
    """Here the result has 4 heads of 256."""
    calls = attend(Op(n_q=512, n_kv=n_kv, n_exact=768, n_head_kv=1, gqa_ratio=4, head_size=(256, 256)))
    assert (calls.copy > 0, calls.upstream, calls.mma) == (joined, joined, 0 if joined else 2)
