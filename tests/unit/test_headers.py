"""Headers without the file. Risks: a download, a header that is longer than what was asked for, a part that is forgotten."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_gguf
from hub_server import Hub, Refusal, hub

from turbo_gguf.errors import EnvironmentMissing, UsageError
from turbo_gguf.inputs import headers
from turbo_gguf.inputs import hub as hub_models

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
        assert "turbo3: turbo-gguf serve org/model --type turbo3 --ctx 4096\n" in done.stdout
        slots = python(server, PLAN, "org/model", "--types", "turbo3 sink=0", "--memory", "1GiB", "-np", "2", "-kvu", "--ctx", "512")
        assert "turbo3 sink=0: turbo-gguf serve org/model --type 'turbo3 sink=0' --ctx 512 -np 2 -kvu\n" in slots.stdout
        assert not list((tmp_path / "hf").rglob("*.gguf"))
        dry = python(server, PLAN.replace("'plan'", "'serve'"), "org/model", "--dry-run")
        assert "turbo4t: 4,096 tokens" in dry.stderr, dry.stderr
        assert dry.stdout.startswith("llama-server -m MODEL.gguf -c 4096")


def test_what_is_too_large_is_not_downloaded(server: Hub, python: Python, tmp_path: Path) -> None:
    program = PLAN.replace("'plan'", "'serve'")
    done = python(server, program, "org/model", "--memory", "1MiB", "--server", sys.executable)
    assert done.returncode == 3 and "256 tokens in turbo2t take" in done.stderr and "take a smaller model" in done.stderr
    assert not list((tmp_path / "hf").rglob("*.gguf")) and sum(n for *_, n in server.served) < 2 * hub_models.FIRST_BYTES


# --- a hub that sends on, refuses or wants to be left alone -----------------------------------------------------------------


def test_a_file_on_another_host_is_read_by_ranges_without_the_token(server: Hub, show: Python, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the public hub does: what it sends on to is signed, and must not see who asks."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with hub(server.files) as cdn:
        server.cdn = cdn
        done = show(server, "org/model")
        assert done.stdout.startswith("tiny "), done.stderr
        assert set(server.tokens) == {"Bearer hf_secret"}
        assert set(cdn.tokens) == {""}
        sent = [n for _, _, n in cdn.served]
        assert len(sent) > 1 and sum(sent) < len(server.files["tiny.gguf"]) / 20 and not server.served


GATED = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model org/model is restricted."}
LIMIT = {"ratelimit": '"resolvers";r=0;t=55', "ratelimit-policy": '"fixed window";"resolvers";q=3000;w=300'}
REFUSALS = {
    "gated": (Refusal(401, GATED, "resolve"), "", 3, "its owner grants access", "/org/model, then log in with `hf auth login`"),
    "not granted": (Refusal(403, GATED, "resolve"), "hf_x", 3, "its owner grants access", "with the account of your token"),
    "gated list": (Refusal(401, GATED, "api"), "", 3, "its owner grants access", "set HF_TOKEN"),
    "private": (Refusal(401, {"X-Error-Code": "RepoNotFound"}), "", 2, "no such public repository", "for a private one log in"),
    "not mine": (Refusal(404, {"X-Error-Code": "RepoNotFound"}), "hf_x", 2, "no such public repository", "what your token may read"),
    "old token": (
        Refusal(401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
        *("hf_x", 3, "does not know the token: Invalid credentials", "or do without a token"),
    ),
    "closed": (Refusal(401, {"X-Error-Message": "log in first"}), "", 3, "asks for a token: log in first", "set HF_TOKEN"),
    "forbidden": (
        Refusal(403, {"X-Error-Message": "no read scope"}),
        "hf_x",
        3,
        "forbids access: no read scope",
        "what your token may read",
    ),
    "no file": (Refusal(404, {"X-Error-Code": "EntryNotFound"}, "resolve"), "", 2, "no file tiny.gguf", "name org/model alone"),
    "limit": (Refusal(429, LIMIT, "api"), "", 3, "too many requests", "wait 55 seconds, and run the same command again; a token raises"),
    "limit of files": (Refusal(429, {"Retry-After": "7"}, "resolve"), "", 3, "too many requests", "wait 7 seconds"),
    "limit without a time": (Refusal(429, {}), "", 3, "too many requests", "wait a few minutes"),
    "fault": (Refusal(503, {}), "", 3, "download from", "run the same command again"),
}


@pytest.mark.parametrize("command", ["plan", "fetch"])
@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(server: Hub, python: Python, monkeypatch: pytest.MonkeyPatch, name: str, command: str) -> None:
    """Of a plan and of a download: what failed, and what to type next."""
    server.refusal, token, code, message, hint = REFUSALS[name]
    monkeypatch.setenv("HF_TOKEN", token)
    args = ["plan", "org/model"] if command == "plan" else ["models", "fetch", "org/model"]
    done = python(server, "import sys; from turbo_gguf.cli import main; main(sys.argv[1:])", *args)
    error, _, rest = done.stderr.partition("\nhint: ")
    assert done.returncode == code, done.stderr
    assert error.startswith("error: hub model org/model: ") and message in error and hint in rest, done.stderr
    assert ("Traceback" not in done.stderr and token not in done.stderr) or not token
    assert not server.served


@pytest.mark.parametrize("status", [429, 503])
def test_a_range_is_asked_for_again(server: Hub, show: Python, status: int) -> None:
    server.refusal = Refusal(status, {"Retry-After": "0"}, "resolve", ("GET",), times=1)
    done = show(server, "org/model")
    assert done.stdout.startswith("tiny ") and server.refused == 1, done.stderr
    server.refusal, server.refused = Refusal(status, {"Retry-After": "0"}, "resolve", ("GET",)), 0
    assert "EnvironmentMissing" in show(server, "org/model").stderr and server.refused == 3


def test_offline(server: Hub, show: Python, python: Python, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked; what was fetched is read, and the way out is named."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = python(server, PLAN, "org/model")
    assert done.returncode == 3 and "lacks a GGUF file" in done.stderr and "hint: unset HF_HUB_OFFLINE" in done.stderr
    assert not server.tokens
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert python(server, "import huggingface_hub as hub; hub.hf_hub_download('org/model', 'tiny.gguf')").returncode == 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = len(server.tokens)
    assert show(server, "org/model").stdout.startswith("tiny ") and len(server.tokens) == asked
