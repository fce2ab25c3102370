"""ROCm on this machine: where it is, how old it is, what is missing, and the AMD GPUs to compile for."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from turbo_gguf.errors import EnvironmentMissing, ToolFailed, UsageError
from turbo_gguf.make.toolkits.toolkit import ALL_PAIRS, CARRIED, PORTABLE, Finding, Toolkit, Variant
from turbo_gguf.tools import capture

OLDEST = (6, 1)
"""Oldest ROCm that upstream's CMake accepts."""

SUPPORTED = {
    "gfx1030": "Radeon RX 6800, 6900, 6950; PRO W6800 (RDNA2)",
    "gfx1100": "Radeon RX 7900; PRO W7900, W7800 (RDNA3)",
    "gfx1101": "Radeon RX 7800 XT, 7700 XT; PRO W7700 (RDNA3)",
    "gfx1151": "Ryzen AI Max, Strix Halo (RDNA3.5)",
    "gfx1200": "Radeon RX 9060 (RDNA4)",
    "gfx1201": "Radeon RX 9070; AI PRO R9700 (RDNA4)",
    "gfx90a": "Instinct MI210, MI250 (CDNA2)",
    "gfx942": "Instinct MI300, MI325X (CDNA3)",
}
"""Architectures that the kernels are written for, and GPUs that have them."""

SAME_CODE = {"gfx1101": "gfx1100", "gfx1200": "gfx1201"}
"""Architecture -> the one of the same family that is compiled and inspected in its place."""

INSPECTED = tuple(name for name in SUPPORTED if name not in SAME_CODE)
"""Architectures that the kernels are compiled and inspected for (``make kernel-report``)."""

STAND_INS = {
    **dict.fromkeys(("gfx1031", "gfx1032", "gfx1033", "gfx1034", "gfx1035", "gfx1036"), ("gfx1030", "10.3.0")),
    **dict.fromkeys(("gfx1102", "gfx1103"), ("gfx1100", "11.0.0")),
    **dict.fromkeys(("gfx1150", "gfx1152", "gfx1153"), ("gfx1151", "11.5.1")),
}
"""Architecture -> the one of the same family whose code it runs under HSA_OVERRIDE_GFX_VERSION, and that variable's value."""

TARGETS_HINT = "GPU_TARGETS=gfx1100 make build-rocm (your GPU: " + "; ".join(f"{k}: {v}" for k, v in SUPPORTED.items()) + ")"
RELOGIN_HINT = "sudo usermod -aG render,video $USER, then log out and in again"

KFD = Path("/dev/kfd")
"""The device through which programs reach AMD GPUs."""

TOPOLOGY = Path("/sys/class/kfd/kfd/topology/nodes")
"""What the kernel says about the GPUs, with or without ROCm."""

OS_RELEASE = Path("/etc/os-release")

NOT_GENERIC = {"gfx9-4-generic": "gfx942"}
"""Targets whose code lacks what the GPU is asked for when it runs: a gfx942 decodes by its own matrix instructions."""

_TARGET = re.compile(r"gfx[0-9a-f]{3,}(:(xnack|sramecc)[+-])*|gfx[0-9]+(-[0-9]+)*-generic")


class Rocm(msgspec.Struct, frozen=True):
    """An installation."""

    root: Path
    version: tuple[int, int] | None  # major and minor; None when nothing says it
    clang: Path | None  # compiler of the HIP language; CMake does not take hipcc for it


def path() -> Path | None:
    """Folder of the ROCm installation: ``ROCM_PATH``, ``HIP_PATH``, /opt/rocm, or /usr for distribution packages."""
    named = (Path(value) for name in ("ROCM_PATH", "HIP_PATH") if (value := os.environ.get(name)))
    return next((root for root in (*named, Path("/opt/rocm"), Path("/usr")) if (root / "bin/hipcc").exists()), None)


def find() -> Rocm | None:
    """The ROCm installation of this machine."""
    root = path()
    return None if root is None else Rocm(root, _version(root), _clang(root))


def targets() -> list[str]:
    """Architectures to compile for, such as gfx1100: those in ``GPU_TARGETS`` (or ``AMDGPU_TARGETS``), else of the GPUs here.

    Raises:
        UsageError: the variable names something else, or a target that would not do.
    """
    named = [name for name in re.split(r"[;, ]+", os.environ.get("GPU_TARGETS") or os.environ.get("AMDGPU_TARGETS") or "") if name]
    wrong = [name for name in named if not _TARGET.fullmatch(name)]
    if wrong:
        raise UsageError(f"GPU_TARGETS: {', '.join(wrong)} is no AMD architecture", TARGETS_HINT)
    for name in set(named) & NOT_GENERIC.keys():
        raise UsageError(f"GPU_TARGETS: code for {name} lacks matrix instructions that we need", f"GPU_TARGETS={NOT_GENERIC[name]}")
    return named or gpus()


def gpus() -> list[str]:
    """Architectures of the AMD GPUs here, each once: asked of ROCm's tools, then of the kernel."""
    found = find()
    tools: list[Path] = []
    if found is not None:
        bins = [found.root / "bin", *([found.clang.parent] if found.clang else [])]
        tools = [folder / name for name in ("rocm_agent_enumerator", "amdgpu-arch", "rocminfo") for folder in bins]
    sources: list[Callable[[], list[str]]] = [*(lambda tool=tool: _ask(tool) for tool in tools if tool.exists()), kernel_gpus]
    return next((names for source in sources if (names := source())), [])


def kernel_gpus() -> list[str]:
    """Architectures of the AMD GPUs that the amdgpu driver shows in sysfs, each once."""
    names = set()
    for properties in sorted(TOPOLOGY.glob("*/properties")):
        match = re.search(r"^gfx_target_version (\d+)$", _read(properties), re.MULTILINE)
        number = int(match[1]) if match else 0  # 0: a CPU
        if number:
            names.add(f"gfx{number // 10000}{number // 100 % 100:x}{number % 100:x}")
    return sorted(names)


def options() -> dict[str, str]:
    """CMake options of a HIP build on this machine.

    Raises:
        EnvironmentMissing: ROCm, a part of it, or a GPU to build for is missing; or ROCm is too old.
    """
    found = _require()
    names = targets()
    if not names:
        raise EnvironmentMissing(
            "no AMD GPU found to build for (rocm_agent_enumerator, amdgpu-arch, rocminfo, amdgpu driver)", TARGETS_HINT
        )
    # Upstream takes CMAKE_HIP_ARCHITECTURES from GPU_TARGETS, but only after CMake may have asked the driver for its own.
    arch = ";".join(names)
    both = {"GPU_TARGETS": arch, "CMAKE_HIP_ARCHITECTURES": arch, "CMAKE_PREFIX_PATH": str(found.root)}
    return {**both, "CMAKE_HIP_COMPILER": str(found.clang)} if found.clang else both


def environment() -> dict[str, str]:
    """Variables of a HIP build: clang finds HIP by them when several ROCm versions are installed."""
    root = path()
    if root is None:
        return {}
    # Distribution packages keep the device libraries beside clang, which does not look there when ROCM_PATH is set.
    rocm = {} if root == Path("/usr") else {"ROCM_PATH": str(root)}
    return {**rocm, "HIP_PATH": str(root), "HIP_PLATFORM": "amd"}


def compiler_version() -> list[str]:
    """Version line of hipcc; none when it is missing."""
    root = path()
    return capture([root / "bin/hipcc", "--version"]).splitlines()[:1] if root is not None else []


def access_problem() -> tuple[str, str] | None:
    """What keeps this user from the AMD GPUs (message, hint); ``None`` when nothing does."""
    if not KFD.exists():
        return f"no {KFD}: the amdgpu driver is not loaded", "sudo modprobe amdgpu; in a container: --device /dev/kfd --device /dev/dri"
    if not os.access(KFD, os.R_OK | os.W_OK):
        return f"{KFD} is not open to this user", RELOGIN_HINT
    return None


def gpu_notes(name: str, root: Path | None) -> str:
    """What to know about an architecture: whether it is one of ours, and what stands in for it where rocBLAS has no kernels."""
    if name in SUPPORTED:
        return SUPPORTED[name] + (f"; same code as {SAME_CODE[name]}, not inspected" if name in SAME_CODE else "")
    text = "may work: our kernels were not compiled and inspected for it"
    if root is not None and name in STAND_INS and not _has_rocblas_kernels(root, name):
        target, version = STAND_INS[name]
        text += f"; rocBLAS has no kernels for it here: build with GPU_TARGETS={target} and run with HSA_OVERRIDE_GFX_VERSION={version}"
    return text


def _require() -> Rocm:
    """The installation, checked for age and for what upstream's CMake looks for."""
    found = find()
    if found is None:
        raise EnvironmentMissing("ROCm not found: no hipcc in $ROCM_PATH/bin, /opt/rocm/bin or /usr/bin", install_hint())
    if found.version is not None and found.version < OLDEST:
        raise EnvironmentMissing(f"ROCm in {found.root} is {found.version[0]}.{found.version[1]}, 6.1 or newer is needed", install_hint())
    missing = [name for name in ("hip", "hipblas", "rocblas") if not any(_cmake_files(found.root, name))]
    if missing:
        raise EnvironmentMissing(
            f"ROCm in {found.root} lacks the development files of {', '.join(missing)}",
            "apt-get install "
            + " ".join(
                {"hip": "libamdhip64-dev"}.get(name, f"lib{name}-dev") if found.root == Path("/usr") else f"{name}-dev" for name in missing
            ),
        )
    return found


def install_hint() -> str:
    """How this distribution gets a ROCm that is new enough."""
    release = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', _read(OS_RELEASE), re.MULTILINE))
    family = [release.get("ID", ""), *release.get("ID_LIKE", "").split()]
    if "fedora" in family:
        return "dnf install rocm-hip-devel hipblas-devel rocblas-devel"
    if "arch" in family:
        return "pacman -S rocm-hip-sdk"
    if release.get("ID") == "debian" and not release.get("VERSION_ID"):  # testing and sid have no number
        return "apt-get install hipcc libamdhip64-dev libhipblas-dev librocblas-dev"
    return (
        "add AMD's repository (https://rocm.docs.amd.com/projects/install-on-linux; the HIP of Debian 12, 13 and Ubuntu 24.04 is too old), "
        "then apt-get install rocm-hip-sdk"
    )


def _version(root: Path) -> tuple[int, int] | None:
    """Major and minor version: of AMD's packages from a file, else from hipconfig."""
    for text in _version_texts(root):
        match = re.search(r"(\d+)\.(\d+)", text)
        if match:
            return int(match[1]), int(match[2])
    return None


def _version_texts(root: Path) -> Iterator[str]:
    yield _read(root / ".info/version")
    yield _output(root / "bin/hipconfig", "--version")
    yield "".join(re.findall(r"HIP version:.*", _output(root / "bin/hipcc", "--version")))


def _clang(root: Path) -> Path | None:
    """The clang++ that hipcc uses."""
    named = _output(root / "bin/hipconfig", "-l")
    folders = [*([Path(named)] if named else []), root / "llvm/bin", root / "lib/llvm/bin"]
    return next((folder / "clang++" for folder in folders if (folder / "clang++").exists()), None)


def _cmake_files(root: Path, package: str) -> Iterator[Path]:
    for pattern in (f"lib/cmake/{package}", f"lib/*/cmake/{package}", f"lib64/cmake/{package}"):
        yield from root.glob(f"{pattern}/{package}-config.cmake")


def _has_rocblas_kernels(root: Path, name: str) -> bool:
    """Whether rocBLAS has kernels for an architecture; taken for granted where its kernels are not where we look."""
    folders = [*root.glob("lib*/rocblas/library"), *root.glob("lib/*/rocblas/*/library")]
    return not folders or any(True for folder in folders for _ in folder.glob(f"*{name}*"))


def _ask(tool: Path) -> list[str]:
    """Architectures in what a tool prints; gfx000 is the CPU. A tool that finds no driver is like one that finds no GPU."""
    words = (word.partition(":")[0] for word in _output(tool).split())
    return sorted({word for word in words if re.fullmatch(r"gfx[0-9a-f]+", word) and word != "gfx000"})


def _output(*argv: str | Path) -> str:
    try:
        return capture(argv)
    except (EnvironmentMissing, ToolFailed):
        return ""


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def devices() -> Iterator[Finding]:
    """Each AMD GPU, and what keeps this user from it; nothing on a machine without one."""
    names = gpus()
    if not names:
        return
    problem = access_problem()
    if problem is not None:
        yield Finding("AMD GPU", "none", f"{', '.join(names)}: {problem[0]}", problem[1])
        return
    for name in names:
        yield Finding(f"AMD {name}", "ok", gpu_notes(name, path()))


TOOLKIT = Toolkit(
    name="rocm",
    title="ROCm",
    backend="ROCm",
    cmake={"GGML_HIP": "ON"},
    min_cmake=(3, 21),
    variants=(
        Variant("", "AMD GPUs through HIP", {}, 3000),
        Variant("all-pairs", "the same, with kernels for all K/V pairs", {"CMAKE_HIP_FLAGS": ALL_PAIRS}, 3000),
        Variant("portable", "the same as the plain one, with the options of cpu-portable", PORTABLE, 3000),
        Variant("carried", "the same, with the options of cpu-carried", CARRIED, 3000),
    ),
    languages=("HIP",),
    targets="GPU_TARGETS",
    options=options,
    environment=environment,
    compiler_version=compiler_version,
    where=lambda: f"in {path()}",
    gpus=lambda: list(gpus()),
    architectures=lambda: list(gpus()),
    devices=devices,
    about_machine=lambda: f"{', '.join(gpus())}, {' '.join(compiler_version())}",
)
