"""The benchmark on the CPU: its cases, targets and rounds. Risks: rounds measured twice, a target that is never looked at."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import bench_cpu
import bench_model
import gguf
import msgspec
import pytest
from bench_ops import TYPES, Case, Check, Row, load, measure
from measuring import bench_row

from turbo_gguf.cache.types import TURBO
from turbo_gguf.errors import ToolFailed
from turbo_gguf.measure.result import BenchRow

PROGRAM = """\
import json, pathlib, sys
device, seconds, threads = sys.argv[1:]
lines = sys.stdin.readlines()
with (pathlib.Path(__file__).parent / "calls").open("a") as file:
    file.write(f"{device} {threads} {len(lines)}\\n")
for line in lines:
    op, k, *_ = line.split()
    us = {"f16": 100.0, "turbo3": 20.0}.get(k, 50.0)
    found = {"us": us, "us_min": us, "us_max": us, "bytes": 1e6, "status": "ok", "threads": THREADS}
    print(json.dumps(found), flush=True)
"""


@pytest.fixture
def build(tmp_path: Path) -> Path:
    path = tmp_path / "build/bin/test-turbo-perf"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!{sys.executable}\n{PROGRAM.replace('THREADS', 'int(threads)')}")
    path.chmod(0o755)
    return tmp_path / "build"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("GGML_", "TURBO_", "LLAMA_", "OMP_", "GOMP_")):
            monkeypatch.delenv(name)


def row(case: Case, us: float, *, number: int = 0, status: str = "ok") -> Row:
    return Row(case, us, us, us, 1e6, status, "CPU", "b", 2, number)


def attention(types: str, queries: int = 1, keys: int = 16384, head: int = 128, gqa: int = 4) -> Case:
    return Case("fattn", types, head, gqa, queries, keys)


def failed(found: list[Check]) -> list[str]:
    return [check.what for check in found if not check.ok]


# --- cases ----------------------------------------------------------------------------------------------------------------


def test_every_target_has_its_cases() -> None:
    ops = list(bench_cpu.op_cases())
    assert len(ops) == len(set(ops))
    for size, targets in bench_cpu.OP_TARGETS.items():
        for types in {name for target in targets for name in (*target.types, target.rival)}:
            assert attention(types, *size) in ops
    assert {case.types for case in ops if case.op == "set_rows"} >= set(bench_cpu.TURBO)
    plans = list(bench_cpu.plans(bench_cpu.DEPTHS, 3, 2))
    for (_, depth), targets in bench_cpu.MODEL_TARGETS.items():
        for target in targets:
            assert any({t.k for t in plan.types} >= {*target.types, target.rival} for plan in plans if plan.depths == (depth,))


def test_odd_shapes_are_all_pairs_of_head_gqa_and_queries() -> None:
    found = list(bench_cpu.odd_cases())
    assert len(found) == len(set(found)) == 4 * 4 * (3 * 7 + 4), "no blocks of 64 in heads of 96"
    assert attention("f16", 7, 4096, head=96, gqa=16) in found
    assert not set(found) & set(bench_cpu.op_cases())
    assert len([*bench_cpu.op_cases(small=True), *bench_cpu.odd_cases(small=True)]) < 60


def test_sharp_attention_is_compared_with_attention_where_all_keys_have_weight() -> None:
    cases = list(bench_cpu.sharp_cases())
    assert {case.keys for case in cases} == {16384, 65536}
    assert not set(cases) & set(bench_cpu.op_cases())
    flat, *sharp = (c for c in cases if (c.types, c.gqa, c.keys) == ("turbo3", 4, 16384))
    text = bench_cpu.markdown(bench_cpu.medians([row(flat, 300.0), *(row(case, 200.0) for case in sharp)]), [], "")
    (line,) = (line for line in text.splitlines() if "turbo3" in line)
    assert line.count("(1.50)") == len(sharp) and line.count("(1.00)") == 1
    assert bench_cpu.checks([row(case, 1.0) for case in cases], []) == []


def test_types_that_are_compared_are_measured_next_to_each_other() -> None:
    first = [case.types for case in bench_cpu.op_cases()][: len(TYPES)]
    assert first == list(TYPES) and {"f16", "q8_0", "q4_0", *TURBO} < set(first)
    assert [case.types for case in bench_cpu.odd_cases()][: len(TURBO) + 2] == ["f16", *TURBO, "f16"]


def test_depth_0_has_more_rounds_and_upstreams_types_one_where_there_are_tokens() -> None:
    found = [(plan.depths[0], len(plan.types), plan.rounds) for plan in bench_cpu.plans(bench_cpu.DEPTHS, 3, 2)]
    assert found == [(0, 9, 9), (4096, 7, 3), (16384, 7, 3), (4096, 2, 1)]
    assert [plan.depths for plan in bench_cpu.plans((4096,), 1, 2)] == [(4096,), (4096,)]


# --- rounds ---------------------------------------------------------------------------------------------------------------


def run(build: Path, out: Path, *options: str) -> int:
    argv = ["--small", "--parts", "ops", "shapes", "--build", str(build), "--out", str(out), "--threads", "2", *options]
    return bench_cpu.main(argv)


def test_rounds_alternate_and_are_not_repeated(build: Path, tmp_path: Path) -> None:
    assert run(build, tmp_path / "out", "--rounds", "1") == 0
    calls = (build / "bin/calls").read_text().splitlines()
    assert calls == ["CPU 2 22", "CPU 1 18"] * bench_cpu.CHEAP + ["CPU 2 4"], "single rows are measured on one thread"
    lines = (tmp_path / "out/ops.jsonl").read_text().splitlines()
    assert run(build, tmp_path / "out", "--rounds", "1") == 0
    assert (tmp_path / "out/ops.jsonl").read_text().splitlines() == lines
    assert run(build, tmp_path / "out", "--rounds", "2") == 0
    assert (build / "bin/calls").read_text().splitlines()[len(calls) :] == [*["CPU 2 22", "CPU 1 18"] * bench_cpu.CHEAP, "CPU 2 4"]


def test_a_part_of_a_round_is_completed(build: Path, tmp_path: Path) -> None:
    run(build, tmp_path / "out", "--rounds", "1")
    store = tmp_path / "out/ops.jsonl"
    lines = store.read_text().splitlines(keepends=True)
    store.write_text("".join(lines[:-1]))
    run(build, tmp_path / "out", "--rounds", "1")
    assert (build / "bin/calls").read_text().splitlines()[-1] == "CPU 2 1"
    assert store.read_text().splitlines(keepends=True) == lines


@pytest.mark.parametrize("change", ["program", "threads", "environment"])
def test_another_set_up_is_measured_anew(build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    run(build, tmp_path / "out", "--rounds", "1")
    before = len(load(tmp_path / "out/ops.jsonl"))
    if change == "program":
        (build / "bin/libggml-cpu.so").write_text("another library, the same program")
    elif change == "environment":
        monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    run(build, tmp_path / "out", "--rounds", "1", *(["--threads", "3"] if change == "threads" else []))
    added = len(load(tmp_path / "out/ops.jsonl")) - before
    assert added == (before - 18 * bench_cpu.CHEAP if change == "threads" else before), "single rows take one thread whatever is asked for"


def test_a_program_that_ignores_the_threads_is_an_error(build: Path) -> None:
    program = build / "bin/test-turbo-perf"
    program.write_text(program.read_text().replace("int(threads)", "4"))
    with pytest.raises(ToolFailed, match="does not take a number of threads"):
        list(measure(program, "CPU", [attention("f16")], 0.1, 2))


def test_medians_over_rounds_with_their_range() -> None:
    rows = [row(attention("f16"), us, number=number) for number, us in enumerate((10.0, 50.0, 12.0))]
    (found,) = bench_cpu.medians(rows)
    assert (found.us, found.us_min, found.us_max) == (12.0, 10.0, 50.0)
    assert bench_cpu.speed(found).value == pytest.approx(1e6 / 12)
    assert bench_cpu.speed(found).error == pytest.approx((1e6 / 10 - 1e6 / 50) / 2)
    lost = [*rows, row(attention("f16"), 0.0, number=3, status="out of memory")]
    assert not bench_cpu.medians(lost)[0].ok


# --- targets --------------------------------------------------------------------------------------------------------------


def test_decode_of_ops() -> None:
    times = {"f16": 100.0, "q8_0": 130.0, "q4_0": 120.0, "turbo4": 25.0, "turbo3": 26.0, "turbo2": 27.0}
    found = bench_cpu.checks([row(attention(types), us) for types, us in times.items()], [])
    assert len(found) == 7
    assert failed(found) == [
        "attention 1 x 16384, head 128, GQA 4, turbo3: speed / f16",
        "attention 1 x 16384, head 128, GQA 4, turbo4: speed / q4_0",
        "attention 1 x 16384, head 128, GQA 4, turbo3: speed / q4_0",
        "attention 1 x 16384, head 128, GQA 4, turbo2: speed / turbo3",
    ]


@pytest.mark.parametrize("case", [attention("", *bench_cpu.PREFILL), attention("", 3, 4096, head=96, gqa=16)])
def test_prefill_and_odd_shapes_are_not_below_f16(case: Case) -> None:
    times = {"f16": 100.0, "turbo4": 99.0, "turbo3": 100.0, "turbo2": 101.0}
    found = bench_cpu.checks([row(msgspec.structs.replace(case, types=types), us) for types, us in times.items()], [])
    assert [check.ok for check in found] == [True, True, False]


def test_writing_has_a_limit_in_microseconds() -> None:
    rows = [row(Case("set_rows", types, 128, 1, 256, 4096), us) for types, us in (("q4_0", 999.0), ("turbo4", 512.0), ("turbo3", 513.0))]
    found = bench_cpu.checks(rows, [])
    assert [(check.what.split()[1], round(check.value, 3), check.ok) for check in found] == [
        ("turbo4:", 2.0, True),
        ("turbo3:", 2.004, False),
    ]


def test_what_is_not_supported_misses_its_targets() -> None:
    found = bench_cpu.checks([row(attention("f16"), 100.0), row(attention("turbo3"), 0.0, status="not supported")], [])
    assert [(check.value, check.ok) for check in found] == [(0.0, False)]
    write = bench_cpu.checks([row(Case("set_rows", "turbo3", 128, 1, 256, 4096), 0.0, status="not supported")], [])
    assert [check.ok for check in write] == [False]


def model_rows(prefill: dict[str, float], decode: dict[str, float], depth: int) -> Iterator[BenchRow]:
    for types, speed in prefill.items():
        yield bench_row(types, depth, speed=speed, n_prompt=256, n_gen=0)
    for types, speed in decode.items():
        yield bench_row(types, depth, speed=speed, n_gen=64)


@pytest.mark.parametrize(
    ("depth", "prefill", "decode", "expected"),
    [
        (0, 98.0, 97.9, [True, False]),
        (4096, 99.0, 220.0, [False, True]),
        (16384, 10.0, 299.0, [False]),
    ],
)
def test_whole_model(depth: int, prefill: float, decode: float, expected: list[bool]) -> None:
    rows = list(model_rows({"f16": 100.0, "turbo3": prefill}, {"f16": 100.0, "turbo3": decode}, depth))
    assert [check.ok for check in bench_cpu.checks([], rows)] == expected


def test_ratios_are_of_medians_and_have_a_spread() -> None:
    speeds = {"f16": (100.0, 104.0, 50.0), "turbo3": (300.0, 310.0, 290.0)}
    rows = [bench_row(t, 16384, speed=s, n_gen=64, number=i) for t, values in speeds.items() for i, s in enumerate(values)]
    (check,) = bench_cpu.checks([], rows)
    assert check.value == 3.0 and check.ok
    assert check.spread == pytest.approx(3.0 * ((27 / 100) ** 2 + (10 / 300) ** 2) ** 0.5)


# --- report ---------------------------------------------------------------------------------------------------------------


def test_tables_and_exit_code(build: Path, tmp_path: Path) -> None:
    assert run(build, tmp_path / "out", "--rounds", "1", "--check") == 1, "writing 1,024 values takes 3.1 us here"
    text = (tmp_path / "out/table.md").read_text()
    assert "| 64 | 2 | 1 | 256 | 0.10 ± 0.00 (1.00) | 0.05 ± 0.00 (2.00) |" in text
    assert "| turbo3     | 1250.0 ± 0.0 |" in text
    assert "| SET_ROWS turbo4: us for 1,024 values | 3.125 | 2 | **fail** |" in text
    assert text.index("**fail**") < text.index("| pass |")


def test_the_model_is_in_the_table_and_in_a_plot(build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path))

    def fake(plan: bench_cpu.bench.BenchPlan, *_: object) -> list[BenchRow]:
        return [
            bench_row(str(types), depth, speed=50.0, n_prompt=p, n_gen=n)
            for types in plan.types
            for depth in plan.depths
            for p, n in ((plan.n_prompt, 0), (0, plan.n_gen))
        ]

    monkeypatch.setattr(bench_cpu.bench, "run", fake)
    argv = ["--small", "--parts", "model", "--build", str(build), "--out", str(tmp_path / "out"), "--check"]
    assert bench_cpu.main(argv) == 0
    text = (tmp_path / "out/table.md").read_text()
    assert "llama-bench on random weights, 2 layers, Q4_0: " in text
    assert "| turbo2    | 50.0 ± 0.0 (1.00) | 50.0 ± 0.0 (1.00) |" in text
    assert "6 of 6 met." in text
    assert (tmp_path / "out/plot.png").read_bytes().startswith(b"\x89PNG")


# --- model ----------------------------------------------------------------------------------------------------------------


def test_the_model_has_the_shape_asked_for(tmp_path: Path) -> None:
    paths = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    for path in paths:
        bench_model.write(path, layers=1, kv_heads=2, gqa=2, n_embd=256, feed_forward=96, weights="q4_0")
    assert paths[0].read_bytes() == paths[1].read_bytes()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(paths[0]).tensors}
    shapes = {
        name: tuple(int(n) for n in tensors[f"blk.0.{name}.weight"].shape) for name in ("attn_q", "attn_k", "attn_output", "ffn_down")
    }
    assert shapes == {"attn_q": (256, 512), "attn_k": (256, 256), "attn_output": (512, 256), "ffn_down": (96, 256)}
    kinds = {tensor.tensor_type.name for name, tensor in tensors.items() if "norm" not in name}
    assert kinds == {"Q4_0"}


def test_quantized_weights_are_those_of_f16(tmp_path: Path) -> None:
    found = {}
    for weights in ("f16", "q8_0"):
        path = tmp_path / f"{weights}.gguf"
        bench_model.write(path, layers=1, kv_heads=1, gqa=2, feed_forward=64, weights=weights)
        tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_up.weight")
        found[weights] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    assert found["f16"].shape == found["q8_0"].shape == (64, 256)
    assert abs(found["f16"] - found["q8_0"]).max() < 0.01 * abs(found["f16"]).max()
