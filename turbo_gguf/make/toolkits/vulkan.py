"""Vulkan on this machine: the shader compiler and the headers that a build takes, the loader, drivers and GPUs that run it."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from turbo_gguf import tools
from turbo_gguf.errors import EnvironmentMissing, ToolFailed
from turbo_gguf.make.toolkits.toolkit import Finding, Toolkit, Variant
from turbo_gguf.tools import capture

EXTENSIONS = {
    "GL_KHR_cooperative_matrix": "cooperative matrices",
    "GL_EXT_integer_dot_product": "integer dot products",
    "GL_EXT_bfloat16": "bf16",
    "GL_NV_cooperative_matrix2": "NVIDIA's matrices",
    "GL_NV_cooperative_matrix_decode_vector": "NVIDIA's matrices of packed types",
    "GL_EXT_float_e4m3": "fp8",
    "GL_EXT_float_e2m1": "fp4",
}
"""Extensions of GLSL that upstream's CMake asks the shader compiler for, and what the shaders that need them are for."""

NEEDED = "VK_EXT_layer_settings"
"""An extension that upstream's C++ takes for granted: headers of 1.3.272 or newer have it."""

OLDEST_VULKAN = (1, 2)
"""What upstream asks of a driver."""

OLDEST_MESA = (23, 3)
"""The first Mesa whose AMD driver has cooperative matrices."""

MESA_HINT = "a newer Debian or Ubuntu, or its backports: apt-get install mesa-vulkan-drivers"
NEWER_HINT = "a newer Debian or Ubuntu, or the Vulkan SDK (https://vulkan.lunarg.com/sdk/home); contributors: make gpu-root"
DRIVER_HINT = "apt-get install mesa-vulkan-drivers (AMD, Intel); NVIDIA's driver brings its own"

PREFIXES = (Path("/usr"), Path("/usr/local"))
"""Where distributions put headers and libraries."""

DRIVER_FOLDERS = (Path("/etc/vulkan/icd.d"), Path("/usr/share/vulkan/icd.d"), Path("/usr/local/share/vulkan/icd.d"))
"""Where the loader looks for drivers."""

RENDER_NODES = Path("/dev/dri")
"""The devices through which programs reach GPUs."""

_UNKNOWN = re.compile(r"extension not supported: (\w+)")


class Device(msgspec.Struct, frozen=True):
    """A device as vulkaninfo shows it."""

    name: str
    kind: str  # "DISCRETE_GPU", "INTEGRATED_GPU", "VIRTUAL_GPU", "CPU" or "OTHER"
    driver: str  # name and version
    version: tuple[int, int]  # of Vulkan

    @property
    def mesa(self) -> tuple[int, int] | None:
        """Version of Mesa; None for another driver."""
        found = re.search(r"Mesa (\d+)\.(\d+)", self.driver)
        return (int(found[1]), int(found[2])) if found else None


def glslc() -> Path | None:
    """The shader compiler: ``GLSLC``, of the SDK in ``VULKAN_SDK``, or on PATH."""
    named = os.environ.get("GLSLC")
    sdk = Path(os.environ.get("VULKAN_SDK", "/nonexistent")) / "bin/glslc"
    return Path(named) if named else sdk if sdk.exists() else tools.find("glslc")


def compiler_version() -> list[str]:
    """Versions of the shader compiler and of its front end; none when it is missing."""
    found = glslc()
    if found is None:
        return []
    text = capture([found, "--version"])
    words = [re.search(rf"^{part} v?(\S+)", text, re.MULTILINE) for part in ("shaderc", "glslang")]
    shaderc, glslang = (word[1] if word else "of unknown version" for word in words)
    return [f"glslc {shaderc} (glslang {glslang})"]


def lacking() -> list[str]:
    """Extensions that the shader compiler does not know: shaders that need them are left out of the build."""
    found = glslc()
    if found is None:
        return []
    wanted = "".join(f"#extension {name} : require\n" for name in EXTENSIONS)
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.comp"
        probe.write_text(f"#version 460\n{wanted}void main() {{}}\n", "ascii")
        try:
            capture([found, "--target-env=vulkan1.3", "-o", os.devnull, probe])
        except (EnvironmentMissing, ToolFailed) as error:
            return [name for name in _UNKNOWN.findall(error.message) if name in EXTENSIONS]
    return []


class Headers(msgspec.Struct, frozen=True):
    """Vulkan's headers for C and C++."""

    version: int  # the last of its three numbers
    suffices: bool


def headers() -> Headers | None:
    """The headers that a build would take."""
    for path in _files("include/vulkan/vulkan_core.h"):
        text = path.read_text("utf-8", errors="replace")
        version = re.search(r"^#define VK_HEADER_VERSION (\d+)$", text, re.MULTILINE)
        if version and (path.parent / "vulkan.hpp").is_file():
            return Headers(int(version[1]), f"#define {NEEDED} 1" in text)
    return None


def options() -> dict[str, str]:
    """CMake options of a Vulkan build on this machine.

    Raises:
        EnvironmentMissing: the shader compiler, headers, or the library to link with are missing, or the headers are too old.
    """
    compiler, found = glslc(), headers()
    parts = (
        ("glslc", compiler, "glslc"),
        ("headers (vulkan/vulkan.hpp)", found, "libvulkan-dev"),
        ("libvulkan.so", loader("libvulkan.so"), "libvulkan-dev"),
        (
            "SPIRV-Headers",
            next(_files("share/cmake/SPIRV-Headers", "lib*/cmake/SPIRV-Headers", "lib/*-linux-*/cmake/SPIRV-Headers"), None),
            "spirv-headers",
        ),
    )
    missing = {name: package for name, path, package in parts if not path}
    if missing:
        packages = " ".join(dict.fromkeys(missing.values()))
        raise EnvironmentMissing(f"for a Vulkan build there is no {', '.join(missing)}", f"apt-get install {packages}")
    if found is not None and not found.suffices:
        raise EnvironmentMissing(f"the Vulkan headers are of 1.x.{found.version}, upstream needs 1.3.272 or newer", NEWER_HINT)
    return {"Vulkan_GLSLC_EXECUTABLE": str(compiler)}


def loader(name: str = "libvulkan.so.1") -> Path | None:
    """The library that finds the drivers."""
    return next(_files(f"lib/{name}", f"lib/*-linux-*/{name}", f"lib64/{name}"), None)


def drivers() -> list[Path]:
    """The files by which the loader knows its drivers."""
    named = os.environ.get("VK_DRIVER_FILES") or os.environ.get("VK_ICD_FILENAMES")
    if named:
        return [path for path in map(Path, named.split(os.pathsep)) if path.exists()]
    return [path for folder in DRIVER_FOLDERS for path in sorted(folder.glob("*.json"))]


def all_devices() -> list[Device] | None:
    """Every device of every driver; None without vulkaninfo."""
    program = tools.find("vulkaninfo")
    if program is None:
        return None
    try:
        text = capture([program, "--summary"])
    except ToolFailed:  # no driver, or none with a device
        return []
    return [_device(block) for block in re.split(r"^GPU\d+:$", text, flags=re.MULTILINE)[1:]]


def gpus() -> list[str]:
    """Names of the GPUs that a Vulkan driver shows; a CPU is none."""
    return [device.name for device in all_devices() or () if device.kind != "CPU" and device.version >= OLDEST_VULKAN]


def devices() -> Iterator[Finding]:
    """What a build lacks, and what runs it: loader, drivers, devices."""
    yield from _compiler_findings()
    found = loader()
    if found is None:
        yield Finding("Vulkan loader", "none", "no libvulkan.so.1", "apt-get install libvulkan1")
    else:
        yield Finding("Vulkan loader", "ok", str(found))
    installed = drivers()
    if installed:
        yield Finding("Vulkan driver", "ok", ", ".join(path.name.removesuffix(".json") for path in installed))
    else:
        yield Finding("Vulkan driver", "none", "none installed", DRIVER_HINT)
    yield from _device_findings()


def _compiler_findings() -> Iterator[Finding]:
    unknown = lacking()
    if unknown:
        words = ", ".join(EXTENSIONS[name] for name in unknown)
        yield Finding("glslc", "none", f"is too old for {words}: shaders with them are left out, so that prompts are slower", NEWER_HINT)


def _device_findings() -> Iterator[Finding]:
    found = all_devices()
    if found is None:
        yield Finding("Vulkan device", "none", "devices are not known without vulkaninfo", "apt-get install vulkan-tools")
        return
    for number, device in enumerate(found):
        yield _finding(number, device)
    if not any(device.kind != "CPU" for device in found):
        closed = [node.name for node in sorted(RENDER_NODES.glob("renderD*")) if not os.access(node, os.R_OK | os.W_OK)]
        if closed:
            yield Finding(
                "Vulkan GPU",
                "none",
                f"{closed[0]} is not open to this user",
                "sudo usermod -aG render,video $USER, then log out and in again",
            )
        else:
            hint = "lspci -k names the kernel's driver of each GPU" if drivers() else DRIVER_HINT
            yield Finding("Vulkan GPU", "none", "no driver shows one", hint)


def _finding(number: int, device: Device) -> Finding:
    version = ".".join(map(str, device.version))
    text = f"{device.name}, {device.driver}, Vulkan {version}"
    if device.kind == "CPU":
        return Finding("Vulkan CPU", "none", f"{text}: no GPU, for tests only: GGML_VK_VISIBLE_DEVICES={number}")
    if device.version < OLDEST_VULKAN:
        return Finding("Vulkan GPU", "none", f"{text}: 1.2 is needed", MESA_HINT if device.mesa else DRIVER_HINT)
    if device.mesa is not None and device.mesa < OLDEST_MESA:
        return Finding(
            "Vulkan GPU", "ok", f"{text}: older than Mesa 23.3, without cooperative matrices, so that prompts are slower", MESA_HINT
        )
    return Finding("Vulkan GPU", "ok", text)


def _device(block: str) -> Device:
    """One device of the summary, whose lines are ``name = value``."""
    fields = dict(re.findall(r"^\s+(\w+)\s+= (.*?)\s*$", block, re.MULTILINE))
    version = re.match(r"(\d+)\.(\d+)", fields.get("apiVersion", ""))
    driver = " ".join(dict.fromkeys(filter(None, (fields.get("driverName", ""), fields.get("driverInfo", "")))))
    return Device(
        name=fields.get("deviceName", "unknown"),
        kind=fields.get("deviceType", "OTHER").removeprefix("PHYSICAL_DEVICE_TYPE_"),
        driver=driver or "unknown driver",
        version=(int(version[1]), int(version[2])) if version else (1, 0),
    )


def _files(*patterns: str) -> Iterator[Path]:
    """Files of the SDK, or of the distribution."""
    sdk = os.environ.get("VULKAN_SDK")
    for prefix in (*([Path(sdk)] if sdk else []), *PREFIXES):
        for pattern in patterns:
            yield from sorted(prefix.glob(pattern))


def _where() -> str:
    found = headers()
    return f"({glslc()})" + (f", headers of 1.x.{found.version}" if found else "")


def about_machine() -> str:
    """GPUs, their drivers, and the shader compiler."""
    names = ", ".join(f"{device.name} ({device.driver})" for device in all_devices() or ()) or "no device found"
    return f"{names}, {' '.join(compiler_version())}"


TOOLKIT = Toolkit(
    name="vulkan",
    title="Vulkan",
    backend="Vulkan",
    by_default=False,  # it has run on no GPU yet
    cmake={"GGML_VULKAN": "ON"},
    min_cmake=(3, 21),
    variants=(Variant("", "GPUs through their Vulkan driver", {}, 400),),
    options=options,
    compiler_version=compiler_version,
    where=_where,
    gpus=gpus,
    devices=devices,
    about_machine=about_machine,
)
