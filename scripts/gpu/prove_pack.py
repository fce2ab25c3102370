"""Prepare a proof on a machine without a GPU: compile for one architecture, and pack what the machine with the GPU needs to run it.

    python scripts/gpu/prove_pack.py --arch 90                        # NVIDIA, compute capability without its dot
    python scripts/gpu/prove_pack.py --preset rocm-carried --arch gfx1100
    python scripts/gpu/prove_pack.py --preset cpu-carried             # to try the same proof without a GPU

Leaves the folder build/prove/proof and the archive build/prove/proof.tar.xz. Exit codes: 3 a compiler or toolkit is missing, 4 it does
not compile, or the archive is larger than --megabytes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from turbo_gguf.assets import embedded_model, home
from turbo_gguf.cache.types import CACHE_TYPES
from turbo_gguf.errors import EnvironmentMissing, ToolFailed
from turbo_gguf.failures import exit_code
from turbo_gguf.inputs import models
from turbo_gguf.make import toolkits
from turbo_gguf.make.build import Build, ensure_build
from turbo_gguf.tools import capture, find

TARGETS = ("test-backend-ops", "test-turbo-perf", "llama-bench", "llama-perplexity")
TEXT_BYTES = 16_000  # of which a stage reads the first 512 tokens
LARGEST_LIBRARY = 20_000_000
"""Libraries of a toolkit that are larger (cuBLAS has 600 MB) have to be on the other machine."""
NOT_PACKED = re.compile(r"(linux-vdso|ld-linux|lib(c|m|dl|rt|pthread|resolv)\.so|libcuda\.so|libvulkan|libnvidia|libdrm|libhsa|libamdhip)")
"""The C library and drivers are those of the machine."""


def pack(build: Build, folder: Path) -> None:
    """Fill a folder with programs, the libraries that they need, a model, a text and what runs them."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "bin").mkdir(parents=True)
    for source in _programs(build.path / "bin"):
        _copy(source, folder / "bin" / source.name)
    for source in _libraries(folder / "bin", build.path / "bin"):
        _copy(source, folder / "bin" / source.name)
    shutil.copy(embedded_model(), folder / "model.gguf")
    (folder / "text.txt").write_bytes(models.held_out_text().path.read_bytes()[:TEXT_BYTES])
    here = Path(__file__).parent
    for name in ("run", "stages", "measures", "ops", "targets", "machine", "model"):
        shutil.copy(here / f"prove_{name}.py", folder)
    toolkit = toolkits.of_preset(build.preset)
    about = f"patches {build.tree.digest[:12]} on llama.cpp {build.tree.upstream}, {build.compiler}"
    bits = {name: cache_type.bits for name, cache_type in CACHE_TYPES.items()}
    plan = {"device": toolkit.device, "build": build.id, "preset": build.preset, "about": about, "bits": bits}
    (folder / "plan.json").write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")


def _programs(folder: Path) -> Iterator[Path]:
    """The programs, and ggml's backends by the names that the loader looks for: they may be loaded without being linked."""
    yield from (folder / name for name in TARGETS)
    yield from (path for path in sorted(folder.glob("libggml*.so*")) if path.name == _soname(path))


def _soname(path: Path) -> str:
    """Name under which a library is loaded: its own where it has no other."""
    match = re.search(r"SONAME.*\[(.+)\]", capture(["readelf", "-d", path]))
    return match[1] if match else path.resolve().name


def _libraries(folder: Path, build_folder: Path) -> Iterator[Path]:
    """What the packed files need of the build and of this machine: no C library, no driver, and of a toolkit nothing large."""
    env = {**os.environ, "LD_LIBRARY_PATH": f"{build_folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"}
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        said = subprocess.run(["ldd", path], capture_output=True, text=True, env=env, check=False).stdout
        found |= {name: Path(place) for name, place in re.findall(r"^\s*(\S+) => (/\S+)", said, re.MULTILINE)}
    for name, path in found.items():
        size = 0 if path.parent == build_folder else path.resolve().stat().st_size
        if not NOT_PACKED.match(name) and not (folder / name).exists() and size < LARGEST_LIBRARY:
            yield path


def _copy(source: Path, target: Path) -> None:
    shutil.copy(source, target)  # follows links
    if find("strip") is not None:
        capture(["strip", "--strip-unneeded", target])


def archive(folder: Path, path: Path) -> float:
    """Pack a folder; returns megabytes."""
    with tarfile.open(path, "w:xz", preset=9) as file:
        file.add(folder, folder.name)
    return path.stat().st_size / 1e6


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", help="what to build for  [default: cuda-carried; with --here, the plain one of the GPU]")
    parser.add_argument("--arch", help="architecture of the GPU, as 90 or gfx1100  [default: CUDAARCHS, GPU_TARGETS, or the GPUs here]")
    parser.add_argument("--jobs", type=int, help="compiler processes  [default: one per core]")
    parser.add_argument("--out", type=Path, default=home() / "prove", help="folder for the proof")
    parser.add_argument("--megabytes", type=float, default=30.0, help="most that the archive may have")
    parser.add_argument("--here", action="store_true", help="make no archive: the GPU is in this machine")
    options = parser.parse_args(argv)
    return exit_code(lambda: _run(options))


def _preset_here() -> str:
    for toolkit in toolkits.with_gpu():
        return toolkit.name
    raise EnvironmentMissing(
        "no GPU found (nvidia-smi, rocm_agent_enumerator, vulkaninfo)", "scripts/gpu/prove.sh prepare --arch 90, for another machine"
    )


def _run(options: argparse.Namespace) -> int:
    preset = options.preset or (_preset_here() if options.here else "cuda-carried")
    if options.arch:
        nvidia = preset.startswith("cuda")
        os.environ["CUDAARCHS" if nvidia else "GPU_TARGETS"] = f"{options.arch}-real" if nvidia else options.arch
    build = ensure_build(preset, targets=TARGETS, jobs=options.jobs)
    folder = options.out / "proof"
    pack(build, folder)
    if options.here:
        print(folder)
        return 0
    path = options.out / "proof.tar.xz"
    size = archive(folder, path)
    if size > options.megabytes:  # random bits as weights are, they do not get smaller
        print(f"{size:.1f} MB: packed again without the model, which lies in the repository", file=sys.stderr)
        (folder / "model.gguf").unlink()
        size = archive(folder, path)
    if size > options.megabytes:
        raise ToolFailed(f"{path} has {size:.1f} MB, more than {options.megabytes:g}", "--megabytes allows more")
    print(f"{path}: {size:.1f} MB for {build.preset}, to be run there by scripts/gpu/prove.sh run {path.name}", file=sys.stderr)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
