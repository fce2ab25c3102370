"""Every instruction of our kernels is known to the emulator, whether a test reaches it or not, and is decoded as LLVM decodes it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import emulated_tools
import pytest
from emulator import opcodes
from emulator.codeobject import CodeObject, image_bytes
from emulator.memory import Memory
from emulator_kernels import Kernels
from gpu_root_tools import need_root

pytestmark = pytest.mark.emulated

BODIES = ["v_cubeid_f32 v20, v10, v11, v12", "s_branch 9f\nv_cubema_f32 v20, v10, v11, v12\n9:", "v_add_f32 v20, v10, v11"]
KERNELS = Kernels("opcodes", BODIES)


def library() -> list[bytes]:
    """The code objects of the built library."""
    need_root()
    return list(opcodes.code_objects((emulated_tools.build() / "libggml-hip.so").read_bytes()))


def test_unknown_instructions_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kernels.elf").write_bytes(KERNELS.elf)
    monkeypatch.setattr(sys, "argv", ["opcodes", str(tmp_path / "kernels.elf")])
    assert opcodes.main() == 1
    out = capsys.readouterr().out
    assert "V_CUBEID_F32: 1 times, first in k0 at 0x" in out
    assert "V_CUBEMA_F32: 1 times, first in k1 at 0x" in out, "behind a branch that is always taken"
    assert "3 functions" in out and "2 kinds not known" in out


def test_all_instructions_of_our_kernels_are_known() -> None:
    findings = opcodes.Findings()
    for elf in library():
        opcodes.look(elf, findings, "turbo")
    assert findings.unknown == {}
    assert findings.functions > 100


def test_instructions_are_decoded_as_by_llvm(tmp_path: Path) -> None:
    elf = next(elf for elf in library() if b"turbo_quantize" in elf)
    file = tmp_path / "code.elf"
    file.write_bytes(elf)
    command = '"$(hipconfig -l)/llvm-objdump" -d --no-show-raw-insn "$1"'
    listing = emulated_tools.in_root(["bash", "-euc", command, "bash", file], cwd=tmp_path, log=tmp_path / "listing").out
    llvm = {int(place, 16): name for name, place in re.findall(r"^\s+(\S+).*// ([0-9A-F]{12}):", listing, re.MULTILINE)}
    seen, differ = set(), set()
    for _, place, inst in opcodes.instructions(CodeObject(elf, Memory.of_size(image_bytes(elf) + (1 << 16)))):
        mine = plain(inst.name or inst.opx)
        seen.add(mine)
        if mine != plain(llvm.get(place, "nothing")):
            differ.add((mine, llvm.get(place)))
    assert differ == set()
    assert len(seen) > 100


def plain(name: str) -> str:
    """A name without what the encoding adds; both of LLVM's names of cache control are one here."""
    return re.sub(r"(_e32|_e64|_dpp|_e64_dpp)$", "", re.sub(r"_gl[01]_inv", "_gl_inv", name.lower()))
