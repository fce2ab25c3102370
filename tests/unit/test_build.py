"""Building with a cmake of our own making: what is asked of it, when it is left alone, and how failures read."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from fake_machine import CMAKE, World

from turbo_gguf.errors import EnvironmentMissing, ToolFailed, UsageError
from turbo_gguf.make import build as building
from turbo_gguf.make.build import DEFAULT_TARGETS, MANIFEST, ensure_build, read_manifest


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


def test_builds_within_the_build_find_ninja_of_a_wheel(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    shutil.move(world.bin / "ninja", tmp_path / "wheels/ninja")
    monkeypatch.setattr(building, "_wheel_tool", lambda program: tmp_path / "wheels/ninja" if program == "ninja" else None)
    world.program("cmake", 'command -v ninja > "$CALLS.ninja"\n' + CMAKE)
    ensure_build(upstream=str(world.source))
    assert Path(f"{world.calls}.ninja").read_text("ascii").split() == [str(tmp_path / "wheels/ninja")]


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
    assert caught.value.hint == (
        "give one of cpu, cpu-debug, cpu-portable, cpu-carried, vulkan, rocm, rocm-all-pairs, rocm-portable, rocm-carried, "
        "cuda, cuda-all-pairs, cuda-portable, cuda-carried"
    )


def test_a_damaged_manifest_means_not_built(world: World) -> None:
    made = ensure_build(upstream=str(world.source))
    (made.path / MANIFEST).write_text("{")
    ensure_build(upstream=str(world.source))
    assert len(world.ran()) == 4
    manifest = read_manifest(made.path)
    assert manifest is not None
    assert manifest.id == made.id
    assert msgspec.json.decode((made.path / MANIFEST).read_bytes())["options"]["LLAMA_BUILD_UI"] == "OFF"
