"""How many instructions a GPU kernel has, and its longest loop: read from the disassembly (AMD) and from the machine code (NVIDIA).

The longest loop of a decode kernel is that over tiles of keys, in which nearly all else is unrolled. A lane unpacks a value of K and one
of V for each channel there, so instructions of the loop over the channels of K and V are instructions per value. Both sides of a branch
count, and an inner loop counts once: the number is no time, but it grows when the code does.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence

import msgspec
from kernel_resources import DECODE_KERNEL, WIDE_KERNEL, Kernel, head_sizes

_SASS_SIZE = 16  # bytes of an instruction, since compute capability 7.0
_SASS_BRANCH = 0x947
_SPLIT_SINCE = 90  # compute capability from which the low byte of a branch's distance lies apart


class Counts(msgspec.Struct, frozen=True):
    """Instructions of a kernel, and those between a branch back and where it goes, at most."""

    instructions: int
    loop: int


def per_value(name: str, loop: int, target: str) -> float | None:
    """Instructions per value of K and V of a decode kernel, by its short name; ``None`` for other kernels.

    Of wide heads a lane has the channels of one warp of four, on gfx942 of one wave of two.
    """
    sizes = head_sizes(name)
    if not DECODE_KERNEL.match(name) or "merge" in name or len(sizes) < 2 or not loop:
        return None
    parts = (2 if target == "gfx942" else 4) if WIDE_KERNEL.match(name) else 1
    return parts * loop / (sizes[0] + sizes[1])


_LABEL = re.compile(r"^[0-9a-f]+ <(?P<symbol>.+)>:$")
_AMD_INSTRUCTION = re.compile(r"^\s+(?P<name>\w+).*// (?P<address>[0-9A-F]+):")
_AMD_TARGET = re.compile(r"<(?P<symbol>[^>+]+)(?:\+0x(?P<offset>[0-9a-f]+))?>$")
_AMD_PADDING = ("s_code_end", "s_nop")


def from_disassembly(text: str) -> dict[str, Counts]:
    """Counts by symbol, of what ``llvm-objdump -d`` prints for an AMD code object."""
    addresses: dict[str, list[int]] = {}
    branches: dict[str, list[tuple[int, int]]] = {}
    symbol = ""
    for line in text.splitlines():
        if match := _LABEL.match(line):
            symbol = match["symbol"]
            addresses[symbol], branches[symbol] = [], []
        elif symbol and (match := _AMD_INSTRUCTION.match(line)) and match["name"] not in _AMD_PADDING:
            address = int(match["address"], 16)
            addresses[symbol].append(address)
            if "branch" in match["name"] and (target := _AMD_TARGET.search(line)) and target["symbol"] == symbol:
                branches[symbol].append((address, addresses[symbol][0] + int(target["offset"] or "0", 16)))
    return {symbol: Counts(len(found), _longest(found, branches[symbol])) for symbol, found in addresses.items()}


def _longest(addresses: list[int], branches: list[tuple[int, int]]) -> int:
    """Instructions between a branch back and its target, both counted."""
    place = {address: n for n, address in enumerate(addresses)}
    return max((place[start] - place[target] + 1 for start, target in branches if target <= start and target in place), default=0)


def from_cubin(elf: bytes, capability: int) -> dict[str, Counts]:
    """Counts by symbol, of a CUDA object for a compute capability such as 90."""
    found: dict[str, Counts] = {}
    for name, code in _sections(elf):
        if name.startswith(".text."):
            words = [struct.unpack_from("<QQ", code, at) for at in range(0, len(code), _SASS_SIZE)]
            addresses = [n * _SASS_SIZE for n in range(len(words))]
            branches = [
                (n * _SASS_SIZE, n * _SASS_SIZE + _SASS_SIZE + _distance(low, high, capability))
                for n, (low, high) in enumerate(words)
                if low & 0xFFF == _SASS_BRANCH
            ]
            while words and words[-1][0] & 0xFFF in (0x918, _SASS_BRANCH):  # the filling: NOP, and a branch to itself
                words.pop()
            found[name.removeprefix(".text.")] = Counts(len(words), _longest(addresses, branches))
    return found


def _distance(low: int, high: int, capability: int) -> int:
    """Bytes from the end of a branch to its target."""
    words = ((high << 64 | low) >> 34) & (1 << 48) - 1
    words -= (words >> 47) << 48
    if capability >= _SPLIT_SINCE:
        words = words << 8 | low >> 16 & 0xFF
    return 4 * words


def _sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of each section of a little-endian 64-bit ELF file."""
    if elf[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + n * size) for n in range(count)]
    strings = headers[names][4]
    for name, kind, _, _, offset, length in headers:
        if kind == 1:  # SHT_PROGBITS
            end = elf.index(b"\0", strings + name)
            yield elf[strings + name : end].decode(), elf[offset : offset + length]


def with_counts(kernels: Sequence[Kernel], counts: Mapping[str, Counts]) -> list[Kernel]:
    """Kernels with what was counted in them."""
    none = Counts(0, 0)
    pairs = ((kernel, counts.get(kernel.symbol, none)) for kernel in kernels)
    return [msgspec.structs.replace(kernel, instructions=found.instructions, loop=found.loop) for kernel, found in pairs]
