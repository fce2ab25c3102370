"""Headers without the file. Risks: a download, a header that is longer than what was asked for, a part that is forgotten."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_gguf
from hub_server import Hub, hub

from turbo_gguf.errors import EnvironmentMissing, UsageError
from turbo_gguf.inputs import headers

REPOSITORY = Path(__file__).resolve().parents[2]
SHOW = """
import sys
from turbo_gguf.inputs import headers, hub
hub.FIRST_BYTES = int(sys.argv[2])
found = headers.read(sys.argv[1])
print(found.name, len(found.tensors), found.fields["llama.block_count"], found.path)
"""

Python = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def python(tmp_path: Path) -> Python:
    """Runs a program in a process of its own: huggingface_hub reads its variables when it is imported."""

    def run(server: Hub, program: str, *args: str) -> subprocess.CompletedProcess[str]:
        env = {
            **os.environ,
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "hf"),
            "TURBO_GGUF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
            "NO_PROXY": "*",
            "no_proxy": "*",
        }
        argv = [sys.executable, "-c", program, *args]
        return subprocess.run(argv, capture_output=True, text=True, env=env, cwd=REPOSITORY, timeout=120, check=False)

    return run


@pytest.fixture
def show(python: Python) -> Python:
    """Reads a header, a few bytes at a time."""
    return lambda server, spec: python(server, SHOW, spec, "4096")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Hub]:
    model = tiny_gguf.write(tmp_path / "tiny.gguf", head=64, n_layer=3)
    with hub({"tiny.gguf": model.read_bytes(), "README.md": b"# tiny\n"}) as running:
        yield running


def test_a_header_takes_a_few_ranges(server: Hub, show: Python) -> None:
    done = show(server, "org/model")
    assert done.stdout.split() == ["tiny", str(3 + 3 * 9), "3", "None"], done.stderr
    sent = [n for method, _, n in server.served if method == "GET"]
    assert len(sent) > 1, "the header is longer than the first range"
    assert sum(sent) < len(server.files["tiny.gguf"]) / 20


def test_a_server_without_ranges(server: Hub, show: Python) -> None:
    server.has_ranges = False
    assert show(server, "org/model").stdout.startswith("tiny ")


def test_a_file_that_is_here_is_read_here(server: Hub, show: Python, python: Python) -> None:
    fetched = python(server, "import huggingface_hub as hub; print(hub.hf_hub_download('org/model', 'tiny.gguf'))")
    path, served = fetched.stdout.strip(), len(server.served)
    done = show(server, "org/model:tiny.gguf")
    assert path and done.stdout.split()[-1] == path, done.stderr
    assert len(server.served) == served
    server.failing = True
    assert show(server, "org/model").stdout.split()[-1] == path


def test_all_parts_are_read(tmp_path: Path, show: Python) -> None:
    first = tiny_gguf.write(tmp_path / "tiny.gguf", head=64, n_layer=3, split=10, small_first=True)
    files = {path.name: path.read_bytes() for path in sorted(tmp_path.glob("tiny-*.gguf"))}
    with hub(files) as server:
        done = show(server, "org/model")
        assert done.stdout.split() == ["tiny", str(3 + 3 * 9), "3", "None"], done.stderr
        wrong = show(server, f"org/model:{sorted(files)[1]}")
        assert "is not the first of its files" in wrong.stderr
        del server.files[sorted(files)[2]]
        assert "no file" in show(server, f"org/model:{first.name}").stderr


def test_what_goes_wrong_is_said(server: Hub, show: Python, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server.files["tiny.gguf"] = b"no model" * 100
    assert "GGUF file damaged" in show(server, "org/model").stderr
    server.failing = True
    assert "EnvironmentMissing" in show(server, "org/model").stderr
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path / "empty"))
    with pytest.raises(EnvironmentMissing) as missing:
        headers.read("smollm2")
    assert missing.value.hint == "turbo-gguf models fetch smollm2"
    with pytest.raises(UsageError):
        headers.read("nothing.gguf")


PLAN = "import sys; from turbo_gguf.cli import main; main(['plan', *sys.argv[1:]])"


def test_a_plan_downloads_nothing(tmp_path: Path, python: Python) -> None:
    """Of a model in several files, too."""
    tiny_gguf.write(tmp_path / "tiny.gguf", head=64, n_layer=3, ctx=4096, split=10)
    files = {path.name: path.read_bytes() for path in sorted(tmp_path.glob("tiny-*.gguf"))}
    with hub(files) as server:
        done = python(server, PLAN, "org/model", "--types", "f16,turbo3", "--memory", "1GiB")
        assert done.returncode == 0, done.stderr
        assert "estimate from the header" in done.stdout
        assert "turbo3: llama-server -m MODEL.gguf -c 4096 -np 1 -ctk turbo3 -ctv turbo3" in done.stdout
        assert not list((tmp_path / "hf").rglob("*.gguf"))
        dry = python(server, PLAN.replace("'plan'", "'serve'"), "org/model", "--dry-run")
        assert "turbo4t: 4,096 tokens" in dry.stderr, dry.stderr
        assert dry.stdout.startswith("llama-server -m MODEL.gguf -c 4096")
