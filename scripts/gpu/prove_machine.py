"""The machine that a proof runs on: processes with a time limit, libraries and tools that are there, and memory in use on the GPU.

Standard library only, like all that is packed: Python 3.10 or newer is all that the machine needs.
"""

from __future__ import annotations

import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

KILL_AFTER = 3.0  # seconds between asking a process to end and killing it, and before one that can't be killed is left alone
LOGGED = 100_000  # characters of a command's output that are written as they come; of the rest the last lines
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Done(NamedTuple):
    """How a command ended."""

    rc: int
    lines: list[str]
    late: bool  # its time was over

    @property
    def words(self) -> str:
        """Its last line, for a note."""
        said = [line for line in self.lines if line.strip()]
        return f"return code {self.rc}" + (f": {said[-1].strip()[:200]}" if said else "")


def run(
    argv: Sequence[str | Path],
    *,
    seconds: float,
    log: TextIO,
    env: Mapping[str, str] | None = None,
    stdin: str = "",
    on_line: Callable[[str], None] | None = None,
) -> Done:
    """Run a command for at most so many seconds; its output, both kinds in one, goes to the log and to ``on_line`` as it comes.

    It is ended with all that it started, and one that does not even end when it is killed (a GPU may hang) is left alone.
    """
    end = time.monotonic() + max(seconds, 0.1)
    log.write(f"=== {' '.join(f'{k}={v}' for k, v in (env or {}).items())} {' '.join(map(str, argv))}\n")
    log.flush()
    process = subprocess.Popen(
        [str(part) for part in argv],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **(env or {})},
        text=True,
        errors="replace",
        start_new_session=True,
    )
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process, stdin, lines), daemon=True).start()
    found: list[str] = []
    rest: deque[str] = deque(maxlen=50)
    late, room = False, LOGGED
    try:
        while True:
            try:
                line = lines.get(timeout=max(end - time.monotonic(), 0.01))
            except queue.Empty:
                if late:
                    break
                late, end = True, time.monotonic() + 2 * KILL_AFTER
                _end(process)
                continue
            if line is None:
                break
            line = _COLOURS.sub("", line)
            found.append(line)
            room -= len(line)
            if room > 0:
                log.write(line)
                log.flush()
            else:
                rest.append(line)
            if on_line is not None:
                on_line(line)
    finally:
        _end(process)
        log.writelines(["[...]\n", *rest] if rest else [])
        log.write(f"=== {'time over, ' if late else ''}return code {process.poll()}\n")
        log.flush()
    return Done(process.returncode if process.returncode is not None else -1, found, late)


def _read(process: subprocess.Popen[str], stdin: str, lines: queue.Queue[str | None]) -> None:
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(stdin)
        process.stdin.close()
    except BrokenPipeError:
        pass  # it ended at once: what it said and its return code follow
    for line in process.stdout:
        lines.put(line)
    process.wait()
    lines.put(None)


def _end(process: subprocess.Popen[str]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(timeout=KILL_AFTER)
        except subprocess.TimeoutExpired:
            continue


def ask(*argv: str) -> str:
    """What a short command prints, "" when it is missing or fails."""
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def find_tool(name: str) -> str:
    """A program of NVIDIA's on PATH or in CUDA's folders, "" when it is missing."""
    places = (f"/usr/local/cuda*/bin/{name}", f"/opt/cuda/bin/{name}", f"/opt/nvidia/nsight-compute/*/{name}")
    return shutil.which(name) or next((str(path) for place in places for path in _found(place)), "")


def _found(pattern: str) -> list[Path]:
    """Files that a pattern names, the newest version first."""
    return sorted(Path("/").glob(pattern.lstrip("/")), reverse=True)


def missing_libraries(files: Sequence[Path], folders: Sequence[str]) -> list[str]:
    """Names of shared libraries that programs and libraries need and the loader does not find."""
    env = {**os.environ, "LD_LIBRARY_PATH": ":".join(folders)}
    said = [subprocess.run(["ldd", str(path)], capture_output=True, text=True, env=env, check=False).stdout for path in files]
    return sorted({match for text in said for match in re.findall(r"^\s*(\S+) => not found", text, re.MULTILINE)})


def library_folders(names: Sequence[str]) -> list[str]:
    """Folders outside of the loader's in which libraries lie: CUDA's own, and those that Python packages such as PyTorch's bring."""
    places = ["/usr/local/cuda*/lib64", "/usr/local/cuda*/targets/*/lib", "/opt/cuda/lib64", "/opt/rocm*/lib", "/usr/local/nvidia/lib64"]
    places += [f"{os.environ[name]}/lib*" for name in ("CUBLAS_ROOT", "CUDA_HOME", "ROCM_PATH") if os.environ.get(name)]
    asked = [*sys.path, *ask("python3", "-c", "import sys; print(*sys.path, sep='\\n')").splitlines()]
    places += [f"{folder}/nvidia/*/lib" for folder in dict.fromkeys(asked) if folder]
    found = []
    for name in names:
        path = next((path for place in places for path in _found(f"{place}/{name}")), None)
        if path is not None:
            found.append(str(path.parent))
    return list(dict.fromkeys(found))


def gpu_name(device: str) -> str:
    """Name, compute capability and driver of the first GPU, "" for none."""
    if device.startswith("CUDA"):
        return ask("nvidia-smi", "--id=0", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader")
    if device.startswith("ROCm"):
        return ask("rocm_agent_enumerator").replace("gfx000", "").strip().replace("\n", ", ")
    if device.startswith("Vulkan"):
        said = ask("vulkaninfo", "--summary")
        return ", ".join(re.findall(r"^\s*(?:deviceName|driverInfo)\s*= (.*?)\s*$", said, re.MULTILINE)[:2])
    return f"CPU, {os.cpu_count()} cores"


def memory_in_use(device: str) -> int | None:
    """MiB in use on the first GPU, ``None`` where that cannot be read."""
    if device.startswith("CUDA"):
        text = ask("nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits")
        return int(text) if text.isdigit() else None
    used = [int(path.read_text()) for path in sorted(Path("/sys/class/drm").glob("card*/device/mem_info_vram_used"))]
    return max(used) >> 20 if used and device.startswith(("ROCm", "Vulkan")) else None


class MemoryPeak:
    """Most memory in use on the device above what was in use before, sampled while the block runs; ``None`` where it can't be read."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._end = threading.Event()
        self.megabytes: int | None = None

    def __enter__(self) -> MemoryPeak:
        self._before = memory_in_use(self._device)
        self._thread = threading.Thread(target=self._sample, daemon=True)
        if self._before is not None:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        if self._before is not None:
            self._thread.join(KILL_AFTER)

    def _sample(self) -> None:
        while not self._end.is_set():
            now = memory_in_use(self._device)
            if now is not None and self._before is not None:
                self.megabytes = max(self.megabytes or 0, now - self._before)
            self._end.wait(0.02)
