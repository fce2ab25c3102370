"""Device-only compiles of single .cu files, for AMD and NVIDIA targets, remembered by what went into them.

A compile is not repeated where the compiler, its command line and all files of the tree that it read are the same. Nor is it where files
have changed, but not what the preprocessor makes of them: comments, formatting, and what other targets see.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import kernel_instructions as instructions
import kernel_resources as resources
import msgspec

from turbo_gguf.errors import EnvironmentMissing, ToolFailed
from turbo_gguf.make.toolkits import cuda, rocm
from turbo_gguf.tools import capture

NVIDIA_TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_120a")
"""RTX 20, A100, RTX 30, RTX 40, H100 and H200, RTX 50: what upstream compiles for them."""

FORMAT = "with instructions"
"""What is remembered of a compile; another one is compiled again."""

CUDA_SOURCES = "ggml/src/ggml-cuda"
"""Folder of the .cu files in a tree."""

_SCRIPTS = Path(__file__).parent
_GPU_ROOT = _SCRIPTS.parent / "gpu_root.sh"
_WARNINGS = ("-Wall", "-Wextra", "-Wcast-qual")
_INCLUDES = ("-Iggml/include", "-Iggml/src")  # those of upstream's CMake files
_HIP_FLAGS = ("-O3", "-DNDEBUG", "-std=gnu++17", "-fPIC", "-DGGML_USE_HIP", "-DGGML_HIP_NO_VMM", "-DGGML_HIP_GRAPHS")
_CUDA_FLAGS = ("-O3", "-DNDEBUG", "-std=c++17", "-use_fast_math", "-extended-lambda", "-DGGML_CUDA_USE_GRAPHS", "-Xptxas", "-v")


_ASSERTED = re.compile(rb'("[^"]*\.(?:cu|cuh|h)"), \d+')
"""File and line in what GGML_ASSERT and its kind become."""


class Toolchain(msgspec.Struct, frozen=True):
    """A compiler and the start of its command line."""

    command: tuple[str, ...]  # up to the flags that depend on the target
    version: str
    amd: bool
    disassembler: tuple[str, ...] = ()  # of AMD's code

    def preprocess(self, target: str, source: str) -> list[str]:
        """Command line that prints what the compiler sees of a source for one target."""
        command = [part for part in self.command if part not in ("-c", "-cubin")]
        return [*command, f"--offload-arch={target}" if self.amd else f"-arch={target}", *_INCLUDES, "-E", source]

    def argv(self, target: str, source: str, output: Path) -> list[str]:
        """Command line that compiles a source of the tree in the current folder for one target, and writes what it included."""
        rule = str(output.with_suffix(".d"))
        if self.amd:  # clang's -MD does nothing for the device
            target_options = [f"--offload-arch={target}", "-Xclang", "-dependency-file", "-Xclang", rule, "-Xclang", "-MT", "-Xclang", rule]
        else:
            target_options = [f"-arch={target}", "-MD", "-MF", rule]
        return [*self.command, *target_options, *_INCLUDES, source, "-o", str(output)]


class Compiled(msgspec.Struct, frozen=True):
    """What a compile gave, kept in the cache."""

    key: str  # hash of the compiler and its command line
    inputs: dict[str, str]  # file of the tree -> sha256
    seconds: float
    size: int  # bytes of the code object
    warnings: list[str]
    kernels: list[resources.Kernel]
    text: str = ""  # sha256 of the preprocessed source

    @property
    def digest(self) -> str:
        """That of its job (:meth:`Job.digest`)."""
        return _digest(self.key, self.text)


def hip_toolchain(extra: Sequence[str] = ()) -> Toolchain:
    """The GPU root's clang, else that of a ROCm installation.

    Raises:
        EnvironmentMissing: neither is there.
    """
    try:
        capture([_GPU_ROOT, "path"])
        start = [str(_GPU_ROOT), "run"]
        clang = capture([*start, "sh", "-c", 'echo "$(hipconfig -l)/clang++"'])
    except (ToolFailed, EnvironmentMissing) as error:
        found = rocm.find()
        if found is None or found.clang is None:
            raise EnvironmentMissing(f"no HIP compiler: {error.message}", "make gpu-root, or install ROCm 6.1 or newer") from error
        start, clang = [], str(found.clang)
    version = capture([*start, clang, "--version"]).splitlines()[0]
    options = ("-x", "hip", "--cuda-device-only", "--no-gpu-bundle-output", *_HIP_FLAGS, *_WARNINGS, *extra, "-c")
    return Toolchain((*start, clang, *options), version, amd=True, disassembler=(*start, str(Path(clang).with_name("llvm-objdump")), "-d"))


def cuda_toolchain(extra: Sequence[str] = ()) -> Toolchain:
    """The CUDA compiler, with a stand-in for cuBLAS' header where it is missing.

    Raises:
        EnvironmentMissing: there is no nvcc.
    """
    nvcc = cuda.compiler()
    if nvcc is None:
        raise EnvironmentMissing("no CUDA compiler (nvcc)", "apt-get install nvidia-cuda-toolkit, or set CUDACXX to the path of nvcc")
    folders = (*cuda.include_folders(nvcc), Path("/usr/include"))
    stubs = () if any((folder / "cublas_v2.h").is_file() for folder in folders) else (f"-I{_SCRIPTS / 'stubs'}",)
    return Toolchain((str(nvcc), "-cubin", *_CUDA_FLAGS, *extra, *stubs), " ".join(cuda.compiler_version()), amd=False)


def toolchain(target: str, extra: Sequence[str] = ()) -> Toolchain:
    """The compiler for a target; see :func:`hip_toolchain` and :func:`cuda_toolchain`."""
    return hip_toolchain(extra) if target.startswith("gfx") else cuda_toolchain(extra)


def types_of(tree: Path) -> dict[int, str]:
    """Number -> name of each type that a tree knows."""
    headers = (tree / "ggml/include" / name for name in ("ggml.h", "ggml-turbo-enum.inc"))
    return resources.type_names(*(header.read_text("utf-8") for header in headers))


def short_names(symbols: Sequence[str], types: Mapping[int, str]) -> dict[str, str]:
    """Symbol -> short name (:func:`kernel_resources.short_name`).

    Raises:
        EnvironmentMissing: there is no c++filt.
    """
    try:
        done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise EnvironmentMissing("c++filt not found", "apt-get install binutils") from error
    return {symbol: resources.short_name(text, types) for symbol, text in zip(symbols, done.stdout.splitlines(), strict=True)}


def cache_folder() -> Path:
    """Where results of compiles are kept; they outlive the checkout, like those of ccache."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "turbo-gguf" / "kernels"


class Job(msgspec.Struct, frozen=True):
    """One file (its name in CUDA_SOURCES) of a tree, for one target."""

    tree: Path
    source: str
    target: str
    tools: Toolchain
    own_files: Sequence[str]  # in the folder of the .cu files, for warnings
    scratch: Path

    @property
    def output(self) -> Path:
        """Where the object goes."""
        return self.scratch / f"{self.source}.{self.target}.o"

    @property
    def argv(self) -> list[str]:
        """The compiler's command line."""
        return self.tools.argv(self.target, f"{CUDA_SOURCES}/{self.source}", self.output)

    @property
    def key(self) -> str:
        """Hash of the compiler and its command line, without what differs between checkouts and runs."""
        fixed = [part for part in self.argv if not part.startswith((str(self.scratch), f"-I{_SCRIPTS}", str(_GPU_ROOT)))]
        return hashlib.sha256("\n".join([FORMAT, self.tools.version, *fixed]).encode()).hexdigest()

    @property
    def record(self) -> Path:
        """Where the result is remembered."""
        return cache_folder() / f"{self.source}.{self.target}.{self.key[:16]}.json"

    def text(self) -> str:
        """Hash of the preprocessed source without the places that its lines come from; "" where it can't be preprocessed."""
        argv = self.tools.preprocess(self.target, f"{CUDA_SOURCES}/{self.source}")
        done = subprocess.run(argv, cwd=self.tree, capture_output=True, check=False)
        lines = (line for line in done.stdout.splitlines() if not re.match(rb'#(line)? \d+ "', line))
        words = b" ".join(word for line in lines for word in line.split())
        return hashlib.sha256(_ASSERTED.sub(rb"\1", words)).hexdigest() if done.returncode == 0 else ""

    def digest(self) -> str:
        """Eight digits for the compiler, its command line and what it sees of the source; "" where that can't be preprocessed."""
        return _digest(self.key, self.text())


def remembered(job: Job) -> Compiled | None:
    """What an earlier compile of the same source gave."""
    try:
        found = msgspec.json.decode(job.record.read_bytes(), type=Compiled)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None
    if found.key != job.key:
        return None
    own = resources.own_warnings("\n".join(found.warnings), job.own_files)  # an earlier version of this took others for ours
    found = msgspec.structs.replace(found, warnings=own)
    if all(_sha256(job.tree / name) == digest for name, digest in found.inputs.items()):
        return found
    return found if found.text and found.text == job.text() else None


def compile_source(job: Job) -> Compiled:
    """Compile it, or return what an earlier compile gave.

    Raises:
        ToolFailed: it does not compile; the message holds the compiler's errors.
    """
    old = remembered(job)
    if old is not None:
        return old
    tree, source, target, tools = job.tree, job.source, job.target, job.tools
    argv, output = job.argv, job.output
    started = time.monotonic()
    done = subprocess.run(argv, cwd=tree, capture_output=True, text=True, errors="replace", check=False)
    seconds = time.monotonic() - started
    if done.returncode != 0:
        errors = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line][:20]
        raise ToolFailed("\n  ".join([f"{source} does not compile for {target}", *errors]), " ".join(argv))
    if tools.amd:
        kernels = resources.from_code_object(output.read_bytes())
        counts = instructions.from_disassembly(capture([*tools.disassembler, output]))
    else:
        kernels = resources.from_ptxas(done.stderr + done.stdout)
        counts = instructions.from_cubin(output.read_bytes(), int(re.sub(r"\D", "", target)))
    found = Compiled(
        key=job.key,
        inputs=_inputs(output.with_suffix(".d").read_text("utf-8"), tree),
        seconds=round(seconds, 1),
        size=output.stat().st_size,
        warnings=resources.own_warnings(done.stderr + done.stdout, job.own_files),
        kernels=instructions.with_counts(kernels, counts),
        text=job.text(),
    )
    record = job.record
    record.parent.mkdir(parents=True, exist_ok=True)
    new = record.with_suffix(f".{os.getpid()}")
    new.write_bytes(msgspec.json.encode(found))
    new.replace(record)
    return found


def _digest(key: str, text: str) -> str:
    return hashlib.sha256(f"{key} {text}".encode()).hexdigest()[:8] if text else ""


def _inputs(dependencies: str, tree: Path) -> dict[str, str]:
    """Files of the tree that a make rule names; the system's headers are covered by the compiler's version."""
    names = re.sub(r"\\\n", " ", dependencies.partition(": ")[2]).split()
    root = tree.resolve()
    paths = {path for name in names if (path := (tree / name).resolve()).is_relative_to(root)}
    return {str(path.relative_to(root)): _sha256(path) for path in sorted(paths)}


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return ""
