"""Count the instructions that a tile of keys takes in a decode kernel with NVIDIA's matrix instructions, without a GPU.

    python scripts/kernels/kernel_path.py                                    # turbo3, turbo3t and turbo4 for sm_90
    python scripts/kernels/kernel_path.py --types turbo4t --head-size 512 --target sm_80

The loop over tiles has ways that are rarely taken: a tile that is not whole, a maximum that moves, a soft cap, several queries. The kernel
report counts all of them. Here only those of a whole tile count, of one query with a mask, whose keys are all seen: the shortest way
through the loop with all matrix instructions, the copies of both sides, a mask that is read without conditions and one exponential for
each score, but without shuffles. A predicate that is tested twice has the same value both times.

Exit codes: 0 all well; 3 a compiler or nvdisasm is missing (it is named, with what brings it); 4 a file does not compile, or has no such
way.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import kernel_toolchains as toolchains
import msgspec
from kernel_instructions import per_value
from kernel_resources import MAX_HEAD, head_sizes

from turbo_gguf import patchset
from turbo_gguf.errors import EnvironmentMissing, ToolFailed
from turbo_gguf.failures import exit_code
from turbo_gguf.files import lock
from turbo_gguf.make.toolkits import cuda
from turbo_gguf.make.upstream import fetch, resolve
from turbo_gguf.tools import capture

KERNELS = re.compile(r"turbo_attn_decode_mma_(wide_)?kernel<")
SOURCES = "turbo-attn-decode-{}-{}.cu"

CLASSES = {
    "matrix": ("IMMA", "HMMA", "MOVM"),
    "shared memory": ("LDS", "STS", "BAR"),
    "permutes, logic, shifts": ("PRMT", "LOP3", "SHF"),
    "floats": ("FFMA", "FADD", "FMUL", "HADD2", "HMUL2", "HFMA2", "F2FP", "MUFU"),
    "copies": ("LDGSTS", "LDGDEPBAR", "DEPBAR"),
}
"""Instructions by what they are for."""

_LABEL = re.compile(r"^(?P<name>\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@(?P<guard>!?U?P\w+) )?(?P<name>\S+)\s*(?P<operands>[^;]*?)\s*;")
_TARGET = re.compile(r"\.L_x_\d+")
_PREDICATE = re.compile(r"U?P\d")
_SETS_PREDICATES = re.compile(r"SETP|PLOP3|VOTE|LOP3|R2P|IADD3")
_NEVER = frozenset({"SHFL", "EXIT", "RET"})


class Instruction(msgspec.Struct, frozen=True):
    """One line of a disassembly."""

    name: str  # with modifiers: IMAD.WIDE
    guard: str  # P0, !P0; "": it is always executed
    operands: str

    @property
    def kind(self) -> str:
        """Its name without modifiers."""
        return self.name.partition(".")[0]

    @property
    def branches(self) -> bool:
        """Whether it goes elsewhere. BRA.DIV does so only for lanes that have parted."""
        return self.kind == "BRA" and ".DIV" not in self.name

    @property
    def sets(self) -> list[str]:
        """Predicates that it sets."""
        first = self.operands.split(",")[:3] if _SETS_PREDICATES.search(self.kind) else []
        return [name for part in first if _PREDICATE.fullmatch(name := part.strip())]


class Code(msgspec.Struct, frozen=True):
    """A kernel: its instructions, and the places of labels among them."""

    instructions: list[Instruction]
    labels: dict[str, int]

    def target(self, at: int) -> int:
        """Where the branch at a place goes."""
        match = _TARGET.search(self.instructions[at].operands)
        return self.labels[match[0]] if match else at


Way = list[Instruction]


def kernels(disassembly: str) -> dict[str, Code]:
    """Each kernel by its symbol, of what ``nvdisasm -c`` prints."""
    found: dict[str, Code] = {}
    code = Code([], {})
    for line in disassembly.splitlines():
        if line.startswith(".text.") and line.endswith(":"):
            code = found[line[6:-1]] = Code([], {})
        elif match := _LABEL.match(line):
            code.labels[match["name"]] = len(code.instructions)
        elif match := _INSTRUCTION.match(line):
            code.instructions.append(Instruction(match["name"], match["guard"] or "", match["operands"]))
    return found


def whole_tile(code: Code, columns: int) -> Way:
    """What a whole tile takes in a kernel for so many columns.

    Raises:
        ToolFailed: the kernel has no loop over tiles, or none with such a way.
    """
    first, last = _loop(code)
    exponentials = columns  # 32 keys times columns, over 32 lanes
    matrix = _kinds(code.instructions[first : last + 1], ("IMMA", "HMMA"))
    ways = [
        way
        for way in _ways(code, first, last, exponentials)
        if _kinds(way, ("IMMA", "HMMA")) == matrix
        and _count(way, "MUFU") == exponentials
        and sum(x.kind in ("LD", "LDG") and x.name.endswith("U16") and not x.guard for x in way) >= 4
    ]
    if not ways:
        raise ToolFailed("no way of a whole tile through the loop", "look at it with nvdisasm -c")
    copies = max(_count(way, "LDGSTS") for way in ways)
    return min((way for way in ways if _count(way, "LDGSTS") == copies), key=len)


def _loop(code: Code) -> tuple[int, int]:
    """First and last instruction of the longest loop with integer products that ends under a condition."""
    ends = [at for at, x in enumerate(code.instructions) if x.branches and x.guard and code.target(at) < at]
    loops = [(code.target(at), at) for at in ends if _count(code.instructions[code.target(at) : at], "IMMA")]
    if not loops:
        raise ToolFailed("no loop with matrix instructions", "is it a decode kernel of a packed type?")
    return max(loops, key=lambda found: found[1] - found[0])


def _ways(code: Code, first: int, last: int, exponentials: int) -> Iterator[Way]:
    """The ways through a loop that only go forward and have no more exponentials."""
    open_ways: list[tuple[int, dict[str, bool], Way]] = [(first, {}, [])]
    while open_ways:
        at, known, way = open_ways.pop()
        left = exponentials - _count(way, "MUFU")
        while at <= last:
            instruction = code.instructions[at]
            way.append(instruction)
            left -= instruction.kind == "MUFU"
            if instruction.kind in _NEVER or left < 0:
                break
            if not instruction.branches:
                for name in instruction.sets:
                    known.pop(name, None)
                at += 1
                continue
            if at == last:
                yield way
                break
            target, name, taken = code.target(at), instruction.guard.lstrip("!"), not instruction.guard.startswith("!")
            goes = not name or known.get(name) == taken
            if goes and target <= at:
                break
            if name and name not in known:
                if target > at:
                    open_ways.append((target, {**known, name: taken}, way.copy()))
                known[name] = not taken
            at = target if goes else at + 1


def _count(way: Sequence[Instruction], kind: str) -> int:
    return sum(instruction.kind == kind for instruction in way)


def _kinds(way: Sequence[Instruction], kinds: Sequence[str]) -> Counter[str]:
    return Counter(instruction.kind for instruction in way if instruction.kind in kinds)


def table(ways: Mapping[str, Way], target: str) -> str:
    """Markdown: a row for each kernel, by its short name."""
    lines = [f"| {target} | a tile | a value | {' | '.join(CLASSES)} | rest |", "|---" * (len(CLASSES) + 4) + "|"]
    for name, way in ways.items():
        counts = [_kinds(way, kinds).total() for kinds in CLASSES.values()]
        cells = [f"`{name}`", len(way), f"{per_value(name, len(way), target):.2f}", *counts, len(way) - sum(counts)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _disassembler() -> str:
    nvcc = cuda.compiler()
    found = shutil.which("nvdisasm") or (shutil.which("nvdisasm", path=nvcc.parent) if nvcc else None)
    if not found:
        raise EnvironmentMissing("no nvdisasm", "pip install nvidia-cuda-nvdisasm, and put its folder bin into PATH")
    return found


def _compile(source: str, target: str, disassembler: str, folder: Path) -> dict[str, Code]:
    """The kernels of a file, by their short names."""
    pristine = fetch(resolve(None))
    with lock(f"tree-{pristine.upstream}"):
        tree = patchset.apply(pristine).path
    job = toolchains.Job(tree, source, target, toolchains.toolchain(target), (), folder)
    capture(job.argv, cwd=tree, timeout=600)
    found = kernels(capture([disassembler, "-c", job.output]))
    names = toolchains.short_names(sorted(found), toolchains.types_of(tree))
    return {names[symbol]: code for symbol, code in found.items()}


def _run(options: argparse.Namespace) -> int:
    ways: dict[str, Way] = {}
    size, disassembler = options.head_size, _disassembler()
    with tempfile.TemporaryDirectory(prefix="kernel-path-") as folder:
        for name in options.types.split(","):
            source = SOURCES.format("wide" if size > MAX_HEAD else "mma", name)
            for short, code in sorted(_compile(source, options.target, disassembler, Path(folder)).items(), key=lambda item: len(item[0])):
                if KERNELS.match(short) and f"{name}, {name}" in short and head_sizes(short) == [size, size]:
                    ways[short] = whole_tile(code, int(short.rstrip(">").rpartition(", ")[2]))
    print(table(ways, options.target))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--target", default="sm_90", help="architecture of NVIDIA")
    parser.add_argument("--types", default="turbo3,turbo3t,turbo4", help="cache types of both sides, separated by commas")
    parser.add_argument("--head-size", type=int, default=128)
    options = parser.parse_args(argv)
    return exit_code(lambda: _run(options))


if __name__ == "__main__":
    sys.exit(main())
