"""Small kernels in assembler and in HIP for the tests of the emulator, compiled by the clang of the GPU root."""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import emulated_tools
import numpy as np
import numpy.typing as npt
from emulator.codeobject import CodeObject
from emulator.machine import Call, Dim, Machine
from emulator.memory import Memory
from gpu_root_tools import need_root

Rows = npt.NDArray[np.uint32]

INPUTS, OUTPUTS, LANES = 8, 4, 32
"""A kernel finds the first four of its input rows in v10 to v13 and leaves its results in v20 to v23.

v0 is the thread, v1 4 * thread, s[4:5] the address of the input, s[6:7] of the output, s8 the block.
"""


def signed(x: int, bits: int = 32) -> int:
    """Two's complement."""
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


_KERNEL = """
.globl {name}
.p2align 8
.type {name},@function
{name}:
    s_load_b128 s[4:7], s[0:1], 0x0
    s_mov_b32 s8, s2
    v_and_b32 v0, 0x3ff, v0
    v_lshlrev_b32 v1, 2, v0
    s_waitcnt lgkmcnt(0)
    global_load_b32 v10, v1, s[4:5]
    global_load_b32 v11, v1, s[4:5] offset:{row}
    global_load_b32 v12, v1, s[4:5] offset:2*{row}
    global_load_b32 v13, v1, s[4:5] offset:3*{row}
    s_waitcnt vmcnt(0)
    v_mov_b32 v20, 0
    v_mov_b32 v21, 0
    v_mov_b32 v22, 0
    v_mov_b32 v23, 0
{body}
    global_store_b32 v1, v20, s[6:7]
    global_store_b32 v1, v21, s[6:7] offset:{row}
    global_store_b32 v1, v22, s[6:7] offset:2*{row}
    global_store_b32 v1, v23, s[6:7] offset:3*{row}
    s_endpgm
.{name}_end:
.size {name}, .{name}_end-{name}
.rodata
.p2align 6
.amdhsa_kernel {name}
    .amdhsa_user_sgpr_kernarg_segment_ptr 1
    .amdhsa_system_sgpr_workgroup_id_x 1
    .amdhsa_group_segment_fixed_size {lds}
    .amdhsa_private_segment_fixed_size {scratch}
    .amdhsa_enable_private_segment {has_scratch}
    .amdhsa_next_free_vgpr 64
    .amdhsa_next_free_sgpr 64
    .amdhsa_wavefront_size32 1
.end_amdhsa_kernel
.text
"""

_METADATA = """
  - .name: {name}
    .symbol: {name}.kd
    .kernarg_segment_size: 16
    .kernarg_segment_align: 8
    .group_segment_fixed_size: {lds}
    .private_segment_fixed_size: {scratch}
    .wavefront_size: 32
    .sgpr_count: 64
    .vgpr_count: 64
    .max_flat_workgroup_size: 1024
    .args:
      - {{.offset: 0, .size: 8, .value_kind: global_buffer, .address_space: global}}
      - {{.offset: 8, .size: 8, .value_kind: global_buffer, .address_space: global}}
"""

LDS, SCRATCH = 4096, 64


def assembler(bodies: Mapping[str, str], waves: int) -> str:
    """Assembler source of kernels with these bodies, for blocks of so many waves."""
    fields = {"lds": LDS, "scratch": SCRATCH, "has_scratch": 1, "row": 4 * LANES * waves}
    kernels = "".join(_KERNEL.format(name=name, body=body, **fields) for name, body in bodies.items())
    metadata = "".join(_METADATA.format(name=name, **fields) for name in bodies)
    return (
        f'.amdgcn_target "amdgcn-amd-amdhsa--gfx1100"\n.amdhsa_code_object_version 5\n.text\n{kernels}\n'
        f"---\namdhsa.version: [1, 2]\namdhsa.kernels:{metadata}...\n"
    ).replace("\n---\n", "\n.amdgpu_metadata\n---\n") + ".end_amdgpu_metadata\n"


def assemble(bodies: Mapping[str, str], folder: Path, waves: int = 1) -> bytes:
    """The code object of kernels with these bodies."""
    source, target = folder / f"kernels-{waves}.s", folder / f"kernels-{waves}.elf"
    source.write_text(assembler(bodies, waves))
    return _clang("-target amdgcn-amd-amdhsa -mcpu=gfx1100", source, target)


def compile_hip(text: str, folder: Path) -> bytes:
    """The code object of HIP source that needs no headers."""
    source, target = folder / "kernels.hip", folder / "kernels.elf"
    source.write_text(text)
    return _clang(
        "-x hip --offload-arch=gfx1100 --cuda-device-only --no-gpu-bundle-output -nogpuinc -nogpulib -O3 -Wall -Werror", source, target
    )


def _clang(options: str, source: Path, target: Path) -> bytes:
    command = f'"$(hipconfig -l)/clang" {options} "$1" -o "$2"'
    done = emulated_tools.in_root(["bash", "-euc", command, "bash", source, target], cwd=source.parent, log=target.with_suffix(".log"))
    if done.rc:
        raise RuntimeError(done.err[-3000:])
    return target.read_bytes()


def _folder(name: str) -> Path:
    """Where the kernels of this name are compiled; skips the test where there is no GPU root."""
    need_root()
    folder = emulated_tools.home() / "builds" / "hip-emulated-kernels" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Bench:
    """A machine with a code object, and the memory of one launch."""

    def __init__(self, elf: bytes, waves: int = 1, check_races: bool = True) -> None:
        self.memory, self.waves = Memory.of_size(1 << 20), waves
        self.machine = Machine(self.memory, check_races)
        self.code = CodeObject(elf, self.memory)

    def run(self, name: str, inputs: Sequence[npt.NDArray[np.generic]], grid: Dim = (1, 1, 1)) -> Rows:
        """Run one block; rows are as long as the block. Returns the output rows."""
        width = LANES * self.waves
        rows = np.zeros((INPUTS, width), np.uint32)
        for row, values in zip(rows, inputs, strict=False):
            row[:] = np.resize(np.ascontiguousarray(values).view(np.uint32), width)
        source = self.memory.place(rows)
        target = self.memory.place(np.zeros((OUTPUTS, width), np.uint32))
        arguments = [struct.pack("<Q", source), struct.pack("<Q", target)]
        self.machine.launch(self.code, Call(name, grid, (width, 1, 1), arguments))
        result: Rows = self.memory.read(target, (OUTPUTS, width), np.uint32)
        return result


class Kernels:
    """Kernels that are assembled together when the first of them is wanted."""

    def __init__(self, name: str, bodies: Iterable[str], waves: int = 1) -> None:
        self.name, self.waves = name, waves
        self.names = {body: f"k{index}" for index, body in enumerate(bodies)}

    @functools.cached_property
    def elf(self) -> bytes:
        """The code object; skips the test where there is no GPU root."""
        return assemble({name: body for body, name in self.names.items()}, _folder(self.name), self.waves)

    def bench(self, check_races: bool = True) -> Bench:
        """A new machine with them."""
        return Bench(self.elf, self.waves, check_races)

    def run(self, body: str, *inputs: npt.NDArray[np.generic]) -> Rows:
        """Run one on a new machine; returns the output rows."""
        return self.bench().run(self.names[body], inputs)


class HipKernels:
    """Kernels of HIP source, compiled when the first of them is wanted. Their arguments are pointers, the last one to the result."""

    def __init__(self, name: str, source: str) -> None:
        self.name, self.source = name, source

    @functools.cached_property
    def elf(self) -> bytes:
        """The code object; skips the test where there is no GPU root."""
        return compile_hip(self.source, _folder(self.name))

    def run(self, kernel: str, inputs: Sequence[npt.NDArray[np.generic]], result: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """Run one wave on a new machine; ``result`` is what its memory holds before. Returns what it holds then."""
        memory = Memory.of_size(1 << 20)
        machine, code = Machine(memory), CodeObject(self.elf, memory)
        places = [memory.place(np.ascontiguousarray(values)) for values in (*inputs, result)]
        machine.launch(code, Call(kernel, (1, 1, 1), (LANES, 1, 1), [struct.pack("<Q", place) for place in places]))
        return memory.read(places[-1], result.shape, result.dtype)
