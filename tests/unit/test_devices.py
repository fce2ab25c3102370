"""Lists of devices. Risks: a device that is overlooked, memory of another one, a program that is no llama-server."""

from __future__ import annotations

from pathlib import Path

import pytest

from turbo_gguf.errors import EnvironmentMissing, LogNotUnderstood, UsageError
from turbo_gguf.plan import devices
from turbo_gguf.plan.devices import Device

MIB = 1 << 20
LISTS = {
    "two": "Available devices:\n  CUDA0: NVIDIA GeForce RTX 4090 (24077 MiB, 23678 MiB free)\n  CUDA1: A (b) (16 MiB, 8 MiB free)\n",
    "noise": "ggml_hip: found 1 device\nAvailable devices:\n  ROCm0: AMD Radeon RX 7900 XTX: 1 (24560 MiB, 24512 MiB free)\n\n",
    "remote": "Available devices:\n  RPC0[10.0.0.2:50052]: 10.0.0.2:50052 (100 MiB, 90 MiB free)\n",
    "blas": "Available devices:\n  BLAS: OpenBLAS (0 MiB, 0 MiB free)\n",
    "none": "Available devices:\n  (none)\n",
}
EXPECTED = {
    "two": (Device("CUDA0", "NVIDIA GeForce RTX 4090", 24077 * MIB, 23678 * MIB), Device("CUDA1", "A (b)", 16 * MIB, 8 * MIB)),
    "noise": (Device("ROCm0", "AMD Radeon RX 7900 XTX: 1", 24560 * MIB, 24512 * MIB),),
    "remote": (Device("RPC0[10.0.0.2:50052]", "10.0.0.2:50052", 100 * MIB, 90 * MIB),),
    "blas": (),
    "none": (),
}


def program(folder: Path, text: str) -> Path:
    (folder / "list").write_text(text)
    path = folder / "llama-server"
    path.write_text(f'#!/bin/sh\n[ "$*" = --list-devices ] && cat {folder}/list\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("name", LISTS)
def test_lists(tmp_path: Path, name: str) -> None:
    assert devices.listed(program(tmp_path, LISTS[name])) == EXPECTED[name]


def test_another_program(tmp_path: Path) -> None:
    with pytest.raises(LogNotUnderstood, match="lists nothing: usage: ls"):
        devices.listed(program(tmp_path, "usage: ls\n"))
    with pytest.raises(EnvironmentMissing, match="not found"):
        devices.listed(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("wanted", "names"),
    [("0", ["CUDA0"]), ("1", ["CUDA1"]), ("cuda1", ["CUDA1"]), ("1, CUDA0", ["CUDA1", "CUDA0"]), ("0,CUDA0", ["CUDA0"])],
)
def test_numbers_and_names(tmp_path: Path, wanted: str, names: list[str]) -> None:
    assert [device.name for device in devices.named(program(tmp_path, LISTS["two"]), wanted)] == names


@pytest.mark.parametrize("wanted", ["2", "CUDA", "0,CPU", "", "-1"])
def test_what_is_not_in_the_list(tmp_path: Path, wanted: str) -> None:
    with pytest.raises(UsageError) as wrong:
        devices.named(program(tmp_path, LISTS["two"]), wanted)
    assert wrong.value.hint.startswith("there are 0: CUDA0 (NVIDIA GeForce RTX 4090), 1: CUDA1")
