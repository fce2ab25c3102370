"""Building with a cmake of our own making: what is asked of it, when it is left alone, and how failures read."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from fake_upstream import default_patches, write_tree

from turbo_gguf import build as building
from turbo_gguf import presets
from turbo_gguf.build import DEFAULT_TARGETS, MANIFEST, ensure_build, read_manifest
from turbo_gguf.errors import EnvironmentMissing, ToolFailed, UsageError
from turbo_gguf.patchset import series

CMAKE = """\
if [ "$1" = --version ]; then echo "cmake version ${FAKE_CMAKE_VERSION:-3.25.1}"; exit; fi
echo "$*" >> "$CALLS"
if [ "$1" = -S ]; then
    mkdir -p "$4"
    printf 'CMAKE_GENERATOR:INTERNAL=%s\\nCMAKE_HOME_DIRECTORY:INTERNAL=%s\\n' "$6" "$2" > "$4/CMakeCache.txt"
    exit ${FAKE_CONFIGURE_RC:-0}
fi
folder=$2
shift 5
if [ -n "$FAKE_ERROR" ]; then
    echo "[1/2] Building CXX object src/a.cpp.o"
    echo "/x/a.cpp:3:5: error: 'foo' was not declared in this scope"
    echo "ninja: build stopped: subcommand failed."
    [ "$FAKE_ERROR" = disk ] && echo "/tmp/cc.s: fatal error: error writing: No space left on device"
    exit 1
fi
mkdir -p "$folder/bin"
for target in "$@"; do : > "$folder/bin/$target"; done
echo "[2/2] Linking"
"""


class World:
    """A machine with only the programs that a test puts on PATH."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bin, self.calls, self.home = root / "bin", root / "calls", root / "home"
        self.source = write_tree(root / "llama")
        self.patches = default_patches(root / "patches")
        self.bin.mkdir()
        monkeypatch.setenv("PATH", f"{self.bin}")
        monkeypatch.setenv("CALLS", str(self.calls))
        monkeypatch.setenv("TURBO_GGUF_HOME", str(self.home))
        for name in ("CC", "CXX", "ROCM_PATH", "GPU_TARGETS", "AMDGPU_TARGETS", "CUDACXX", "CUDAARCHS"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(building, "_wheel_tool", lambda program: None)
        monkeypatch.setattr(series, "patches_dir", lambda: self.patches)
        for name in ("mkdir", "git"):
            self.link(name)
        self.program("cmake", CMAKE)
        for name in ("cc", "c++", "ninja", "ccache"):
            self.program(name, f'echo "{name} (fake) 1.0"')

    def link(self, name: str) -> None:
        path = shutil.which(name, path=os.defpath + ":/usr/local/bin")
        if path:
            (self.bin / name).symlink_to(path)

    def program(self, name: str, code: str) -> None:
        path = self.bin / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{code}\n")
        path.chmod(0o755)

    def drop(self, *names: str) -> None:
        for name in names:
            (self.bin / name).unlink()

    def ran(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def test_a_build_fetches_patches_configures_and_compiles(world: World) -> None:
    made = ensure_build(upstream=str(world.source), jobs=3)
    configure, compile_ = world.ran()
    assert configure.startswith(f"-S {made.tree.path} -B {made.path} -G Ninja -DCMAKE_MAKE_PROGRAM={world.bin / 'ninja'} ")
    assert compile_ == f"--build {made.path} --parallel 3 --target {' '.join(DEFAULT_TARGETS)}"
    assert made.tree.digest
    assert "is_turbo" in (made.tree.path / "ggml/src/ggml.c").read_text()
    assert made.tool("llama-cli").is_file()
    assert made.compiler == "c++ (fake) 1.0"
    assert len(made.id) == 12


def test_options_keep_the_build_offline_and_lean(world: World) -> None:
    ensure_build(upstream=str(world.source))
    asked = world.ran()[0].split()
    for option in (
        "LLAMA_BUILD_UI",
        "LLAMA_USE_PREBUILT_UI",
        "LLAMA_OPENSSL",
        "LLAMA_BUILD_EXAMPLES",
        "LLAMA_BUILD_APP",
        "LLAMA_LLGUIDANCE",
    ):
        assert f"-D{option}=OFF" in asked
    assert "-DCMAKE_BUILD_TYPE=Release" in asked
    assert f"-DCMAKE_CXX_COMPILER_LAUNCHER={world.bin / 'ccache'}" in asked
    assert "-DLLAMA_BUILD_NUMBER=0" in asked


def test_the_debug_preset_checks_ggml_too_and_keeps_assertions(world: World) -> None:
    ensure_build("cpu-debug", upstream=str(world.source))
    asked = world.ran()[0]
    for option in ("LLAMA_SANITIZE_ADDRESS", "LLAMA_SANITIZE_UNDEFINED", "GGML_SANITIZE_ADDRESS", "GGML_SANITIZE_UNDEFINED"):
        assert f"-D{option}=ON" in asked
    assert "-DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1 -g " in asked
    assert "NDEBUG" not in asked


def test_a_second_call_runs_nothing(world: World) -> None:
    first = ensure_build(upstream=str(world.source))
    calls = world.ran()
    assert ensure_build(upstream=str(world.source)) == first
    assert ensure_build(upstream=str(world.source), targets=["llama-bench"]) == first
    assert world.ran() == calls


def test_another_target_compiles_without_configuring(world: World) -> None:
    first = ensure_build(upstream=str(world.source))
    assert ensure_build(upstream=str(world.source), targets=["test-backend-ops"]) == first
    assert [call.split()[0] for call in world.ran()] == ["-S", "--build", "--build"]
    manifest = read_manifest(first.path)
    assert manifest is not None
    assert set(manifest.targets) == {*DEFAULT_TARGETS, "test-backend-ops"}


def test_a_changed_patch_set_is_another_build_in_the_same_folder(world: World) -> None:
    first = ensure_build(upstream=str(world.source))
    (world.patches / "overlay/ggml/src/names-turbo.inc").write_text('    "turbo4",\n')
    second = ensure_build(upstream=str(world.source))
    assert second.path == first.path
    assert second.id != first.id
    assert len(world.ran()) == 4


def test_a_changed_compiler_is_another_build(world: World) -> None:
    first = ensure_build(upstream=str(world.source))
    world.program("c++", 'echo "c++ (fake) 2.0"')
    assert ensure_build(upstream=str(world.source)).id != first.id


def test_another_cpu_is_another_build(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ensure_build(upstream=str(world.source))
    monkeypatch.setattr(building, "cpu_mark", lambda: "other")
    assert ensure_build(upstream=str(world.source)).id != first.id


def test_a_lost_program_is_built_again(world: World) -> None:
    made = ensure_build(upstream=str(world.source))
    made.tool("llama-cli").unlink()
    ensure_build(upstream=str(world.source))
    assert made.tool("llama-cli").is_file()


def test_an_unpatched_build_stands_beside(world: World) -> None:
    patched = ensure_build(upstream=str(world.source))
    plain = ensure_build(upstream=str(world.source), pristine=True)
    assert plain.path.name == f"{patched.path.name}-pristine"
    assert plain.tree.digest == ""
    assert "is_turbo" not in (plain.tree.path / "ggml/src/ggml.c").read_text()


def test_make_is_used_when_there_is_no_ninja(world: World) -> None:
    first = ensure_build(upstream=str(world.source))
    (first.path / "stale.o").write_text("")
    world.drop("ninja", "ccache")
    world.program("make", "echo make")
    (world.patches / "overlay/ggml/src/names-turbo.inc").write_text("x\n")
    ensure_build(upstream=str(world.source))
    assert " -G Unix Makefiles " in world.ran()[2]
    assert "LAUNCHER" not in world.ran()[2]
    assert not (first.path / "stale.o").exists(), "CMake refuses a folder of another generator"


@pytest.mark.parametrize(
    ("gone", "message", "hint"),
    [
        (["c++"], "not found: g++", "apt-get install g++"),
        (["cc", "c++"], "not found: gcc, g++", "apt-get install gcc g++"),
        (["cmake"], "not found: cmake", "apt-get install cmake; or pip install 'turbo-gguf[build]'"),
        (["ninja"], "not found: make", "apt-get install make"),
    ],
)
def test_missing_programs_are_named_with_their_packages(world: World, gone: list[str], message: str, hint: str) -> None:
    world.drop(*gone)
    with pytest.raises(EnvironmentMissing) as caught:
        ensure_build(upstream=str(world.source))
    assert (caught.value.message, caught.value.hint, caught.value.exit_code) == (message, hint, 3)


def test_an_old_cmake_is_named_with_its_version(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CMAKE_VERSION", "3.10.2")
    with pytest.raises(EnvironmentMissing, match=r"cmake is 3\.10, the preset cpu needs 3\.14"):
        ensure_build(upstream=str(world.source))


def test_a_new_cmake_of_the_environment_beats_an_old_one(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FAKE_CMAKE_VERSION", "3.10.2")
    world.program("../wheel-cmake", CMAKE.replace("${FAKE_CMAKE_VERSION:-3.25.1}", "3.31.0"))
    monkeypatch.setattr(building, "_wheel_tool", lambda program: tmp_path / "wheel-cmake" if program == "cmake" else None)
    assert ensure_build(upstream=str(world.source)).tool("llama-cli").is_file()


def test_a_compile_error_shows_itself_the_log_and_the_way_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_ERROR", "1")
    with pytest.raises(ToolFailed) as caught:
        ensure_build(upstream=str(world.source))
    lines = caught.value.message.splitlines()
    name = next((world.home / "builds").iterdir()).name
    logs = world.home / "logs"
    assert lines == [
        f"compiling llama.cpp failed; log: {logs / f'build-{name}.out'}, {logs / f'build-{name}.err'}",
        "  /x/a.cpp:3:5: error: 'foo' was not declared in this scope",
    ]
    assert caught.value.hint == "mend the error; the same command again compiles only what is left"
    assert caught.value.exit_code == 4
    assert read_manifest(world.home / "builds" / name) is None


def test_a_failed_build_is_tried_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_ERROR", "1")
    with pytest.raises(ToolFailed):
        ensure_build(upstream=str(world.source))
    monkeypatch.delenv("FAKE_ERROR")
    assert ensure_build(upstream=str(world.source)).tool("llama-cli").is_file()


def test_a_failed_configure_says_what_to_remove(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CONFIGURE_RC", "1")
    with pytest.raises(ToolFailed, match=r"configuring llama\.cpp failed") as caught:
        ensure_build(upstream=str(world.source))
    assert f"rm -r {world.home / 'builds'}" in caught.value.hint


def test_a_disk_that_fills_up_while_compiling_is_the_environment(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_ERROR", "disk")
    with pytest.raises(EnvironmentMissing) as caught:
        ensure_build(upstream=str(world.source))
    assert "TURBO_GGUF_HOME" in caught.value.hint


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = shutil.which("mount") or "/bin/mount"
    done = subprocess.run([mount, "-t", "tmpfs", "-o", "size=40m", "tmpfs", folder], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"mounting a tmpfs is not allowed here: {done.stderr.strip()}")
    yield folder
    subprocess.run([shutil.which("umount") or "/bin/umount", folder], check=True)


def test_a_nearly_full_disk_is_refused_before_compiling(small_disk: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBO_GGUF_HOME", str(small_disk / "home"))
    with pytest.raises(EnvironmentMissing, match=r"\d+ MB free, building cpu needs 150 MB"):
        ensure_build(upstream=str(world.source))
    assert world.ran() == []


def test_a_disk_that_is_full_while_unpacking_is_the_environment(small_disk: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real error of the system, not a made one."""
    monkeypatch.setenv("TURBO_GGUF_HOME", str(small_disk / "home"))
    (world.source / "src").mkdir()
    (world.source / "src/huge.cpp").write_bytes(bytes(60_000_000))
    with pytest.raises(EnvironmentMissing, match="no space left on the disk"):
        ensure_build(upstream=str(world.source))
    assert list((small_disk / "home/upstream").iterdir()) == []


def test_what_an_earlier_build_takes_counts_as_there(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ensure_build(upstream=str(world.source))
    (made.path / "objects").write_bytes(bytes(110_000_000))
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(building.shutil, "disk_usage", lambda path: usage._replace(free=60_000_000))
    ensure_build(upstream=str(world.source), targets=["test-backend-ops"])
    monkeypatch.setattr(building.shutil, "disk_usage", lambda path: usage._replace(free=30_000_000))
    with pytest.raises(EnvironmentMissing, match=r"30 MB free, building cpu needs 50 MB"):
        ensure_build(upstream=str(world.source), targets=["test-quantize-fns"])


def test_an_edited_tree_is_not_built(world: World) -> None:
    made = ensure_build(upstream=str(world.source))
    (made.tree.path / "include/llama.h").write_text("edit\n")
    with pytest.raises(UsageError, match=r"include/llama\.h"):
        ensure_build(upstream=str(world.source))


def test_an_unknown_preset_names_the_known_ones(world: World) -> None:
    with pytest.raises(UsageError, match="no preset 'gpu'") as caught:
        ensure_build("gpu", upstream=str(world.source))
    assert caught.value.hint == "give one of cpu, cpu-debug, rocm, cuda"


def test_a_damaged_manifest_means_not_built(world: World) -> None:
    made = ensure_build(upstream=str(world.source))
    (made.path / MANIFEST).write_text("{")
    ensure_build(upstream=str(world.source))
    assert len(world.ran()) == 4
    manifest = read_manifest(made.path)
    assert manifest is not None
    assert manifest.id == made.id
    assert msgspec.json.decode((made.path / MANIFEST).read_bytes())["options"]["LLAMA_BUILD_UI"] == "OFF"


# GPUs


@pytest.fixture
def rocm(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    root = tmp_path / "rocm"
    monkeypatch.setenv("ROCM_PATH", str(root))
    world.program("../rocm/bin/hipcc", "echo 'HIP version: 6.2.1'")
    world.program("../rocm/bin/rocm_agent_enumerator", "echo gfx000; echo gfx1100; echo gfx1036; echo gfx1100")
    world.program("../rocm/llvm/bin/clang++", "echo clang")
    return root


def test_rocm_is_built_for_the_gpus_that_are_there(world: World, rocm: Path) -> None:
    made = ensure_build("rocm", upstream=str(world.source))
    asked = world.ran()[0]
    assert "-DGGML_HIP=ON" in asked
    assert "-DGPU_TARGETS=gfx1036;gfx1100 " in asked
    assert f"-DCMAKE_HIP_COMPILER={rocm}/llvm/bin/clang++" in asked
    assert "-DCMAKE_HIP_COMPILER_LAUNCHER=" in asked
    assert made.compiler == "c++ (fake) 1.0; HIP version: 6.2.1"


def test_gpu_targets_of_the_environment_win(world: World, rocm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_TARGETS", "gfx1151;gfx1201")
    assert presets.rocm_targets() == ["gfx1151", "gfx1201"]


def test_amdgpu_arch_is_asked_when_the_enumerator_fails(world: World, rocm: Path) -> None:
    world.program("../rocm/bin/rocm_agent_enumerator", "exit 1")
    world.program("../rocm/llvm/bin/amdgpu-arch", "echo gfx1201")
    assert presets.rocm_targets() == ["gfx1201"]


def test_rocm_without_a_gpu_says_how_to_name_one(world: World, rocm: Path) -> None:
    world.program("../rocm/bin/rocm_agent_enumerator", "echo gfx000")
    with pytest.raises(EnvironmentMissing, match="no AMD GPU found") as caught:
        ensure_build("rocm", upstream=str(world.source))
    assert "GPU_TARGETS=gfx1100" in caught.value.hint


def test_missing_rocm_names_the_packages(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "rocm_path", lambda: None)
    with pytest.raises(EnvironmentMissing, match="ROCm not found") as caught:
        ensure_build("rocm", upstream=str(world.source))
    assert "apt-get install rocm-hip-sdk" in caught.value.hint


def test_cuda_uses_the_compiler_that_is_named(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world.program("../nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.88'")
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc"))
    monkeypatch.setenv("CUDAARCHS", "90")
    made = ensure_build("cuda", upstream=str(world.source))
    assert f"-DCMAKE_CUDA_COMPILER={tmp_path / 'nvcc'}" in world.ran()[0]
    assert "-DCMAKE_CUDA_ARCHITECTURES=90" in world.ran()[0]
    assert made.compiler == "c++ (fake) 1.0; release 13.0, V13.0.88"


def test_missing_cuda_names_the_package(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "cuda_compiler", lambda: None)
    with pytest.raises(EnvironmentMissing, match="CUDA compiler not found") as caught:
        ensure_build("cuda", upstream=str(world.source))
    assert "nvidia-cuda-toolkit" in caught.value.hint
