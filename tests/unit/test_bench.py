"""Speed sweeps on a stand-in for llama-bench. Risks: rounds measured twice, another type or device measured, depths left out."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import msgspec
import pytest
from measuring import LOGS, MODEL, fake_build

from turbo_gguf.cache.spec import CacheSpec, parse_types
from turbo_gguf.errors import LogNotUnderstood, SilentFallback, ToolFailed, UsageError
from turbo_gguf.measure import bench
from turbo_gguf.measure.store import Store

IN_FORCE, PARTS = " cal=1a2b3c4d sink=4 tail=16", " | calibrated K 4 4 V 4 4 of 4 | copies 96 rows in 1 streams, 0.38 MiB"
PLAIN = "turbo3 | rotated 1/1 | bits 3.500/3.500"
DECAYING = f"turbo3 decay=15,35,50{IN_FORCE} | rotated 1/1 | bits 3.500/3.500 | decaying 4/4{PARTS}"
BY_LAYER = f"turbo3 k=0:q8_0;1-3:turbo3 v=0-3:turbo3{IN_FORCE} | rotated 1/1 | bits 4.750/3.500{PARTS}"
TYPED = PLAIN.replace(" |", f"{IN_FORCE} |", 1) + PARTS

_FAKE = f"""#!{sys.executable}
import json, os, re, sys
from pathlib import Path
argv, here = sys.argv[1:], Path(__file__).parent
option = lambda name, other="0": argv[argv.index(name) + 1] if name in argv else other
k, v = option("-ctk"), option("-ctv")
names = ("--cache-type-k-layers", "--cache-type-v-layers", "--cache-layer-adaptive", "--cache-decay")
names += ("--cache-calibration", "--cache-sink", "--cache-tail")
settings = " ".join(option(name) for name in names if name in argv)
plan = json.loads((here / "plan.json").read_text()) if (here / "plan.json").exists() else {{}}
if "-v" in argv:
    log = Path({str(LOGS / "bench-verbose.err")!r}).read_text()
    log = re.sub(r"K \\(\\w+\\)(.*)V \\(\\w+\\)", rf"K ({{plan.get('swap', k)}})\\1V ({{plan.get('swap', v)}})", log)
    for side, name in (("k", k), ("v", v)):
        log = re.sub(rf"attn_rot_{{side}} = \\d", f"attn_rot_{{side}} = {{int(name not in ('f16', 'f32'))}}", log)
    log = re.sub(r"(llama_context: flash_attn += )\\w+", rf"\\g<1>{{'enabled' if option('-fa') == 'on' else 'disabled'}}", log)
    bits = {{"f32": 32, "f16": 16, "q8_0": 8.5, "q4_0": 4.5, "turbo3": 3.5}}
    told = (plan.get("swap", k), plan.get("swap", v))
    line = f"{{'/'.join(dict.fromkeys(told))}} | rotated {{int(k not in ('f16', 'f32'))}}/{{int(v not in ('f16', 'f32'))}}"
    line += " | bits {{:.3f}}/{{:.3f}}".format(*(bits.get(name, 0) for name in told))
    sys.stderr.write(log + f"llama_turbo_cache: {{plan.get('lines', {{}}).get(settings, line)}}\\n")
    sys.exit()
with (here / "calls").open("a") as file:
    file.write(" ".join(filter(None, (f"{{k}}/{{v}}", settings, option("-d")))) + "\\n")
if plan.get("crash") == k:
    sys.exit(1)
row = json.loads(Path({str(LOGS / "bench.out")!r}).read_text().splitlines()[0]) | {{"type_k": plan.get("row", k), "type_v": v}}
for depth in option("-d").split(",")[: plan.get("depths", 9)]:
    for p, n in ((int(option("-p")), 0), (0, int(option("-n")))):
        if p or n:
            print(json.dumps(row | {{"n_prompt": p, "n_gen": n, "n_depth": int(depth), "avg_ts": plan.get("speed", 50.0)}}))
"""


class Bench:
    def __init__(self, folder: Path) -> None:
        self.build = fake_build(folder, "llama-bench", _FAKE)
        self.bin = self.build.path / "bin"
        self.store = Store(folder / "results")
        self.words: list[str] = []

    def run(self, **changes: object) -> list[object]:
        plan = bench.BenchPlan(
            types=(CacheSpec("f16", "f16"), CacheSpec("q8_0", "q4_0")),
            depths=(0, 512),
            n_prompt=64,
            n_gen=16,
            rounds=2,
            threads=2,
            backend="CPU",
        )
        return list(bench.run(msgspec.structs.replace(plan, **changes), self.build, MODEL, self.store, self.words.append))

    def go_wrong(self, **plan: object) -> None:
        (self.bin / "plan.json").write_bytes(msgspec.json.encode(plan))

    def calls(self) -> list[str]:
        path = self.bin / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path))
    return Bench(tmp_path)


def test_rounds_alternate_between_the_types(sweep: Bench) -> None:
    rows = sweep.run()
    assert sweep.calls() == ["f16/f16 0,512", "q8_0/q4_0 0,512"] * 2
    assert len(rows) == 2 * 2 * 2 * 2 and len(sweep.store.bench_path.read_text().splitlines()) == 16


def test_the_base_runs_as_it_is_measured(sweep: Bench) -> None:
    """With flash attention its speed would be that of f16 and a cast."""
    assert len(sweep.run(types=(CacheSpec("f32", "f32"),), rounds=1)) == 2 * 2
    assert sweep.calls() == ["f32/f32 0,512"]


def test_rounds_that_are_there_are_not_repeated(sweep: Bench) -> None:
    first = sweep.run()
    assert sweep.run() == first and len(sweep.calls()) == 4
    assert len(sweep.run(rounds=3, depths=(0, 512, 1024))) == 2 * 3 * 3 * 2
    assert sweep.calls()[4:] == ["f16/f16 1024", "q8_0/q4_0 1024"] * 2 + ["f16/f16 0,512,1024", "q8_0/q4_0 0,512,1024"]


def test_another_machine_setting_starts_anew(sweep: Bench) -> None:
    sweep.run()
    sweep.run(threads=1)
    assert len(sweep.calls()) == 8


def test_a_calibration_that_was_moved_is_not_measured_again(sweep: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_probe", lambda *_: None)
    found = {}
    for path in ("a.gguf#0123abcd", "moved/b.gguf#0123abcd", "a.gguf#0123abce"):
        types = CacheSpec.parse(f"q8_0 cal={path}")
        found[path] = sweep.run(types=(types,), rounds=1)
        assert {row.types for row in found[path]} == {types}, "the types are those asked for"  # type: ignore[attr-defined]
    assert sweep.calls() == ["q8_0/q8_0 a.gguf 0,512"] * 2
    assert len(found["moved/b.gguf#0123abcd"]) == len(found["a.gguf#0123abcd"]) == 4


def test_silent_fallback_is_found_before_anything_is_measured(sweep: Bench) -> None:
    sweep.go_wrong(swap="q8_0")
    with pytest.raises(SilentFallback, match="is q8_0; asked for was f16"):
        sweep.run()
    assert sweep.calls() == [] and sweep.store.bench_rows() == []


@pytest.mark.parametrize(
    ("plan", "error"),
    [
        ({"row": "f32"}, SilentFallback),
        ({"depths": 1}, LogNotUnderstood),
        ({"speed": 0.0}, LogNotUnderstood),
        ({"crash": "f16"}, ToolFailed),
    ],
)
def test_what_is_not_sound_is_not_stored(sweep: Bench, plan: dict[str, object], error: type[Exception]) -> None:
    sweep.go_wrong(**plan)
    with pytest.raises(error):
        sweep.run()
    assert sweep.store.bench_rows() == []


def test_settings_are_handed_on_and_checked_in_the_probe(sweep: Bench) -> None:
    types = tuple(map(parse_types, ("turbo3 k=0:q8_0", "turbo3 decay=balanced", "turbo3", "turbo3 cal=none sink=0 tail=0")))
    sweep.go_wrong(lines={"0:q8_0": BY_LAYER, "balanced": DECAYING, "": TYPED, "none 0 0": PLAIN})
    rows = sweep.run(types=types, rounds=1)
    assert sweep.calls() == [f"turbo3/turbo3 {settings}0,512" for settings in ("0:q8_0 ", "balanced ", "", "none 0 0 ")]
    assert [row.types for row in rows] == [t for t in types for _ in range(4)]
    assert sweep.run(types=types, rounds=1) == rows and len(sweep.calls()) == 4, "types with the same names are told apart"


@pytest.mark.parametrize(
    ("types", "line", "words"),
    [
        ("turbo3 k=0:q8_0", TYPED, "its map of K names 0"),
        ("turbo3 k=0:q8_0", BY_LAYER.replace("0:q8_0;1", "0"), "is turbo3 k=0-3:turbo3 v=0-3:turbo3 .*; asked for was turbo3 k=0:q8_0"),
        ("turbo3 decay=balanced", PLAIN, "is turbo3; asked for was turbo3 decay=balanced"),
        ("turbo3", PLAIN, "is turbo3; asked for was turbo3 cal=auto sink=4 tail=64"),
        ("turbo3", f"{PLAIN} | no calibration: the disk is full", "turbo3 has no calibration, which it gets by default: the disk is full"),
        ("turbo3 cal=none sink=0 tail=0", TYPED, "is turbo3 cal=#1a2b3c4d sink=4 tail=16; asked for was turbo3 cal=none sink=0 tail=0"),
        ("turbo3 decay=balanced", DECAYING.replace("4/4", "4/0"), "K of 4 and V of 0 layers decay"),
    ],
)
def test_settings_that_the_probe_does_not_find(sweep: Bench, types: str, line: str, words: str) -> None:
    sweep.go_wrong(lines=dict.fromkeys(("0:q8_0", "balanced", "", "none 0 0"), line))
    with pytest.raises(SilentFallback, match=words):
        sweep.run(types=(parse_types(types),))
    assert sweep.calls() == []


def test_logs_have_names_that_every_file_system_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path))
    long = "turbo3 k=" + ";".join(f"{i}:q8_0" for i in range(100))
    texts = [
        "turbo4/turbo3",
        "turbo3 k=0,-1:q8_0",
        "turbo3 k=0:q8_0;-1:q8_0",
        "turbo3 k=*:q8_0",
        "turbo3 decay=15,35,50",
        long,
        long + ";*:f16",
    ]
    names = [bench._log("probe", CacheSpec.parse(text)).name for text in texts]
    assert names[0] == "probe-turbo4-turbo3.log", "as before"
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[\w.-]{1,100}", name) for name in names)


def test_plan_that_does_not_fit_the_model(sweep: Bench) -> None:
    with pytest.raises(UsageError, match="trained on 2048"):
        sweep.run(depths=(2000,))
    with pytest.raises(UsageError, match="there is no layer 4"):
        sweep.run(types=(parse_types("turbo3 k=4:q8_0"),))
    with pytest.raises(UsageError, match="head size 80"):
        bench.check_fit(
            bench.BenchPlan((CacheSpec("turbo3", "turbo3"),), (0,), 1, 1, 1, 1, "CPU"),
            msgspec.structs.replace(MODEL, head_k=80, head_v=80),
        )


@pytest.mark.parametrize("out", ["{", '{"build_commit": "x"}', "[]", "error: failed"])
def test_output_that_is_not_understood(out: str) -> None:
    with pytest.raises(LogNotUnderstood, match="llama-bench printed"):
        bench.rows_of(out)
