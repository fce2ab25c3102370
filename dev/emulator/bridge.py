"""What ``runtime/hip_launch.cpp`` calls: memory, code objects and launches of a program that runs on the emulator.

Environment:
    TURBO_EMULATOR_LOG: a file to which each launch is added: kernel, grid, block, instructions per wave group and per wave, seconds.
    TURBO_EMULATOR_RACES: 0 leaves out the check for races in LDS.
    TURBO_EMULATOR_FAULT: name of a vector instruction that gives wrong results, to see that tests notice.
"""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

import numpy as np

from . import codeobject
from .codeobject import CodeObject
from .machine import Call, Dim, Machine
from .memory import Memory


class _State:
    machine: Machine
    codes: dict[int, CodeObject]
    log: Path | None


def start(base: int, size: int) -> None:
    """Device memory is there."""
    log = os.environ.get("TURBO_EMULATOR_LOG")
    races, fault = os.environ.get("TURBO_EMULATOR_RACES") != "0", os.environ.get("TURBO_EMULATOR_FAULT", "")
    _State.machine = Machine(Memory.at(base, size), check_races=races, fault=fault)
    _State.codes, _State.log = {}, Path(log) if log else None


def allocations(spans: bytes) -> None:
    """All allocations, as pairs of int64 offsets (start, end)."""
    pairs = np.frombuffer(spans, np.int64).reshape(-1, 2)
    _State.machine.memory.set_spans(pairs[:, 0].tolist(), pairs[:, 1].tolist())


def image_bytes(elf: bytes) -> int:
    """How much memory a code object needs."""
    return codeobject.image_bytes(elf)


def image(index: int, elf: bytes, address: int) -> None:
    """A code object, and where to load it."""
    _State.codes[index] = CodeObject(elf, _State.machine.memory, address)


def launch(index: int, name: str, grid: Dim, block: Dim, arguments: int, shared: int) -> None:  # noqa: PLR0917  # called from C++
    """Run a kernel; ``arguments`` is the address of an array of pointers to its arguments."""
    code = _State.codes[index]
    visible = [argument for argument in code.kernels[name].arguments if not argument.kind.startswith("hidden_")]
    pointers = (ctypes.c_void_p * len(visible)).from_address(arguments)
    values = [ctypes.string_at(pointer, argument.size) for pointer, argument in zip(pointers, visible, strict=True)]
    began = time.perf_counter()
    done = _State.machine.launch(code, Call(name, grid, block, values, shared))
    if _State.log is not None:
        took = time.perf_counter() - began
        with _State.log.open("a") as file:
            file.write(f"{name} {grid} {block} {done.instructions} {done.wave_instructions} {took:.4f}\n")
