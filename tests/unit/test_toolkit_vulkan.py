"""Vulkan on machines of our own making: what is found, what CMake is asked for, and how what is missing or too old reads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from fake_machine import World

from turbo_gguf.cli import main
from turbo_gguf.cli import options as cli_options
from turbo_gguf.errors import EnvironmentMissing
from turbo_gguf.make import presets, toolkits
from turbo_gguf.make.build import ensure_build
from turbo_gguf.make.toolkits import rocm, vulkan
from turbo_gguf.make.toolkits.toolkit import Finding

GLSLC = """\
if [ "$1" = --version ]; then printf 'shaderc v2026.4 v2026.4\\nspirv-tools v2026.2\\nglslang 16.4.0-1\\n'; exit; fi
for last; do :; done
for name in $UNKNOWN; do
    grep -q $name $last && echo "$last:2: error: '#extension' : extension not supported: $name" >&2 && bad=1
done
[ -z "$bad" ]
"""

HEADER = "// Version\n#define VK_HEADER_VERSION 354\n#define VK_EXT_layer_settings 1\n"

RADEON = """\
GPU0:
	apiVersion         = 1.4.305
	driverVersion      = 25.1.3
	deviceType         = PHYSICAL_DEVICE_TYPE_DISCRETE_GPU
	deviceName         = AMD Radeon RX 7900 XTX (RADV NAVI31)
	driverName         = radv
	driverInfo         = Mesa 25.1.3
"""

LAVAPIPE = """\
GPU1:
	apiVersion         = 1.4.354
	deviceType         = PHYSICAL_DEVICE_TYPE_CPU
	deviceName         = llvmpipe (LLVM 22.1.8, 256 bits)
	driverName         = llvmpipe
	driverInfo         = Mesa 26.2.6-1 (LLVM 22.1.8)
"""


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A machine with all that a Vulkan build takes; no vulkaninfo, no driver."""
    made = World(tmp_path, monkeypatch)
    made.program("glslc", GLSLC)
    made.link("grep")
    made.link("cat")
    for name, text in (
        ("include/vulkan/vulkan_core.h", HEADER),
        ("include/vulkan/vulkan.hpp", ""),
        ("lib/x86_64-linux-gnu/libvulkan.so", ""),
        ("share/cmake/SPIRV-Headers/SPIRV-HeadersConfig.cmake", ""),
    ):
        file(tmp_path / "usr" / name, text)
    return made


def file(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def show(world: World, *devices: str) -> None:
    """A vulkaninfo with these devices."""
    file(world.bin.parent / "summary", "Devices:\n========\n" + "".join(devices))
    world.program("vulkaninfo", f"cat {world.bin.parent / 'summary'}")


def findings() -> dict[str, Finding]:
    return {finding.name: finding for finding in vulkan.devices()}


def test_a_build_takes_the_shader_compiler_that_was_found(world: World) -> None:
    made = ensure_build("vulkan", upstream=str(world.source))
    asked = world.ran()[0] + " "
    assert "-DGGML_VULKAN=ON " in asked
    assert f"-DVulkan_GLSLC_EXECUTABLE={world.bin}/glslc " in asked
    assert made.compiler == "c++ (fake) 1.0; glslc 2026.4 (glslang 16.4.0-1)"
    assert (made.tool("llama-cli")).is_file()


@pytest.mark.parametrize(
    ("lost", "what", "package"),
    [
        ("bin/glslc", "glslc", "glslc"),
        ("usr/include/vulkan/vulkan_core.h", "headers (vulkan/vulkan.hpp)", "libvulkan-dev"),
        ("usr/include/vulkan/vulkan.hpp", "headers (vulkan/vulkan.hpp)", "libvulkan-dev"),
        ("usr/lib/x86_64-linux-gnu/libvulkan.so", "libvulkan.so", "libvulkan-dev"),
        ("usr/share/cmake/SPIRV-Headers", "SPIRV-Headers", "spirv-headers"),
    ],
)
def test_what_a_build_lacks_is_named_with_its_package(world: World, tmp_path: Path, lost: str, what: str, package: str) -> None:
    (tmp_path / lost).rename(tmp_path / "away")
    with pytest.raises(EnvironmentMissing) as caught:
        ensure_build("vulkan", upstream=str(world.source))
    assert caught.value.message == f"for a Vulkan build there is no {what}"
    assert caught.value.hint == f"apt-get install {package}"
    assert world.ran() == []


def test_two_parts_of_one_package_are_one(world: World, tmp_path: Path) -> None:
    for name in ("include", "lib"):
        (tmp_path / "usr" / name).rename(tmp_path / name)
    with pytest.raises(EnvironmentMissing) as caught:
        vulkan.options()
    assert caught.value.hint == "apt-get install libvulkan-dev"


def test_the_sdk_is_looked_at_first(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VULKAN_SDK", str(tmp_path / "sdk"))
    world.program("../sdk/bin/glslc", GLSLC)
    file(tmp_path / "sdk/include/vulkan/vulkan_core.h", HEADER.replace("354", "400"))
    file(tmp_path / "sdk/include/vulkan/vulkan.hpp")
    assert vulkan.options() == {"Vulkan_GLSLC_EXECUTABLE": f"{tmp_path}/sdk/bin/glslc"}
    assert vulkan.headers() == vulkan.Headers(400, suffices=True)
    monkeypatch.setenv("GLSLC", "/other/glslc")
    assert vulkan.glslc() == Path("/other/glslc")


def test_headers_that_upstream_does_not_compile_with_are_refused(world: World, tmp_path: Path) -> None:
    """As those of Debian 12."""
    file(tmp_path / "usr/include/vulkan/vulkan_core.h", "#define VK_HEADER_VERSION 239\n")
    with pytest.raises(EnvironmentMissing, match=r"headers are of 1\.x\.239, upstream needs 1\.3\.272 or newer") as caught:
        ensure_build("vulkan", upstream=str(world.source))
    assert "newer Debian" in caught.value.hint and "make gpu-root" in caught.value.hint


def test_an_old_shader_compiler_builds_and_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert vulkan.lacking() == [] and "glslc" not in findings()
    monkeypatch.setenv("UNKNOWN", "GL_KHR_cooperative_matrix GL_EXT_bfloat16")
    assert vulkan.lacking() == ["GL_KHR_cooperative_matrix", "GL_EXT_bfloat16"]
    told = findings()["glslc"]
    assert "too old for cooperative matrices, bf16:" in told.detail
    assert "make gpu-root" in told.fix and "newer Debian" in told.fix
    assert vulkan.options()


def test_what_runs_it_is_named_with_its_package(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = findings()
    assert [found[f"Vulkan {part}"].status for part in ("loader", "driver", "device")] == ["none"] * 3
    assert found["Vulkan loader"].fix == "apt-get install libvulkan1"
    assert found["Vulkan driver"].fix.startswith("apt-get install mesa-vulkan-drivers")
    assert found["Vulkan device"].fix == "apt-get install vulkan-tools"
    file(tmp_path / "usr/lib/chromium/libvulkan.so.1")
    assert findings()["Vulkan loader"].status == "none", "that of a browser is its own"
    file(tmp_path / "usr/lib/x86_64-linux-gnu/libvulkan.so.1")
    file(tmp_path / "usr/share/vulkan/icd.d/radeon_icd.x86_64.json")
    show(world, RADEON)
    found = findings()
    assert found["Vulkan loader"].detail == f"{tmp_path}/usr/lib/x86_64-linux-gnu/libvulkan.so.1"
    assert found["Vulkan driver"].detail == "radeon_icd.x86_64"
    assert found["Vulkan GPU"] == Finding("Vulkan GPU", "ok", "AMD Radeon RX 7900 XTX (RADV NAVI31), radv Mesa 25.1.3, Vulkan 1.4")
    file(tmp_path / "other.json")
    monkeypatch.setenv("VK_ICD_FILENAMES", f"{tmp_path}/other.json:{tmp_path}/none.json")
    assert findings()["Vulkan driver"].detail == "other"


def test_a_cpu_is_no_gpu(world: World) -> None:
    show(world, RADEON, LAVAPIPE)
    assert vulkan.gpus() == ["AMD Radeon RX 7900 XTX (RADV NAVI31)"]
    told = findings()["Vulkan CPU"]
    assert told.status == "none" and told.detail.endswith("no GPU, for tests only: GGML_VK_VISIBLE_DEVICES=1")
    show(world, LAVAPIPE)
    assert vulkan.gpus() == []
    assert findings()["Vulkan GPU"].detail == "no driver shows one"


def test_a_gpu_that_is_closed_to_this_user_is_told(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    show(world)
    file(tmp_path / "dri/renderD128")
    assert findings()["Vulkan GPU"].detail == "no driver shows one"
    monkeypatch.setattr(vulkan.os, "access", lambda path, mode: mode & os.X_OK != 0)  # root may do anything
    assert findings()["Vulkan GPU"].detail == "renderD128 is not open to this user"
    assert "usermod -aG render,video" in findings()["Vulkan GPU"].fix


@pytest.mark.parametrize(
    ("before", "after", "status", "detail"),
    [
        ("1.4.305", "1.1.190", "none", "Vulkan 1.1: 1.2 is needed"),
        ("Mesa 25.1.3", "Mesa 22.3.6-1+deb12u2", "ok", "older than Mesa 23.3, without cooperative matrices"),
    ],
)
def test_an_old_driver_is_told(world: World, before: str, after: str, status: str, detail: str) -> None:
    show(world, RADEON.replace(before, after))
    told = findings()["Vulkan GPU"]
    assert told.status == status and detail in told.detail
    assert "newer Debian" in told.fix
    assert bool(vulkan.gpus()) == (status == "ok")


def test_a_vulkaninfo_without_a_driver_shows_nothing(world: World) -> None:
    world.program("vulkaninfo", "echo 'ERROR: vkCreateInstance failed with ERROR_INCOMPATIBLE_DRIVER' >&2; exit 1")
    assert vulkan.all_devices() == []
    assert vulkan.about_machine() == "no device found, glslc 2026.4 (glslang 16.4.0-1)"


def test_layers_are_offloaded_to_vulkan() -> None:
    assert toolkits.gpu_layers("Vulkan") == ("-ngl", "999")
    assert toolkits.of_device("Vulkan0") is vulkan.TOOLKIT
    assert presets.backend_of("vulkan") == "Vulkan"
    assert vulkan.TOOLKIT.device == "Vulkan0"


def test_vulkan_is_taken_only_by_name(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    show(world, RADEON)
    assert [toolkit.name for toolkit in toolkits.with_gpu()] == ["vulkan"]
    assert cli_options.preset_of(None) == "cpu"
    assert cli_options.preset_of("vulkan") == "vulkan"
    monkeypatch.setattr(rocm, "gpus", lambda: ["gfx1100"])
    assert [toolkit.name for toolkit in toolkits.with_gpu()] == ["rocm", "vulkan"]
    assert cli_options.preset_of(None) == "rocm"


def test_doctor_has_a_row(world: World) -> None:
    show(world, RADEON)
    text = CliRunner().invoke(main, ["doctor"]).output
    assert "glslc 2026.4 (glslang 16.4.0-1)" in text and "headers of 1.x.354" in text
    assert "builds for" not in next(line for line in text.splitlines() if line.startswith("Vulkan "))
