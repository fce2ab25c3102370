"""The doctor finds what is there, and each thing that is missing has a command that fixes it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from fake_machine import GPU_VARIABLES, hide_vulkan
from fake_upstream import archive, default_patches

from turbo_gguf import patchset
from turbo_gguf.files import sha256_of
from turbo_gguf.make import build as building
from turbo_gguf.make import doctor, presets, upstream
from turbo_gguf.make.doctor import Finding
from turbo_gguf.make.toolkits import cuda, rocm
from turbo_gguf.make.upstream import Upstream, fetch
from turbo_gguf.patchset import series


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with all that a CPU build needs, no GPU, and an upstream that is not fetched; returns its PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, version in (("cc", "cc 12"), ("c++", "c++ 12"), ("cmake", "cmake version 3.25.1"), ("make", "GNU Make 4"), ("git", "git 2")):
        (folder / name).write_text(f"#!/bin/sh\necho '{version}'\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path / "home"))
    for name in GPU_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(rocm, "path", lambda: None)
    monkeypatch.setattr(cuda, "compiler", lambda: None)
    for module, name in ((rocm, "TOPOLOGY"), (rocm, "KFD"), (rocm, "OS_RELEASE"), (cuda, "DEVICE"), (cuda, "DRIVER")):
        monkeypatch.setattr(module, name, tmp_path / name)
    hide_vulkan(tmp_path, monkeypatch)
    monkeypatch.setattr(building, "_wheel_tool", lambda program: None)
    path = tmp_path / "home/downloads/a_package-1.tar.gz"
    path.parent.mkdir(parents=True)
    source = Upstream(name="1", commit="abc", package="a-package", version="1", sha256=sha256_of(archive(path)))
    monkeypatch.setattr(doctor, "resolve", lambda: source)
    patches = default_patches(tmp_path / "patches")
    monkeypatch.setattr(series, "patches_dir", lambda: patches)
    return folder


def by_name() -> dict[str, Finding]:
    return {finding.name: finding for finding in doctor.examine()}


def missing() -> list[str]:
    return [finding.name for finding in doctor.examine() if finding.status == "missing"]


def test_a_fresh_machine_with_compilers_is_ready() -> None:
    found = by_name()
    assert missing() == []
    assert found["cmake"].detail.startswith("cmake version 3.25.1 (")
    assert found["python"].detail.endswith(f"({sys.executable})")
    assert found["patch set"].detail.startswith("2 hooks with 2 lines, 1 overlay files, digest ")


def test_what_is_not_there_yet_has_a_command() -> None:
    found = by_name()
    assert (found["llama.cpp 1"].status, found["llama.cpp 1"].fix) == ("none", "turbo-gguf upstream fetch")
    assert (found["build cpu"].status, found["build cpu"].fix) == ("none", "turbo-gguf build --preset cpu")
    assert "apt-get install rocm-hip-sdk" in found["ROCm"].fix
    assert "nvidia-cuda-toolkit" in found["CUDA"].fix
    assert found["Vulkan"].fix == "apt-get install glslc libvulkan-dev spirv-headers"
    assert found["Vulkan loader"].fix == "apt-get install libvulkan1"
    assert "mesa-vulkan-drivers" in found["Vulkan driver"].fix
    assert found["Vulkan device"].fix == "apt-get install vulkan-tools"
    assert found["ccache"].fix == "apt-get install ccache"
    assert found["ninja"].status == "none"


@pytest.mark.parametrize(
    ("program", "name", "fix"),
    [
        ("cc", "C compiler", "apt-get install gcc"),
        ("c++", "C++ compiler", "apt-get install g++"),
        ("cmake", "cmake", "apt-get install cmake"),
        ("make", "make", "apt-get install make"),
    ],
)
def test_a_missing_program_is_found(machine: Path, program: str, name: str, fix: str) -> None:
    (machine / program).unlink()
    assert missing() == [name]
    assert by_name()[name].fix == fix


def test_a_program_that_does_not_run_is_missing(machine: Path) -> None:
    (machine / "c++").write_text("#!/bin/sh\necho 'cannot load libisl.so' >&2; exit 127\n")
    assert missing() == ["C++ compiler"]
    assert "libisl" in by_name()["C++ compiler"].detail


def test_an_old_cmake_is_missing(machine: Path) -> None:
    (machine / "cmake").write_text("#!/bin/sh\necho 'cmake version 3.10.2'\n")
    assert missing() == ["cmake"]
    assert by_name()["cmake"].fix == "pip install 'turbo-gguf[build]'"


def test_make_is_not_needed_beside_ninja(machine: Path) -> None:
    shutil.move(machine / "make", machine / "ninja")
    assert missing() == []


def test_a_small_disk_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage._replace(free=100_000_000))
    assert missing() == ["disk"]
    assert by_name()["disk"].detail.startswith("100 MB free in ")


def test_a_home_that_cannot_be_written_to_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path / "file"))
    assert "disk" in missing()
    assert by_name()["disk"].detail == f"{tmp_path}/file cannot be written to"


def test_a_broken_patch_set_is_found(tmp_path: Path) -> None:
    (tmp_path / "patches/hooks/size.patch").unlink()
    assert missing() == ["patch set"]
    assert "hooks/size.patch does not exist" in by_name()["patch set"].detail


def test_states_of_the_tree_are_told_apart(tmp_path: Path) -> None:
    tree = fetch(doctor.resolve())
    assert by_name()["llama.cpp 1"].status == "ok"
    assert by_name()["patched tree"].fix == "turbo-gguf patch apply"
    work = patchset.apply(tree).path
    assert by_name()["patched tree"].status == "ok"
    (work / "include/llama.h").write_text("edit")
    assert by_name()["patched tree"].detail == "edited by hand: include/llama.h"
    patchset.apply(tree, force=True)
    (tmp_path / "patches/overlay/ggml/src/names-turbo.inc").write_text("newer")
    assert "not the present ones" in by_name()["patched tree"].detail


def test_states_of_the_build_are_told_apart(machine: Path, tmp_path: Path) -> None:
    tree = patchset.apply(fetch(doctor.resolve()))
    tools = building.toolchain(presets.preset("cpu"))
    folder = building.build_folder(tree, "cpu")
    made = building.Build(building.build_id(tree, "cpu", tools, presets.PRESETS["cpu"].options), folder, "cpu", tree, tools.compiler)
    folder.mkdir(parents=True)
    building._write_manifest(made, presets.PRESETS["cpu"].options, {"llama-cli", "test-x"})
    assert (by_name()["build cpu"].status, by_name()["build cpu"].detail) == ("ok", f"{made.id}: llama-cli")
    (machine / "c++").write_text("#!/bin/sh\necho 'c++ 13'\n")
    assert by_name()["build cpu"].fix == "turbo-gguf build --preset cpu"


def install(folder: Path, **programs: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\necho '{text}'\n")
        (folder / name).chmod(0o755)


@pytest.fixture
def rocm_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """ROCm 6.2 with a 7900 XTX that this user may use."""
    root = tmp_path / "rocm"
    install(root / "bin", hipcc="HIP version: 6.2.1", rocm_agent_enumerator="gfx1100")
    for name in ("hip", "hipblas", "rocblas"):
        (root / f"lib/cmake/{name}").mkdir(parents=True)
        (root / f"lib/cmake/{name}/{name}-config.cmake").write_text("")
    rocm.KFD.write_text("")
    monkeypatch.setattr(rocm, "path", lambda: root)
    return root


def test_amd_gpus_are_named(rocm_root: Path) -> None:
    assert by_name()["ROCm"] == Finding("ROCm", "ok", f"HIP version: 6.2.1 in {rocm_root}, builds for gfx1100")
    assert by_name()["AMD gfx1100"] == Finding("AMD gfx1100", "ok", "Radeon RX 7900; PRO W7900, W7800 (RDNA3)")
    install(rocm_root / "bin", rocm_agent_enumerator="gfx906")
    assert by_name()["AMD gfx906"].detail.startswith("may work")


def test_an_old_rocm_is_found(rocm_root: Path) -> None:
    install(rocm_root / "bin", hipcc="HIP version: 5.7.1")
    assert by_name()["ROCm"].detail == f"ROCm in {rocm_root} is 5.7, 6.1 or newer is needed"


def test_missing_rights_have_a_command(rocm_root: Path) -> None:
    rocm.KFD.unlink()
    found = by_name()["AMD GPU"]
    assert (found.status, found.detail) == ("none", f"gfx1100: no {rocm.KFD}: the amdgpu driver is not loaded")
    assert "modprobe amdgpu" in found.fix


def test_an_amd_gpu_is_seen_without_rocm() -> None:
    (rocm.TOPOLOGY / "1").mkdir(parents=True)
    (rocm.TOPOLOGY / "1/properties").write_text("gfx_target_version 120001\n")
    rocm.KFD.write_text("")
    found = by_name()
    assert found["AMD gfx1201"].detail == "Radeon RX 9070; AI PRO R9700 (RDNA4)"
    assert "apt-get install rocm-hip-sdk" in found["ROCm"].fix


def test_nvidia_gpus_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, machine: Path) -> None:
    install(tmp_path / "cuda/bin", nvcc="Cuda compilation tools, release 13.0, V13.0.88")
    install(machine, **{"nvidia-smi": "NVIDIA H200, 9.0"})
    cuda.DRIVER.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Release\n")
    monkeypatch.setattr(cuda, "compiler", lambda: tmp_path / "cuda/bin/nvcc")
    assert by_name()["CUDA"] == Finding("CUDA", "ok", f"release 13.0, V13.0.88 ({tmp_path}/cuda/bin/nvcc), builds for 90-real")
    assert by_name()["NVIDIA GPU"] == Finding("NVIDIA GPU", "ok", "NVIDIA H200, compute capability 9.0, driver 580.159.04")


def test_an_nvidia_gpu_without_its_tools_is_found() -> None:
    cuda.DEVICE.write_text("")
    assert by_name()["NVIDIA GPU"].fix.startswith("apt-get install nvidia-smi")
    cuda.DEVICE.unlink()
    cuda.DRIVER.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Release\n")
    assert "shows no GPU" in by_name()["NVIDIA GPU"].detail


def test_the_doctor_changes_nothing(tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    doctor.examine()
    assert sorted(tmp_path.rglob("*")) == before


def test_the_table_puts_each_fix_below() -> None:
    text = doctor.table([Finding("a", "ok", "1.0"), Finding("long", "missing", "not found", "apt-get install long")])
    assert text == "a     ok       1.0\nlong  missing  not found\n               -> apt-get install long"


def test_the_real_upstream_is_looked_at_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "resolve", upstream.resolve)
    assert by_name()[f"llama.cpp {upstream.default_name()}"].status == "none"
