"""Which instructions of compiled kernels the emulator does not know: ``python -m emulator.opcodes [--kernels PATTERN] FILE...`` in ``dev``.

A file is a code object for gfx1100, or a library or object file with bundles of them. Every instruction of a kernel is decoded and bound,
reached or not. Ends with 1 when one is not known.
"""

from __future__ import annotations

import argparse
import re
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .codeobject import CodeObject, functions, image_bytes
from .decode import LONGEST, Instruction, decode
from .errors import EmulatorError
from .machine import Program
from .memory import Memory

MAGIC = b"__CLANG_OFFLOAD_BUNDLE__"


@dataclass
class Findings:
    """What a look at code objects gave: instructions looked at, and places by what is not known there."""

    functions: int = 0
    instructions: int = 0
    unknown: dict[str, list[str]] = field(default_factory=dict)


def code_objects(data: bytes, target: str = "gfx1100") -> Iterator[bytes]:
    """The code objects for a target in a file: itself, or those of its bundles."""
    at = data.find(MAGIC)
    if at < 0:
        yield data
    while at >= 0:
        (count,) = struct.unpack_from("<Q", data, at + len(MAGIC))
        entry = at + len(MAGIC) + 8
        for _ in range(count):
            offset, size, length = struct.unpack_from("<QQQ", data, entry)
            name = data[entry + 24 : entry + 24 + length].decode()
            entry += 24 + length
            if target in name and size:
                yield data[at + offset : at + offset + size]
        at = data.find(MAGIC, at + 1)


def instructions(code: CodeObject, pattern: str = "") -> Iterator[tuple[str, int, Instruction]]:
    """All instructions of the functions whose names match: function, place, instruction."""
    image = code.image.tobytes()
    for name, start, size in functions(code.elf):
        at, end = start, start + size if re.search(pattern, name) else start
        while at < end:
            try:
                inst = decode(image[at : at + LONGEST])
            except EmulatorError as error:
                raise type(error)(f"{name} at {at:#x}: {error}") from error
            yield name, at, inst
            at += inst.size


def look(elf: bytes, findings: Findings, pattern: str = "") -> None:
    """Add what a code object holds."""
    code = CodeObject(elf, Memory.of_size(image_bytes(elf) + (1 << 16)))
    program, known, last = Program(code), set(), ""
    for name, at, inst in instructions(code, pattern):
        findings.functions += name != last
        findings.instructions += 1
        last = name
        if inst in known:  # equal bytes are one object
            continue
        why = _why_not(program, inst, at)
        if why:
            findings.unknown.setdefault(why, []).append(f"{name} at {at:#x}")
        else:
            known.add(inst)


def _why_not(program: Program, inst: Instruction, at: int) -> str:
    try:
        program.check(inst, at)
    except EmulatorError as error:
        return f"{inst.format} {inst.name}: {error}"
    return ""


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--kernels", default="", help="regular expression of names of functions (default: all)")
    arguments = parser.parse_args()
    findings = Findings()
    for file in arguments.files:
        for elf in code_objects(file.read_bytes()):
            look(elf, findings, arguments.kernels)
    for why, places in sorted(findings.unknown.items()):
        print(f"{why}: {len(places)} times, first in {places[0]}")
    print(f"{findings.functions} functions, {findings.instructions} instructions, {len(findings.unknown)} kinds not known")
    return 1 if findings.unknown or not findings.instructions else 0


if __name__ == "__main__":
    sys.exit(main())
