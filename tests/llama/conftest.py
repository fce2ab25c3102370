"""What the tests of the patched llama.cpp share: the build, tiny models, and a way to run tools.

Environment variables:
    TURBO_GGUF_NATIVE_BIN: folder with finished programs of a patched build; nothing is built then.
    TURBO_GGUF_PRISTINE_BIN: folder with llama-perplexity and llama-completion of an unpatched build made with the same flags;
        without it the driver builds them.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_models
from server import QUIET

from turbo_gguf import assets
from turbo_gguf.make.build import ensure_build
from turbo_gguf.tools import run

TARGETS = (
    "llama-cli",
    "llama-server",
    "llama-completion",
    "llama-perplexity",
    "llama-bench",
    "llama-batched-bench",
    "test-quantize-fns",
    "test-backend-ops",
    "test-arg-parser",
    "test-save-load-state",
    "test-llama-archs",
    "test-gguf",
    "test-turbo-cache",
    "test-turbo-layers",
    "test-turbo-decay",
    "test-turbo-calibration",
    "test-turbo-exact",
    "test-turbo-defaults",
    "test-turbo-logits",
    "llama-turbo-calibrate",
    "llama-quantize",
)
PRISTINE_TARGETS = ("llama-perplexity", "llama-completion")


@dataclass(frozen=True)
class Done:
    """A tool that has ended."""

    rc: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """Both streams, for messages and for logs that may be on either."""
        return self.out + self.err

    @property
    def refused(self) -> bool:
        """Whether the tool ended by itself, with an error: no signal, no abort."""
        return 0 < self.rc < 128


Tool = Callable[..., Done]

NUMBERS = itertools.count()
"""Of logs, also where tools run side by side."""


def run_tool(folder: Path, logs: Path, name: str, *args: str | Path, env: dict[str, str] | None = None, timeout: float = 300) -> Done:
    """Run a program of a build folder to its end; each stream goes to a file of its own."""
    log = logs / f"{name}-{next(NUMBERS)}.log"
    done = run([folder / name, *args], log=log, cwd=logs, env={**QUIET, **(env or {})}, timeout=timeout, check=False)
    return Done(done.rc, done.stdout.read_text("utf-8", errors="replace"), done.stderr.read_text("utf-8", errors="replace"))


@pytest.fixture(scope="session")
def native_bin() -> Path:
    """Folder with the programs of the patched build, built on first use."""
    given = os.environ.get("TURBO_GGUF_NATIVE_BIN")
    return Path(given) if given else ensure_build("cpu", targets=TARGETS).path / "bin"


@pytest.fixture(scope="session")
def pristine_bin() -> Path:
    """Folder with the programs of an unpatched build, built on first use."""
    given = os.environ.get("TURBO_GGUF_PRISTINE_BIN")
    return Path(given) if given else ensure_build("cpu", targets=PRISTINE_TARGETS, pristine=True).path / "bin"


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where llama.cpp keeps calibrations: a folder of this test, which is not there yet. No setting comes from outside."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LLAMA_CACHE", str(folder))
    for name in [name for name in os.environ if name.startswith("TURBO_CACHE_")]:
        monkeypatch.delenv(name)
    return folder


PLAIN = {"TURBO_CACHE_CALIBRATION": "none", "TURBO_CACHE_SINK": "0", "TURBO_CACHE_TAIL": "0"}
"""Variables that leave out what turbo types get by default."""


@pytest.fixture
def plain(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The types alone, as they are without the defaults of turbo types."""
    del cache_folder  # which takes settings away, first
    for name, value in PLAIN.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def tool(native_bin: Path, tmp_path: Path) -> Tool:
    """``tool(name, *args, env=None, timeout=300)`` runs a program of the patched build in the test's folder."""
    return functools.partial(run_tool, native_bin, tmp_path)


@pytest.fixture
def pristine_tool(pristine_bin: Path, tmp_path: Path) -> Tool:
    """The same for the unpatched build."""
    return functools.partial(run_tool, pristine_bin, tmp_path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny(name)`` is the path of a model of ``tiny_models.SHAPES``, written on first use."""
    folder = tmp_path_factory.mktemp("models")
    return functools.cache(lambda name: tiny_models.write(name, folder))


@pytest.fixture(scope="session")
def trained() -> Path:
    """The model that ships with the package."""
    return assets.embedded_model()


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of about 6,000 tokens of a byte-level model, ASCII only."""
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    words: Sequence[str] = Path(tiny_models.__file__).read_text("ascii").split()
    path.write_text(" ".join(words)[:6000], "ascii")
    return path
