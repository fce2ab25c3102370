"""The toolkits that a build is made with: one row per backend. A new backend is a module here and its name in the list below."""

from __future__ import annotations

from collections.abc import Iterator

from turbo_gguf.make.toolkits import cpu, cuda, rocm, vulkan
from turbo_gguf.make.toolkits.toolkit import Finding, Toolkit, Variant

TOOLKITS: dict[str, Toolkit] = {toolkit.name: toolkit for toolkit in (cpu.TOOLKIT, vulkan.TOOLKIT, rocm.TOOLKIT, cuda.TOOLKIT)}
"""By the first word of their presets' names; of two that run on one GPU, the later one is the faster."""

__all__ = ["TOOLKITS", "Finding", "Toolkit", "Variant", "gpu_layers", "of_device", "of_preset", "with_gpu"]


def of_preset(name: str) -> Toolkit:
    """The toolkit of a preset such as ``cuda-all-pairs``."""
    return TOOLKITS[name.partition("-")[0]]


def gpu_layers(backend: str) -> tuple[str, ...]:
    """Options of llama.cpp's tools that put all layers on this backend: none for the CPU, where a build has nothing else."""
    return ("-ngl", "999") if _of_backend(backend).offloads else ()


def _of_backend(backend: str) -> Toolkit:
    return next(toolkit for toolkit in TOOLKITS.values() if toolkit.backend == backend)


def of_device(device: str) -> Toolkit:
    """The toolkit of a device such as ``CUDA0``."""
    return next(toolkit for toolkit in TOOLKITS.values() if device.startswith(toolkit.backend))


def with_gpu() -> Iterator[Toolkit]:
    """Toolkits that have a GPU here, the fastest first; what asks a driver comes before what may only see a device."""
    return (toolkit for toolkit in reversed(TOOLKITS.values()) if toolkit.gpus())
