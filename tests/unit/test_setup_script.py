"""scripts/setup.sh: names what is missing, makes .venv once, and makes it again only when something changed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "setup.sh"

PYTHON = """\
case "$*" in
    *"sys.version_info < "*) exit ${OLD_PYTHON:-0} ;;
    *"import venv, ensurepip"*) exit ${NO_VENV:-0} ;;
    -V) echo "Python 3.12.1" ;;
    "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo made >> calls ;;
    "-m pip --version") ;;
    "-m pip install"*) echo "$*" >> calls; exit ${NO_NETWORK:-0} ;;
    *) echo "unexpected: $*" >&2; exit 99 ;;
esac
"""


class Checkout:
    """A checkout with the script and a fake machine."""

    def __init__(self, root: Path) -> None:
        self.root, self.bin = root, root / "bin"
        (root / "scripts").mkdir()
        self.bin.mkdir()
        shutil.copy(SCRIPT, root / "scripts")
        (root / "pyproject.toml").write_text("[project]\n")
        for name in ("bash", "sh", "cat", "cp", "sed", "sort", "head", "dirname", "sha256sum", "rm", "mkdir"):
            path = shutil.which(name)
            assert path, name
            (self.bin / name).symlink_to(path)
        for name in ("git", "make", "cc", "c++", "ninja"):
            self.program(name, "exit 0")
        self.program("cmake", 'echo "cmake version 3.25.1"')
        self.program("python3", PYTHON)

    def program(self, name: str, code: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{code}\n")
        (self.bin / name).chmod(0o755)

    def drop(self, *names: str) -> None:
        for name in names:
            (self.bin / name).unlink()

    def run(self, kind: str = "run", **environment: str) -> subprocess.CompletedProcess[str]:
        argv = [shutil.which("bash") or "bash", str(self.root / "scripts" / "setup.sh"), kind]
        environment = {"PATH": str(self.bin), **environment}
        return subprocess.run(argv, cwd="/", env=environment, capture_output=True, text=True, check=False)

    def calls(self) -> list[str]:
        path = self.root / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def install(what: str) -> str:
    return f"-m pip install --quiet --disable-pip-version-check --editable {what}"


def test_the_first_run_makes_an_environment_the_second_does_nothing(checkout: Checkout) -> None:
    assert checkout.run().returncode == 0
    assert checkout.calls() == ["made", install(".")]
    second = checkout.run()
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert len(checkout.calls()) == 2


def test_dev_adds_to_run_and_covers_it(checkout: Checkout) -> None:
    checkout.run("run")
    checkout.run("dev")
    checkout.run("run")
    assert checkout.calls() == ["made", install("."), install(".[dev]")]


@pytest.mark.parametrize("change", ["cmake", "ninja", "old cmake"])
def test_build_tools_come_as_wheels_where_the_system_has_none(checkout: Checkout, change: str) -> None:
    if change == "old cmake":
        checkout.program("cmake", 'echo "cmake version 3.9.6"')
    else:
        checkout.drop(change)
    checkout.run("dev")
    assert checkout.calls()[1] == install(".[dev,build]")


def test_a_changed_pyproject_installs_again(checkout: Checkout) -> None:
    checkout.run()
    (checkout.root / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    checkout.run()
    assert checkout.calls() == ["made", install("."), install(".")]


def test_a_moved_checkout_installs_again(checkout: Checkout, tmp_path_factory: pytest.TempPathFactory) -> None:
    checkout.run()
    moved = tmp_path_factory.mktemp("moved") / "checkout"
    shutil.copytree(checkout.root, moved, symlinks=True)
    checkout.root = moved
    checkout.run()
    assert checkout.calls()[-1] == install(".")
    assert len(checkout.calls()) == 3


def test_a_failed_install_is_not_taken_for_done(checkout: Checkout) -> None:
    failed = checkout.run(NO_NETWORK="1")
    assert failed.returncode == 3
    assert failed.stderr.splitlines()[-2:] == [
        "error: pip could not install . into .venv",
        "hint: check the network and pip's settings (proxy, mirror, certificate), then run the same command again",
    ]
    assert checkout.run().returncode == 0
    assert checkout.calls() == ["made", install("."), install(".")]


@pytest.mark.parametrize(
    ("gone", "environment", "missing", "packages"),
    [
        (["c++"], {}, "a C++ compiler (c++)", "g++"),
        (["make", "git"], {}, "git, make", "git make"),
        (["python3"], {}, "Python 3.11 or newer", "python3 python3-venv"),
        ([], {"OLD_PYTHON": "1"}, "Python 3.11 or newer", "python3 python3-venv"),
        ([], {"CXX": "clang++-99"}, "a C++ compiler (clang++-99)", "g++"),
    ],
)
def test_what_is_missing_is_named(checkout: Checkout, gone: list[str], environment: dict[str, str], missing: str, packages: str) -> None:
    checkout.drop(*gone)
    done = checkout.run(**environment)
    assert (done.returncode, done.stderr) == (3, f"error: missing: {missing}\nhint: apt-get install {packages}\n")
    assert checkout.calls() == []


def test_a_python_without_venv_is_named(checkout: Checkout) -> None:
    done = checkout.run(NO_VENV="1")
    assert done.returncode == 3
    assert "the venv module of " in done.stderr
    assert "hint: apt-get install python3-venv" in done.stderr


def test_an_unknown_kind_is_usage(checkout: Checkout) -> None:
    assert checkout.run("all").returncode == 2
