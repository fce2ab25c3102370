"""An installed wheel works from any folder: patches, gate files and the embedded model travel with it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from turbo_gguf import __version__, patchset

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.network  # pip fetches the build backend


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    argv = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(argv, check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `turbo-gguf` command of a new environment, which borrows only the dependencies from this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True
    )
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(own.stdout.strip(), "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n")
    return folder / "bin" / "turbo-gguf"


def call(program: Path, folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # cmake and ninja, where the system has none
    environment = {**os.environ, "TURBO_GGUF_HOME": str(folder / "home"), "PATH": tools}
    environment.pop("PYTHONPATH", None)
    return subprocess.run([program, *args], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def evaluation_files() -> set[str]:
    """All sweeps and gates, and what explains them."""
    return {"eval/README.md", *(f"eval/{path.name}" for path in (ROOT / "eval").glob("*.toml"))}


def test_the_build_backend_is_told_of_all_files_of_an_evaluation() -> None:
    told = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert {path: f"turbo_gguf/_assets/{path}" for path in evaluation_files()} == {k: v for k, v in told.items() if k.startswith("eval/")}


def test_the_wheel_holds_all_that_a_run_needs(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    patches = patchset.load()
    wanted = {f"ggml-patches/hooks/{hook.name}" for hook in patches.hooks} | {f"ggml-patches/overlay/{path}" for path in patches.overlay}
    wanted |= {"ggml-patches/series", "ggml-patches/upstreams.toml"}
    assert {f"turbo_gguf/_assets/{path}" for path in wanted | evaluation_files()} <= names
    assert "turbo_gguf/data/model/eval-model.gguf" in names
    assert not [name for name in names if name.startswith(("build/", "tests/", "scripts/"))]


def test_the_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 15_000_000


def test_the_installed_package_is_not_this_checkout(program: Path, tmp_path: Path) -> None:
    code = "from turbo_gguf import assets; print(assets.is_checkout(), assets.patches_dir())"
    done = subprocess.run([program.with_name("python"), "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    checkout, folder = done.stdout.split()
    assert checkout == "False"
    assert Path(folder).is_relative_to(program.parents[1])


def test_version_from_another_folder(program: Path, tmp_path: Path) -> None:
    assert call(program, tmp_path, "--version").stdout == f"turbo-gguf, version {__version__}\n"


def test_patch_list_from_another_folder(program: Path, tmp_path: Path) -> None:
    done = call(program, tmp_path, "patch", "list")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"digest {patchset.load().digest}"


def test_doctor_from_another_folder(program: Path, tmp_path: Path) -> None:
    done = call(program, tmp_path, "doctor")
    assert done.returncode == 0, done.stderr
    assert str(program.with_name("python")) in done.stdout
    assert "turbo-gguf upstream fetch" in done.stdout
    assert not (tmp_path / "home").exists()
