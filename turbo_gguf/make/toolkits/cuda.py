"""CUDA on this machine: the compiler, the NVIDIA GPUs to compile for, and cuBLAS where CUDA's own folder lacks it."""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from turbo_gguf import tools
from turbo_gguf.errors import EnvironmentMissing, ToolFailed, UsageError
from turbo_gguf.make.toolkits.toolkit import ALL_PAIRS, CARRIED, PORTABLE, Finding, Toolkit, Variant
from turbo_gguf.tools import capture

ARCHS_HINT = "CUDAARCHS=89 make build-cuda (compute capability without its dot: 86 is RTX 30, 89 RTX 40, 120 RTX 50, 80 A100, 90 H100)"

DEVICE = Path("/dev/nvidia0")
"""The device of the first GPU."""

DRIVER = Path("/proc/driver/nvidia/version")
"""What the kernel's driver says about itself."""

DRIVER_FOLDERS = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/local/nvidia/lib64", "/usr/lib/wsl/lib")
"""Where installations of the driver put libcuda.so.1."""

UNCOMPRESSED = {"GGML_CUDA_COMPRESSION_MODE": "none"}
"""Code objects as they are, for an archive. Compressed by nvcc, those of compute capability 9.0 take 26 MB of it, else 17."""

_DEFAULT_ROOTS = ("/usr/local/cuda", "/opt/cuda")


def compiler() -> Path | None:
    """The CUDA compiler: ``CUDACXX``, on PATH, or of the default installations."""
    named = os.environ.get("CUDACXX")
    defaults = (Path(root) / "bin/nvcc" for root in _DEFAULT_ROOTS)
    return Path(named) if named else tools.find("nvcc") or next((path for path in defaults if path.exists()), None)


def compiler_version() -> list[str]:
    """Release of the CUDA compiler; none when it is missing."""
    nvcc = compiler()
    return re.findall(r"release.*", capture([nvcc, "--version"]))[:1] if nvcc is not None else []


def gpus() -> list[tuple[str, str]]:
    """Name and compute capability ("9.0") of each NVIDIA GPU here; none without nvidia-smi."""
    try:
        lines = capture(["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]).splitlines()
    except (EnvironmentMissing, ToolFailed):
        return []
    rows = (line.rpartition(",") for line in lines)
    return [(name.strip(), cap.strip()) for name, _, cap in rows if re.fullmatch(r"\d+\.\d+", cap.strip())]


def driver_version() -> str:
    """Version of the loaded driver, "" without one."""
    match = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", _text(DRIVER))
    return match[1] if match else ""


def architectures() -> list[str]:
    """CMake architectures to compile for: those in ``CUDAARCHS`` (or ``GPU_TARGETS``), else of the GPUs here.

    Raises:
        UsageError: a variable names something else.
    """
    name = "CUDAARCHS" if os.environ.get("CUDAARCHS") else "GPU_TARGETS"
    named = [value for value in re.split(r"[;, ]+", os.environ.get(name, "")) if value]
    plain = [re.sub(r"^sm_|\.", "", value) for value in named]
    wrong = [value for value, short in zip(named, plain, strict=True) if not re.fullmatch(r"\d{2,3}[af]?(-real|-virtual)?|native", short)]
    if wrong:
        raise UsageError(f"{name}: {', '.join(wrong)} is no CUDA architecture", ARCHS_HINT)
    if plain:
        return plain
    found = sorted({cap.replace(".", "") for _, cap in gpus()}, key=int)
    if found:
        return [f"{number}-real" for number in found]  # for these GPUs only, without PTX for later ones
    return ["native"] if DEVICE.exists() else []  # nvidia-smi is missing: CMake asks the driver itself


def options() -> dict[str, str]:
    """CMake options of a CUDA build on this machine.

    Raises:
        EnvironmentMissing: the compiler, cuBLAS, or a GPU to build for is missing; or the compiler does not know the GPU.
    """
    nvcc = compiler()
    if nvcc is None:
        raise EnvironmentMissing(
            "CUDA compiler not found: no nvcc on PATH or in /usr/local/cuda/bin",
            "apt-get install nvidia-cuda-toolkit (or https://developer.nvidia.com/cuda-downloads), or set CUDACXX to the path of nvcc",
        )
    wanted = architectures()
    if not wanted:
        raise EnvironmentMissing("no NVIDIA GPU found to build for (nvidia-smi)", ARCHS_HINT)
    _require_known(nvcc, wanted)
    return {
        "CMAKE_CUDA_COMPILER": str(nvcc),
        "CMAKE_CUDA_ARCHITECTURES": ";".join(wanted),
        **_cublas_options(nvcc),
        **_driver_options(nvcc),
    }


def include_folders(nvcc: Path) -> list[Path]:
    """Folders in which the compiler looks for CUDA's own headers."""
    root = nvcc.resolve().parent.parent
    places = [root / "include", *root.glob("targets/*/include")]
    for wrapped in re.findall(r"(/\S+)/bin/nvcc", _text(nvcc)):  # a shell script that calls the compiler elsewhere
        places += [Path(wrapped) / "include", *Path(wrapped).glob("targets/*/include")]
    return [folder for folder in places if folder.is_dir()]


def cublas_wheel() -> Path | None:
    """Folder with include/ and lib/ of the Python package nvidia-cublas, in ``CUBLAS_ROOT`` or in this Python's environment."""
    named = os.environ.get("CUBLAS_ROOT")
    site = Path(sysconfig.get_path("purelib")) / "nvidia"
    for folder in (*([Path(named)] if named else []), *sorted(site.glob("cu*"), reverse=True), site / "cublas"):
        if (folder / "include/cublas_v2.h").is_file():
            return folder
    return None


def _cublas_options(nvcc: Path) -> dict[str, str]:
    """How CMake finds cuBLAS when CUDA's own folder lacks it, as minimal installations do."""
    folders = include_folders(nvcc)
    if not folders or any((folder / "cublas_v2.h").is_file() for folder in (*folders, Path("/usr/include"))):
        return {}
    wheel = cublas_wheel()
    if wheel is None:
        raise EnvironmentMissing(
            f"CUDA in {folders[0].parent} lacks cuBLAS (cublas_v2.h)",
            "apt-get install libcublas-dev-13-0 (your CUDA's version) from NVIDIA's repository, or pip install nvidia-cublas",
        )
    found = {f"CUDA_{name}_LIBRARY": next(_libraries(wheel, name), None) for name in ("cublas", "cublasLt")}
    return {"CMAKE_CUDA_FLAGS": f"-I{wheel / 'include'}", **{key: str(path) for key, path in found.items() if path is not None}}


def _driver_options(nvcc: Path) -> dict[str, str]:
    """How CMake finds libcuda when CUDA's own folder lacks the stub of it, as minimal installations do."""
    roots = {folder.parent for folder in include_folders(nvcc)}
    if not roots or any(True for root in roots for _ in root.glob("lib*/stubs/libcuda.so")):
        return {}
    driver = next((path for folder in DRIVER_FOLDERS for path in sorted(Path(folder).glob("libcuda.so*"))), None)
    # Without it upstream's pool of virtual memory can't be linked; its other pool does the same with more fragmentation.
    return {"CUDA_cuda_driver_LIBRARY": str(driver)} if driver else {"GGML_CUDA_NO_VMM": "ON"}


def _libraries(root: Path, name: str) -> Iterator[Path]:
    yield from sorted(root.glob(f"lib/lib{name}.so*"))


def _require_known(nvcc: Path, wanted: list[str]) -> None:
    """Refuse a GPU that this compiler is too old, or too new, for."""
    try:
        known = re.findall(r"sm_(\d+)", capture([nvcc, "--list-gpu-code"]))
    except (EnvironmentMissing, ToolFailed):
        return  # CUDA before 11.? has no such option; the compiler itself will say what it can't do
    unknown = [arch for arch in wanted if (number := re.match(r"\d+", arch)) and number[0] not in known]
    if known and unknown:
        release = " ".join(compiler_version()).partition(",")[0]
        raise EnvironmentMissing(
            f"{nvcc} ({release}) does not compile for {', '.join(unknown)}; it knows {', '.join(known)}",
            "CUDA 12 for compute capabilities below 7.5, CUDA 12.8 or newer for RTX 50; or name other ones in CUDAARCHS",
        )


def _text(path: Path) -> str:
    """A small text file; "" for a program."""
    try:
        return path.read_text(encoding="utf-8") if path.is_file() and path.stat().st_size < 10_000 else ""
    except (OSError, UnicodeDecodeError):
        return ""


def devices() -> Iterator[Finding]:
    """Each NVIDIA GPU, and what is missing for a driver that shows none."""
    found = gpus()
    for name, capability in found:
        yield Finding("NVIDIA GPU", "ok", f"{name}, compute capability {capability}, driver {driver_version() or 'unknown'}")
    if not found and DEVICE.exists():
        yield Finding("NVIDIA GPU", "none", f"{DEVICE} is there, nvidia-smi is not", "apt-get install nvidia-smi (of the driver's version)")
    elif not found and driver_version():
        yield Finding(
            "NVIDIA GPU", "none", f"driver {driver_version()} is loaded, but shows no GPU", "nvidia-smi; sudo dmesg | grep -i nvrm"
        )


def about_machine() -> str:
    """GPUs, driver and compiler."""
    names = ", ".join(f"{name} (compute capability {capability})" for name, capability in gpus()) or "no GPU found"
    return f"{names}, driver {driver_version() or 'unknown'}, CUDA {' '.join(compiler_version())}"


TOOLKIT = Toolkit(
    name="cuda",
    title="CUDA",
    backend="CUDA",
    cmake={"GGML_CUDA": "ON", "GGML_CUDA_NCCL": "OFF"},
    min_cmake=(3, 18),
    variants=(
        Variant("", "NVIDIA GPUs", {}, 4000),
        Variant("all-pairs", "the same, with kernels for all K/V pairs", {"CMAKE_CUDA_FLAGS": ALL_PAIRS}, 4000),
        Variant("portable", "the same as the plain one, with the options of cpu-portable", PORTABLE, 4000),
        Variant("carried", "the same, with the options of cpu-carried", {**CARRIED, **UNCOMPRESSED}, 4000),
    ),
    languages=("CUDA",),
    targets="CMAKE_CUDA_ARCHITECTURES",
    options=options,
    compiler_version=compiler_version,
    where=lambda: f"({compiler()})",
    gpus=lambda: [name for name, _ in gpus()],
    architectures=lambda: [capability.replace(".", "") for _, capability in gpus()],
    devices=devices,
    about_machine=about_machine,
)
