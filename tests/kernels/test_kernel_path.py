"""The way of a whole tile through the loop of a decode kernel, as nvdisasm prints it."""

from __future__ import annotations

import kernel_path
import pytest

from turbo_gguf.errors import ToolFailed

MASK = ["LD.E.U16 R1, [R2]", "LD.E.U16 R3, [R2]", "LD.E.U16 R4, [R2]", "LD.E.U16 R5, [R2]"]

LOOP = [
    "FSETP.NEU.FTZ.AND P1, PT, R0, RZ, PT",
    "@P1 BRA `(.L_x_2)",  # a soft cap: the mask is added later
    *["FFMA R6, R6, R7, R8"] * 3,
    ".L_x_2:",
    "IMMA.16832.S8.S8 R8, R9, R10, R11",
    "@!P1 BRA `(.L_x_3)",
    *["MUFU.TANH R6, R6"] * 8,
    ".L_x_3:",
    "ISETP.GE.AND P1, PT, R0, R1, PT",
    "@P1 BRA `(.L_x_4)",
    "LDGSTS.E.64 [R1], [R2]",
    "LDGSTS.E.64 [R3], [R4]",
    ".L_x_4:",
    *["MUFU.EX2 R6, R6"] * 8,
    "VOTE.ANY P2, P2",
    "@!P2 BRA `(.L_x_5)",
    "SHFL.BFLY PT, R6, R6, 0x10, 0x1f",  # a maximum that moves
    ".L_x_5:",
    "HMMA.16816.F32 R8, R9, R10, R8",
    *MASK,
    "ISETP.LT.AND P3, PT, R0, R1, PT",
]


def _disassembly(loop: list[str]) -> str:
    lines = ["EXIT", ".L_x_1:", *loop, "@P3 BRA `(.L_x_1)", "EXIT", ".L_x_9:", "BRA `(.L_x_9)"]
    text = [line if line.startswith(".") else f"        /*{16 * at:04x}*/                   {line} ;" for at, line in enumerate(lines)]
    return "\n".join([".section .text.kernel", ".text.kernel:", *text])


def _whole(loop: list[str]) -> list[str]:
    (code,) = kernel_path.kernels(_disassembly(loop)).values()
    return [instruction.kind for instruction in kernel_path.whole_tile(code, columns=8)]


def test_way_of_a_whole_tile() -> None:
    # both tests of P1 go the same way: the mask is added at once, and there is no soft cap
    expected = ["FSETP", "BRA", "FFMA", "FFMA", "FFMA", "IMMA", "BRA", "ISETP", "BRA", "LDGSTS", "LDGSTS"]
    expected += ["MUFU"] * 8 + ["VOTE", "BRA", "HMMA", "LD", "LD", "LD", "LD", "ISETP", "BRA"]
    assert _whole(LOOP) == expected


@pytest.mark.parametrize("left_out", ["HMMA", "LD", "IMMA"])
def test_no_such_way(left_out: str) -> None:
    """A product that is left out for some tiles, a mask under conditions, a loop that is no loop over tiles."""
    if left_out == "HMMA":
        loop = [*LOOP, "@P4 BRA `(.L_x_6)", "HMMA.16816.F32 R8, R9, R10, R8", "SHFL.IDX PT, R1, R1, R2, R3", ".L_x_6:"]
    elif left_out == "LD":
        loop = [f"@P5 {line}" if line.startswith("LD.") else line for line in LOOP]
    else:
        loop = [line for line in LOOP if "IMMA" not in line]
    with pytest.raises(ToolFailed, match=r"no loop with matrix|no way of a whole tile"):
        _whole(loop)


def test_table() -> None:
    (code,) = kernel_path.kernels(_disassembly(LOOP)).values()
    way = kernel_path.whole_tile(code, columns=8)
    name = "turbo_attn_decode_mma_kernel<64, 64, turbo3, turbo3, 8>"
    cells = [cell.strip() for cell in kernel_path.table({name: way}, "sm_90").splitlines()[2].strip("|").split("|")]
    assert cells == [f"`{name}`", "28", "0.22", "2", "0", "0", "11", "2", "13"]
