"""The real Vulkan backend on Mesa's lavapipe, a driver that runs shaders on the CPU: its build in the GPU root, and its programs.

A device that is a CPU is left out by llama.cpp unless ``GGML_VK_VISIBLE_DEVICES`` names it. Everything is made on first use and found
again by the next process: compiler results in ``CCACHE_DIR``, SPIR-V in ``TURBO_GGUF_SPIRV``.
"""

from __future__ import annotations

import functools
import os
import shlex
from pathlib import Path

from gpu_root_tools import REPOSITORY, SCRIPT, Case, Done, build_in_root, cases_of, in_root

from turbo_gguf.assets import home

GLSLC = REPOSITORY / "dev" / "vulkan" / "glslc"
DRIVER = "/usr/share/vulkan/icd.d/lvp_icd.json"
DEVICE = "Vulkan0"

TARGETS = ("test-backend-ops", "llama-perplexity")
LIFE = ("cache", "layers", "decay", "calibration", "exact", "defaults")
MORE_TARGETS = (*TARGETS, "llama-completion", "llama-cli", "llama-bench", "test-turbo-perf", *(f"test-turbo-{name}" for name in LIFE))

# Shaders that no test here calls, by the names of their SPIR-V: two of three. Weights are f32, f16, q8_0 and q4_0 here.
OTHER_WEIGHTS = r"(matmul|mul_mat_vec)(_id)?_(q[12]_0|q4_1|q5_[01]|q[2-6]_k|iq[1-4]_[a-z]+|mxfp4|nvfp4|tq[12]_0|bf16)_.*"
OTHER_DEVICES = r".*_(cm2|dot2|ocp)(_.*)?"  # extensions that lavapipe lacks
OTHER_OPS = (
    r"(matmul|mul_mat_vec)_id_.*|(conv|im2col|col2im|pool|wkv|rwkv|ssm|gated|snake|opt_step|upscale|lightning|dsv4|solve|topk|cumsum).*"
)
SKIP = "|".join((OTHER_WEIGHTS, OTHER_DEVICES, OTHER_OPS))

OPTIONS = {"GGML_VULKAN": "ON", "Vulkan_GLSLC_EXECUTABLE": str(GLSLC)}


def spirv() -> Path:
    """Folder in which SPIR-V outlives the build."""
    folder = Path(os.environ.get("TURBO_GGUF_SPIRV") or home() / "spirv").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def build(targets: tuple[str, ...] = TARGETS, pristine: bool = False, jobs: int = 2) -> Path:
    """Folder of the programs of a Vulkan build, of the patched tree or of upstream's."""
    environment = {"GLSLC_CACHE": str(spirv()), "GLSLC_SKIP": SKIP, "GPU_ROOT_BIND": str(spirv())}
    sources = "ggml/src/ggml-vulkan/vulkan-shaders/*.comp"
    return build_in_root("vulkan-lavapipe", OPTIONS, targets, sources=sources, pristine=pristine, jobs=jobs, environment=environment)


def environment(**more: str) -> dict[str, str]:
    """Variables with which a program of the build finds the one device."""
    return {
        "VK_DRIVER_FILES": DRIVER,
        "GGML_VK_VISIBLE_DEVICES": "0",
        "MESA_SHADER_CACHE_DIR": str(home() / "builds" / "lavapipe-cache"),
        "LP_NUM_THREADS": "1",  # two programs run at once, with a core for each
        "GGML_NO_BACKTRACE": "1",
        **more,
    }


def lavapipe(program: str, *arguments: str | Path, cwd: Path, pristine: bool = False, timeout: float = 3600, **more: str) -> Done:
    """Run a program of the build, which is made with it if it lacks it."""
    targets = TARGETS if program in TARGETS else MORE_TARGETS
    path = build(targets, pristine) / program
    cwd.mkdir(parents=True, exist_ok=True)
    log = cwd / f"{program}-{len(list(cwd.glob('*.log')))}.log"
    return in_root([path, *arguments], cwd=cwd, timeout=timeout, environment=environment(**more), log=log)


def backend_ops(op: str, pattern: str, cwd: Path, *, pristine: bool = False, timeout: float = 3600, **more: str) -> list[Case]:
    """Run cases of test-backend-ops on lavapipe, compared with the CPU; see :func:`gpu_root_tools.cases_of`."""
    command = ("test-backend-ops", "test", "-b", DEVICE, "-o", op, "-p", pattern)
    return cases_of(lavapipe(*command, cwd=cwd, pristine=pristine, timeout=timeout, **more), op)


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
    """Folder with a script for each program of the build, which runs it in the root, all layers on the device: for tests/llama."""
    programs = build(MORE_TARGETS)
    folder = home() / "builds" / "lavapipe-programs"
    folder.mkdir(parents=True, exist_ok=True)
    variables = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment().items())
    for name in MORE_TARGETS:
        place = " -ngl 99" if name.startswith(("test-turbo-", "llama-")) and name != "test-turbo-perf" else ""
        text = f'#!/bin/sh\n{variables}exec {shlex.quote(str(SCRIPT))} run {shlex.quote(str(programs / name))} "$@"{place}\n'
        (folder / name).write_text(text, "utf-8")
        (folder / name).chmod(0o755)
    return folder
