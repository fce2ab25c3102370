"""``scripts/gpu_root.sh`` where a root cannot be made: what it says and how it ends. Needs no network and no root rights."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu_root.sh"
TOOLS = (
    "bash",
    "sh",
    "cat",
    "cut",
    "dirname",
    "env",
    "flock",
    "grep",
    "head",
    "mkdir",
    "mv",
    "realpath",
    "rm",
    "sed",
    "sha256sum",
    "tail",
    "touch",
    "du",
)


class Script:
    """The script with a PATH of its own: the tools it always needs, and programs that a test makes."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.root = folder / "bin", folder / "roots" / "gpu-root"
        self.home = folder / "home"
        self.bin.mkdir()
        for name in TOOLS:
            found = next(Path(part) / name for part in ("/usr/bin", "/bin", "/usr/local/bin") if (Path(part) / name).exists())
            (self.bin / name).symlink_to(found)
        self.fake("id", "echo 0")
        self.fake("unshare", "exit 0")

    def fake(self, name: str, body: str) -> None:
        """Put a program on PATH."""
        path = self.bin / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def __call__(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        given = {"PATH": str(self.bin), "TURBO_GGUF_HOME": str(self.home), "TURBO_GGUF_GPU_ROOT": str(self.root), **environment}
        return subprocess.run([SCRIPT, *arguments], env=given, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


def test_without_root_rights(script: Script) -> None:
    script.fake("id", "echo 1000")
    done = script("make")
    assert done.returncode == 3
    assert "needs root rights" in done.stderr
    assert "hint: sudo " in done.stderr


def test_without_mounts(script: Script) -> None:
    script.fake("unshare", "exit 1")
    done = script("make")
    assert done.returncode == 3
    assert "mount" in done.stderr


def test_without_debootstrap(script: Script) -> None:
    done = script("make")
    assert done.returncode == 3
    assert "hint: apt-get install debootstrap" in done.stderr
    assert not script.root.exists()


def test_a_mirror_that_does_not_answer(script: Script) -> None:
    script.fake("debootstrap", 'echo "E: Failed getting release file $5"; exit 1')
    done = script("make", TURBO_GGUF_DEBIAN_MIRROR="http://mirror.example/debian/")
    assert done.returncode == 3
    log = script.home / "logs" / "gpu-root.log"
    assert "Failed getting release file http://mirror.example/debian" in log.read_text()
    for part in ("Failed getting release file", str(log), "http://mirror.example/debian)", "run the same command again"):
        assert part in done.stderr
    assert not script.root.exists()


def test_the_mirror_comes_from_apt(script: Script) -> None:
    script.fake("debootstrap", 'echo "from $5"; exit 1')
    script.fake("apt-get", "echo 'Debian http://apt.example/debian/'; echo 'Debian-Security http://apt.example/security'")
    done = script("make")
    assert "from http://apt.example/debian\n" in (script.home / "logs" / "gpu-root.log").read_text()
    assert done.returncode == 3


@pytest.mark.parametrize("command", ["path", "run"])
def test_nothing_there(script: Script, command: str) -> None:
    done = script(command, "true")
    assert done.returncode == 3
    assert str(script.root) in done.stderr
    assert "hint: scripts/gpu_root.sh make" in done.stderr


def test_an_older_recipe_is_not_taken_for_a_root(script: Script) -> None:
    script.root.mkdir(parents=True)
    (script.root / ".turbo-gguf").write_text("0123456789abcdef\n")
    assert script("path").returncode == 3


def test_usage(script: Script) -> None:
    done = script("build")
    assert done.returncode == 2
    assert "usage:" in done.stderr


def test_is_executable() -> None:
    assert os.access(SCRIPT, os.X_OK)
