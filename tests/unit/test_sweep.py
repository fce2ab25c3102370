"""Sweep files to cases. Risks: a typo that runs something else, a key that does not change with what decides the numbers."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from turbo_gguf import assets, gate, sweep
from turbo_gguf.cache_types import CACHE_TYPES, check_head_sizes, parse_types
from turbo_gguf.errors import UsageError
from turbo_gguf.records import CacheTypes

SETUP = sweep.Setup(build_id="b", model_sha256="m", text_sha256="t", backend="CPU")


def _load(tmp_path: Path, text: str) -> sweep.Sweep:
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    return sweep.load(path)


def test_shipped_sweeps_load_and_gates_apply_to_them() -> None:
    limits = gate.load(assets.eval_dir() / "gates.toml")
    for name in ("default", "smoke"):
        plan = sweep.load(assets.eval_dir() / f"{name}.toml")
        cases = sweep.cases(plan, SETUP, gate.references(limits))
        for ctx in {case.ctx for case in cases}:
            here = {str(c.types) for c in cases if c.ctx == ctx and not c.is_noise_floor}
            assert here >= {"q8_0", "q5_0", "q4_0", "turbo4", "turbo3"}
            assert sum(c.is_noise_floor for c in cases if c.ctx == ctx) == 1
        assert {str(c.types) for c in cases if "turbo" in str(c.types)} <= set(limits.type)


def test_each_context_starts_with_noise_floor_and_competitors(tmp_path: Path) -> None:
    plan = _load(
        tmp_path, '[[run]]\nctx = 512\nchunks = 2\ntypes = ["turbo3", "q4_0"]\n[[run]]\nctx = 1024\nchunks = 2\ntypes = ["turbo3"]\n'
    )
    names = [(c.ctx, str(c.types), c.batch) for c in sweep.cases(plan, SETUP)]
    assert names[:5] == [(512, "f16", 256), (512, "q8_0", 512), (512, "q5_0", 512), (512, "q4_0", 512), (512, "turbo3", 512)]
    assert len(names) == 10 and names[5] == (1024, "f16", 256)


@pytest.mark.parametrize(("ctx", "batch", "noise"), [(128, 128, 64), (256, 256, 128), (300, 300, 256), (512, 512, 256), (4096, 512, 256)])
def test_batches_are_never_longer_than_a_chunk_and_always_differ(ctx: int, batch: int, noise: int) -> None:
    cases = sweep.cases(sweep.Sweep(run=(sweep.SweepRun(ctx=ctx, chunks=2, types=("q4_0",)),)), SETUP)
    assert [(c.batch, c.base_batch, c.is_noise_floor) for c in cases] == [(noise, batch, True), (batch, batch, False)]


def test_reference_of_a_gate_is_measured_too(tmp_path: Path) -> None:
    plan = _load(tmp_path, '[[run]]\nctx = 512\nchunks = 2\ntypes = ["q4_1"]\n')
    assert [str(c.types) for c in sweep.cases(plan, SETUP, {"q4_1": "q5_1"})] == ["f16", "q5_1", "q4_1"]


def test_key_changes_with_everything_that_decides_the_numbers() -> None:
    plan = sweep.Sweep(run=(sweep.SweepRun(ctx=512, chunks=2, types=("q4_0",)),))
    case = sweep.cases(plan, SETUP)[-1]
    changed = {
        "types": CacheTypes("q4_0", "q5_0"),
        "ctx": 1024,
        "chunks": 3,
        "batch": 256,
        "base_batch": 256,
        "backend": "CUDA",
        "build_id": "c",
        "model_sha256": "n",
        "text_sha256": "u",
        "env": ("GGML_X=1",),
        "metrics_version": 2,
    }
    assert set(changed) == set(case.__struct_fields__)
    keys = {msgspec.structs.replace(case, **{name: value}).key for name, value in changed.items()}
    assert len(keys | {case.key}) == len(changed) + 1
    assert case.key == sweep.cases(plan, SETUP)[-1].key


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "run"),
        ("[[run]]\nctx = 512\nchunks = 2\n", "types"),
        ('[[run]]\nctx = 512\nchunks = 2\ntypes = ["turbo5"]\n', "turbo5"),
        ('[[run]]\nctx = 512\nchunks = 2\ntypes = ["turbo3/q9"]\n', "q9"),
        ('[[run]]\nctx = 512\nchunks = 2\ntype = ["turbo3"]\n', "type"),
        ('[[run]]\nctx = "512"\nchunks = 2\ntypes = ["turbo3"]\n', "ctx"),
        ('[[run]]\nctx = 513\nchunks = 2\ntypes = ["turbo3"]\n', "even"),
        ('batch = 0\n[[run]]\nctx = 256\nchunks = 2\ntypes = ["turbo3"]\n', "batch"),
        ('[[run]]\nctx = 512\nchunks = 0\ntypes = ["turbo3"]\n', "chunks"),
        ('batch = 16\nnoise_batch = 8\n[[run]]\nctx = 16\nchunks = 2\ntypes = ["turbo3"]\n', "100 tokens"),
        ('batch = 256\n[[run]]\nctx = 512\nchunks = 2\ntypes = ["turbo3"]\n', "noise"),
        ("[[run]\n", "sweep.toml"),
    ],
)
def test_wrong_files_are_usage_errors_that_name_the_field(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        _load(tmp_path, text)


def test_missing_file() -> None:
    with pytest.raises(UsageError, match=r"nowhere\.toml"):
        sweep.load(Path("nowhere.toml"))


def test_command_line_wins_over_the_file() -> None:
    plan = sweep.load(assets.eval_dir() / "default.toml")
    other = sweep.override(plan, types=("turbo3",), ctx=(1024,), chunks=4, batch=128)
    assert [(r.ctx, r.chunks, r.types) for r in other.run] == [(1024, 4, ("turbo3",))]
    assert (other.batch, other.noise_batch) == (128, 64)
    assert sweep.override(plan) == plan
    with pytest.raises(UsageError, match="turbo7"):
        sweep.override(plan, types=("turbo7",))


def test_context_without_a_table_scores_about_as_many_tokens() -> None:
    plan = sweep.Sweep(run=(sweep.SweepRun(ctx=512, chunks=32, types=("q4_0",)),))
    (run,) = sweep.override(plan, ctx=(4096,)).run
    assert (run.ctx, run.chunks) == (4096, 4)


def test_pairs_are_read_and_written_the_same_way() -> None:
    assert str(parse_types(" turbo4/turbo3 ")) == "turbo4/turbo3"
    assert parse_types("turbo3") == CacheTypes("turbo3", "turbo3") and str(parse_types("turbo3/turbo3")) == "turbo3"
    for bad in ("", "/", "turbo3/", "turbo3/turbo3/turbo3", "TURBO3"):
        with pytest.raises(UsageError):
            parse_types(bad)


@pytest.mark.parametrize("head", [80, 112])
def test_head_sizes_that_cannot_be_cut_into_blocks(head: int) -> None:
    for types in ("turbo2", "turbo3", "turbo4", "f16/turbo3", "turbo3/f16", "q8_0"):
        with pytest.raises(UsageError, match=f"head size {head}") as caught:
            check_head_sizes(CacheTypes.parse(types), head, head)
        assert caught.value.hint.endswith("f32, f16, bf16")
    check_head_sizes(CacheTypes.parse("f16/bf16"), head, head)


@pytest.mark.parametrize("head", [32, 64, 96, 128, 192, 256, 576])
def test_head_sizes_that_work(head: int) -> None:
    for name in CACHE_TYPES:
        check_head_sizes(CacheTypes.parse(name), head, head)


def test_nominal_bits() -> None:
    expected = {"f16": 16, "q8_0": 8.5, "q5_0": 5.5, "q4_0": 4.5, "turbo4": 4.5, "turbo3": 3.5, "turbo2": 2.5}
    assert {name: CACHE_TYPES[name].bits for name in expected} == expected
