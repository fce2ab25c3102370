"""Runs of ``llama-turbo-calibrate``, which reads a text with a model and writes a calibration of its KV cache.

The tool is part of the patch set (``overlay/tools/turbo-calibrate``); all arithmetic is in the library (``overlay/src/turbo/calibrate.h``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from turbo_gguf import assets, files, tools
from turbo_gguf.cache import calibration
from turbo_gguf.cache.calibration import Calibration
from turbo_gguf.errors import LogNotUnderstood, UsageError
from turbo_gguf.inputs.models import ModelFile, TextFile
from turbo_gguf.make.build import Build
from turbo_gguf.make.toolkits import gpu_layers, of_preset

TARGET = "llama-turbo-calibrate"
"""CMake target and name of the program."""

TOKENS = 4096
"""Tokens that are read, unless the user says otherwise. More of them gain nothing that was measured."""

LEAST_TOKENS = 64
"""Fewer are refused by the tool."""

_DIGEST = re.compile(r"^\d+ tokens, \d+ layers, digest ([0-9a-f]{8})$", re.MULTILINE)


def calibrate(
    build: Build,
    model: ModelFile,
    texts: Sequence[TextFile],
    out: Path,
    *,
    tokens: int = TOKENS,
    threads: int = 1,
    on_line: Callable[[str], None] | None = None,
) -> Calibration:
    """Write a calibration. The file is there whole, and is what the tool says that it wrote; or what was there before is left.

    Args:
        build: has the tool, and decides the device.
        model: its file.
        texts: read one behind the other; none: the text that is built into the library.
        out: file to write.
        tokens: at most so many are read.
        threads: of llama.cpp.
        on_line: called with each line of the tool.

    Raises:
        UsageError: the model can't be calibrated, the text is too short, or the file can't be written.
        EnvironmentMissing: the disk is full.
        ToolFailed: the tool crashed.
        LogNotUnderstood: it wrote something else than it said.
    """
    with files.whole(out) as temporary:
        _try_to_write(temporary, out)
        done = _run(build, model, texts, temporary, tokens=tokens, threads=threads, on_line=on_line)
        return _checked(temporary, done)


def _try_to_write(temporary: Path, out: Path) -> None:
    """Minutes of work must not end in a folder that is missing."""
    try:
        temporary.touch()
    except OSError as error:
        if files.is_full(error):
            raise
        raise UsageError(f"{out}: {error.strerror}", "name another file with --out") from error


def _run(
    build: Build,
    model: ModelFile,
    texts: Sequence[TextFile],
    out: Path,
    *,
    tokens: int,
    threads: int,
    on_line: Callable[[str], None] | None,
) -> tools.Run:
    argv: list[str | Path] = [build.tool(TARGET), "-m", model.path, "-o", out, "-n", str(tokens), "-t", str(threads)]
    argv += gpu_layers(of_preset(build.preset).backend)
    for text in texts:
        argv += ["-f", text.path]
    log = assets.home() / "logs" / "calibrate" / f"{model.sha256[:12]}.log"
    done = tools.run(argv, log=log, check=False, on_line=on_line)
    if done.rc == 2:
        complaint = _complaint(done)
        hint = "docs/design/0011-calibration.md says what can be calibrated" if "can't be calibrated" in complaint else ""
        raise UsageError(f"{complaint}; log: {done.stderr}", hint)
    if done.rc != 0:
        raise tools.failure(done, "the log says more")
    return done


def _complaint(done: tools.Run) -> str:
    lines = [line for line in tools.tail(done.stderr).splitlines() if line.startswith("error: ")]
    return lines[-1].removeprefix("error: ") if lines else f"{TARGET} says no reason"


def _checked(path: Path, done: tools.Run) -> Calibration:
    """Read what was written, and compare it with what the tool said."""
    said = _DIGEST.search(done.stdout.read_text("utf-8", errors="replace"))
    try:
        made = calibration.read(path)
    except UsageError as error:
        raise LogNotUnderstood(f"{TARGET} wrote no complete file: {error.message}; log: {done.stdout}") from error
    if not said or said[1] != calibration.digest(made):
        digest = said[1] if said else "no digest"
        raise LogNotUnderstood(f"{TARGET} wrote {calibration.digest(made)}, and said {digest}; log: {done.stdout}")
    return made
