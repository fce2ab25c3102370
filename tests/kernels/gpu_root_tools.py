"""What tests in the root of ``scripts/gpu_root.sh`` share, for HIP on the emulator and for Vulkan on the CPU's driver.

What is missing (root rights, debootstrap, network) raises :class:`Unavailable`, which tests turn into a skip.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
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

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts" / "gpu_root.sh"
ENVIRONMENT_MISSING = 3  # exit code of SCRIPT

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
    """The Debian root, made when it is not there yet.

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
    log = log or home() / "logs" / f"gpu-root-{os.getpid()}.log"
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


def checked(done: Done, what: str) -> Done:
    """The same, or an error with the end of its output."""
    if done.rc:
        raise RuntimeError(f"{what} ended with {done.rc}\n{(done.out + done.err)[-4000:]}")
    return done


def build_in_root(
    name: str,
    options: Mapping[str, str],
    targets: Sequence[str],
    *,
    sources: str,
    pristine: bool = False,
    jobs: int = 2,
    environment: Mapping[str, str] | None = None,
) -> Path:
    """Compile the patched tree, or upstream's, with the root's clang; returns the folder of the programs.

    Args:
        name: of the build's folder, behind that of the upstream.
        options: of CMake, beside :data:`OPTIONS`.
        targets: of CMake.
        sources: pattern of the files that CMake lists when it configures: when there are others, it does so again.
        pristine: upstream's tree, without our patches.
        jobs: compiler processes.
        environment: variables of CMake and of the compilers.
    """
    root()
    source = resolve(None)
    with lock(f"tree-{source.name}"):
        tree = fetch(source)
        if not pristine:
            tree = patchset.apply(tree)
    folder = home() / "builds" / f"{source.name}-{name}{'-pristine' if pristine else ''}"
    with lock(folder.name):
        log = home() / "logs" / f"{folder.name}.log"
        script = ["bash", "-euc", _BUILD_SCRIPT, "bash", tree.path, folder, str(jobs), sources, *targets]
        lines = "\n".join(f"-D{option}={value}" for option, value in {**OPTIONS, **options}.items())
        done = in_root(script, cwd=folder, log=log, timeout=7200, environment={**(environment or {}), "BUILD_OPTIONS": lines})
        checked(done, f"the build ({log})")
    return folder / "bin"


OPTIONS = {
    **{"CMAKE_BUILD_TYPE": "Release", "BUILD_SHARED_LIBS": "ON", "GGML_NATIVE": "OFF", "GGML_CCACHE": "OFF"},
    **{"LLAMA_BUILD_TESTS": "ON", "LLAMA_BUILD_EXAMPLES": "OFF", "LLAMA_BUILD_APP": "OFF", "LLAMA_BUILD_UI": "OFF"},
    **{"LLAMA_USE_PREBUILT_UI": "OFF", "LLAMA_OPENSSL": "OFF", "LLAMA_LLGUIDANCE": "OFF"},
    **{f"CMAKE_{language}_COMPILER_LAUNCHER": "ccache" for language in ("C", "CXX")},
}
"""Of every build in the root; the script adds the root's clang, whatever its version."""

_BUILD_SCRIPT = """
tree=$1 folder=$2 jobs=$3 sources=$4
shift 4
export CC="$(hipconfig -l)/clang" HIP_PATH="$(hipconfig -R)"
export CXX="$CC++" HIPCXX="$CC"  # builds within the build look for them here
export CCACHE_BASEDIR="$(dirname "$(dirname "$folder")")" CCACHE_NOHASHDIR=1  # results are good for checkouts elsewhere, too
mapfile -t options <<<"$BUILD_OPTIONS"
options+=(-DCMAKE_C_COMPILER="$CC" -DCMAKE_CXX_COMPILER="$CXX")
mark=$({ printf '%s\\n' "$tree" "${options[@]}" && ls "$tree"/$sources; } | sha256sum)
if [ "$mark" != "$(cat "$folder/configured" 2>/dev/null)" ]; then
    rm -rf "$folder/CMakeCache.txt"
    cmake -G Ninja -S "$tree" -B "$folder" "${options[@]}"
    echo "$mark" >"$folder/configured"
fi
nice -n 5 ninja -C "$folder" -j "$jobs" "$@"
"""


def cases_of(done: Done, op: str) -> list[Case]:
    """The cases that test-backend-ops ran for ``op`` (several with commas); those that the device does not support are left out.

    Raises:
        RuntimeError: the program ended otherwise than by reporting what failed.
    """
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


def need_root() -> None:
    """Skip the running test where there is no root."""
    try:
        root()
    except Unavailable as error:
        skip(str(error))


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
