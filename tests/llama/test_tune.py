"""``tune`` with the patched llama.cpp, on the embedded model. Risks: a search that measures nothing, and starts anew each time."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from cache_lines import cache_lines
from click.testing import CliRunner, Result
from conftest import Tool
from server import VERBOSE

from turbo_gguf.cache.spec import CacheSpec, layer_types
from turbo_gguf.cache.types import cache_type
from turbo_gguf.cli import main
from turbo_gguf.cli import tune as command
from turbo_gguf.inputs import headers, models
from turbo_gguf.make.build import Build
from turbo_gguf.measure.store import Store
from turbo_gguf.patchset.tree import Tree
from turbo_gguf.plan.memory import Context
from turbo_gguf.plan.planner import Planner
from turbo_gguf.tune import preset

pytestmark = pytest.mark.native


@pytest.fixture
def home(native_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of this test, with finished programs."""
    tree = Tree(path=tmp_path, upstream="test", commit="c", digest="d")
    build = Build(id="here", path=native_bin.parent, preset="cpu", tree=tree, compiler="cc")
    monkeypatch.setattr(command, "ensure_build", lambda *a, **k: build)
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def tune(*args: str) -> Result:
    short = ("--chunks", "1", "--proof-chunks", "1", "--minutes", "0", "--threads", "2")
    return CliRunner().invoke(main, ["tune", str(models.embedded().path), *args, *short])


def test_from_end_to_end(home: Path, tool: Tool, prose: Path, tmp_path: Path) -> None:
    done = tune("--bits", "3.25")
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob("*.cache.toml")
    found = preset.read(path)
    assert 2.9 < found.evidence["bits"] <= 3.25
    rows = {row["about"]: row["kld"] for row in reversed(found.evidence["row"])}
    assert rows["f16"] < rows["tuned"] < rows["uniform"], "a gain that a search on one chunk finds, too"

    args = ("-m", models.embedded().path, "-f", prose, "-c", "512", "--chunks", "1", "-t", "1", *VERBOSE)
    line = cache_lines(tool("llama-perplexity", *args, "--cache-preset", path).text)[-1]
    asked = [sum(cache_type(name).bits for name in side) / 4 for side in layer_types(found.types, 4)]
    assert line.bits == pytest.approx(asked, abs=0.001)
    assert shlex.split(done.stdout)[0] == "llama-server"

    measured = len(Store(home / "results").results())
    assert measured > 20
    again = tune("--bits", "3.25")
    assert again.exit_code == 0
    assert len(Store(home / "results").results()) == measured, "all is in the store"


def test_a_memory_holds_all_that_a_server_takes_and_speed_is_measured(home: Path, native_bin: Path) -> None:
    planner = Planner(headers.read(str(models.embedded().path)), server=native_bin / "llama-server", backend="CPU")
    context = Context(2048)
    limit = planner.charged(CacheSpec("turbo3t", "turbo3t"), context)
    done = tune("--memory", f"{limit}B", "--ctx", "2048", "--target-tps", "1", "--out", "small.toml")
    assert done.exit_code == 0, done.output
    assert "tokens per second, 1 are asked for" in done.stderr
    assert 0.99 * limit < planner.charged(preset.read(Path("small.toml")).types, context) <= limit
