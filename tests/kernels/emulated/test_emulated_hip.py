"""The real libggml-hip.so for gfx1100 on the emulator, against the CPU backend: operations of turbo caches, and perplexity of a tiny model.

``make test-hip-emulated`` runs more of the same and writes the result down.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import emulated_tools
import pytest
from backend_jobs import ROWS, SCALAR, TRELLIS, Outcome, assert_decay_ran, assert_equals_cpu, assert_every_type_ran
from emulated_runs import (
    BATCHES,
    CONTEXT,
    FAULTY,
    HEAD_SIZES,
    JOBS,
    PAIRS,
    TRELLIS_PAIRS,
    UBATCH,
    UPSTREAM,
    WIDE,
    launches_of,
    perplexity,
    run_jobs,
)
from gpu_root_tools import need_root

pytestmark = pytest.mark.emulated


@functools.cache
def outcomes() -> dict[str, Outcome]:
    """All jobs, one per core; by name, with "upstream" and "faulty"."""
    need_root()
    return run_jobs({**JOBS, "upstream": UPSTREAM, "faulty": FAULTY}, emulated_tools.home() / "logs" / "hip-emulated")


@pytest.mark.parametrize("name", [*JOBS, "upstream"])
def test_operation_equals_cpu(name: str) -> None:
    assert_equals_cpu(outcomes()[name])


@pytest.mark.parametrize(("op", "key", "at_least"), ROWS)
def test_every_type_ran(op: str, key: str, at_least: int) -> None:
    assert_every_type_ran(outcomes()[op], key, at_least)


def test_decay_ran() -> None:
    outcome = outcomes()["decay"]
    assert_decay_ran(outcome)
    assert any("turbo_decay_blocks" in name for name in outcome.kernels)


@pytest.mark.parametrize("size", HEAD_SIZES)
def test_every_pair_and_batch_ran(size: str) -> None:
    cases = [case.parameters for case in outcomes()[f"attention, head size {size}"].cases]
    pairs = PAIRS if size == "96" else PAIRS | TRELLIS_PAIRS
    assert {(c["type_K"], c["type_V"], c["hsk"], c["nb"]) for c in cases} == {(*pair, size, nb) for pair in pairs for nb in BATCHES}


def test_our_kernels_ran_and_not_the_cpu() -> None:
    ran = outcomes()["attention, head size 128"].kernels
    decode = [name for name in ran if "turbo_attn_decode" in name]
    assert len(decode) >= 2 * (len(SCALAR) + len(TRELLIS))
    assert any("turbo_dequantize" in name for name in ran)
    assert any("turbo_quantize" in name for name in outcomes()["SET_ROWS"].kernels)
    assert any("turbo_quantize_trellis" in name for name in outcomes()["SET_ROWS"].kernels)
    assert any("turbo_attn_merge" in name for name in outcomes()["attention, slices, head size 128"].kernels)


@pytest.mark.parametrize("size", ["64", "128"])
def test_decode_by_matrix_instructions_ran(size: str) -> None:
    """More than 8 columns of its own accord, fewer because the environment says so."""
    wide = [name for name in outcomes()[f"attention, head size {size}"].kernels if "turbo_attn_decode_wmma" in name]
    narrow = [name for name in outcomes()[f"attention by matrix instructions, head size {size}"].kernels if "turbo_attn_decode_" in name]
    assert len(wide) >= len(SCALAR) + len(TRELLIS)
    assert all("Li16EE" in name for name in wide)
    assert len(narrow) >= len(SCALAR) + len(TRELLIS)
    assert all("turbo_attn_decode_wmma" in name and "Li8EE" in name for name in narrow)
    without = [name for name in outcomes()["attention without matrix instructions"].kernels if "turbo_attn_decode_" in name]
    assert without and not any("wmma" in name for name in without)


@pytest.mark.parametrize("size", WIDE)
def test_decode_of_wide_heads_ran(size: str) -> None:
    decode = [name for name in outcomes()[f"attention, wide heads, {size}"].kernels if "turbo_attn_decode_" in name]
    assert len(decode) == 2
    assert all("turbo_attn_decode_wmma_wide" in name and "Li16EE" in name for name in decode)


def test_decode_of_heads_that_are_wide_here_ran() -> None:
    wide = [name for name in outcomes()["attention, head size 256"].kernels if "turbo_attn_decode_wmma" in name]
    assert len(wide) >= len(SCALAR) + len(TRELLIS)
    assert all("turbo_attn_decode_wmma_wide" in name and "Li16EE" in name for name in wide)


def test_two_segments_ran() -> None:
    outcome = outcomes()["attention, two segments, head size 128"]
    types = {case.parameters["type_K"] for case in outcome.cases}
    assert types == {"f16", "bf16", "q8_0", "q5_1", "q4_0", *SCALAR, *TRELLIS}, "iq4_nl is refused"
    assert {(case.parameters["nb"], case.parameters["kind"]) for case in outcome.cases} >= {*(("1", kind) for kind in "0123"), ("40", "0")}
    assert any(re.search(r"turbo_attn_decode_(wmma_)?kernelILi128ELi128EL9ggml_type1ELS0_1E", name) for name in outcome.kernels), "f16/f16"
    assert any("turbo_attn_merge_exact" in name for name in outcome.kernels), "a short segment without a launch of its own"
    assert any("turbo_copy_rows" in name for name in outcome.kernels), "both segments in one slice"
    slices = outcomes()["attention, two segments in slices, head size 128"]
    for parts in ("turbo_tile_parts", "turbo_mma_parts"):
        assert any("turbo_attn_merge_slice" in name and parts in name for name in (*outcome.kernels, *slices.kernels)), parts


def test_upstream_kernels_ran() -> None:
    ran = outcomes()["upstream"].kernels
    assert any("flash_attn_ext_f16" in name for name in ran), "WMMA"
    assert any("flash_attn_tile" in name for name in ran)


def test_wrong_results_are_noticed() -> None:
    outcome = outcomes()["faulty"]
    assert outcome.cases
    assert not any(case.ok for case in outcome.cases)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and a text beside it."""
    outcomes()
    return emulated_tools.tiny_model("head64", tmp_path_factory.mktemp("tiny"))


# Relative difference of perplexities. A type of few bits turns a difference in the last bit of a value now and then into a whole step, and
# a trellis type into another path of nearly the same cost: measured .014 to .035, where the type itself changes this random model's
# perplexity by .06 to .1. Operations are compared strictly above, and bits of blocks by test_lanes_trellis.py.
@pytest.mark.parametrize(("cache_type", "bound"), [("f16", 1e-3), ("q8_0", 5e-3), ("turbo4", 2e-2), ("turbo3", 2e-2), ("turbo2", 4e-2)])
def test_perplexity_equals_cpu(tiny: Path, tmp_path: Path, cache_type: str, bound: float) -> None:
    emulated, cpu = (perplexity(tiny, cache_type, tmp_path / where, on_cpu=where == "cpu") for where in ("gpu", "cpu"))
    assert emulated == pytest.approx(cpu, rel=bound)


def test_k_and_v_of_a_layer_are_written_by_one_launch(tiny: Path, tmp_path: Path) -> None:
    environment = {"TURBO_EMULATOR_CUS": "64"}  # for so many compute units the rows of a batch are few
    emulated = perplexity(tiny, "turbo3t", tmp_path / "gpu", on_cpu=False, chunks=1, **environment)
    cpu = perplexity(tiny, "turbo3t", tmp_path / "cpu", on_cpu=True, chunks=1)
    assert emulated == pytest.approx(cpu, rel=6e-2)
    writes = [name for name, _ in launches_of(tmp_path / "gpu" / "launches.txt") if "turbo_quantize" in name]
    assert all("turbo_quantize_few" in name for name in writes), set(writes)
    batches, layers = CONTEXT // UBATCH, 2
    assert len(writes) in (batches * layers, (batches + 1) * layers), "with or without a batch to warm up"
