"""The whole of ppl-gate on a stand-in for llama-perplexity that prints golden logs.

Risks: a case measured twice or lost after a kill, a silent fallback that is stored, a crash taken for a verdict, a lost last chunk.
"""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import tiny_gguf
from measuring import MODEL, case, program

from turbo_gguf.errors import EnvironmentMissing, LogNotUnderstood
from turbo_gguf.inputs.models import TextFile
from turbo_gguf.measure import base_logits, kld
from turbo_gguf.measure.metrics import Metric
from turbo_gguf.measure.result import BaseRun
from turbo_gguf.measure.store import Store

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]

SWEEP = """
[[run]]
ctx = 512
chunks = 4
types = ["turbo4", "turbo3"]
"""
SECOND_CONTEXT = """
[[run]]
ctx = 1024
chunks = 3
types = ["turbo4"]
"""
COMPETITORS = ("f16", "q8_0", "q5_0", "q4_0", "q4_0 sink=4 tail=64")
ALL = ["base-512", "noise-512", *(f"{types}-512" for types in COMPETITORS), "turbo4-512", "turbo3-512"]
SECOND = ["base-1024", "noise-1024", *(f"{types}-1024" for types in COMPETITORS), "turbo4-1024"]

_RUN = """
import sys
from pathlib import Path
from turbo_gguf.make.build import Build
from turbo_gguf.patchset.tree import Tree
import turbo_gguf.make.build
tree = Tree(path=Path("tree"), upstream="test", commit="0c1e57098", digest="d" * 64)
turbo_gguf.make.build.ensure_build = lambda *a, **k: Build(id="fake", path=Path(sys.argv[1]), preset="cpu", tree=tree, compiler="cc")
from turbo_gguf.cli import main
main(["ppl-gate", *sys.argv[2:]])
"""


class Gate:
    """A folder with a fake build, a tiny model and a plan of what goes wrong."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        fake = f"#!{sys.executable}\nimport runpy\nrunpy.run_path({str(HERE / 'fake_perplexity.py')!r}, run_name='__main__')\n"
        program(folder / "build" / "bin" / "llama-perplexity", fake)
        tiny_gguf.write(folder / "tiny.gguf")
        (folder / "text.txt").write_text("def f(x):\n    return x\n" * 2000)
        (folder / "sweep.toml").write_text(SWEEP)
        (folder / "gates.toml").write_text(
            '[type.turbo4]\nreference = "q4_0"\nmean_kld = 0.95\n[type.turbo3]\nreference = "q4_0"\nmean_kld = 6\n'
        )
        self.plan()

    def plan(self, **what: object) -> None:
        (self.folder / "plan.json").write_text(json.dumps({"count": str(self.folder / "count"), **what}))

    def start(self, *args: str) -> subprocess.Popen[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith(("LLAMA_", "GGML_"))}
        env |= {"TURBO_GGUF_HOME": str(self.home), "FAKE_PLAN": str(self.folder / "plan.json")}
        options = {"--model": "tiny.gguf", "--text": "text.txt", "--config": "sweep.toml", "--gates": "gates.toml", "--out": "out"}
        given = [part for name, value in options.items() if name not in args for part in (name, str(self.folder / value))]
        argv = [sys.executable, "-c", _RUN, str(self.folder / "build"), *given, *args]
        # a parent that ignores SIGINT (nohup, a job in the background) hands that on
        allow = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=REPOSITORY, preexec_fn=allow)

    def run(self, *args: str) -> tuple[int, str, str]:
        process = self.start(*args)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def calls(self) -> list[str]:
        count = self.folder / "count"
        return count.read_text().splitlines() if count.exists() else []

    def stored(self) -> list[str]:
        return [f"{'noise' if r.case.is_noise_floor else r.case.types}-{r.case.ctx}" for r in Store(self.home / "results").results()]


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


def test_from_end_to_end(gate: Gate) -> None:
    (gate.folder / "sweep.toml").write_text(SWEEP + SECOND_CONTEXT)
    rc, out, err = gate.run()
    assert rc == 0, err
    assert gate.calls() == ALL + SECOND and gate.stored() == [name for name in ALL + SECOND if not name.startswith("base")]
    assert out.count("### ") == 2 and re.search(r"\| turbo3 .* pass \|", out) and "error" not in out
    assert "[1/15] ctx 512, f32 (base logits)" in err and " left" in err
    assert (gate.folder / "out" / "table.md").read_text() == f"Made with patches `{'d' * 12}`.\n\n{out}"
    assert (gate.folder / "out" / "plot.png").read_bytes()[:4] == b"\x89PNG"
    result = Store(gate.home / "results").results()[-1]
    assert result.bits.nominal == 4.5 and result.bits.low is not None and result.patch_digest == "d" * 64
    assert (result.stats.chunks, result.stats.tokens) == (3, 3 * 511)


def test_second_run_measures_nothing_and_says_the_same(gate: Gate) -> None:
    _, first, _ = gate.run()
    rc, second, err = gate.run()
    assert (rc, second, gate.calls()) == (0, first, ALL) and "8 of 8 cases are in the store already" in err


def test_more_types_measure_only_what_is_new(gate: Gate) -> None:
    gate.run()
    rc, out, _ = gate.run("--types", "turbo4,turbo4/turbo3", "--types", "turbo2", "--ctx", "512")
    assert rc == 0 and gate.calls()[len(ALL) :] == ["turbo4/turbo3-512", "turbo2-512"], "the base logits are still there"
    assert "turbo4/turbo3" in out


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_killed_run_continues_where_it_stopped(gate: Gate, number: signal.Signals) -> None:
    gate.plan(sleep={"q4_0-512": 30})
    process = gate.start()
    deadline = time.monotonic() + 60
    while "q4_0-512" not in gate.calls():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0 and gate.stored() == ["noise-512", "f16-512", "q8_0-512", "q5_0-512"]
    gate.plan()
    rc, _, err = gate.run()
    assert rc == 0, err
    assert Counter(gate.calls()) == Counter([*ALL, "q4_0-512"]), "only the case in hand is measured again"
    assert "4 of 8 cases are in the store already" in err


def test_kill_while_the_base_is_written_leaves_no_half_file(gate: Gate) -> None:
    gate.plan(sleep={"base-512": 30})
    process = gate.start()
    while not list(gate.home.glob("base/*.part")):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert not list(gate.home.glob("base/*.logits"))
    gate.plan()
    assert gate.run()[0] == 0
    assert not list(gate.home.glob("base/*.part"))


def test_silent_fallback_is_never_stored(gate: Gate) -> None:
    """The classic: K and V become q8_0 behind the back of the user, and the numbers look excellent."""
    gate.plan(swap={"turbo4": "q8_0"}, mean={"turbo4": 0.00003})
    rc, out, err = gate.run()
    assert rc == 4 and out == ""
    assert "is q8_0; asked for was turbo4" in err and "log: " in err
    assert "turbo4-512" not in gate.stored() and gate.stored()[-1] == "q4_0 sink=4 tail=64-512"


def test_type_at_the_noise_floor_was_not_used(gate: Gate) -> None:
    gate.plan(mean={"turbo3": 0.000001})
    rc, out, err = gate.run()
    assert rc == 4 and out == "" and "noise floor" in err


def test_crash_is_no_verdict(gate: Gate) -> None:
    gate.plan(crash=["turbo3-512"])
    rc, out, err = gate.run()
    assert rc == 4 and out == "" and "SIGSEGV" in err and "log:" in err
    assert "turbo3-512" not in gate.stored() and "turbo4-512" in gate.stored()


def test_nan_is_no_verdict_and_not_tried_again(gate: Gate) -> None:
    gate.plan(nan=["turbo3-512"])
    rc, out, err = gate.run()
    assert rc == 4 and out == "" and "NaN" in err and gate.calls().count("turbo3-512") == 1


def test_lost_end_of_a_log_is_run_again(gate: Gate) -> None:
    gate.plan(cut={"q5_0-512": 1, "turbo4-512": 2})
    rc, _, err = gate.run()
    assert rc == 0 and err.count("lost the end of its log") == 3, err
    assert Counter(gate.calls()) == Counter([*ALL, "q5_0-512", "turbo4-512", "turbo4-512"])


def test_log_that_is_never_complete_is_an_error(gate: Gate) -> None:
    gate.plan(cut={"turbo4-512": 99})
    rc, out, err = gate.run()
    assert rc == 4 and out == "" and f"in {kld.TRIES} runs" in err and gate.calls().count("turbo4-512") == kld.TRIES
    assert "turbo4-512" not in gate.stored()


def test_failed_gate_is_exit_code_1_with_the_table(gate: Gate) -> None:
    gate.plan(mean={"turbo4": 0.0035})
    rc, out, err = gate.run()
    assert rc == 1 and re.search(r"\| turbo4 .* fail \|", out) and "turbo4 at context 512: fail" in err


def test_undecided_is_said_and_does_not_fail(gate: Gate) -> None:
    gate.plan(mean={"turbo4": 0.0028 * 0.95})
    rc, out, err = gate.run()
    assert rc == 0 and "within error" in out and "--chunks -1" in err


# --- what types get by default ---------------------------------------------------------------------------------------------

TYPED, PLAIN = "turbo3", "turbo3 cal=none sink=0 tail=0"


def test_types_as_typed_and_plain_from_end_to_end(gate: Gate) -> None:
    rc, out, err = gate.run("--types", f"{TYPED},{PLAIN},turbo3 tail=128,q4_0 cal=auto")
    assert rc == 0, err
    assert gate.stored()[-4:] == [f"{types}-512" for types in (TYPED, PLAIN, "turbo3 tail=128", "q4_0 cal=auto")]
    typed, plain, tail, calibrated = Store(gate.home / "results").results()[-4:]
    assert [str(r.facts.caches[0].spec).partition(" ")[2] for r in (typed, plain, tail, calibrated)] == [
        "cal=#1a2b3c4d sink=4 tail=32",
        "",
        "cal=#1a2b3c4d sink=4 tail=128",
        "cal=#1a2b3c4d",
    ], "the result keeps what was in force"
    assert typed.argv[typed.argv.index("-ctv") + 2 :][:2] == ("-fa", "on"), "what is not asked for is not named"
    assert plain.argv[plain.argv.index("-ctv") + 2 :][:6] == ("--cache-calibration", "none", "--cache-sink", "0", "--cache-tail", "0")
    assert typed.bits.nominal == plain.bits.nominal == 3.5 and typed.bits.exact > plain.bits.exact == 0
    assert f"| `{PLAIN}` |" in out


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("no calibration: the model has two KV caches", "turbo3 has no calibration, which it gets by default: the model has two KV caches"),
        ("no exact tokens: the context is too short", "turbo3 has no exact tokens, which it gets by default: the context is too short"),
    ],
)
def test_default_that_could_not_be_had_is_never_stored(gate: Gate, part: str, words: str) -> None:
    gate.plan(without={TYPED: [part]})
    rc, out, err = gate.run("--types", TYPED)
    assert rc == 4 and out == "" and words in err and "hint: to measure it without" in err and f"{TYPED}-512" not in gate.stored()
    assert gate.run("--types", PLAIN)[0] == 0 and gate.stored()[-1] == f"{PLAIN}-512"


# --- types by layer, and decay --------------------------------------------------------------------------------------------

BY_LAYER = "turbo3 k=0:q8_0 v=-1:turbo4 cal=none sink=0 tail=0"
MAPS = ["0:q8_0;1:turbo3", "0:turbo3;1:turbo4"]
DECAY = "turbo3 decay=balanced cal=none sink=0 tail=0"


def test_types_by_layer_from_end_to_end(gate: Gate) -> None:
    gate.plan(layers={BY_LAYER: MAPS})
    rc, out, err = gate.run("--types", f"turbo3,{BY_LAYER}")
    assert rc == 0, err
    assert gate.stored()[-2:] == ["turbo3-512", f"{BY_LAYER}-512"]
    assert re.search(rf"\| `{re.escape(BY_LAYER)}` +\| +5 \|", out), out
    stored = Store(gate.home / "results").results()[-1]
    assert stored.bits.nominal == 5.0 and str(stored.facts.caches[0].spec.layers_k) == MAPS[0]
    assert gate.run("--types", BY_LAYER)[0] == 0 and gate.calls().count(f"{BY_LAYER}-512") == 1


def test_one_layer_of_another_type_is_never_stored(gate: Gate) -> None:
    """A map that the tool reads otherwise: same types, same sizes, another layer."""
    gate.plan(layers={BY_LAYER: ["0:turbo3;1:q8_0", MAPS[1]]})
    rc, out, err = gate.run("--types", BY_LAYER)
    assert rc == 4 and out == "" and "asked for was turbo3 k=0:q8_0;1:turbo3" in err and "log: " in err
    assert f"{BY_LAYER}-512" not in gate.stored()


def test_build_that_ignores_the_map(gate: Gate) -> None:
    rc, _, err = gate.run("--types", BY_LAYER)
    assert rc == 4 and "its map of K names 0" in err


def test_decay_from_end_to_end(gate: Gate) -> None:
    rc, out, err = gate.run("--types", DECAY, "--batch", "128")
    assert rc == 0, err
    assert re.search(rf"\| `{DECAY}` +\| +3\.5 \|", out)
    stored = Store(gate.home / "results").results()[-1]
    assert [(d.cells_k, d.cells_v) for d in stored.facts.decayed] == [(4 * 192, 4 * 192)]
    assert stored.argv[stored.argv.index("-b") :][:4] == ("-b", "128", "-ub", "128")


def test_decay_of_k_alone_is_never_stored(gate: Gate) -> None:
    gate.plan(decayed={DECAY: [768, 0]})
    rc, out, err = gate.run("--types", DECAY, "--batch", "128")
    assert rc == 4 and out == "" and "0 cells of V decayed; it must have been 768" in err
    assert f"{DECAY}-512" not in gate.stored() and gate.calls().count(f"{DECAY}-512") == 1


def test_lost_count_of_decay_is_run_again(gate: Gate) -> None:
    gate.plan(uncounted={f"{DECAY}-512": 2})
    rc, _, err = gate.run("--types", DECAY, "--batch", "128")
    assert rc == 0 and err.count("counts the decayed cells of 0 of 1 KV caches: llama.cpp lost the end of its log") == 2, err
    assert gate.calls().count(f"{DECAY}-512") == 3


def test_base_that_decays_is_no_base(gate: Gate) -> None:
    """What a variable would do that nobody told the case about."""
    (gate.folder / "build" / "bin" / "llama-perplexity").write_text(
        f"#!{sys.executable}\nimport runpy, sys\nsys.argv += ['--cache-decay', 'balanced']\n"
        f"runpy.run_path({str(HERE / 'fake_perplexity.py')!r}, run_name='__main__')\n"
    )
    rc, _, err = gate.run("--batch", "128")
    assert rc == 4 and "is f32 decay=balanced; asked for was f32" in err and gate.stored() == []


def test_base_is_attended_without_flash_attention(gate: Gate) -> None:
    """With it, llama.cpp rounds an f32 cache to f16: the base would be that of f16, and nothing would say so."""
    assert gate.run()[0] == 0
    asked = {str(r.case.types): r.argv[r.argv.index("-fa") + 1] for r in Store(gate.home / "results").results()}
    assert asked.pop("f32") == "off" and set(asked.values()) == {"on"}
    gate.plan(flash=True)
    rc, _, err = gate.run("--ctx", "1024")
    assert rc == 4 and "flash attention is enabled; asked for was disabled" in err and not list(gate.home.glob("base/*.part"))


def test_type_that_fell_back_to_f16_was_not_used(gate: Gate) -> None:
    """Far above the noise floor, as on quantized weights, and its numbers are those of f16."""
    gate.plan(mean={"f16": 0.0033, "turbo3": 0.0033})
    rc, out, err = gate.run()
    assert rc == 4 and out == "" and "turbo3 at ctx 512: every number is that of f16" in err


def test_base_that_was_cut_on_disk_is_made_again(gate: Gate) -> None:
    gate.run("--ctx", "512", "--types", "turbo4")
    (path,) = gate.home.glob("base/*.logits")
    path.write_bytes(path.read_bytes()[:-1])
    rc, _, err = gate.run("--ctx", "512", "--types", "turbo4,turbo3")
    assert rc == 0, err
    assert gate.calls()[-2:] == ["base-512", "turbo3-512"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--types", "turbo9"), "unknown cache type 'turbo9'"),
        (("--ctx", "4096"), "trained on"),
        (("--model", "nowhere.gguf"), "no such file"),
        (("--text", "nowhere.txt"), "nowhere.txt"),
        (("--config", "nowhere"), "nowhere.toml"),
        (("--gates", "nowhere.toml"), "nowhere.toml"),
        (("--chunks", "0"), "chunks = 0"),
        (("--types", "turbo3 k=2:q8_0"), "there is no layer 2, the model has 2 layers with a KV cache"),
        (("--types", "turbo3 adaptive=7 k=0:q8_0"), "exclude each other"),
        (("--types", "turbo3 decay=balanced"), "use --batch 64 or less"),
    ],
)
def test_usage_errors_come_before_any_work(gate: Gate, args: tuple[str, ...], words: str) -> None:
    rc, out, err = gate.run(*args)
    assert rc == 2 and out == "" and words in err and "Traceback" not in err and gate.calls() == []


def test_head_size_80_is_refused_with_the_types_that_work(gate: Gate) -> None:
    tiny_gguf.write(gate.folder / "head80.gguf", head=80)
    rc, _, err = gate.run("--model", str(gate.folder / "head80.gguf"), "--types", "turbo3")
    assert rc == 2 and "cache type turbo3: the K head size 80" in err and "f32, f16, bf16" in err and gate.calls() == []


def test_truncated_model(gate: Gate) -> None:
    whole = (gate.folder / "tiny.gguf").read_bytes()
    (gate.folder / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    rc, _, err = gate.run("--model", str(gate.folder / "cut.gguf"))
    assert rc == 2 and "truncated" in err and "hint:" in err


def test_environment_that_changes_the_measurement(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBO_TEST_KNOB", "1")
    monkeypatch.setenv("TURBO_GGUF_TEST", "ours, and nothing that llama.cpp reads")
    rc, _, _ = gate.run("--ctx", "512")
    assert rc == 0 and Store(gate.home / "results").results()[0].case.env == ("TURBO_TEST_KNOB=1",)
    monkeypatch.delenv("TURBO_TEST_KNOB")
    assert gate.run("--ctx", "512")[0] == 0 and len(gate.calls()) == 2 * 9, "another environment is another measurement"


def test_settings_from_outside_are_refused(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBO_DECAY", "balanced")
    rc, _, err = gate.run()
    assert rc == 2 and "the environment sets TURBO_DECAY" in err and "--types 'turbo3 k=0,-1:q8_0'" in err and gate.calls() == []


def test_no_room_for_the_base_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary of 256,000 over a long text asks for more than any disk has free."""
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path))
    model = msgspec.structs.replace(MODEL, n_vocab=256_000)
    text = TextFile(path=tmp_path / "t", sha256="t", name="t", size=10**12)
    with pytest.raises(EnvironmentMissing, match="MB free") as caught:
        base_logits.require_disk(case(chunks=-1), model, text)
    assert "--chunks" in caught.value.hint
    assert base_logits.require_disk(case(chunks=8), MODEL, text) == 16_744_404
    assert base_logits.require_disk(case(chunks=8), MODEL, msgspec.structs.replace(text, size=512 * 3)) == 6_279_164


def test_disk_that_runs_full_under_the_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama-perplexity checks no write: exit code 0, and a file that is too short."""
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path))
    run = BaseRun(key="k", chunks=8, ppl=Metric(10.0, 0.1), splits=1, seconds=1.0, size=16_744_404)

    def write(part: Path) -> BaseRun:
        part.write_bytes(b"_logits_" + bytes(1000))
        return run

    for free, error in ((1000, EnvironmentMissing), (10**12, LogNotUnderstood)):
        monkeypatch.setattr(base_logits.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        with pytest.raises(error, match="1008 bytes written, 16744404 expected"), base_logits.ensured(case(chunks=8), write):
            pass
    assert not logits()


def logits() -> list[str]:
    return sorted(path.name for path in base_logits.folder().iterdir() if path.suffix != ".lock")


def test_old_base_logits_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path))
    base_logits.folder().mkdir()
    for age, name in enumerate(("newest", "middle", "oldest")):
        for end in ("logits", "json"):
            path = base_logits.folder() / f"{name}.{end}"
            path.write_bytes(bytes(100))
            os.utime(path, (1000 - age, 1000 - age))
    base_logits.prune(limit=150)
    assert logits() == ["newest.json", "newest.logits"]


def test_base_logits_that_another_process_uses_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several contexts at a time on one node may take more than is kept."""
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path))

    def write(part: Path) -> BaseRun:
        size = base_logits.size_of(512, 259, 4)
        part.write_bytes((b"_logits_" + struct.pack("<iii", 512, 259, 4)).ljust(size, b"\0"))
        return BaseRun(key="k", chunks=4, ppl=Metric(10.0, 0.1), splits=1, seconds=1.0, size=size)

    def prune_elsewhere() -> None:
        script = "from turbo_gguf.measure import base_logits; base_logits.prune(limit=0)"
        subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True)

    with base_logits.ensured(case(chunks=4), write) as (path, _):
        prune_elsewhere()
        assert logits() == [f"{path.stem}.json", path.name]
    prune_elsewhere()
    assert not logits()


def test_size_of_base_logits_is_that_of_real_files() -> None:
    """llama-perplexity 0c1e57098: 8 x 512 and 3 x 512 tokens of a vocabulary of 4096, 4 x 512 of 259."""
    assert base_logits.size_of(512, 4096, 8) == 16_744_404
    assert base_logits.size_of(512, 4096, 3) == 6_279_164
    assert base_logits.size_of(512, 259, 4) == 546_772


def test_help_is_there_without_a_build() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "turbo_gguf.ppl-gate", "--help"], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert done.returncode == 0 and "--types" in done.stdout and "Exit codes" in done.stdout
