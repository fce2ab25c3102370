"""Patched tree + preset -> CMake -> a build with an identity.

Builds are incremental: one folder per upstream and preset, in which a changed patch set compiles only what it reaches. A
build that is there already costs a look at its manifest.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from turbo_gguf import patchset
from turbo_gguf.assets import home
from turbo_gguf.errors import EnvironmentMissing, ToolFailed
from turbo_gguf.files import MORE_SPACE, lock
from turbo_gguf.make import known_wrong, presets
from turbo_gguf.make.presets import Preset, gpu_compiler, preset
from turbo_gguf.make.toolkits import TOOLKITS, of_preset
from turbo_gguf.make.upstream import fetch, resolve
from turbo_gguf.patchset.tree import Tree
from turbo_gguf.tools import APT_PACKAGES, Run, capture, failure, find, run

DEFAULT_TARGETS = ("llama-cli", "llama-server", "llama-completion", "llama-perplexity", "llama-bench")
"""Programs that the driver runs or that users chat with."""

MANIFEST = "turbo-gguf-build.json"

_PROGRESS = re.compile(r"^\[\s*(\d+)/(\d+)\]|^\[\s*(\d+)%\]")
_ERROR = re.compile(r"\b[Ee]rror\b|FAILED: |undefined reference|No space left")
_KEPT_ERRORS = 12


class Build(msgspec.Struct, frozen=True):
    """A finished build of a tree."""

    id: str  # short hash of commit, digest, preset, compiler and CMake options
    path: Path  # CMake build folder
    preset: str
    tree: Tree
    compiler: str

    def tool(self, name: str) -> Path:
        """Path of a built program such as ``llama-perplexity``."""
        return self.path / "bin" / name


class Toolchain(msgspec.Struct, frozen=True):
    """The programs a build uses."""

    cmake: Path
    ninja: Path | None
    make: Path | None
    cc: Path
    cxx: Path
    ccache: Path | None
    compiler: str  # versions of the C++ compiler and, for a GPU, of its compiler


class Manifest(msgspec.Struct, frozen=True):
    """What a build folder holds, written when a build has ended well."""

    id: str
    folder: str  # programs find their libraries by this path: a folder that was moved is built again
    commit: str
    digest: str
    compiler: str
    options: dict[str, str]
    targets: tuple[str, ...]


def ensure_build(
    preset_name: str = "cpu",
    *,
    upstream: str | None = None,
    targets: Sequence[str] = DEFAULT_TARGETS,
    jobs: int | None = None,
    pristine: bool = False,
) -> Build:
    """Fetch, patch, configure and compile what is not there yet, and return the build.

    Args:
        preset_name: a name in :data:`turbo_gguf.make.presets.PRESETS`.
        upstream: as :func:`turbo_gguf.make.upstream.resolve` takes it.
        targets: CMake targets; those of earlier calls are kept up to date only when they are asked for again.
        jobs: parallel compiler processes, one per core when ``None``.
        pristine: build upstream without our patches, in a folder of its own (to compare with).

    Raises:
        EnvironmentMissing: a compiler, cmake, GPU toolkit, network or disk space is missing.
        UsageError: the patch set does not fit, or the work tree was edited.
        ToolFailed: configuring or compiling failed; the message has the log and its errors.
    """
    chosen = preset(preset_name)
    tools, options = toolchain(chosen), presets.options(chosen)  # what is missing is said before anything is fetched
    source = resolve(upstream)
    with lock(f"tree-{source.name}"):
        tree = fetch(source)
        for text in known_wrong.warnings(tree.path, of_preset(chosen.name).built_for(options)):
            print(f"warning: llama.cpp {source.name} is {text}; {known_wrong.advice(source.name)}", file=sys.stderr)
        if not pristine:
            tree = patchset.apply(tree)
        return build(tree, chosen, tools, options, targets=targets, jobs=jobs or os.cpu_count() or 1)


def build(tree: Tree, chosen: Preset, tools: Toolchain, options: Mapping[str, str], *, targets: Sequence[str], jobs: int) -> Build:
    """Configure and compile a tree; see :func:`ensure_build`. The caller holds the lock of the tree."""
    folder = build_folder(tree, chosen.name)
    found = Build(id=build_id(tree, chosen.name, tools, options), path=folder, preset=chosen.name, tree=tree, compiler=tools.compiler)
    old = read_manifest(folder)
    if old is not None and (old.id, old.folder) != (found.id, str(folder)):
        old = None
    if old is not None and set(targets) <= set(old.targets) and all(_is_built(found, name) for name in targets):
        return found
    _require_disk(chosen, folder)
    (folder / MANIFEST).unlink(missing_ok=True)
    environment = {**_environment(tree, tools), **presets.environment(chosen)}
    if old is None:
        _configure(tree, folder, tools, options, environment)
    _compile(folder, tools, targets, jobs, environment)
    _write_manifest(found, options, {*targets, *(old.targets if old is not None else ())})
    return found


def found(preset_name: str, program: str, *, upstream: str | None = None) -> Path | None:
    """A program of a patched build that is there, whatever became of the patch set since; nothing is made."""
    folder = home() / "builds" / f"{resolve(upstream).name}-{preset_name}"
    path = folder / "bin" / program
    return path if read_manifest(folder) is not None and path.is_file() else None


def build_folder(tree: Tree, preset_name: str) -> Path:
    """Folder of the build of a tree, the unpatched one beside the patched one."""
    return home() / "builds" / f"{tree.upstream}-{preset_name}{'' if tree.digest else '-pristine'}"


def read_manifest(folder: Path) -> Manifest | None:
    """What a build folder holds, ``None`` when no build has ended well there."""
    try:
        return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except (FileNotFoundError, NotADirectoryError, msgspec.MsgspecError):
        return None


def _write_manifest(found: Build, options: Mapping[str, str], targets: set[str]) -> None:
    tree = found.tree
    manifest = Manifest(found.id, str(found.path), tree.commit, tree.digest, found.compiler, dict(options), tuple(sorted(targets)))
    (found.path / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")


def build_id(tree: Tree, preset_name: str, tools: Toolchain, options: Mapping[str, str]) -> str:
    """Twelve hexadecimal digits that stand for all that decides what a build computes."""
    parts = [tree.commit, tree.digest, preset_name, tools.compiler, cpu_mark(), *(f"{k}={v}" for k, v in sorted(options.items()))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def cpu_mark() -> str:
    """Short hash of this CPU's features: a native build is for this kind of CPU only, in a shared compiler cache too."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:
        text = ""
    features = sorted({word for line in re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE) for word in line.split()})
    return hashlib.sha256(" ".join([os.uname().machine, *features]).encode()).hexdigest()[:8]


def toolchain(chosen: Preset) -> Toolchain:
    """Find the programs of a build.

    Raises:
        EnvironmentMissing: names every program that is missing, and the packages that bring them.
    """
    cmake, ninja, make = find_cmake(chosen.min_cmake), find_tool("ninja"), find("make")
    cc, cxx = compiler("CC", ("cc", "gcc", "clang")), compiler("CXX", ("c++", "g++", "clang++"))
    missing = [name for name, path in (("cmake", cmake), ("gcc", cc), ("g++", cxx), ("make", ninja or make)) if path is None]
    if cmake is None or cc is None or cxx is None or missing:
        packages = " ".join(dict.fromkeys(APT_PACKAGES[name] for name in missing))
        wheels = "; or pip install 'turbo-gguf[build]'" if "cmake" in missing else ""
        raise EnvironmentMissing(f"not found: {', '.join(missing)}", f"apt-get install {packages}{wheels}")
    version = cmake_version(cmake)
    if version < chosen.min_cmake:
        need = ".".join(map(str, chosen.min_cmake))
        raise EnvironmentMissing(
            f"{cmake} is {'.'.join(map(str, version))}, the preset {chosen.name} needs {need}", "pip install 'turbo-gguf[build]'"
        )
    versions = [capture([cxx, "--version"]).splitlines()[0], *gpu_compiler(chosen.name)]
    return Toolchain(cmake=cmake, ninja=ninja, make=make, cc=cc, cxx=cxx, ccache=find("ccache"), compiler="; ".join(versions))


def find_tool(program: str) -> Path | None:
    """A program on PATH, or one that a wheel brought into this Python's environment."""
    return find(program) or _wheel_tool(program)


def _wheel_tool(program: str) -> Path | None:
    path = Path(sysconfig.get_path("scripts")) / program
    return path if path.is_file() else None


def find_cmake(oldest: tuple[int, int]) -> Path | None:
    """The first cmake that is new enough, of PATH and of this Python's environment; else the first one."""
    found = [path for path in (find("cmake"), _wheel_tool("cmake")) if path is not None]
    return next((path for path in found if cmake_version(path) >= oldest), found[0] if found else None)


def compiler(variable: str, names: Sequence[str]) -> Path | None:
    """The compiler that an environment variable names, or the first of ``names`` that exists."""
    named = os.environ.get(variable)
    return next((path for name in ([named] if named else names) if (path := find(name)) is not None), None)


def cmake_version(cmake: Path) -> tuple[int, int]:
    """Major and minor version of a cmake program, (0, 0) when it does not say."""
    match = re.search(r"version (\d+)\.(\d+)", capture([cmake, "--version"]))
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _is_built(found: Build, target: str) -> bool:
    """Whether a target's program is there (libraries have other names and are not looked for)."""
    return not target.startswith(("llama-", "test-")) or found.tool(target).is_file()


def _require_disk(chosen: Preset, folder: Path) -> None:
    """Refuse to begin what cannot end; what an earlier build takes already counts as there."""
    folder.mkdir(parents=True, exist_ok=True)
    taken = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) // 1_000_000
    free = shutil.disk_usage(folder).free // 1_000_000
    needed = max(chosen.megabytes - taken, 50)
    if free < needed:
        raise EnvironmentMissing(
            f"{folder}: {free} MB free, building {chosen.name} needs {needed} MB",
            MORE_SPACE,
        )


def _environment(tree: Tree, tools: Toolchain) -> dict[str, str]:
    """Variables of CMake and of what it starts.

    Git is kept from finding an outer repository. ccache shares results between checkouts, but not between kinds of CPUs. Builds within the
    build, such as that of Vulkan's shader generator, look for cmake and ninja on PATH, where those of a wheel are not.
    """
    folders = dict.fromkeys(str(program.parent) for program in (tools.cmake, tools.ninja) if program is not None)
    return {
        "PATH": os.pathsep.join((os.environ.get("PATH", os.defpath), *folders)),
        "GIT_CEILING_DIRECTORIES": str(tree.path.parent),
        "CCACHE_BASEDIR": str(home()),
        "CCACHE_NOHASHDIR": "1",
        "CCACHE_NAMESPACE": f"turbo-gguf-{cpu_mark()}",
    }


def _configure(tree: Tree, folder: Path, tools: Toolchain, options: Mapping[str, str], environment: Mapping[str, str]) -> None:
    settings = {
        **options,
        "CMAKE_C_COMPILER": str(tools.cc),
        "CMAKE_CXX_COMPILER": str(tools.cxx),
        "LLAMA_BUILD_NUMBER": "0",  # else asked of git
        "LLAMA_BUILD_COMMIT": tree.commit,
    }
    if tools.ccache is not None:
        languages = ("C", "CXX", *_gpu_languages(options))
        settings |= {f"CMAKE_{language}_COMPILER_LAUNCHER": str(tools.ccache) for language in languages}
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools.ninja}"] if tools.ninja else ["-G", "Unix Makefiles"]
    cache = folder / "CMakeCache.txt"
    if cache.is_file() and not _same_generator(cache, generator[1], tree):
        shutil.rmtree(folder)
        folder.mkdir()
    argv: list[str | Path] = [
        tools.cmake,
        "-S",
        tree.path,
        "-B",
        folder,
        *generator,
        *(f"-D{key}={value}" for key, value in settings.items()),
    ]
    print(f"configuring llama.cpp {tree.upstream} in {folder}", file=sys.stderr)
    done = run(argv, log=_log(folder, "configure"), env=environment, check=False)
    if done.rc != 0:
        raise _build_failed("configuring", done, f"see the log; then remove {folder} and try again: rm -r {folder}")


def _gpu_languages(options: Mapping[str, str]) -> list[str]:
    """CMake languages of the backends that options switch on."""
    return [language for toolkit in TOOLKITS.values() if toolkit.cmake.items() <= options.items() for language in toolkit.languages]


def _same_generator(cache: Path, generator: str, tree: Tree) -> bool:
    """Whether a CMake cache can be used again: CMake refuses another generator or source folder."""
    text = cache.read_text("utf-8", errors="replace")
    return f"CMAKE_GENERATOR:INTERNAL={generator}\n" in text and f"CMAKE_HOME_DIRECTORY:INTERNAL={tree.path}\n" in text


def _compile(folder: Path, tools: Toolchain, targets: Sequence[str], jobs: int, environment: Mapping[str, str]) -> None:
    argv: list[str | Path] = [tools.cmake, "--build", folder, "--parallel", str(jobs), "--target", *targets]
    log = _log(folder, "build")
    print(f"compiling with {jobs} jobs; log: {log.with_suffix('.out')}", file=sys.stderr)
    done = run(argv, log=log, env=environment, check=False, on_line=_progress())
    if done.rc != 0:
        raise _build_failed("compiling", done, "mend the error; the same command again compiles only what is left")


def _log(folder: Path, step: str) -> Path:
    return home() / "logs" / f"{step}-{folder.name}.log"


def _progress() -> Callable[[str], None]:
    """Show ninja's or make's count on a terminal, on one line."""
    terminal = sys.stderr.isatty()

    def show(line: str) -> None:
        if terminal and _PROGRESS.match(line):
            print(f"\r{line[:78]:78}", end="", file=sys.stderr, flush=True)

    return show


def _build_failed(step: str, done: Run, hint: str) -> EnvironmentMissing | ToolFailed:
    """The error of a failed step, with the lines of its log that name errors."""
    base = failure(done, hint)
    if isinstance(base, EnvironmentMissing):
        return base
    lines = [line for path in (done.stdout, done.stderr) for line in path.read_text("utf-8", errors="replace").splitlines()]
    errors = [line.strip()[:300] for line in lines if _ERROR.search(line)][-_KEPT_ERRORS:] or [line for line in lines if line.strip()][
        -_KEPT_ERRORS:
    ]
    return ToolFailed("\n  ".join([f"{step} llama.cpp failed; log: {done.stdout}, {done.stderr}", *errors]), hint)
