"""Instructions of a kernel and of its longest loop are counted right, in AMD's disassembly and in NVIDIA's machine code."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from kernel_instructions import Counts, from_cubin, from_disassembly, per_value, with_counts
from kernel_resources import Kernel

DATA = Path(__file__).parents[1] / "data/kernels"
DECODE = "turbo_attn_decode_kernel<128, 128, turbo3, turbo3, 4>"

AMD = """
x.o:\tfile format elf64-amdgpu

Disassembly of section .text:

0000000000001900 <_Z5loopsPf>:
\ts_load_b64 s[0:1], s[0:1], null                            // 000000001900: F4040000 F8000000
\tv_mov_b32_e32 v0, 0                                        // 000000001908: 7E000280
\tv_add_f32_e32 v0, 1.0, v0                                  // 00000000190C: 060000F2
\ts_cbranch_scc1 65534                                       // 000000001910: BFA2FFFE <_Z5loopsPf+0xc>
\ts_cbranch_vccz 1                                           // 000000001914: BFA30001 <_Z5loopsPf+0x1c>
\ts_branch 65531                                             // 000000001918: BFA0FFFB <_Z5loopsPf+0x8>
\ts_endpgm                                                   // 00000000191C: BFB00000
\ts_code_end                                                 // 000000001920: BF9F0000

0000000000001a00 <_Z8straightPf>:
\ts_endpgm                                                   // 000000001A00: BFB00000
"""


def test_the_longest_loop_of_a_disassembly_is_counted() -> None:
    assert from_disassembly(AMD) == {"_Z5loopsPf": Counts(7, 5), "_Z8straightPf": Counts(1, 0)}


def branch(bytes_from_here: int, capability: int) -> bytes:
    """A branch, relative to its own address."""
    words = (bytes_from_here - 16) // 4
    high, low = (words, 0) if capability < 90 else (words >> 8, words & 0xFF)
    return ((high & (1 << 48) - 1) << 34 | low << 16 | 0x947).to_bytes(16, "little")


def cubin(**kernels: bytes) -> bytes:
    """An ELF file with a section for each kernel."""
    names = ["", ".shstrtab", *(f".text.{name}" for name in kernels)]
    strings = b"\0".join(name.encode() for name in names) + b"\0"
    contents = [b"", strings, *kernels.values()]
    offset, headers, data = 64, b"", b""
    for n, (name, content) in enumerate(zip(names, contents, strict=True)):
        headers += struct.pack(
            "<IIQQQQIIQQ",
            strings.find(name.encode() + b"\0"),
            (0, 3, *[1] * len(kernels))[n],
            0,
            0,
            offset + len(data),
            len(content),
            0,
            0,
            1,
            0,
        )
        data += content
    head = b"\x7fELF\x02\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 2, 190, 1, 0, 0, 64 + len(data), 0, 64, 0, 0, 64, len(names), 1
    )
    return head + data + headers


@pytest.mark.parametrize(
    ("capability", "to_itself"),
    [(90, (0xFFFFFFFC00FC7947, 0x000FC0000383FFFF)), (80, (0xFFFFFFF000007947, 0x000FC0000383FFFF))],  # as nvcc 13.0 writes it
)
def test_the_longest_loop_of_machine_code_is_counted(capability: int, to_itself: tuple[int, int]) -> None:
    other, nop = (0x7221).to_bytes(16, "little"), (0x7918).to_bytes(16, "little")
    loops = [other, other, other, branch(-16, capability), other, branch(-64, capability), branch(32, capability), other, other]
    code = b"".join([*loops, struct.pack("<QQ", *to_itself), nop, nop])
    assert from_cubin(cubin(loops=code, straight=other), capability) == {"loops": Counts(9, 5), "straight": Counts(1, 0)}


def test_long_loops_need_more_bits_than_a_short_distance() -> None:
    other = (0x7221).to_bytes(16, "little")
    for capability in (75, 90, 120):
        code = other * 5000 + branch(-16 * 4000, capability) + other
        assert from_cubin(cubin(loop=code), capability)["loop"] == Counts(5002, 4001)


def test_what_is_no_object_is_refused() -> None:
    with pytest.raises(ValueError, match="ELF"):
        from_cubin(b"no object", 90)


def test_instructions_per_value_are_of_decode_kernels() -> None:
    assert per_value(DECODE, 1696, "sm_90") == 6.625
    assert per_value("turbo_attn_merge_parts<128>", 100, "sm_90") is None
    assert per_value("turbo_quantize<turbo3>", 100, "sm_90") is None
    assert per_value(DECODE, 0, "sm_90") is None


def test_kernels_get_what_was_counted() -> None:
    found = with_counts([Kernel("a", 10), Kernel("b", 20)], {"a": Counts(5, 2)})
    assert found == [Kernel("a", 10, instructions=5, loop=2), Kernel("b", 20)]
