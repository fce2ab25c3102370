"""Runs kernels: places blocks, steps groups of waves through straight pieces of code, meets barriers."""

from __future__ import annotations

import bisect
import collections
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from . import lds as lds_module
from . import matrix, packed, salu, valu, vmem
from .codeobject import CodeObject, Kernel
from .decode import VGPR, Instruction, decode
from .errors import BadBarrier, EmulatorError, Unsupported
from .lds import Lds
from .memory import Memory
from .operands import scalar64
from .state import EXEC, LANES, VCC, Group, Waves, pack
from .vmem import Scratch, Spaces

Dim = tuple[int, int, int]
Run = Callable[[Group], None]

np.seterr(all="ignore")

RUNNING, WAITING, ENDED = 0, 1, 2
WAVES_AT_ONCE = 256  # enough that numpy's overhead per call no longer counts, few enough that their registers stay in the cache
WAVE_INSTRUCTIONS = 2_000_000_000  # a kernel that needs more is taken to hang

NO_EFFECT = re.compile(
    r"S_WAITCNT.*|S_DELAY_ALU|S_CLAUSE|S_NOP|S_SENDMSG|S_SET_INST_PREFETCH_DISTANCE|S_ICACHE_INV|S_SLEEP|S_SETPRIO|S_DENORM_MODE|S_SETREG_.*|"
    r"S_WAIT_IDLE|BUFFER_GL_INV"
)
BRANCHES: dict[str, Callable[[Group], npt.NDArray[np.bool_]]] = {
    "S_CBRANCH_SCC0": lambda g: ~g.scc,
    "S_CBRANCH_SCC1": lambda g: g.scc,
    "S_CBRANCH_VCCZ": lambda g: g.s[VCC] == 0,
    "S_CBRANCH_VCCNZ": lambda g: g.s[VCC] != 0,
    "S_CBRANCH_EXECZ": lambda g: g.s[EXEC] == 0,
    "S_CBRANCH_EXECNZ": lambda g: g.s[EXEC] != 0,
}
BINDERS: tuple[tuple[tuple[str, ...], Callable[[Instruction], Run]], ...] = (
    (("VOPD",), valu.bind_dual),
    (("VOP3P",), packed.bind),
    (("VOP",), valu.bind),
    (("SOP",), salu.bind),
    (("SMEM",), salu.bind_load),
    (("DS",), lds_module.bind),
    (("GLOBAL", "FLAT", "SCRATCH"), vmem.bind),
)
"""By the beginning of the name of the format; the first counts."""
Next = int | npt.NDArray[np.int64]
"""Where a group goes on: one place for all of its waves, or one for each."""
END, BARRIER = -1, -2


@dataclass
class Piece:
    """Instructions up to the one that may go somewhere else, which is ``leave``."""

    places: list[int] = field(default_factory=list)
    steps: list[Run] = field(default_factory=list)
    leave: Callable[[Group], Next] = lambda g: END
    end: int = 0


@dataclass
class Statistics:
    """What a launch took."""

    instructions: int = 0
    wave_instructions: int = 0
    steps: collections.Counter[str] = field(default_factory=collections.Counter)


@dataclass(frozen=True)
class Call:
    """A launch of a kernel. ``arguments`` are the visible ones, in order, as bytes."""

    kernel: str
    grid: Dim
    block: Dim
    arguments: Sequence[bytes]
    dynamic_lds: int = 0


class Program:
    """The code of a code object as functions, made when it is first reached."""

    def __init__(self, code: CodeObject, fault: str = "") -> None:
        self.code, self.fault = code, fault
        self._pieces: dict[int, Piece] = {}

    def piece(self, start: int) -> Piece:
        """The piece of code from a place on."""
        if start not in self._pieces:
            self._pieces[start] = self._decode(start)
        return self._pieces[start]

    def check(self, inst: Instruction, at: int) -> None:
        """Raise an EmulatorError where the instruction at a place is not known."""
        if self._leave(inst, at + inst.size) is None:
            self._bind(inst, at + inst.size)

    def _decode(self, start: int) -> Piece:
        piece, at = Piece(), start
        while True:
            inst = None
            try:
                inst = decode(self.code.code(at))
                after = at + inst.size
                leave = self._leave(inst, after)
                if leave is not None:
                    piece.leave, piece.end = leave, at
                    return piece
                step = self._bind(inst, after)
            except EmulatorError as error:
                what = type(error)(f"{inst!r}: {error}") if inst is not None else error
                piece.leave, piece.end = _fail(what), at  # when it is reached, which may be never
                return piece
            if self.fault and inst.name.startswith(self.fault) and step is not None:
                step = _faulty(step, inst)
            if step is not None:
                piece.places.append(at)
                piece.steps.append(step)
            at = after

    def _bind(self, inst: Instruction, after: int) -> Run | None:
        if inst.step is not None:
            return inst.step
        if NO_EFFECT.fullmatch(inst.name):
            return None
        if inst.name == "S_GETPC_B64":
            target, value = inst.sdst, np.array([self.code.address + after], np.uint64)
            return lambda g: g.put_scalar64(target, value)
        inst.step = _bind_anywhere(inst)
        return inst.step

    def _leave(self, inst: Instruction, after: int) -> Callable[[Group], Next] | None:
        """What ends a piece, if this instruction does."""
        name = inst.name
        if name == "S_ENDPGM":
            return lambda g: END
        if name == "S_BARRIER":
            return lambda g: BARRIER
        if name in ("S_SETPC_B64", "S_SWAPPC_B64"):
            return self._jump(inst, name, after)
        if not name.startswith(("S_BRANCH", "S_CBRANCH")):
            return None
        target = after + 4 * ((inst.simm16 ^ 0x8000) - 0x8000)
        if name == "S_BRANCH":
            return lambda g: target
        condition = BRANCHES[name]

        def leave(g: Group) -> Next:
            taken = condition(g)
            count = int(np.count_nonzero(taken))
            if count == 0:
                return after
            return target if count == g.n else np.where(taken, target, after)

        return leave

    def _jump(self, inst: Instruction, name: str, after: int) -> Callable[[Group], Next]:
        read, base = scalar64(inst.ssrc0, None, "I"), self.code.address

        def leave(g: Group) -> Next:
            target = np.broadcast_to(read(g) - base, (g.n,)).copy()
            if name == "S_SWAPPC_B64":
                g.put_scalar64(inst.sdst, np.array([base + after], np.uint64))
            return int(target[0]) if (target == target[0]).all() else target

        return leave


def _bind_anywhere(inst: Instruction) -> Run:
    """The function that executes an instruction, wherever it stands."""
    if inst.name.startswith("V_WMMA"):
        return matrix.bind(inst)
    for prefixes, bind in BINDERS:
        if inst.format.startswith(prefixes):
            return bind(inst)
    raise Unsupported(f"{inst.format} {inst.name}")


def _fail(error: EmulatorError) -> Callable[[Group], Next]:
    def leave(g: Group) -> Next:
        raise type(error)(str(error)) from error

    return leave


def _faulty(step: Run, inst: Instruction) -> Run:
    """An instruction whose result has its lowest bit inverted."""

    def run(g: Group) -> None:
        step(g)
        register = inst.vdst - VGPR
        g.put(g.u[register], g.u[register] ^ np.uint32(1))

    return run


class Machine:
    """Runs the kernels of code objects on a memory. ``fault`` names a vector instruction that gives wrong results."""

    def __init__(self, memory: Memory, check_races: bool = True, fault: str = "") -> None:
        self.memory, self.check_races, self.fault = memory, check_races, fault
        self._programs: dict[CodeObject, Program] = {}

    def launch(self, code: CodeObject, call: Call) -> Statistics:
        """Run a kernel to its end.

        Raises:
            EmulatorError: names the kernel and the place in it.
        """
        kernel, statistics = code.kernels[call.kernel], Statistics()
        segment = argument_segment(kernel, call)
        address = self.memory.place(np.frombuffer(segment + dispatch_packet(call), np.uint8))
        program = self._programs.setdefault(code, Program(code, self.fault))
        at_once, total = blocks_at_once(call.block), _product(call.grid)
        try:
            for first in range(0, total, at_once):
                blocks = _Blocks(self, program, kernel, call, np.arange(first, min(first + at_once, total)))
                blocks.start(address, address + len(segment))
                blocks.run(statistics)
        finally:
            self.memory.forbid(address - self.memory.base)
        return statistics


def blocks_at_once(block: Dim) -> int:
    """How many blocks run in lock step."""
    return max(1, WAVES_AT_ONCE // _waves_per_block(block))


def _product(dims: Dim) -> int:
    return dims[0] * dims[1] * dims[2]


def _waves_per_block(block: Dim) -> int:
    return (_product(block) + LANES - 1) // LANES


def argument_segment(kernel: Kernel, call: Call) -> bytes:
    """The kernel's argument segment, hidden arguments included."""
    segment, given = bytearray((kernel.argument_bytes + 7) // 8 * 8), iter(call.arguments)
    for argument in kernel.arguments:
        axis = "xyz".find(argument.kind[-1])
        if not argument.kind.startswith("hidden_"):
            value = next(given)
            if len(value) != argument.size:
                raise ValueError(f"argument at {argument.offset} of {kernel.name}: {len(value)} bytes for {argument.size}")
        elif argument.kind.startswith("hidden_block_count_"):
            value = struct.pack("<I", call.grid[axis])
        elif argument.kind.startswith("hidden_group_size_"):
            value = struct.pack("<H", call.block[axis])
        elif argument.kind == "hidden_grid_dims":
            value = struct.pack("<H", 3)
        elif argument.kind == "hidden_dynamic_lds_size":
            value = struct.pack("<I", call.dynamic_lds)
        else:
            continue
        segment[argument.offset : argument.offset + len(value)] = value
    return bytes(segment)


def dispatch_packet(call: Call) -> bytes:
    """What the dispatch pointer points to, as far as kernels read it: sizes of blocks, and of the grid in work items."""
    threads = [blocks * size for blocks, size in zip(call.grid, call.block, strict=True)]
    return struct.pack("<HH3HH3I", 0, 3, *call.block, 0, *threads).ljust(64, b"\0")


class _Blocks:
    """Some blocks of a grid, from their start to their end."""

    def __init__(self, machine: Machine, program: Program, kernel: Kernel, call: Call, numbers: npt.NDArray[np.int64]) -> None:
        self.program, self.kernel, self.call, self.numbers = program, kernel, call, numbers
        per_block = _waves_per_block(call.block)
        self.lds = Lds(len(numbers), kernel.lds + call.dynamic_lds, per_block, machine.check_races)
        spaces = Spaces(machine.memory, self.lds, Scratch(len(numbers) * per_block, kernel.scratch))
        self.waves = Waves(len(numbers), per_block, kernel.vgprs + 2, spaces)
        self.place = np.full(self.waves.count, kernel.entry, np.int64)
        self.state = np.zeros(self.waves.count, np.int8)
        self.statistics = Statistics()
        self._groups: dict[tuple[int, int], Group] = {}

    def start(self, arguments: int, packet: int) -> None:
        """Registers as the hardware sets them: work item ids in v0, addresses of arguments and packet and the block's ids in scalars."""
        grid, block = self.call.grid, self.call.block
        waves, kernel = self.waves, self.kernel
        thread = waves.wave[:, None] * LANES + np.arange(LANES)
        x, y, z = thread % block[0], thread // block[0] % block[1], thread // (block[0] * block[1])
        waves.vector[0] = x | y << 10 | z << 20
        waves.scalar[EXEC] = pack(thread < _product(block))
        if kernel.properties & 0b1110101:
            raise Unsupported(f"{kernel.name}: user registers {kernel.properties:#x}")
        register = 0
        for bit, address in ((2, packet), (8, arguments)):  # in the order of the bits
            if kernel.properties & bit:
                waves.scalar[register], waves.scalar[register + 1] = address & 0xFFFFFFFF, address >> 32
                register += 2
        number = self.numbers[waves.block]
        ids = (number % grid[0], number // grid[0] % grid[1], number // (grid[0] * grid[1]))
        register = kernel.rsrc2 >> 1 & 31
        for bit, value in zip((7, 8, 9), ids, strict=True):
            if kernel.rsrc2 >> bit & 1:
                waves.scalar[register] = value
                register += 1

    def run(self, statistics: Statistics) -> None:
        """Run to the end."""
        self.statistics = statistics
        while True:
            running = self.state == RUNNING
            if not running.any():
                if (self.state == ENDED).all():
                    return
                self._barrier()
                continue
            places = self.place[running]
            now = int(places.min())
            chosen = np.flatnonzero(running & (self.place == now))
            others = places[places > now]
            self._advance(self._group(chosen), now, int(others.min()) if others.size else None)

    def _group(self, chosen: npt.NDArray[np.int64]) -> Group:
        key = int(chosen[0]), int(chosen[-1])
        if key[1] - key[0] + 1 != len(chosen):
            return Group(self.waves, chosen)
        if key not in self._groups:
            self._groups[key] = Group(self.waves, chosen)
        group = self._groups[key]
        group.refresh()
        return group

    def _barrier(self) -> None:
        """No wave can go on: all that have not ended wait. Those of one block must do so at the same place."""
        waiting = self.state == WAITING
        by_block: npt.NDArray[np.int64] = np.full(self.waves.block.max() + 1, -1, np.int64)
        by_block[self.waves.block[waiting]] = self.place[waiting]
        differs = self.place[waiting] != by_block[self.waves.block[waiting]]
        if differs.any():
            places = sorted({hex(place) for place in self.place[waiting]})
            raise BadBarrier(f"{self.kernel.name}: waves of one block wait at different barriers: {', '.join(places)}")
        self.state[waiting] = RUNNING
        self.lds.barrier()

    def _advance(self, group: Group, place: int, meet: int | None) -> None:
        """Run a group until its waves part, stop, or come to where others wait to be joined."""
        while True:
            piece = self.program.piece(place)
            if meet is not None and place < meet <= piece.end:
                count = bisect.bisect_left(piece.places, meet)
                self._run(group, piece, count)
                self._leave(group, meet)
                return
            self._run(group, piece, len(piece.steps))
            try:
                target = piece.leave(group)
            except EmulatorError as error:
                raise type(error)(f"{self.kernel.name} at {piece.end:#x}: {error}") from error
            self.statistics.instructions += 1
            if not isinstance(target, int):
                self._leave(group, target)
                return
            if target in (END, BARRIER):
                self.state[group.chosen] = ENDED if target == END else WAITING
                self._leave(group, piece.end + 4)
                return
            place = target
            if self.statistics.wave_instructions > WAVE_INSTRUCTIONS:
                raise EmulatorError(f"{self.kernel.name} at {place:#x}: does not end")
            if meet is not None and place >= meet:
                self._leave(group, place)
                return

    def _leave(self, group: Group, place: Next) -> None:
        group.finish()
        self.place[group.chosen] = place

    def _run(self, group: Group, piece: Piece, count: int) -> None:
        steps = piece.steps if count == len(piece.steps) else piece.steps[:count]
        self.statistics.instructions += count
        self.statistics.wave_instructions += count * group.n
        index = 0
        try:
            for index, step in enumerate(steps):  # noqa: B007  # named in the error
                step(group)
        except EmulatorError as error:
            place = piece.places[index]
            inst = decode(self.program.code.code(place))
            raise type(error)(f"{self.kernel.name} at {place:#x}: {inst!r}: {error}") from error
