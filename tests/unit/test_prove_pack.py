"""What a proof takes along: programs, libraries, model, and no more than fits; and the script around it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import gguf
import prove_model
import prove_pack
import pytest

from turbo_gguf.make import presets
from turbo_gguf.make.build import Build
from turbo_gguf.make.toolkits import cuda, rocm
from turbo_gguf.patchset.tree import Tree

SCRIPT = Path(prove_pack.__file__).parent / "prove.sh"


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """A build whose programs and libraries are a program of the system; one library has a version, the other no name of its own."""
    folder = tmp_path / "build/bin"
    folder.mkdir(parents=True)
    for name in (*prove_pack.TARGETS, "libggml-cpu.so", "libggml.so.0.26.0"):
        shutil.copy(shutil.which("true") or "", folder / name)
    monkeypatch.setattr(prove_pack, "_soname", lambda path: path.resolve().name.replace(".0.26.0", ".0"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + os.urandom(300_000))
    monkeypatch.setattr(prove_pack, "embedded_model", lambda: tmp_path / "model.gguf")
    (folder / "libggml.so.0").symlink_to("libggml.so.0.26.0")
    (folder / "libggml.so").symlink_to("libggml.so.0")
    made = Build(id="abc", path=tmp_path / "build", preset="cpu-carried", tree=Tree(tmp_path, "u", "c", "d" * 20), compiler="cc 12")
    monkeypatch.setattr(prove_pack, "ensure_build", lambda *a, **k: made)
    return made


def test_the_folder_has_all_that_runs_there(build: Build, tmp_path: Path) -> None:
    assert prove_pack.main(["--preset", "cpu-carried", "--out", str(tmp_path / "out")]) == 0
    folder = tmp_path / "out/proof"
    assert {path.name for path in (folder / "bin").iterdir()} == {*prove_pack.TARGETS, "libggml-cpu.so", "libggml.so.0"}
    assert not any(path.is_symlink() for path in (folder / "bin").iterdir())
    plan = json.loads((folder / "plan.json").read_text())
    assert (plan["device"], plan["build"]) == ("CPU", "abc")
    assert (folder / "model.gguf").read_bytes()[:4] == b"GGUF"
    assert len((folder / "text.txt").read_bytes()) == prove_pack.TEXT_BYTES
    # its Python needs nothing but Python
    done = subprocess.run([sys.executable, "-S", "-E", folder / "prove_run.py", "--help"], capture_output=True, text=True, check=True)
    assert "--seconds" in done.stdout
    with tarfile.open(tmp_path / "out/proof.tar.xz") as file:
        assert "proof/prove_run.py" in file.getnames()


def test_an_archive_that_is_too_large_is_refused(build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--preset", "cpu-carried", "--out", str(tmp_path / "out")]
    assert prove_pack.main([*argv, "--megabytes", "0.01"]) == 4
    assert "more than 0.01\nhint: --megabytes allows more" in capsys.readouterr().err
    assert prove_pack.main([*argv, "--megabytes", "1"]) == 0
    with tarfile.open(tmp_path / "out/proof.tar.xz") as file:
        assert "proof/model.gguf" in file.getnames()
    assert prove_pack.main([*argv, "--megabytes", "0.2"]) == 0, "without the model it fits"
    with tarfile.open(tmp_path / "out/proof.tar.xz") as file:
        assert "proof/model.gguf" not in file.getnames() and "proof/prove_run.py" in file.getnames()


def test_what_is_carried_is_not_for_this_cpu_only_and_finds_its_libraries_beside_it() -> None:
    for preset in ("cpu-carried", "rocm-carried", "cuda-carried"):
        options = presets.preset(preset).options
        assert options["GGML_NATIVE"] == "OFF" and options["GGML_BACKEND_DL"] == "ON" and options["CMAKE_BUILD_RPATH_USE_ORIGIN"] == "ON"


@pytest.mark.usefixtures("build")
def test_it_is_compiled_for_one_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for preset, arch, variable, value in (
        ("cuda-carried", "90", "CUDAARCHS", "90-real"),
        ("rocm-carried", "gfx1100", "GPU_TARGETS", "gfx1100"),
    ):
        monkeypatch.setenv(variable, "before")
        assert prove_pack.main(["--preset", preset, "--arch", arch, "--here", "--out", str(tmp_path)]) == 0
        assert os.environ[variable] == value
        assert not (tmp_path / "proof.tar.xz").exists()


def test_a_machine_without_a_gpu_ends_with_3(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], build: Build) -> None:
    monkeypatch.setattr(cuda, "gpus", lambda: [])
    monkeypatch.setattr(rocm, "gpus", lambda: [])
    assert prove_pack.main(["--here"]) == 3
    assert "error: no GPU found" in capsys.readouterr().err


def test_the_script_unpacks_and_runs_and_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = tmp_path / "proof"
    folder.mkdir()
    (folder / "prove_run.py").write_text("import sys; print(*sys.argv[1:]); sys.exit(4)")
    with tarfile.open(tmp_path / "proof.tar.xz", "w:xz") as file:
        file.add(folder, "proof")
    env = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    for place in (folder, tmp_path / "proof.tar.xz"):
        done = subprocess.run([SCRIPT, "run", place, "--out", "x"], env=env, capture_output=True, text=True, check=False)
        model = SCRIPT.parents[2] / "turbo_gguf/data/model/eval-model.gguf"
        assert (done.returncode, done.stdout, done.stderr) == (4, f"--model {model} --out x\n", "")
    assert list((tmp_path / "tmp").iterdir()) == []
    assert subprocess.run([SCRIPT, "run"], capture_output=True, check=False).returncode == 2


def test_the_random_model_is_one(tmp_path: Path) -> None:
    path = tmp_path / "random.gguf"
    prove_model.write(path, layers=2, kv_heads=1, gqa=2, feed_forward=96)
    reader = gguf.GGUFReader(path)
    shapes = {tensor.name: tuple(int(n) for n in tensor.shape) for tensor in reader.tensors}
    assert len(shapes) == 3 + 2 * 9
    assert shapes["blk.1.attn_k.weight"] == (256, 128)
    assert shapes["blk.0.ffn_down.weight"] == (96, 256)
    down = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_down.weight").data
    assert 0.9 < down.astype("f4").std() * 96**0.5 < 1.1
    assert path.stat().st_size == reader.tensors[-1].data_offset + reader.tensors[-1].n_bytes
