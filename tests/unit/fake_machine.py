"""A machine of our own making: only the programs that a test puts on PATH, and a cmake that notes what it is asked for."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from fake_upstream import default_patches, write_tree

from turbo_gguf.make import build as building
from turbo_gguf.make.toolkits import cuda, rocm, vulkan
from turbo_gguf.patchset import series

GPU_VARIABLES = ("CC", "CXX", "ROCM_PATH", "HIP_PATH", "GPU_TARGETS", "AMDGPU_TARGETS", "CUDACXX", "CUDAARCHS", "CUBLAS_ROOT")
VULKAN_VARIABLES = ("GLSLC", "VULKAN_SDK", "VK_DRIVER_FILES", "VK_ICD_FILENAMES")


def hide_vulkan(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Vulkan's headers, libraries, drivers and devices looked for below a folder."""
    for name in VULKAN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(vulkan, "PREFIXES", (root / "usr",))
    monkeypatch.setattr(vulkan, "DRIVER_FOLDERS", (root / "usr/share/vulkan/icd.d",))
    monkeypatch.setattr(vulkan, "RENDER_NODES", root / "dri")


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
        for name in GPU_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(rocm, "TOPOLOGY", root / "kfd")
        monkeypatch.setattr(rocm, "KFD", root / "dev-kfd")
        monkeypatch.setattr(rocm, "OS_RELEASE", root / "os-release")
        monkeypatch.setattr(cuda, "DEVICE", root / "dev-nvidia0")
        monkeypatch.setattr(cuda, "DRIVER", root / "nvidia-version")
        monkeypatch.setattr(cuda, "DRIVER_FOLDERS", (str(root / "driver"),))
        monkeypatch.setattr(cuda, "_DEFAULT_ROOTS", (str(root / "cuda"),))
        hide_vulkan(root, monkeypatch)
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
