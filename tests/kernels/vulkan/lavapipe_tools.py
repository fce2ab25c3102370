"""The real Vulkan backend on Mesa's lavapipe, a driver that runs shaders on the CPU.

Debian 12 has neither the headers nor the shader compiler for it, so the library is compiled in the GPU root, and nothing else: the programs
are those of the CPU build, which load it by ``GGML_BACKEND_PATH``. They run in the root, where the driver is. A device that is a CPU is
left out by llama.cpp unless ``GGML_VK_VISIBLE_DEVICES`` names it.

Everything is made on first use and found again by the next process: compiler results in ``CCACHE_DIR``, SPIR-V in ``TURBO_GGUF_SPIRV``.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
from pathlib import Path

from gpu_root_tools import REPOSITORY, SCRIPT, Case, Done, build_in_root, cases_of, in_root

from turbo_gguf.assets import home
from turbo_gguf.make.build import ensure_build

GLSLC = REPOSITORY / "dev" / "vulkan" / "glslc"
PATIENCE = REPOSITORY / "dev" / "vulkan" / "patience.h"
DRIVER = "/usr/share/vulkan/icd.d/lvp_icd.json"
DEVICE = "Vulkan0"

LIFE = ("cache", "layers", "decay", "calibration", "exact", "defaults")
TARGETS = ("test-backend-ops", "llama-perplexity", "llama-completion", "llama-bench", *(f"test-turbo-{name}" for name in LIFE))
"""Programs of the CPU build."""

# Shaders that no test here calls, by the names of their SPIR-V: two of three. What is multiplied here is f32, f16, bf16, q8_0 or q4_0.
OTHER_WEIGHTS = r"(matmul|mul_mat_vec)(_id)?_(q[12]_0|q4_1|q5_[01]|q[2-6]_k|iq[1-4]_[a-z]+|mxfp4|nvfp4|tq[12]_0)_.*"
OTHER_DEVICES = r".*_(cm2|dot2|ocp)(_.*)?"  # extensions that lavapipe lacks
OTHER_OPS = (
    r"(matmul|mul_mat_vec)_id_.*|(conv|im2col|col2im|pool|wkv|rwkv|ssm|gated|snake|opt_step|upscale|lightning|dsv4|solve|topk|cumsum).*"
)
SKIP = "|".join((OTHER_WEIGHTS, OTHER_DEVICES, OTHER_OPS))

OPTIONS = {"GGML_VULKAN": "ON", "GGML_BACKEND_DL": "ON", "Vulkan_GLSLC_EXECUTABLE": str(GLSLC)}


def spirv() -> Path:
    """Folder in which SPIR-V outlives the build."""
    folder = Path(os.environ.get("TURBO_GGUF_SPIRV") or home() / "spirv").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def library(jobs: int = 2) -> Path:
    """The backend of the patched tree."""
    environment = {"GLSLC_CACHE": str(spirv()), "GLSLC_SKIP": SKIP, "GPU_ROOT_BIND": str(spirv())}
    sources = "ggml/src/ggml-vulkan/vulkan-shaders/*.comp"
    header = home() / "builds" / PATIENCE.name  # where ccache knows it in every checkout
    if not header.exists() or header.read_bytes() != PATIENCE.read_bytes():
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_bytes(PATIENCE.read_bytes())
    options = {**OPTIONS, "CMAKE_CXX_FLAGS": f"-include {header}"}
    folder = build_in_root("vulkan-lavapipe", options, ["ggml-vulkan"], sources=sources, jobs=jobs, environment=environment)
    return folder / "libggml-vulkan.so"


@functools.cache
def programs() -> Path:
    """Folder of the programs of the CPU build, or of ``TURBO_GGUF_NATIVE_BIN``."""
    given = os.environ.get("TURBO_GGUF_NATIVE_BIN")
    return Path(given) if given else ensure_build("cpu", targets=TARGETS).path / "bin"


def environment(**more: str) -> dict[str, str]:
    """Variables with which a program finds the library, the driver and the device."""
    return {
        "GGML_BACKEND_PATH": str(library()),
        "GPU_ROOT_BIND": f"{programs().parent.parent}\n{spirv()}",
        "VK_DRIVER_FILES": DRIVER,
        "GGML_VK_VISIBLE_DEVICES": "0",
        "MESA_SHADER_CACHE_DIR": str(spirv() / "lavapipe"),  # machine code
        "LP_NUM_THREADS": "1",  # two programs run at once, with a core for each
        "GGML_NO_BACKTRACE": "1",
        **more,
    }


def lavapipe(program: str, *arguments: str | Path, cwd: Path, timeout: float = 3600, **more: str) -> Done:
    """Run a program of the CPU build with the backend."""
    cwd.mkdir(parents=True, exist_ok=True)
    log = cwd / f"{program}-{len(list(cwd.glob('*.log')))}.log"
    return in_root([programs() / program, *arguments], cwd=cwd, timeout=timeout, environment=environment(**more), log=log)


ON_DEVICE = ("-dev", DEVICE, "-ngl", "99", "-lv", "4")
"""Options of llama.cpp's tools. Without the name of a device they do not look for one beside those that they are linked with."""


SINGLE = {"GGML_VK_DISABLE_COOPMAT": "1", "GGML_VK_DISABLE_F16": "1"}
"""Variables with which products are binary32 as the CPU's are. Without them lavapipe, as most GPUs, rounds what is multiplied to binary16,
weights' products included: that alone moves the logits of a small random model by a tenth (squared error .01)."""


def on_device(done: Done) -> Done:
    """The same, or an error if the KV cache was not on the device."""
    if not re.search(rf"{DEVICE} KV buffer size", done.out + done.err):
        raise RuntimeError(f"the KV cache was not on {DEVICE}\n{done.err[-3000:]}")
    return done


def backend_ops(op: str, pattern: str, cwd: Path, *, timeout: float = 3600, **more: str) -> list[Case]:
    """Run cases of test-backend-ops on lavapipe, compared with the CPU; see :func:`gpu_root_tools.cases_of`."""
    command = ("test-backend-ops", "test", "-b", DEVICE, "-o", op, "-p", pattern)
    return cases_of(lavapipe(*command, cwd=cwd, timeout=timeout, **more), op)


# --- validation layers ----------------------------------------------------------------------------------------------------

LAYER = "VK_LAYER_KHRONOS_validation"


def validated(folder: Path, **settings: str) -> dict[str, str]:
    """Variables that switch the validation layers on; what they say goes to ``validation.txt`` in the folder.

    Without ``settings`` they check the use of the API and of memory between dispatches.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = {
        "debug_action": "VK_DBG_LAYER_ACTION_LOG_MSG",
        "report_flags": "error,warn",
        "log_filename": str(folder / "validation.txt"),
        "enable_message_limit": "false",
        "validate_sync": "true",
        **settings,
    }
    file = folder / "vk_layer_settings.txt"
    file.write_text("".join(f"khronos_validation.{name} = {value}\n" for name, value in lines.items()), "utf-8")
    return {"VK_INSTANCE_LAYERS": LAYER, "VK_LAYER_SETTINGS_PATH": str(file)}


def messages(folder: Path) -> list[str]:
    """What the validation layers said."""
    file = folder / "validation.txt"
    if not file.is_file():
        raise RuntimeError(f"the validation layers were not loaded: there is no {file}")
    return [line for line in file.read_text("utf-8", errors="replace").splitlines() if line.strip()]


# --- the tests of tests/llama ---------------------------------------------------------------------------------------------


def wrappers() -> Path:
    """Folder with a script for each program, which runs it in the root, all layers on the device, in binary32: for tests/llama."""
    folder = home() / "builds" / "lavapipe-programs"
    folder.mkdir(parents=True, exist_ok=True)
    variables = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment(**SINGLE).items())
    for name in TARGETS:
        place = "" if name == "test-backend-ops" else " -ngl 99" if name.startswith("test-") else f" {' '.join(ON_DEVICE)}"
        text = f'#!/bin/sh\n{variables}exec {shlex.quote(str(SCRIPT))} run {shlex.quote(str(programs() / name))} "$@"{place}\n'
        (folder / name).write_text(text, "utf-8")
        (folder / name).chmod(0o755)
    return folder
