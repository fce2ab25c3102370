"""The command line: what users read, on which stream, and with which exit code."""

from __future__ import annotations

import errno
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from fake_upstream import default_patches, write_tree

from turbo_gguf import __version__, cli, errors, patchset
from turbo_gguf.cli import COMMANDS, main
from turbo_gguf.errors import EnvironmentMissing, TurboError
from turbo_gguf.make.snapshots import default_name, supported
from turbo_gguf.patchset import series
from turbo_gguf.patchset.hook import MAX_ADDED_LINES


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def patches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = default_patches(tmp_path / "patches")
    monkeypatch.setattr(series, "patches_dir", lambda: root)
    return root


@pytest.fixture
def source(tmp_path: Path) -> str:
    return str(write_tree(tmp_path / "llama"))


def call(*args: str) -> Result:
    return CliRunner().invoke(main, args)


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Result:
    @click.command()
    def command() -> None:
        raise error

    monkeypatch.setattr(cli.LazyGroup, "get_command", lambda self, ctx, name: command)
    return call("doctor")


# Errors


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.UsageError, 2),
        (errors.EnvironmentMissing, 3),
        (errors.ToolFailed, 4),
        (errors.LogNotUnderstood, 4),
        (errors.SilentFallback, 4),
    ],
)
def test_errors_become_message_hint_and_exit_code(monkeypatch: pytest.MonkeyPatch, kind: type[TurboError], code: int) -> None:
    result = fail_with(monkeypatch, kind("what failed", "what to type"))
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", "error: what failed\nhint: what to type\n")


def test_an_error_without_hint_has_no_hint_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fail_with(monkeypatch, EnvironmentMissing("x")).stderr == "error: x\n"


def test_an_unexpected_full_disk_is_the_environment(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    result = fail_with(monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x/results.jsonl"))
    assert result.exit_code == 3
    assert result.stderr == (
        "error: the disk is full: [Errno 28] No space left on device: '/x/results.jsonl'\n"
        f"hint: free space, or set TURBO_GGUF_HOME to a folder on another disk (now it is {home})\n"
    )


def test_an_unexpected_error_is_never_1(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    result = fail_with(monkeypatch, KeyError("x"))
    log = home / "logs/internal-error.log"
    assert (result.exit_code, result.stdout) == (4, "")
    assert (
        result.stderr == f"error: internal error: KeyError: 'x'; log: {log}\nhint: this is a fault of turbo-gguf; report it with the log\n"
    )
    assert "Traceback" in log.read_text() and "raise error" in log.read_text()


def run(home: str, *args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "TURBO_GGUF_HOME": home, **variables}
    code = "from turbo_gguf.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=env, check=False)


@pytest.mark.parametrize(
    "command", [["models", "eval-text"], ["models", "fetch", "smollm2"], ["build"], ["ppl-gate"], ["bench"], ["patch", "apply"]]
)
def test_a_home_that_cannot_be_written_to(tmp_path: Path, command: list[str]) -> None:
    """A folder below a file: refused to root, too."""
    (tmp_path / "file").write_text("x")
    done = run(str(tmp_path / "file/home"), *command)
    assert done.returncode == 3, done.stderr
    assert re.search(rf"^error: {tmp_path}/file\S*: Not a directory\n", done.stderr, re.MULTILINE)
    assert done.stderr.endswith(f"hint: set TURBO_GGUF_HOME to a folder that you can write to (now it is {tmp_path}/file/home)\n")


def test_a_home_of_nobody() -> None:
    done = run("~no-such-user/x", "models", "eval-text")
    assert done.returncode == 3 and "set TURBO_GGUF_HOME" in done.stderr and "Traceback" not in done.stderr


def test_output_that_nobody_reads_is_no_verdict() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = "from turbo_gguf.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "models", "list"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (cli.EXIT_NO_READER, "")


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    result = fail_with(monkeypatch, KeyboardInterrupt())
    assert result.exit_code == 130
    assert result.stderr == "error: interrupted\nhint: the same command again continues where it stopped\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["build", "--preset", "gpu"], "Invalid value for '--preset'"),
        (["build", "--jobs", "0"], "Invalid value for '--jobs'"),
        (["patch", "check", "--al"], "No such option"),
        (["patch", "check", "--all", "--upstream", "0.3.36"], "error: --all and --upstream exclude each other"),
        (["build", "--upstream", "/no/such/place"], "error: no upstream '/no/such/place'"),
    ],
)
def test_wrong_command_lines_are_2(args: list[str], message: str) -> None:
    result = call(*args)
    assert result.exit_code == 2
    assert message in result.stderr


# The table of commands


def test_help_lists_every_command_and_imports_none() -> None:
    code = (
        "import sys\nfrom turbo_gguf.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit: pass\n"
        "print([name for name in sys.modules if name.startswith('turbo_gguf.cli.')], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
    for name, (_, text) in COMMANDS.items():
        assert re.search(rf"^  {name} +{text.split()[0]}", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    module, text = COMMANDS[name]
    command = importlib.import_module(f"turbo_gguf.cli.{module}").command
    assert isinstance(command, click.Command)
    result = call(name, "--help")
    assert result.exit_code == 0
    assert text
    assert command.help


def test_version() -> None:
    assert call("--version").stdout == f"turbo-gguf, version {__version__}\n"


# patch


def test_patch_list(patches: Path) -> None:
    result = call("patch", "list")
    assert result.exit_code == 0
    assert result.stdout == (
        "size.patch   +1 (1)  ggml : a hook\n"
        "             ggml/src/ggml.c\n"
        "names.patch  +1 (1)  ggml : a hook\n"
        "             ggml/src/names.c\n"
        f"2 of {MAX_ADDED_LINES} hook lines in 2 hooks; 1 files in the overlay\n"
        f"digest {patchset.load(patches).digest}\n"
    )


def test_patch_apply_prints_the_folder_only_on_stdout(patches: Path, source: str, home: Path) -> None:
    for _ in range(2):
        result = call("patch", "apply", "--upstream", source)
        assert result.exit_code == 0
        assert Path(result.stdout.rstrip("\n")).parent == home / "trees"
        assert re.fullmatch(r"folder-\w+ \(unknown-\w+\) patched with [0-9a-f]{12}\n", result.stderr)


def test_patch_apply_refuses_edits_and_force_drops_them(patches: Path, source: str) -> None:
    work = Path(call("patch", "apply", "--upstream", source).stdout.strip())
    (work / "ggml/src/ggml.c").write_text("edit")
    result = call("patch", "apply", "--upstream", source)
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: {work} has edits that the patch set does not explain:\n  ggml/src/ggml.c\n"
        "hint: keep edits of upstream files: turbo-gguf patch export NAME; drop all edits: turbo-gguf patch apply --force\n"
    )
    assert call("patch", "apply", "--upstream", source, "--force").exit_code == 0


def test_patch_check_counts_lines_and_judges(patches: Path, source: str) -> None:
    result = call("patch", "check", "--upstream", source)
    assert result.exit_code == 0
    assert f"2 of {MAX_ADDED_LINES} hook lines in 2 hooks" in result.stdout
    assert re.search(r"^upstream folder-\w+ \(unknown-\w+\): ok$", result.stdout, re.MULTILINE)
    Path(source, "ggml/src/ggml.c").write_text("int other;\n")
    result = call("patch", "check", "--upstream", source)
    assert result.exit_code == 2
    assert re.search(r": 1 problems$", result.stdout, re.MULTILINE)
    assert result.stderr.startswith("error: 1 problems in the patch set:\n  folder-")


def test_patch_refresh_and_export(patches: Path, source: str) -> None:
    assert call("patch", "refresh", "--onto", source).stdout == "nothing to change\n"
    work = Path(call("patch", "apply", "--upstream", source).stdout.strip())
    text = (work / "ggml/src/names.c").read_text()
    (work / "ggml/src/names.c").write_text(text.replace("static int count", "// names\nstatic int count"))
    result = call("patch", "export", "count", "--subject", "ggml : count", "--why", "Because.", "--upstream", source)
    assert result.stdout == f"{patches / 'hooks/count.patch'}\n"
    assert call("patch", "check", "--upstream", source).exit_code == 0


# upstream, doctor


def test_upstream_list() -> None:
    lines = call("upstream", "list").stdout.splitlines()
    default = supported()[default_name()]
    assert lines[0] == f"{default.name}  {default.commit}  b{default.build}  -  (default)"
    assert "0.3.30  e3a74b299  b9665  -" in lines


def test_upstream_fetch_prints_the_folder(source: str, home: Path) -> None:
    result = call("upstream", "fetch", source)
    assert result.exit_code == 0
    assert Path(result.stdout.strip()).parent == home / "upstream"


def test_doctor_is_3_when_the_cpu_path_is_not_complete(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = call("doctor")
    assert result.exit_code == 3
    assert re.search(r"^C\+\+ compiler +missing  not found\n +-> apt-get install g\+\+$", result.stdout, re.MULTILINE)
    assert result.stderr.startswith("error: not ready for a CPU build: ")
    assert "C++ compiler" in result.stderr


def test_every_exit_code_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs/reference/exit-codes.md").read_text()
    for code in (
        0,
        errors.EXIT_GATE_FAILED,
        errors.EXIT_USAGE,
        errors.EXIT_ENVIRONMENT,
        errors.EXIT_TOOL,
        cli.EXIT_INTERRUPTED,
        cli.EXIT_NO_READER,
    ):
        assert re.search(rf"^\| {code} \|", text, re.MULTILINE)
