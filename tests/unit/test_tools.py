"""Running processes: streams apart, time limits, Ctrl-C, and errors that say what to do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from turbo_gguf import tools
from turbo_gguf.errors import EnvironmentMissing, ToolFailed

PYTHON = sys.executable


def python(code: str) -> list[str]:
    return [PYTHON, "-c", code]


def is_running(pid: int) -> bool:
    """Whether a process runs; one that has ended but was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: object, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.02)
    return False


def test_streams_go_to_files_of_their_own(tmp_path: Path) -> None:
    done = tools.run(python("import sys; print('result'); print('noise', file=sys.stderr)"), log=tmp_path / "new" / "case.log")
    assert done.rc == 0
    assert done.stdout == tmp_path / "new" / "case.out"
    assert done.stdout.read_text() == "result\n"
    assert done.stderr.read_text() == "noise\n"
    assert done.seconds > 0


def test_dots_in_the_name_of_a_log_are_kept(tmp_path: Path) -> None:
    """`with_suffix` would give the logs of 0.3.36-a and 0.3.35-b the same name."""
    assert tools.run(python("pass"), log=tmp_path / "0.3.36-a").stdout == tmp_path / "0.3.36-a.out"
    assert tools.run(python("pass"), log=tmp_path / "0.3.36-a.log").stderr == tmp_path / "0.3.36-a.err"


def test_a_second_run_replaces_the_log(tmp_path: Path) -> None:
    tools.run(python("print('a long first line')"), log=tmp_path / "x.log")
    assert tools.run(python("print('b')"), log=tmp_path / "x.log").stdout.read_text() == "b\n"


def test_environment_is_added_to_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS", "1")
    done = tools.run(python("import os; print(os.environ['OURS'], os.environ['ADDED'])"), log=tmp_path / "x.log", env={"ADDED": "2"})
    assert done.stdout.read_text() == "1 2\n"


def test_failure_names_program_code_log_and_last_lines(tmp_path: Path) -> None:
    with pytest.raises(ToolFailed) as caught:
        tools.run(python("import sys; sys.stderr.write('one\\ntwo\\n'); sys.exit(7)"), log=tmp_path / "x.log", fail_hint="do this")
    message = caught.value.message
    assert message.splitlines()[0] == f"{Path(PYTHON).name}: exit code 7; log: {tmp_path / 'x.err'}"
    assert message.endswith("one\ntwo")
    assert caught.value.hint == "do this"
    assert caught.value.exit_code == 4


def test_failure_shows_stdout_when_stderr_is_empty(tmp_path: Path) -> None:
    with pytest.raises(ToolFailed, match=r"log: .*x\.out\nonly here"):
        tools.run(python("print('only here'); raise SystemExit(1)"), log=tmp_path / "x.log")


def test_check_off_returns_the_code(tmp_path: Path) -> None:
    assert tools.run(python("raise SystemExit(5)"), log=tmp_path / "x.log", check=False).rc == 5


def test_killed_by_the_kernel_mentions_memory(tmp_path: Path) -> None:
    with pytest.raises(ToolFailed, match=r"killed by SIGKILL .*out of memory"):
        tools.run(python("import os; os.kill(os.getpid(), 9)"), log=tmp_path / "x.log")


def test_crash_names_the_signal(tmp_path: Path) -> None:
    with pytest.raises(ToolFailed, match="killed by SIGABRT"):
        tools.run(python("import os; os.abort()"), log=tmp_path / "x.log")


def test_full_disk_of_a_tool_is_the_environment(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentMissing) as caught:
        tools.run(python("import sys; sys.exit('write failed: No space left on device')"), log=tmp_path / "x.log")
    assert "TURBO_GGUF_HOME" in caught.value.hint


def test_missing_program_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentMissing) as caught:
        tools.run(["cmake", "--version"], log=tmp_path / "x.log")
    assert (caught.value.message, caught.value.hint) == ("cmake: not found", "apt-get install cmake")
    with pytest.raises(EnvironmentMissing, match="cmake: not found"):
        tools.capture(["cmake", "--version"])


def test_missing_working_folder_is_not_a_missing_program(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        tools.run(python("pass"), log=tmp_path / "x.log", cwd=tmp_path / "nowhere")


def test_time_limit_kills_the_whole_group(tmp_path: Path) -> None:
    code = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    code += "print(p.pid, flush=True); time.sleep(60)"
    started = time.monotonic()
    with pytest.raises(ToolFailed, match=r"no end after 1 s, killed"):
        tools.run(python(code), log=tmp_path / "x.log", timeout=1)
    assert time.monotonic() - started < 20
    child = int((tmp_path / "x.out").read_text())
    assert wait_for(lambda: not is_running(child))


def test_a_tool_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "KILL_GRACE_SECONDS", 0.3)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    started = time.monotonic()
    with pytest.raises(ToolFailed, match="killed"):
        tools.run(python(code), log=tmp_path / "x.log", timeout=1.5)
    assert time.monotonic() - started < 20


def test_a_service_ends_with_its_block_and_its_children(tmp_path: Path) -> None:
    code = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    code += "print(p.pid, flush=True); print('words', file=sys.stderr, flush=True); time.sleep(60)"
    with tools.serving(python(code), log=tmp_path / "new" / "server.log") as service:
        assert wait_for(lambda: service.stdout.read_text().endswith("\n") and service.stderr.read_text() == "words\n")
        child = int(service.stdout.read_text())
        service.require_alive()
        assert is_running(child)
        peak = service.peak_mib()
        assert peak is None if sys.platform != "linux" else peak is not None and 3 < peak < 200
    assert wait_for(lambda: not is_running(child))
    with pytest.raises(ToolFailed, match="killed by SIGTERM"):
        service.require_alive()


def test_a_service_that_ended_says_how(tmp_path: Path) -> None:
    with tools.serving(python("import sys; sys.exit('no such model')"), log=tmp_path / "x.log") as service:
        with pytest.raises(ToolFailed, match=r"exit code 1; log: .*x\.err\nno such model") as raised:
            service.require_alive("look there", wait=20)
        assert raised.value.hint == "look there" and service.peak_mib() is None
    with pytest.raises(EnvironmentMissing, match="not found"), tools.serving(["no-such-program"], log=tmp_path / "x.log"):
        pass


def test_an_error_in_the_block_ends_the_service(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ours"), tools.serving(python("import time; time.sleep(60)"), log=tmp_path / "x.log") as service:
        raise ValueError("ours")
    with pytest.raises(ToolFailed, match="killed"):
        service.require_alive()


def test_lines_are_reported_once_and_in_order(tmp_path: Path) -> None:
    code = "import sys, time\nfor i in range(5): print(i, flush=True); time.sleep(0.15)\nsys.stdout.write('half'); sys.stdout.flush()"
    seen: list[str] = []
    tools.run(python(code), log=tmp_path / "x.log", on_line=seen.append)
    assert seen == ["0", "1", "2", "3", "4", "half"]


def test_lines_are_reported_while_the_tool_runs(tmp_path: Path) -> None:
    times: list[float] = []
    code = "import time; print('a', flush=True); time.sleep(1); print('b')"
    tools.run(python(code), log=tmp_path / "x.log", on_line=lambda _: times.append(time.monotonic()))
    assert times[1] - times[0] > 0.5


def test_bytes_that_are_no_text_do_not_stop_the_run(tmp_path: Path) -> None:
    seen: list[str] = []
    tools.run(python("import sys; sys.stdout.buffer.write(b'\\xff\\xfe\\n')"), log=tmp_path / "x.log", on_line=seen.append)
    assert seen == ["��"]


def test_an_error_in_on_line_ends_the_tool(tmp_path: Path) -> None:
    def stop(line: str) -> None:
        raise ValueError(line)

    with pytest.raises(ValueError, match=r"\d+"):
        tools.run(python("import os, time; print(os.getpid(), flush=True); time.sleep(60)"), log=tmp_path / "x.log", on_line=stop)
    pid = int((tmp_path / "x.out").read_text())
    assert not is_running(pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_us_ends_the_tool(tmp_path: Path, number: signal.Signals) -> None:
    """A child in a process group of its own would outlive us, with the GPU and all its memory."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom turbo_gguf import cli, tools\nimport click\n"
        "@cli.main.command(name='wait')\ndef wait() -> None:\n"
        "    child = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'\n"
        f"    tools.run([sys.executable, '-c', child], log=Path({str(tmp_path / 'x.log')!r}))\n"
        "cli.LazyGroup.get_command = lambda self, ctx, name: wait\n"
        "cli.main(['wait'])\n"
    )
    # a parent that ignores SIGINT (nohup, a job in the background) hands that on
    allow = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    ours = subprocess.Popen(python(code), stderr=subprocess.PIPE, text=True, preexec_fn=allow)
    out = tmp_path / "x.out"
    assert wait_for(lambda: out.exists() and out.read_text().strip())
    child = int(out.read_text())
    os.kill(ours.pid, number)
    _, stderr = ours.communicate(timeout=30)
    assert ours.returncode == 128 + number
    assert wait_for(lambda: not is_running(child))
    assert "Traceback" not in stderr


_TIED = """
import sys
from pathlib import Path
from turbo_gguf import tools
tools.end_with_us()
tools.run([sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"], log=Path(sys.argv[1]))
"""


@pytest.mark.skipif(tools.find("setpriv") is None, reason="needs setpriv of util-linux")
def test_killing_us_outright_ends_the_tool_where_that_was_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "tied.out"
    driver = subprocess.Popen([sys.executable, "-c", _TIED, str(tmp_path / "tied")])
    assert wait_for(lambda: out.exists() and out.read_text().endswith("\n"))
    tool = int(out.read_text())
    assert is_running(tool)
    driver.kill()
    driver.wait()
    assert wait_for(lambda: not is_running(tool))


def test_missing_program_is_the_environment_there_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "_WITH_US", [])
    tools.end_with_us()
    with pytest.raises(EnvironmentMissing, match="no-such-program: not found"):
        tools.run(["no-such-program"], log=tmp_path / "log")


def test_capture_returns_stripped_stdout() -> None:
    assert tools.capture(python("print('  v1  ')")) == "v1"


def test_capture_failure_shows_what_the_tool_said() -> None:
    with pytest.raises(ToolFailed, match="exit code 2: no such option"):
        tools.capture(python("import sys; sys.stderr.write('no such option'); sys.exit(2)"))


def test_capture_has_a_time_limit() -> None:
    with pytest.raises(ToolFailed, match=r"no answer after 0\.5 s"):
        tools.capture(python("import time; time.sleep(30)"), timeout=0.5)


def test_tail_of_a_large_file_is_its_end(tmp_path: Path) -> None:
    path = tmp_path / "big.log"
    path.write_text("\n".join(f"line {i}" for i in range(200_000)) + "\n\n")
    assert tools.tail(path, 2) == "line 199998\nline 199999"
    assert tools.tail(tmp_path / "none") == ""
