"""The devices of a build, as llama.cpp lists them: ``llama-server --list-devices`` has names, and how much memory is free."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from turbo_gguf import tools
from turbo_gguf.errors import EnvironmentMissing, LogNotUnderstood, UsageError
from turbo_gguf.make.toolkits import TOOLKITS

_MIB = 1 << 20
_HEAD = "Available devices:"
_ROW = re.compile(r"^\s*(?P<name>\S+): (?P<about>.*) \((?P<total>\d+) MiB, (?P<free>\d+) MiB free\)\s*$", re.MULTILINE)
_PRESETS = " or ".join(name for name in TOOLKITS if name != "cpu")
_HINT = f"build for a GPU: turbo-gguf build --preset {_PRESETS}; or say how much memory there is: --memory 24GiB"


class Device(msgspec.Struct, frozen=True):
    """A GPU, or another device with a memory of its own."""

    name: str  # such as CUDA0
    about: str  # such as NVIDIA GeForce RTX 4090
    total: int  # bytes
    free: int  # bytes, when it was asked


def listed(server: Path) -> tuple[Device, ...]:
    """All devices with a memory of their own that a llama-server can use; none: it has the CPU only, maybe with a library such as BLAS.

    Raises:
        EnvironmentMissing: it can't be started.
        ToolFailed: it crashed, or its list is no list.
    """
    text = tools.capture([server, "--list-devices"])
    if _HEAD not in text:
        raise LogNotUnderstood(f"{server} --list-devices lists nothing: {text[:200] or 'no output'}")
    return tuple(
        Device(row["name"], row["about"], int(row["total"]) * _MIB, int(row["free"]) * _MIB)
        for row in _ROW.finditer(text, text.index(_HEAD))
        if int(row["total"])
    )


def named(server: Path | None, wanted: str) -> tuple[Device, ...]:
    """The devices that a user names.

    Args:
        server: llama-server of a build, ``None`` where there is none.
        wanted: numbers in its list, or names, separated by commas.

    Raises:
        UsageError: a device is not in the list.
        EnvironmentMissing: nothing can be asked, or the list is empty.
    """
    if server is None:
        raise EnvironmentMissing(f"--device {wanted}: there is no build to ask", _HINT)
    found = listed(server)
    if not found:
        raise EnvironmentMissing(f"--device {wanted}: {server} lists no device", _HINT)
    return tuple(dict.fromkeys(_one(found, word.strip(), server) for word in wanted.split(",")))


def _one(found: tuple[Device, ...], word: str, server: Path) -> Device:
    by_word = {device.name.lower(): device for device in found} | {str(i): device for i, device in enumerate(found)}
    if device := by_word.get(word.lower()):
        return device
    listing = ", ".join(f"{i}: {device.name} ({device.about})" for i, device in enumerate(found))
    raise UsageError(f"--device {word}: no such device of {server}", f"there are {listing}")
