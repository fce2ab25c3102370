"""The real libggml-hip.so on the emulator: the Debian root, the stand-in for the HIP runtime, the build, and its programs.

What is missing (root rights, debootstrap, network) raises :class:`Unavailable`, which tests turn into a skip.
Everything is made on first use and found again by the next process; compiler results are in ``CCACHE_DIR``.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

from turbo_gguf import patchset
from turbo_gguf.assets import home
from turbo_gguf.files import lock
from turbo_gguf.make.upstream import fetch, resolve

FOLDER = Path(__file__).resolve().parent
REPOSITORY = FOLDER.parents[2]
SCRIPT = REPOSITORY / "scripts" / "gpu_root.sh"
RUNTIME = REPOSITORY / "dev" / "emulator" / "runtime"
ENVIRONMENT_MISSING = 3  # exit code of SCRIPT

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

ANSI = re.compile(r"\x1b\[[0-9;]*m")


class Unavailable(Exception):
    """Why there is no GPU root here, in words for a skip."""


@dataclass(frozen=True)
class Done:
    """A program that has ended."""

    rc: int
    out: str
    err: str


@dataclass(frozen=True)
class Case:
    """One case of test-backend-ops that ran."""

    parameters: dict[str, str]
    text: str
    ok: bool


def root() -> Path:
    """The Debian root with HIP, made when it is not there yet.

    Raises:
        Unavailable: it cannot be made here. That is found out once: a mirror that does not answer takes its time.
    """
    found = _root_or_reason()
    if isinstance(found, str):
        raise Unavailable(found)
    return found


@functools.cache
def _root_or_reason() -> Path | str:
    done = subprocess.run([SCRIPT, "make"], capture_output=True, text=True, check=False)
    if done.returncode == ENVIRONMENT_MISSING:
        return " ".join(done.stderr.strip().splitlines()[-2:])
    if done.returncode:
        raise RuntimeError(f"{SCRIPT} ended with {done.returncode}\n{done.stderr[-3000:]}")
    return Path(done.stdout.strip())


def in_root(
    command: Sequence[str | Path],
    *,
    cwd: Path,
    environment: Mapping[str, str] | None = None,
    timeout: float = 3600,
    log: Path | None = None,
) -> Done:
    """Run a command in the root to its end; its output goes to ``log`` and ``log``.err, too."""
    root()
    cwd.mkdir(parents=True, exist_ok=True)
    log = log or home() / "logs" / f"hip-emulated-{os.getpid()}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    errors = log.with_name(log.name + ".err")
    with log.open("w") as out, errors.open("w") as err:
        done = subprocess.run(
            [SCRIPT, "run", *command],
            cwd=cwd,
            env={**os.environ, **(environment or {})},
            stdout=out,
            stderr=err,
            timeout=timeout,
            check=False,
        )
    return Done(done.returncode, log.read_text("utf-8", errors="replace"), errors.read_text("utf-8", errors="replace"))


def _checked(done: Done, what: str) -> Done:
    if done.rc:
        raise RuntimeError(f"{what} ended with {done.rc}\n{(done.out + done.err)[-4000:]}")
    return done


@functools.cache
def runtime() -> Path:
    """Folder with the stand-ins for libamdhip64, libhipblas and librocblas."""
    sources = [root() / ".turbo-gguf", *sorted(RUNTIME.glob("hip*"))]
    mark = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    folder = home() / "builds" / f"hip-emulated-runtime-{mark}"
    if not (folder / "done").exists():
        _checked(in_root(["bash", "-euc", _RUNTIME_SCRIPT, "bash", RUNTIME, folder], cwd=folder), "compiling the runtime")
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
    root()
    source = resolve(None)
    with lock(f"tree-{source.name}"):
        tree = fetch(source)
        if not pristine:
            tree = patchset.apply(tree)
    folder = home() / "builds" / f"{source.name}-hip-emulated{'-pristine' if pristine else ''}"
    with lock(folder.name):
        log = home() / "logs" / f"{folder.name}.log"
        script = ["bash", "-euc", _BUILD_SCRIPT, "bash", tree.path, folder, str(jobs), *TARGETS]
        _checked(in_root(script, cwd=folder, log=log, environment=_options()), f"the build ({log})")
    return folder / "bin"


def _options() -> dict[str, str]:
    options = {
        **{"CMAKE_BUILD_TYPE": "Release", "BUILD_SHARED_LIBS": "ON", "GGML_HIP": "ON", "GPU_TARGETS": "gfx1100"},
        **{"GGML_NATIVE": "OFF", "GGML_CCACHE": "OFF", "LLAMA_BUILD_TESTS": "ON", "LLAMA_BUILD_EXAMPLES": "OFF", "LLAMA_BUILD_APP": "OFF"},
        **{"LLAMA_BUILD_UI": "OFF", "LLAMA_USE_PREBUILT_UI": "OFF", "LLAMA_OPENSSL": "OFF", "LLAMA_LLGUIDANCE": "OFF"},
        **{f"CMAKE_{language}_COMPILER_LAUNCHER": "ccache" for language in ("C", "CXX", "HIP")},
        "CMAKE_C_COMPILER": "clang-21",
        "CMAKE_CXX_COMPILER": "clang++-21",
        "CMAKE_EXE_LINKER_FLAGS": "-Wl,--allow-shlib-undefined",
        "GGML_CUDA_FA_QUANTS": "f16-f16;q8_0-q8_0;q4_0-q4_0",
        "CMAKE_PROJECT_ggml_INCLUDE": str(RUNTIME / "slim.cmake"),
        "EMULATED_TILE": ";".join(TILE),
        "EMULATED_MMA": ";".join(MMA),
        "EMULATED_SKIP": SKIP,
    }
    del options["CMAKE_C_COMPILER"], options["CMAKE_CXX_COMPILER"]  # of the root's version of clang: the script names them
    return {"EMULATED_OPTIONS": "\n".join(f"-D{name}={value}" for name, value in options.items())}


_BUILD_SCRIPT = """
tree=$1 folder=$2 jobs=$3
shift 3
export HIPCXX="$(hipconfig -l)/clang" HIP_PATH="$(hipconfig -R)"
export CCACHE_BASEDIR="$(dirname "$(dirname "$folder")")" CCACHE_NOHASHDIR=1  # results are good for checkouts elsewhere, too
mapfile -t options <<<"$EMULATED_OPTIONS"
options+=(-DCMAKE_C_COMPILER="$HIPCXX" -DCMAKE_CXX_COMPILER="$HIPCXX++")
# CMake lists files when it configures.
mark=$({ printf '%s\\n' "$tree" "${options[@]}" && find "$tree/ggml/src/ggml-cuda" -name '*.cu' | sort; } | sha256sum)
if [ "$mark" != "$(cat "$folder/configured" 2>/dev/null)" ]; then
    rm -rf "$folder/CMakeCache.txt"
    cmake -G Ninja -S "$tree" -B "$folder" "${options[@]}"
    echo "$mark" >"$folder/configured"
fi
nice -n 5 ninja -C "$folder" -j "$jobs" "$@"
"""


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
    text = ANSI.sub("", done.out)
    cases, names = [], f"(?:{op.replace(',', '|')})"
    for name, parameters, result in re.findall(rf"^(?:\[{names}\].*)?  ({names})\((.*)\): (.*)$", text, re.MULTILINE):
        if "not supported" not in result:
            fields = dict(re.findall(r"(\w+)=(\[[^]]*\]|[^,\[]+)", parameters))
            cases.append(Case(fields, f"{name}({parameters}): {result}", result.strip() == "OK"))
    if done.rc not in (0, 1) or f"{sum(case.ok for case in cases)}/{len(cases)} tests passed" not in text:
        raise RuntimeError(f"test-backend-ops ended with {done.rc}\n{text[-2000:]}\n{done.err[-4000:]}")
    return cases


def skip(reason: str) -> NoReturn:
    """Skip the running test, or fail where ``TURBO_GGUF_REQUIRE_GPU_ROOT`` says that there is a root (continuous integration)."""
    if os.environ.get("TURBO_GGUF_REQUIRE_GPU_ROOT"):
        pytest.fail(reason)
    pytest.skip(reason)


def tiny_model(name: str, folder: Path) -> Path:
    """Write a model of ``tests/llama/tiny_models.py`` and a text into a folder."""
    spec = importlib.util.spec_from_file_location("tiny_models", REPOSITORY / "tests" / "llama" / "tiny_models.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    (folder / "text.txt").write_text(" ".join(Path(spec.origin or "").read_text("ascii").split())[:6000], "ascii")
    model: Path = module.write(name, folder)
    return model


_KERNELS_SCRIPT = """
"$(hipconfig -l)/clang++" -x hip --cuda-device-only --no-gpu-bundle-output --offload-arch=gfx1100 -O3 -DNDEBUG -std=gnu++17 -w \\
    -DGGML_USE_HIP -DGGML_HIP_NO_VMM -DGGML_HIP_GRAPHS -Iggml/include -Iggml/src -c ggml/src/ggml-cuda/"$1" -o "$2"
"""


@functools.cache
def code_object(source: str) -> bytes:
    """The kernels of one of our .cu files, compiled for gfx1100. Skips the test where there is no compiler."""
    try:
        root()
    except Unavailable as error:
        skip(str(error))
    tree = patchset.apply(fetch(resolve(None)))
    target = home() / "builds" / "hip-emulated-kernels" / f"{source}.elf"
    target.parent.mkdir(parents=True, exist_ok=True)
    script = ["bash", "-euc", _KERNELS_SCRIPT, "bash", source, target]
    _checked(in_root(script, cwd=tree.path, log=target.with_suffix(".log")), f"compiling {source}")
    return target.read_bytes()
