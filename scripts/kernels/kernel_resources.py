"""What a GPU kernel takes: registers, spills, scratch and shared memory, read from code objects (AMD) and from ptxas -v (NVIDIA).

Pure functions of bytes and text.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence

import msgspec

DECODE_KERNEL = re.compile(r"turbo_attn_(decode|merge)\w*")
WIDE_KERNEL = re.compile(r"turbo_attn_decode_\w*wide_kernel")
MAX_HEAD = 256
"""Larger head sizes than this are wide. Head sizes are the leading integer template arguments, those before the first type."""

_NT_AMDGPU_METADATA = 32
_PT_NOTE = 4


class Kernel(msgspec.Struct, frozen=True):
    """One kernel on one target. AMD has spilled registers, NVIDIA bytes of spill stores and loads; 0 is none in both."""

    symbol: str
    vgpr: int  # vector registers; NVIDIA: registers of a thread
    sgpr: int = 0
    agpr: int = 0
    spill: int = 0  # vector registers; NVIDIA: bytes stored and loaded
    sgpr_spill: int = 0  # to lanes of vector registers, which costs instructions but no memory
    scratch: int = 0  # bytes per thread; NVIDIA: stack
    lds: int = 0  # bytes of shared memory that are known at compile time
    instructions: int = 0
    loop: int = 0  # instructions of the longest loop


def from_code_object(elf: bytes) -> list[Kernel]:
    """The kernels that an AMD code object describes in its metadata note.

    Raises:
        ValueError: the bytes are no 64-bit ELF file, or have no such note.
    """
    for kind, owner, content in _notes(elf):
        if kind == _NT_AMDGPU_METADATA and owner == b"AMDGPU":
            found = msgspec.msgpack.decode(content)
            return [_amd_kernel(entry) for entry in found.get("amdhsa.kernels", [])]
    raise ValueError("no AMDGPU metadata note")


def _amd_kernel(entry: Mapping[str, int | str]) -> Kernel:
    def number(name: str) -> int:
        return int(entry.get(name, 0))

    return Kernel(
        symbol=str(entry[".name"]),
        vgpr=number(".vgpr_count"),
        sgpr=number(".sgpr_count"),
        agpr=number(".agpr_count"),
        spill=number(".vgpr_spill_count"),
        sgpr_spill=number(".sgpr_spill_count"),
        scratch=number(".private_segment_fixed_size"),
        lds=number(".group_segment_fixed_size"),
    )


def _notes(elf: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Type, owner and content of each note of a little-endian 64-bit ELF file."""
    if elf[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", elf, 32)
    size, count = struct.unpack_from("<HH", elf, 54)
    for i in range(count):
        kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", elf, table + i * size)
        if kind == _PT_NOTE:
            yield from _notes_of_segment(elf[offset : offset + length])


def _notes_of_segment(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    at = 0
    while at + 12 <= len(data):
        owner_size, size, kind = struct.unpack_from("<III", data, at)
        owner = at + 12
        content = owner + (owner_size + 3) // 4 * 4
        yield kind, data[owner : owner + owner_size].rstrip(b"\0"), data[content : content + size]
        at = content + (size + 3) // 4 * 4


_ENTRY = re.compile(r"Compiling entry function '(?P<symbol>[^']+)' for")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def from_ptxas(text: str) -> list[Kernel]:
    """The kernels in what ``ptxas -v`` prints for one architecture."""
    kernels = []
    symbol, stack = "", (0, 0, 0)
    for line in text.splitlines():
        if match := _ENTRY.search(line):
            symbol, stack = match["symbol"], (0, 0, 0)
        elif match := _STACK.search(line):
            stack = (int(match[1]), int(match[2]), int(match[3]))
        elif symbol and (match := _USED.search(line)):
            shared = _SHARED.search(line)
            kernels.append(Kernel(symbol, int(match[1]), spill=stack[1] + stack[2], scratch=stack[0], lds=int(shared[1]) if shared else 0))
            symbol = ""
    return kernels


_CLANG_WARNING = re.compile(r"^(?P<file>[^\s:][^:]*):\d+:\d+: (warning|error): .*", re.MULTILINE)
_NVCC_WARNING = re.compile(r"^(?P<file>[^\s(][^(]*)\(\d+\): (warning|error)\b.*", re.MULTILINE)
_PTXAS_WARNING = re.compile(r"^ptxas (warning|error)\b.*|^nvlink (warning|error)\b.*", re.MULTILINE)


def own_warnings(text: str, own_files: Sequence[str]) -> list[str]:
    """Warnings of clang, nvcc and ptxas about files of ours, each once; ptxas names no file, so all of its are ours.

    ``own_files`` are relative to the folder of the .cu files: upstream has an mma.cuh, too.
    """
    own = tuple(f"/{name}" for name in own_files)
    matches = (match for pattern in (_CLANG_WARNING, _NVCC_WARNING) for match in pattern.finditer(text))
    found = [match[0] for match in matches if f"/{match['file']}".endswith(own)]
    return list(dict.fromkeys([*found, *(match[0] for match in _PTXAS_WARNING.finditer(text))]))


def type_names(ggml_h: str, turbo_enum: str) -> dict[int, str]:
    """Number -> cache type name ("q8_0", "turbo3") of upstream's enum ggml_type and of ours."""
    body = re.search(r"enum ggml_type \{(.*?)\};", ggml_h, re.DOTALL)
    both = (body[1] if body else "") + turbo_enum
    pairs = re.findall(r"^\s*GGML_TYPE_(\w+)\s*=\s*(\d+)", both, re.MULTILINE)
    return {int(number): re.sub(r"^(turbo\d)_(?:0|(t))$", r"\1\2", name.lower()) for name, number in pairs if name != "COUNT"}


def short_name(demangled: str, types: Mapping[int, str]) -> str:
    """A demangled kernel without its return type and parameters, with types by name: ``turbo_decode<128, 128, turbo4, turbo3, 4>``."""
    text = re.sub(r"\(ggml_type\)(\d+)", lambda match: types.get(int(match[1]), match[0]), demangled)
    text = re.sub(r"\((?:unsigned )?(?:int|long|char)\)(-?\d+)", r"\1", text).replace("(bool)1", "true").replace("(bool)0", "false")
    text = re.sub(r"\(anonymous namespace\)::|_INTERNAL_[0-9a-f_]+\w*::", "", text)
    head = re.match(r"(?:void )?(\w+(?:::\w+)*)", text)
    if head is None:
        return demangled
    name, rest = head[1], text[head.end() :]
    return name + (rest[: _closing(rest)] if rest.startswith("<") else "")


def _closing(text: str) -> int:
    """Position behind the bracket that closes the first one."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if depth == 0:
            return at + 1
    return len(text)


def head_sizes(name: str) -> list[int]:
    """Leading integer template arguments of a short name."""
    arguments = name.partition("<")[2].rstrip(">").split(",")
    sizes = []
    for argument in arguments:
        if not argument.strip().isdigit():
            break
        sizes.append(int(argument))
    return sizes


def leaves_registers(kernel: Kernel) -> bool:
    """Whether a kernel spills or uses scratch, which no kernel of ours may."""
    return kernel.spill + kernel.sgpr_spill + kernel.scratch > 0
