"""The only module that runs processes.

Standard output and standard error of a tool go to files of their own, never into one pipe: llama.cpp prints its results on
one and logs on the other from another thread, and mixed streams have lost the end of a log before.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from turbo_gguf.errors import EnvironmentMissing, ToolFailed
from turbo_gguf.files import MORE_SPACE

POLL_SECONDS = 0.1
"""How often a running tool is looked at: the delay of ``on_line`` and of time limits."""

KILL_GRACE_SECONDS = 5.0
"""Time between asking a process group to end (SIGTERM) and killing it (SIGKILL)."""

TAIL_LINES = 8
"""Lines of the log that an error message repeats."""

_TAIL_BYTES = 16_384
_NO_SPACE = "No space left on device"

APT_PACKAGES = {
    "c++": "g++",
    "cc": "gcc",
    "ccache": "ccache",
    "cmake": "cmake",
    "g++": "g++",
    "gcc": "gcc",
    "git": "git",
    "hipcc": "hipcc",
    "make": "make",
    "ninja": "ninja-build",
    "nvcc": "nvidia-cuda-toolkit",
}
"""Debian and Ubuntu package that brings a program."""


_WITH_US: list[str | Path] = []
"""Put in front of programs: see :func:`end_with_us`."""


class Run(msgspec.Struct, frozen=True):
    """One finished process. Standard output and error go to files of their own."""

    argv: tuple[str, ...]
    rc: int  # negative: killed by that signal
    seconds: float
    stdout: Path
    stderr: Path


class _Follower:
    """Hands each complete new line of a growing file to a function."""

    def __init__(self, path: Path, on_line: Callable[[str], None]) -> None:
        self._file = path.open(encoding="utf-8", errors="replace", newline="")
        self._on_line = on_line
        self._rest = ""

    def poll(self) -> None:
        """Report the lines that were finished since the last call."""
        *lines, self._rest = (self._rest + self._file.read()).replace("\r", "\n").split("\n")
        for line in lines:
            if line:
                self._on_line(line)

    def close(self, *, report: bool) -> None:
        """Report what is left, an unfinished last line too, and close the file."""
        try:
            if report:
                self.poll()
                if self._rest:
                    self._on_line(self._rest)
        finally:
            self._file.close()


def default_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find(program: str) -> Path | None:
    """Path of a program on PATH, or ``None``."""
    found = shutil.which(program)
    return Path(found) if found else None


def install_hint(program: str) -> str:
    """What to type so that ``program`` exists (Debian and Ubuntu), or a general sentence."""
    package = APT_PACKAGES.get(program)
    return f"apt-get install {package}" if package else f"install {program} and put it on PATH"


def end_with_us() -> None:
    """From now on, let the system kill each program that runs to a log when this process dies, however that comes about.

    Else a program lives on when its driver is killed outright, as workers of a cluster are. This takes Linux, and ``setpriv`` of
    util-linux; without it nothing changes.
    """
    setpriv = find("setpriv")
    _WITH_US[:] = [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """Return the last ``lines`` non-empty lines of a text file, "" when it does not exist."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join([line for line in text.replace("\r", "\n").splitlines() if line.strip()][-lines:])


def describe_rc(rc: int) -> str:
    """Say how a process ended: "exit code 3", or the name of the signal that killed it."""
    if rc >= 0:
        return f"exit code {rc}"
    try:
        name = signal.Signals(-rc).name
    except ValueError:
        name = f"signal {-rc}"
    reason = " (killed from outside: out of memory?)" if -rc == signal.SIGKILL else ""
    return f"killed by {name}{reason}"


def run(
    argv: Sequence[str | Path],
    *,
    log: Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
    check: bool = True,
    on_line: Callable[[str], None] | None = None,
    fail_hint: str = "",
) -> Run:
    """Run a program to its end and return how it went.

    Standard output goes to ``NAME.out`` and standard error to ``NAME.err`` for a ``log`` of ``NAME`` or ``NAME.log``; both are
    replaced.

    Args:
        argv: program (looked up on PATH) and arguments.
        log: path of both files without their suffix; its folder is made.
        cwd: working folder of the program.
        env: variables set on top of the environment of this process.
        timeout: seconds after which the whole process group is killed.
        check: raise for a return code other than 0.
        on_line: called with each finished line of either stream, at most :data:`POLL_SECONDS` late.
        fail_hint: hint of the error when the program fails.

    Raises:
        EnvironmentMissing: the program does not exist or cannot be executed, or it ran into a full disk.
        ToolFailed: the time limit passed, or ``check`` and the return code is not 0.
    """
    args = tuple(str(part) for part in argv)
    started = time.monotonic()
    process, stdout, stderr = _start_logged(args, log=log, cwd=cwd, env=env)
    in_time = _supervise(process, (stdout, stderr), on_line, None if timeout is None else started + timeout)
    result = Run(argv=args, rc=process.returncode, seconds=time.monotonic() - started, stdout=stdout, stderr=stderr)
    if not in_time:
        raise ToolFailed(f"{_name(args)}: no end after {timeout:g} s, killed; {_log_text(result)}", fail_hint)
    if check and result.rc != 0:
        raise failure(result, fail_hint)
    return result


class Service:
    """A program that runs as long as a block does, such as a server."""

    def __init__(self, process: subprocess.Popen[bytes], argv: tuple[str, ...], stdout: Path, stderr: Path) -> None:
        self._process = process
        self._started = time.monotonic()
        self.argv = argv
        self.stdout, self.stderr = stdout, stderr
        self._said: list[str] = []
        self._followers: list[_Follower] = []

    def lines(self) -> list[str]:
        """Lines of both streams that were finished since the last call."""
        if not self._followers:
            self._followers = [_Follower(path, self._said.append) for path in (self.stdout, self.stderr)]
        for follower in self._followers:
            follower.poll()
        found, self._said[:] = list(self._said), []
        return found

    def close(self) -> None:
        """Stop to follow its streams."""
        for follower in self._followers:
            follower.close(report=False)

    def ended(self) -> int | None:
        """Its return code; ``None``: it runs."""
        return self._process.poll()

    def require_alive(self, hint: str = "", *, wait: float = 0.0) -> None:
        """Say how it ended when it should be there.

        Args:
            hint: of the error.
            wait: seconds for a program that may be about to end: its connections break before it is gone.

        Raises:
            EnvironmentMissing: it ran into a full disk.
            ToolFailed: it has ended.
        """
        with suppress(subprocess.TimeoutExpired):
            rc = self._process.wait(wait)
            raise failure(Run(self.argv, rc, time.monotonic() - self._started, self.stdout, self.stderr), hint)

    def peak_mib(self) -> float | None:
        """Most memory that it has had until now (resident, files that it maps included); ``None`` where the system does not say."""
        try:
            text = Path(f"/proc/{self._process.pid}/status").read_text("ascii", errors="replace")
        except OSError:
            return None
        found = re.search(r"^VmHWM:\s*(\d+) kB$", text, re.MULTILINE)
        return int(found[1]) / 1024 if found else None


@contextmanager
def serving(
    argv: Sequence[str | Path], *, log: Path, env: Mapping[str, str] | None = None, grace: float = KILL_GRACE_SECONDS
) -> Iterator[Service]:
    """Run a program as long as the block does, and end it with its children. Arguments, logs and errors are those of :func:`run`.

    ``grace`` is how long it may take to end by itself; 0 is for one that has nothing to tidy up.
    """
    args = tuple(str(part) for part in argv)
    process, stdout, stderr = _start_logged(args, log=log, cwd=None, env=env)
    service = Service(process, args, stdout, stderr)
    try:
        yield service
    finally:
        service.close()
        _kill_group(process, grace)


def failure(result: Run, hint: str = "") -> EnvironmentMissing | ToolFailed:
    """Return the error for a run whose return code is not 0 (for callers that pass ``check=False``)."""
    message = f"{_name(result.argv)}: {describe_rc(result.rc)}; {_log_text(result)}"
    if _NO_SPACE in tail(result.stderr, 50) or _NO_SPACE in tail(result.stdout, 50):
        return EnvironmentMissing(message, f"the disk is full: {MORE_SPACE}")
    return ToolFailed(message, hint)


def capture(argv: Sequence[str | Path], *, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 60.0) -> str:
    """Return what a small query such as ``cc --version`` prints on standard output, stripped. ``env`` is set on top of ours.

    Raises:
        EnvironmentMissing: the program does not exist or cannot be executed.
        ToolFailed: it took longer than ``timeout`` seconds, or its return code is not 0.
    """
    args = tuple(str(part) for part in argv)
    try:
        environment = {**os.environ, **env} if env else None
        done = subprocess.run(
            args, cwd=cwd, env=environment, capture_output=True, text=True, errors="replace", timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ToolFailed(f"{_name(args)}: no answer after {timeout:g} s ({shlex.join(args)})") from error
    except OSError as error:
        raise _not_started(args, error) from error
    if done.returncode != 0:
        text = (done.stderr or done.stdout).strip()
        raise ToolFailed(f"{shlex.join(args)}: {describe_rc(done.returncode)}" + (f": {text}" if text else ""))
    return done.stdout.strip()


def _start_logged(
    args: tuple[str, ...], *, log: Path, cwd: Path | None, env: Mapping[str, str] | None
) -> tuple[subprocess.Popen[bytes], Path, Path]:
    """Start a program whose standard output and error go to files beside ``log``, which are returned."""
    name = log.name.removesuffix(".log")  # not with_suffix: names such as 0.3.36-cpu have dots of their own
    stdout, stderr = log.with_name(f"{name}.out"), log.with_name(f"{name}.err")
    log.parent.mkdir(parents=True, exist_ok=True)
    with stdout.open("wb") as out, stderr.open("wb") as err:
        return _start(args, cwd=cwd, env=env, out=out.fileno(), err=err.fileno()), stdout, stderr


def _start(args: tuple[str, ...], *, cwd: Path | None, env: Mapping[str, str] | None, out: int, err: int) -> subprocess.Popen[bytes]:
    try:
        if _WITH_US and find(args[0]) is None:  # setpriv would say so in the log, with an exit code of its own
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), args[0])
        return subprocess.Popen(
            [*_WITH_US, *args],
            cwd=cwd,
            env={**os.environ, **env} if env else None,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,  # a process group of its own, so that the tool's children end with it
        )
    except OSError as error:
        raise _not_started(args, error) from error


def _not_started(args: tuple[str, ...], error: OSError) -> Exception:
    """Tell a missing program from a missing working folder and other trouble of this machine."""
    if not isinstance(error, (FileNotFoundError, PermissionError)) or error.filename != args[0]:
        return error
    what = "not found" if isinstance(error, FileNotFoundError) else "cannot be executed"
    return EnvironmentMissing(f"{args[0]}: {what}", install_hint(_name(args)))


def _supervise(
    process: subprocess.Popen[bytes], streams: Sequence[Path], on_line: Callable[[str], None] | None, deadline: float | None
) -> bool:
    """Wait for the end and report lines on the way; return False when ``deadline`` (monotonic seconds) passed."""
    followers: list[_Follower] = []
    try:
        if on_line is not None:
            followers = [_Follower(path, on_line) for path in streams]
        return _wait(process, followers, deadline)
    except BaseException:  # Ctrl-C, SIGTERM (SystemExit), or an error in on_line: never leave the tool running
        _kill_group(process)
        raise
    finally:
        for follower in followers:
            follower.close(report=process.returncode is not None)


def _wait(process: subprocess.Popen[bytes], followers: Sequence[_Follower], deadline: float | None) -> bool:
    """Wait for the end; kill the group and return False when ``deadline`` (monotonic seconds) passes."""
    while True:
        try:
            process.wait(POLL_SECONDS)
            return True
        except subprocess.TimeoutExpired:
            if deadline is not None and time.monotonic() >= deadline:
                _kill_group(process)
                return False
        for follower in followers:
            follower.poll()


def _kill_group(process: subprocess.Popen[bytes], grace: float = KILL_GRACE_SECONDS) -> None:
    """End the tool and its children: first politely, if there is time for that, then for good."""
    for sign, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, None))[0 if grace else 1 :]:
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _name(args: Sequence[str]) -> str:
    return Path(args[0]).name


def _log_text(result: Run) -> str:
    """Say where the log is, and repeat its last lines: those of stderr, or of stdout when stderr is empty."""
    path = result.stderr if tail(result.stderr, 1) else result.stdout
    last = tail(path)
    return f"log: {path}" + (f"\n{last}" if last else " (empty)")
