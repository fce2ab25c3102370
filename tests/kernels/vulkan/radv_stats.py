"""What our shaders take on AMD GPUs that are not here: registers and instructions, from RADV's compiler.

Mesa's stand-in for the kernel's driver (Debian's mesa-drm-shim) shows RADV a GPU that executes nothing. The backend makes its pipelines on
it as on a real one, and prints what the compiler says of them (``GGML_VK_PIPELINE_STATS``); results are garbage, and not looked at.
"""

from __future__ import annotations

import re
from pathlib import Path

import lavapipe_tools
from backend_jobs import DIAGONAL, SMALL, TURBO, attention, two_segments
from gpu_root_tools import in_root

from turbo_gguf.codec import tables

GPUS = {"navi21": "RDNA2, RX 6800", "navi31": "RDNA3, RX 7900", "gfx1201": "RDNA4, RX 9070"}
"""Names that the stand-in knows, and what they are."""

SHIM = "/usr/lib/x86_64-linux-gnu/libamdgpu_noop_drm_shim.so"
DRIVER = "/usr/share/vulkan/icd.d/radeon_icd.json"

COLUMNS = {
    "VGPRs": "VGPRs",
    "SGPRs": "SGPRs",
    "Spilled VGPRs": "spilled",
    "LDS size": "LDS, bytes",
    "Instructions": "instructions",
    "Code size": "code, bytes",
}
"""Statistics of RADV, and how the table calls them."""

DECAYS = tuple(t.name for t in tables.SCALAR if t.decays)

CASES = (
    *(("SET_ROWS", f"type_dst={name},type_idx=i64,ne=.1024,5,1,3.,.*v=0", "turbo") for name in TURBO),
    *(("GET_ROWS", f"type={name},n=256,.*be1=1,.*v=0", "turbo") for name in TURBO),
    *(("MAP_CUSTOM1", f"type={name},ne0=1024,rows=1,v=0", "turbo") for name in DECAYS),
    ("CPY", "type_src=turbo3,type_dst=turbo3,ne.*=.256,4,4,4.", "turbo"),
    ("FLASH_ATTN_EXT", attention("128", SMALL + "nb=(1|32),", pairs=DIAGONAL).pattern, "flash_attn"),
    ("FLASH_ATTN_EXT", two_segments("128", more="75,kind=0,.*nb=1,.*type_K=turbo3t?,").pattern, "turbo"),
)
"""Operations and cases of test-backend-ops that make the pipelines, and a part of the pipelines' names.

A run may end when the CPU is asked for the same with indices that are garbage, so each has few cases.
"""

Stats = dict[str, list[dict[str, int]]]
"""Numbers by statistic, of each pipeline of a name: types and head sizes are constants that its shader is specialized with."""


def parse(text: str) -> Stats:
    """What the backend prints of each pipeline."""
    found: Stats = {}
    current: dict[str, int] = {}
    for line in text.splitlines():
        if head := re.match(r"ggml_vulkan: pipeline stats for (.*):$", line):
            current = {}
            found.setdefault(head[1], []).append(current)
        elif row := re.match(r"ggml_vulkan:   (.*): (\d+)$", line):
            current[row[1]] = int(row[2])
    return found


def stats(gpu: str, folder: Path) -> Stats:
    """Numbers of all pipelines that the cases make on a GPU."""
    found: Stats = {}
    for number, (op, pattern, part) in enumerate(CASES):
        variables = {
            **lavapipe_tools.environment(),
            "LD_PRELOAD": SHIM,
            "AMDGPU_GPU_ID": gpu,
            "VK_DRIVER_FILES": DRIVER,
            "GGML_VK_VISIBLE_DEVICES": "0",
            "GGML_VK_PIPELINE_STATS": part,
        }
        program = lavapipe_tools.programs() / "test-backend-ops"
        command = [
            "env",
            *(f"{name}={value}" for name, value in variables.items()),
            program,
            "test",
            "-b",
            "Vulkan0",
            "-o",
            op,
            "-p",
            pattern,
        ]
        done = in_root(
            command,
            cwd=folder,
            log=folder / f"{gpu}-{number}.log",
            environment={"GPU_ROOT_BIND": variables["GPU_ROOT_BIND"], "MESA_SHADER_CACHE_DISABLE": "1"},
        )
        for name, made in parse(done.err).items():
            found.setdefault(name, []).extend(made)
    if not found:
        raise RuntimeError(f"RADV made no pipeline for {gpu}; see {folder}")
    return found


def most(found: Stats, key: str) -> int:
    """The largest number of a statistic."""
    return max(numbers.get(key, 0) for made in found.values() for numbers in made)


def rows(found: Stats) -> list[str]:
    """Rows of a table, by name: how many pipelines it has, and the least and the most that they take."""
    return [
        f"| `{name}` | {len(made)} | " + " | ".join(_range([numbers.get(key, 0) for numbers in made]) for key in COLUMNS) + " |"
        for name, made in sorted(found.items())
    ]


def _range(values: list[int]) -> str:
    least, largest = min(values), max(values)
    return str(least) if least == largest else f"{least} to {largest}"
