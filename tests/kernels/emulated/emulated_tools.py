"""The real libggml-hip.so on the emulator: the Debian root, the stand-in for the HIP runtime, the build, and its programs.

What is missing (root rights, debootstrap, network) raises :class:`Unavailable`, which tests turn into a skip.
Everything is made on first use and found again by the next process; compiler results are in ``CCACHE_DIR``.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
from pathlib import Path

from gpu_root_tools import REPOSITORY, Case, Done, build_in_root, cases_of, checked, in_root, need_root, root, tiny_model

from turbo_gguf import patchset
from turbo_gguf.assets import home
from turbo_gguf.make.upstream import fetch, resolve

RUNTIME = REPOSITORY / "dev" / "emulator" / "runtime"

__all__ = ["Case", "Done", "home", "in_root", "root", "tiny_model"]

TARGETS = ("test-backend-ops", "llama-perplexity")
TILE = ("64-64", "96-96", "128-128", "192-128", "256-256", "512-512", "576-512")  # head sizes of K and V
# What upstream's dispatch takes on RDNA3 for batches of 3 and of 32 queries with 4 query heads per KV head, and with 2 in the models.
MMA = ("64-4-4", "64-16-4", "96-4-4", "96-16-4", "128-4-4", "128-16-4", "256-16-4", "128-8-8", "64-32-2", "128-32-2", "128-8-2")
# Operations that no test here calls.
SKIP = (
    "acc|add-id|allreduce|arange|argmax|col2im.*|conv2d.*|conv3d|conv-.*|count-equal|cross-entropy-loss|cumsum|diag|diagmask|dsv4-hc|fill|gated_delta_net|gla|"
    "im2col|lightning-indexer|mean|moe-.*|opt-step.*|out-prod|pad|pad_reflect_1d|pool.*|roll|set|snake|solve_tri|ssm-.*|sum|topk-moe|top-k|"
    "tri|tsembd|upscale|wkv"
)


@functools.cache
def runtime() -> Path:
    """Folder with the stand-ins for libamdhip64, libhipblas and librocblas."""
    sources = [root() / ".turbo-gguf", *sorted(RUNTIME.glob("hip*"))]
    mark = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    folder = home() / "builds" / f"hip-emulated-runtime-{mark}"
    if not (folder / "done").exists():
        checked(in_root(["bash", "-euc", _RUNTIME_SCRIPT, "bash", RUNTIME, folder], cwd=folder), "compiling the runtime")
        (folder / "done").touch()
    return folder


_RUNTIME_SCRIPT = """
python() { python3 -c "import sysconfig; print(sysconfig.$1)"; }
compile() { "$(hipconfig -l)/clang++" -std=c++17 -shared -fPIC -Wall -Wextra -Werror "$@"; }
compile -O2 "$1"/hip_{memory,launch,runtime}.cpp -I"$(python "get_path('include')")" -lpython"$(python "get_config_var('LDVERSION')")" \
    -Wl,--version-script="$1/hip_versions.map" -Wl,-soname,libamdhip64.so.6 -o "$2/libamdhip64.so.6"
compile -O3 -mavx2 -mfma -mf16c -ffast-math "$1/hipblas.cpp" -Wl,-soname,libhipblas.so.2 -o "$2/libhipblas.so.2"
compile -x c++ /dev/null -Wl,-soname,librocblas.so.4 -o "$2/librocblas.so.4"
"""


@functools.cache
def modules() -> Path:
    """Folder with tinygrad, for the Python in the root (it has no dependencies)."""
    found = importlib.util.find_spec("tinygrad")
    if found is None or found.origin is None:
        raise RuntimeError("tinygrad is not installed: pip install -e '.[dev]'")
    package = Path(found.origin).parent
    metadata = next(package.parent.glob("tinygrad-*.dist-info"))
    folder = home() / "builds" / "hip-emulated-modules" / metadata.name
    if not folder.exists():
        partial = folder.with_name(folder.name + f".{os.getpid()}")
        shutil.copytree(package, partial / "tinygrad", ignore=shutil.ignore_patterns("__pycache__"))
        partial.rename(folder)
    return folder


@functools.cache
def build(pristine: bool = False, jobs: int = 2) -> Path:
    """Folder of the programs of a HIP build for gfx1100, of the patched tree or of upstream's."""
    return build_in_root("hip-emulated", OPTIONS, TARGETS, sources="ggml/src/ggml-cuda/*.cu", pristine=pristine, jobs=jobs)


OPTIONS = {
    **{"GGML_HIP": "ON", "GPU_TARGETS": "gfx1100", "CMAKE_HIP_COMPILER_LAUNCHER": "ccache"},
    "CMAKE_EXE_LINKER_FLAGS": "-Wl,--allow-shlib-undefined",
    "GGML_CUDA_FA_QUANTS": "f16-f16;q8_0-q8_0;q4_0-q4_0",
    "CMAKE_PROJECT_ggml_INCLUDE": str(RUNTIME / "slim.cmake"),
    "EMULATED_TILE": ";".join(TILE),
    "EMULATED_MMA": ";".join(MMA),
    "EMULATED_SKIP": SKIP,
}


def emulated(program: str, *arguments: str | Path, cwd: Path, pristine: bool = False, timeout: float = 3600, **environment: str) -> Done:
    """Run a program of the build on the emulator."""
    path = build(pristine) / program
    return in_root(
        [path, *arguments],
        cwd=cwd,
        timeout=timeout,
        environment={
            "TURBO_EMULATOR_PATH": f"{REPOSITORY / 'dev'}:{modules()}",
            "LD_LIBRARY_PATH": str(runtime()),
            "GGML_CUDA_DISABLE_GRAPHS": "1",
            "GGML_NO_BACKTRACE": "1",
            "PYTHONPYCACHEPREFIX": str(home() / "builds" / "hip-emulated-modules" / "cache"),
            "OPENBLAS_NUM_THREADS": "1",
            **environment,
        },
        log=cwd / f"{program}-{len(list(cwd.glob('*.log')))}.log",
    )


def backend_ops(op: str, pattern: str, cwd: Path, *, pristine: bool = False, timeout: float = 3600, **environment: str) -> list[Case]:
    """Run cases of test-backend-ops on the emulated device, compared with the CPU.

    Args:
        op: an operation, or several with commas.
        pattern: a regular expression that the parameters match; cases that the device does not support are left out.
        cwd: folder for the logs.

    Raises:
        RuntimeError: the program ended otherwise than by reporting what failed.
    """
    cwd.mkdir(parents=True, exist_ok=True)
    command = ("test-backend-ops", "test", "-b", "ROCm0", "-o", op, "-p", pattern)
    done = emulated(*command, cwd=cwd, pristine=pristine, timeout=timeout, **environment)
    return cases_of(done, op)


_KERNELS_SCRIPT = """
"$(hipconfig -l)/clang++" -x hip --cuda-device-only --no-gpu-bundle-output --offload-arch=gfx1100 -O3 -DNDEBUG -std=gnu++17 -w \\
    -DGGML_USE_HIP -DGGML_HIP_NO_VMM -DGGML_HIP_GRAPHS -Iggml/include -Iggml/src -c ggml/src/ggml-cuda/"$1" -o "$2"
"""


@functools.cache
def code_object(source: str) -> bytes:
    """The kernels of one of our .cu files, compiled for gfx1100. Skips the test where there is no compiler."""
    need_root()
    tree = patchset.apply(fetch(resolve(None)))
    target = home() / "builds" / "hip-emulated-kernels" / f"{source}.elf"
    target.parent.mkdir(parents=True, exist_ok=True)
    script = ["bash", "-euc", _KERNELS_SCRIPT, "bash", source, target]
    checked(in_root(script, cwd=tree.path, log=target.with_suffix(".log")), f"compiling {source}")
    return target.read_bytes()
