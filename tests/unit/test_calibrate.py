"""``turbo-gguf calibrate`` on a stand-in for llama-turbo-calibrate.

Risks: a file that is not what the tool meant, an old file lost, minutes of work before a folder turns out to be missing, a wrong code.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny_gguf
from click.testing import CliRunner, Result
from measuring import program

import turbo_gguf.cli.calibrate
from turbo_gguf.cache import calibration
from turbo_gguf.cli import main
from turbo_gguf.make.build import Build
from turbo_gguf.measure import calibrate
from turbo_gguf.patchset.tree import Tree

_FAKE = f"""#!{sys.executable}
import json, os, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import calibration_writer
import numpy as np
from turbo_gguf.cache.calibration import Calibration, LayerCalibration, digest
here, argv = Path(__file__).parent, sys.argv[1:]
(here / "argv.json").write_text(json.dumps(argv))
plan = json.loads((here / "plan.json").read_text()) if (here / "plan.json").exists() else {{}}
out = Path(argv[argv.index("-o") + 1])
print("0 of 77 tokens", file=sys.stderr)
print("a warning of the library", file=sys.stderr)
if "error" in plan:
    print(f"error: {{plan['error']}}", file=sys.stderr)
    sys.exit(plan["rc"])
if plan.get("signal"):
    os.kill(os.getpid(), plan["signal"])
ones = np.ones((1, 8), np.float32)
layer = LayerCalibration(ones, ones, None, None, None, ones)
made = Calibration("llama", "tiny", "0123abcd", 77, {{0: layer}}, 3, plan.get("distance", 1.0))
calibration_writer.write(made, out)
if plan.get("cut"):
    out.write_bytes(out.read_bytes()[:plan["cut"]])
print("77 of 77 tokens", file=sys.stderr)
if not plan.get("silent"):
    print(f"77 tokens, 1 layers, digest {{plan.get('digest', digest(made))}}")
"""


class Calibrating:
    """A folder with a fake build, a tiny model and a text."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.bin = folder, folder / "build" / "bin"
        program(self.bin / calibrate.TARGET, _FAKE)
        self.model = tiny_gguf.write(folder / "tiny.gguf", head=8, n_layer=1)
        self.text, self.out = folder / "text.txt", folder / "out.gguf"
        self.text.write_text("once upon a time")
        self.targets: Sequence[str] = ()
        monkeypatch.setenv("TURBO_GGUF_HOME", str(folder / "home"))
        monkeypatch.setattr(turbo_gguf.cli.calibrate, "ensure_build", self.build)
        monkeypatch.chdir(folder)

    def build(self, preset: str, *, upstream: str | None, targets: Sequence[str]) -> Build:
        self.targets = targets
        tree = Tree(path=self.folder, upstream="test", commit="c", digest="d")
        return Build(id="fake", path=self.folder / "build", preset=preset, tree=tree, compiler="cc")

    def run(self, *args: str | Path, **plan: object) -> Result:
        (self.bin / "plan.json").write_text(json.dumps(plan))
        return CliRunner().invoke(main, ["calibrate", str(self.model), *map(str, args)])

    @property
    def argv(self) -> list[str]:
        return json.loads((self.bin / "argv.json").read_text())


@pytest.fixture
def calibrating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calibrating:
    return Calibrating(tmp_path, monkeypatch)


def test_a_path_on_stdout_and_words_on_stderr(calibrating: Calibrating) -> None:
    done = calibrating.run("--out", calibrating.out)
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{calibrating.out}\n"
    assert done.stderr == "0 of 77 tokens\n77 of 77 tokens\n1 layers from 77 tokens, K of 1 centered, V of 0 centered\n"
    assert calibration.read(calibrating.out).tokens == 77


def test_a_token_that_stands_out_is_named(calibrating: Calibrating) -> None:
    done = calibrating.run("--out", calibrating.out, distance=6.25)
    assert done.stderr.endswith(
        "; token 3 is an attention sink (its K lies 6.2 times as far from the mean as that of others): keep --cache-sink above 3\n"
    )


def test_what_the_tool_is_asked(calibrating: Calibrating) -> None:
    other = calibrating.folder / "other.txt"
    other.write_text("and then")
    done = calibrating.run(calibrating.text, other, "--tokens", "512", "--threads", "3")
    assert done.exit_code == 0, done.output
    assert done.stdout == "tiny.calibration.gguf\n"
    assert calibrating.targets == (calibrate.TARGET,)
    argv = calibrating.argv
    del argv[argv.index("-o") : argv.index("-o") + 2]
    assert argv == ["-m", str(calibrating.model), "-n", "512", "-t", "3", "-f", str(calibrating.text), "-f", str(other)]


def test_defaults(calibrating: Calibrating) -> None:
    assert calibrating.run().exit_code == 0
    argv = calibrating.argv
    assert argv[argv.index("-n") + 1] == "4096"
    assert "-f" not in argv and "-ngl" not in argv
    assert calibrating.run("--preset", "cuda").exit_code == 0
    assert " ".join(calibrating.argv).endswith("-ngl 999")


@pytest.mark.parametrize(
    ("plan", "code", "message", "hint"),
    [
        ({"rc": 2, "error": "the text has 20 tokens, a calibration needs 64"}, 2, "error: the text has 20 tokens", ""),
        ({"rc": 2, "error": "this model can't be calibrated: it has an encoder"}, 2, "it has an encoder", "0011-calibration.md"),
        ({"rc": 1, "error": "x: can't be written: No space left on device"}, 3, "No space left", "the disk is full"),
        ({"rc": 1, "error": "failed to compute"}, 4, "exit code 1", "the log says more"),
        ({"signal": 11}, 4, "killed by SIGSEGV", "the log says more"),
        ({"cut": 200}, 4, "wrote no complete file", ""),
        ({"silent": True}, 4, "and said no digest", ""),
        ({"digest": "00000000"}, 4, "and said 00000000", ""),
    ],
)
def test_errors(calibrating: Calibrating, plan: dict[str, object], code: int, message: str, hint: str) -> None:
    calibrating.out.write_text("old")
    done = calibrating.run("--out", calibrating.out, **plan)
    assert done.exit_code == code, done.output
    assert message in done.stderr
    assert "log: " in done.stderr
    assert ("hint: " in done.stderr) == bool(hint)
    assert hint in done.stderr
    assert done.stdout == ""
    assert calibrating.out.read_text() == "old"
    assert sorted(path.name for path in calibrating.folder.iterdir()) == ["build", "home", "out.gguf", "text.txt", "tiny.gguf"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("no.txt",), "text no.txt: No such file"),
        (("--out", "no/a.gguf"), "no/a.gguf: No such file or directory"),
        (("--out", "text.txt/a.gguf"), "text.txt/a.gguf: Not a directory"),
        (("--out", "build"), "is a directory"),
        (("--out", "a" * 300), "File name too long"),
        (("--tokens", "63"), "63 is not in the range x>=64"),
    ],
)
def test_wrong_input_ends_before_the_work(calibrating: Calibrating, args: tuple[str, ...], message: str) -> None:
    done = calibrating.run(*args)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert not (calibrating.bin / "argv.json").exists()
