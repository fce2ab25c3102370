"""Instructions of gfx1100 from their bytes, by the tables of tinygrad: formats, fields, numbers of operations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tinygrad.renderer import amd
from tinygrad.renderer.amd import dsl
from tinygrad.runtime.autogen.amd.rdna3 import ins

from .errors import Unsupported

LONGEST = 16
VGPR, DPP16, DPP8, LITERAL = 256, 250, (233, 234), 255
"""Numbers of operands: 256 is the first vector register; the others stand for what follows the instruction."""

_CACHE_CONTROL = (0xE0AC, 0xE0B0)  # BUFFER_GL0_INV and BUFFER_GL1_INV, upper halves of their first dwords: tinygrad decodes no MUBUF


class Instruction:
    """A decoded instruction.

    ``name`` is that of the operation (VOPD has ``opx`` and ``opy`` instead), ``format`` that of the encoding, ``size`` in bytes. The
    fields of the encoding are attributes with tinygrad's names; a register or constant is its number in the space of source operands.
    ``step`` is for the function that executes it, once there is one.
    """

    name: str = ""
    step: Callable[[Any], None] | None = None

    def __init__(self, format_name: str, size: int, fields: dict[str, Any]) -> None:
        self.format, self.size = format_name, size
        self.__dict__.update(fields)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{self.format} {self.name} has no field {name}")

    def get(self, name: str, default: Any = 0) -> Any:
        """A field, or the default where the encoding has none of that name."""
        return self.__dict__.get(name, default)

    def has(self, name: str) -> bool:
        """Whether the encoding has a field."""
        return name in self.__dict__

    def __repr__(self) -> str:
        fields = ", ".join(
            f"{key}={value}" for key, value in self.__dict__.items() if key not in ("format", "size", "name", "step") and value
        )
        return f"{self.name or self.format} ({fields})"


@dataclass(frozen=True)
class _Field:
    """One field: ``((bits >> low) & mask) << shift`` plus ``base``, or the name of that number."""

    name: str
    low: int
    mask: int
    shift: int = 0
    base: int = 0
    names: tuple[tuple[int, str], ...] = ()
    is_source: bool = False


class _Format:
    """One encoding."""

    def __init__(self, cls: Any) -> None:

        self.name: str = cls.__name__
        self.size: int = cls._base_size
        self.fixed_mask = self.fixed = 0
        self.fields: list[_Field] = []
        self.operations: list[tuple[int, int, dict[int, str], str]] = []
        for name, field in cls._fields:
            if isinstance(field, dsl.FixedBitField):
                self.fixed_mask |= field.mask << field.lo
                self.fixed |= field.default << field.lo
            elif isinstance(field, dsl.EnumBitField):
                allowed = field.allowed if field.allowed is not None else list(field._enum)
                self.operations.append((field.lo, field.mask, {member.value: member.name for member in allowed}, name))
            else:
                base = field._valid_range[0] if isinstance(field, dsl.SrcField) else 0
                shift = field._align.bit_length() - 1 if isinstance(field, dsl.AlignedSGPRField) else 0
                source = isinstance(field, dsl.SrcField) and "src" in name
                self.fields.append(_Field(name, field.lo, field.mask, shift, base, is_source=source))
        self.variants = {suffix: getattr(ins, self.name + suffix, None) for suffix in ("_LIT", "_DPP16")}

    def matches(self, bits: int) -> bool:
        """Whether an instruction has this format."""
        return bits & self.fixed_mask == self.fixed and all(bits >> low & mask in names for low, mask, names, _ in self.operations)

    def decode(self, bits: int) -> Instruction:
        """The fields of an instruction of this format."""
        names = {name if name != "op" else "name": table[bits >> low & mask] for low, mask, table, name in self.operations}
        values = {field.name: ((bits >> field.low & field.mask) << field.shift) + field.base for field in self.fields}
        sources = [values[field.name] for field in self.fields if field.is_source]
        suffix = ""
        first = values.get("src0")
        if first in DPP8:
            raise Unsupported(f"{names.get('name')} with DPP8")
        if LITERAL in sources or any("FMAMK" in name or "FMAAK" in name for name in names.values()):
            suffix = "_LIT"
        elif first == DPP16:
            suffix = "_DPP16"
        variant = self.variants.get(suffix)
        if variant is not None:
            return _format(variant).decode(bits)
        if "vdsty" in values:  # its lowest bit is the opposite of the other target's
            values["vdsty"] = VGPR + (values["vdsty"] << 1 | (values["vdstx"] & 1 ^ 1))
        return Instruction(self.name, self.size, {**names, **values})


@functools.cache
def _format(cls: Any) -> _Format:
    return _Format(cls)


@functools.cache
def _formats() -> dict[int, list[_Format]]:
    """Formats by the upper six bits of the first dword, in the order in which tinygrad tries them (the first that matches counts)."""

    by_top: dict[int, list[_Format]] = {}
    for cls in amd._load_formats()["rdna3"]:
        if cls.__name__.endswith("_DPP16"):
            continue  # found as a variant of its format
        found = _format(cls)
        for top in range(64):
            bits, mask = top << 26, found.fixed_mask & 0xFC000000
            if bits & mask == found.fixed & mask:
                by_top.setdefault(top, []).append(found)
    return by_top


_known: dict[bytes, Instruction] = {}
_KEPT = 1 << 17


def decode(code: bytes) -> Instruction:
    """The instruction at the start of these bytes; there are at least :data:`LONGEST`. Equal ones are the same object."""
    for size in range(4, LONGEST + 1, 4):  # no instruction is the beginning of another
        found = _known.get(code[:size])
        if found is not None:
            return found
    if len(_known) == _KEPT:
        _known.clear()
    inst = _decode(int.from_bytes(code[:LONGEST], "little"))
    _known[code[: inst.size]] = inst
    return inst


def _decode(bits: int) -> Instruction:
    word = bits & 0xFFFFFFFF
    if word >> 16 in _CACHE_CONTROL:
        return Instruction("MUBUF", 8, {"name": "BUFFER_GL_INV"})
    for candidate in _formats().get(word >> 26, ()):
        if candidate.matches(bits):
            return candidate.decode(bits)
    raise Unsupported(f"instruction word {word:#010x}")


def all_names() -> Iterator[str]:
    """Names of all operations that can be decoded (for tests)."""
    for found in {id(f): f for formats in _formats().values() for f in formats}.values():
        for _, _, names, _ in found.operations:
            yield from names.values()
