"""The real Vulkan backend on a driver for CPUs, against the CPU backend: operations of turbo caches, validation layers, perplexity.

``make test-vulkan`` runs more of the same and writes the result down.
"""

from __future__ import annotations

import functools
from pathlib import Path

import gpu_root_tools
import lavapipe_runs
import lavapipe_tools
import pytest
import radv_stats
from backend_jobs import (
    DIAGONAL,
    ROWS,
    SCALAR,
    TURBO,
    Job,
    Outcome,
    assert_decay_ran,
    assert_equals_cpu,
    assert_every_type_ran,
)
from lavapipe_runs import JOBS, LARGER, MIXED, PLAIN, ROLLED_JOBS, UPSTREAM, VALIDATED, perplexity
from lavapipe_tools import SINGLE

pytestmark = pytest.mark.vulkan


@functools.cache
def logs() -> Path:
    """Folder of all logs; skips the test where there is no root."""
    gpu_root_tools.need_root()
    return lavapipe_runs.logs("lavapipe")


@functools.cache
def outcomes() -> dict[str, Outcome]:
    """All jobs, one per core; by name, with "upstream"."""
    return lavapipe_runs.run_jobs({**JOBS, "upstream": UPSTREAM}, logs())


@functools.cache
def rolled() -> dict[str, Outcome]:
    """Those of larger shaders, whose loops are not unrolled."""
    return lavapipe_runs.run_jobs(ROLLED_JOBS, logs(), run=lavapipe_runs.rolled())


@functools.cache
def validated() -> dict[str, Outcome]:
    """Those that run under the validation layers."""
    return lavapipe_runs.run_jobs(VALIDATED, logs() / "validated", run=lavapipe_runs.run_validated)


@pytest.mark.parametrize("name", [*JOBS, "upstream"])
def test_operation_equals_cpu(name: str) -> None:
    assert_equals_cpu(outcomes()[name])


@pytest.mark.parametrize("name", ROLLED_JOBS)
def test_operation_of_a_larger_shader_equals_cpu(name: str) -> None:
    assert_equals_cpu(rolled()[name])


@pytest.mark.parametrize(("op", "key", "at_least"), ROWS)
def test_every_type_ran(op: str, key: str, at_least: int) -> None:
    assert_every_type_ran(outcomes()[op], key, at_least)


def test_decay_ran() -> None:
    assert_decay_ran(outcomes()["decay"])


@pytest.mark.parametrize(("size", "pairs", "batches"), [("64", DIAGONAL, "1 32"), ("128", MIXED, "1")])
def test_every_pair_and_batch_ran(size: str, pairs: set[tuple[str, str]], batches: str) -> None:
    cases = [case.parameters for case in outcomes()[f"attention, head size {size}"].cases]
    assert {(c["type_K"], c["type_V"], c["nb"]) for c in cases} == {(*pair, nb) for pair in pairs for nb in batches.split()}


@pytest.mark.parametrize("size", [*LARGER, "192"])
def test_every_type_ran_at_every_head_size(size: str) -> None:
    ran = {case.parameters["type_K"] for case in rolled()[f"attention, head size {size}, all types"].cases}
    assert ran == set(SCALAR if size == "96" else TURBO)  # blocks of trellis types have 64 values


def test_two_segments_ran() -> None:
    cases = [case.parameters for case in outcomes()["attention, two segments"].cases]
    assert {case["type_K"] for case in cases} == {"q8_0", "turbo3", "turbo3t"}
    assert {(case["nb"], case["kind"]) for case in cases} >= {*(("1", kind) for kind in "0123"), ("3", "1")}


@pytest.mark.parametrize("name", VALIDATED)
def test_the_validation_layers_are_content(name: str) -> None:
    outcome = validated()[name]
    assert not outcome.error
    assert outcome.cases and all(case.ok for case in outcome.cases)


def test_the_validation_layers_do_speak() -> None:
    """They warn about what is no error, too, when they are asked to."""
    folder = lavapipe_runs.fresh(logs() / "speak")
    job = Job("GET_ROWS", "type=f32,n=1,m=8,r=2,")
    outcome = lavapipe_runs.run_job(
        job, folder, **lavapipe_tools.validated(folder, validate_best_practices="true", report_flags="error,warn,perf")
    )
    assert not outcome.error
    assert lavapipe_tools.messages(folder)


def test_a_wrong_table_is_noticed() -> None:
    right = [
        case for case in outcomes()["attention, head size 64"].cases if case.parameters["type_K"] == case.parameters["type_V"] == "turbo3t"
    ]
    assert right and all(case.ok for case in right)
    outcome = lavapipe_runs.run_faulty(logs() / "faulty")
    assert not outcome.error and outcome.cases
    assert not any(case.ok for case in outcome.cases)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and a text beside it."""
    logs()
    return gpu_root_tools.tiny_model("head64", tmp_path_factory.mktemp("tiny"))


# Relative difference of perplexities. A type of few bits turns a difference in the last bit of a value now and then into a whole step.
@pytest.mark.parametrize(("cache_type", "bound"), [("f16", 1e-4), ("turbo4", 2e-2), ("turbo3", 2e-2), ("turbo3t", 4e-2)])
def test_perplexity_equals_cpu(tiny: Path, tmp_path: Path, cache_type: str, bound: float) -> None:
    device = perplexity(tiny, cache_type, tmp_path / "gpu", on_cpu=False, **PLAIN, **SINGLE)
    assert device == pytest.approx(perplexity(tiny, cache_type, tmp_path / "cpu", on_cpu=True, **PLAIN), rel=bound)


def test_perplexity_with_the_defaults(tiny: Path, tmp_path: Path) -> None:
    """With a calibration and exact tokens, and products as a user gets them."""
    device, cpu = (perplexity(tiny, "turbo3", tmp_path / where, on_cpu=where == "cpu") for where in ("gpu", "cpu"))
    assert device == pytest.approx(cpu, rel=2e-2)


# --- AMD's compiler -------------------------------------------------------------------------------------------------------


def test_what_the_backend_prints_of_a_pipeline_is_read() -> None:
    lines = ("noise", "pipeline stats for turbo_a:", "  VGPRs: 24", "  Latency: 1.5", "  SGPRs: 108")
    said = "".join(f"ggml_vulkan: {line}\n" for line in lines)
    assert radv_stats.parse(said + said.replace("24", "32")) == {"turbo_a": [{"VGPRs": 24, "SGPRs": 108}, {"VGPRs": 32, "SGPRs": 108}]}
    assert radv_stats.rows(radv_stats.parse(said + said.replace("24", "32"))) == ["| `turbo_a` | 2 | 24 to 32 | 108 | 0 | 0 | 0 | 0 |"]


def test_no_shader_spills_on_rdna3() -> None:
    found = radv_stats.stats("navi31", logs() / "registers")
    assert any("turbo" in name for name in found) and any("flash_attn" in name for name in found)
    assert radv_stats.most(found, "Spilled VGPRs") == 0
    assert 0 < radv_stats.most(found, "VGPRs") <= 256
