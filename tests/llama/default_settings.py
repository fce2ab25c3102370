"""What the tests of the defaults of turbo types share: a short run of a tool, and what it tells of its cache."""

from __future__ import annotations

from pathlib import Path

from cache_lines import CacheLine, cache_lines
from conftest import Done, Tool

TURBO = ("-ctk", "turbo3", "-ctv", "turbo3")
READS = "tokens to calibrate the KV cache"
"""What the log says when a model reads the built-in text."""


def complete(tool: Tool, model: Path, *args: str | Path, env: dict[str, str] | None = None) -> Done:
    """A run of llama-completion that works; the last of the same options counts."""
    common = ("-p", "once", "-n", "4", "-c", "256", "-no-cnv", "-t", "1", "-lv", "4", "--temp", "0")
    done = tool("llama-completion", "-m", model, *common, *args, env=env, timeout=60)
    assert done.rc == 0, done.text[-3000:]
    return done


def line_of(done: Done) -> CacheLine:
    """The last one: contexts that are made to measure memory come first."""
    return cache_lines(done.text)[-1]


def digest_of(done: Done) -> str:
    """Of the calibration that is in force."""
    return line_of(done).settings["cal"]


def words(line: CacheLine) -> set[str]:
    """What turbo types get by default, as the line has it: "cal", "sink=4", "tail=64"."""
    return {name if name == "cal" else f"{name}={value}" for name, value in line.settings.items() if name not in "kv"}


def kept(folder: Path) -> list[Path]:
    """All files of a folder that may not be there."""
    return sorted(folder.iterdir()) if folder.is_dir() else []
