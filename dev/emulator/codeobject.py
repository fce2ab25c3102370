"""Code objects: ELF files for amdgcn with kernels, their metadata and descriptors."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from .decode import LONGEST
from .errors import Unsupported
from .memory import Memory

PT_LOAD, PT_NOTE, SHT_SYMTAB, SHT_RELA, SHT_DYNSYM = 1, 4, 2, 4, 11
STT_FUNC = 2
NT_AMDGPU_METADATA = 32
R_AMDGPU_RELATIVE64 = 13


@dataclass(frozen=True)
class Argument:
    """One argument of a kernel in its argument segment; ``kind`` as the metadata has it (by_value, global_buffer, hidden_...)."""

    offset: int
    size: int
    kind: str


@dataclass(frozen=True)
class Kernel:
    """What is needed to launch one kernel. Sizes in bytes; ``entry`` is an offset in the image."""

    name: str
    arguments: tuple[Argument, ...]
    argument_bytes: int
    vgprs: int
    lds: int
    scratch: int
    entry: int
    rsrc2: int
    properties: int


class CodeObject:
    """A code object at an address in memory, where it is read-only data for its kernels, too."""

    def __init__(self, elf: bytes, memory: Memory, address: int | None = None) -> None:
        """Load an ELF file; ``address`` is a span of :func:`image_bytes` bytes that is kept for it (None: behind all allocations)."""
        self.elf = elf
        size = image_bytes(elf)
        if address is None:
            address = memory.place(np.zeros(size, np.uint8), align=4096)
        self.address = address
        offset = address - memory.base
        self.image = memory.data[offset : offset + size]
        for kind, start, virtual, file_size, _ in _segments(elf):
            if kind == PT_LOAD:
                self.image[virtual : virtual + file_size] = np.frombuffer(elf, np.uint8, file_size, start)
        self._relocate()
        self.kernels = {kernel.name: kernel for kernel in self._kernels()}

    def code(self, offset: int) -> bytes:
        """The bytes of the instruction at an offset, and some behind it."""
        return self.image[offset : offset + LONGEST].tobytes()

    def _relocate(self) -> None:
        for kind, start, size, _ in _sections(self.elf):
            if kind != SHT_RELA:
                continue
            for offset, info, addend in struct.iter_unpack("<QQq", self.elf[start : start + size]):
                if info & 0xFFFFFFFF != R_AMDGPU_RELATIVE64:
                    raise Unsupported(f"relocation of type {info & 0xFFFFFFFF} in the code object")
                self.image[offset : offset + 8] = np.frombuffer(struct.pack("<Q", self.address + addend), np.uint8)

    def _kernels(self) -> list[Kernel]:
        symbols = self._symbols()
        found = []
        for entry in self._metadata()["amdhsa.kernels"]:
            if entry.get(".wavefront_size", 32) != 32:
                raise Unsupported(f"{entry['.name']}: waves of {entry['.wavefront_size']} lanes")
            at = symbols[entry[".symbol"]]
            descriptor = self.image[at : at + 64].tobytes()
            lds, scratch = struct.unpack_from("<II", descriptor)
            (code,) = struct.unpack_from("<q", descriptor, 16)
            (rsrc2,) = struct.unpack_from("<I", descriptor, 52)
            (properties,) = struct.unpack_from("<H", descriptor, 56)
            arguments = tuple(Argument(a[".offset"], a[".size"], a[".value_kind"]) for a in entry.get(".args", ()))
            found.append(
                Kernel(
                    entry[".name"],
                    arguments,
                    entry[".kernarg_segment_size"],
                    entry[".vgpr_count"],
                    lds,
                    scratch,
                    at + code,
                    rsrc2,
                    properties,
                )
            )
        return found

    def _metadata(self) -> dict[str, Any]:
        for kind, start, _, size, _ in _segments(self.elf):
            at = start
            while kind == PT_NOTE and at < start + size:
                name_size, size_, note = struct.unpack_from("<III", self.elf, at)
                body = at + 12 + (name_size + 3 & ~3)
                if note == NT_AMDGPU_METADATA:
                    decoded: dict[str, Any] = msgspec.msgpack.decode(self.elf[body : body + size_])
                    return decoded
                at = body + (size_ + 3 & ~3)
        raise Unsupported("the code object has no metadata")

    def _symbols(self) -> dict[str, int]:
        return {name: value for name, _, value, _ in _symbols(self.elf, SHT_DYNSYM)}


def functions(elf: bytes) -> list[tuple[str, int, int]]:
    """Name, virtual address and size of all functions of a code object: kernels, and what they call."""
    return sorted({(name, value, size) for name, kind, value, size in _symbols(elf, SHT_SYMTAB) if kind == STT_FUNC})


def _symbols(elf: bytes, table: int) -> Iterator[tuple[str, int, int, int]]:
    """Name, kind, value and size of the symbols of a table."""
    sections = list(_sections(elf))
    for kind, start, size, link in sections:
        if kind != table:
            continue
        names = sections[link][1]
        for name, info, _, _, value, length in struct.iter_unpack("<IBBHQQ", elf[start : start + size]):
            end = elf.index(b"\0", names + name)
            yield elf[names + name : end].decode(), info & 15, value, length


def image_bytes(elf: bytes) -> int:
    """How much memory a code object takes, with room behind its last instruction for a decoder that looks ahead."""
    return max(virtual + size for kind, _, virtual, _, size in _segments(elf) if kind == PT_LOAD) + LONGEST


def _segments(elf: bytes) -> list[tuple[int, int, int, int, int]]:
    """Kind, offset in the file, virtual address, size in the file, size in memory."""
    (table,) = struct.unpack_from("<Q", elf, 32)
    size, count = struct.unpack_from("<HH", elf, 54)
    rows = (struct.unpack_from("<IIQQQQQ", elf, table + k * size) for k in range(count))
    return [(kind, start, virtual, file_size, memory_size) for kind, _, start, virtual, _, file_size, memory_size in rows]


def _sections(elf: bytes) -> list[tuple[int, int, int, int]]:
    """Kind, offset in the file, size, linked section."""
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, _ = struct.unpack_from("<HHH", elf, 58)
    rows = (struct.unpack_from("<IIQQQQI", elf, table + k * size) for k in range(count))
    return [(kind, start, length, link) for _, kind, _, _, start, length, link in rows]
