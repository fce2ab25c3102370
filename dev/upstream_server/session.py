"""One pytest session of upstream's server tests, with one cache type."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from turbo_gguf.tools import run
from upstream_server import outcome, skips
from upstream_server.hub import Hub, Repositories, fill_cache

TESTS = Path("tools/server/tests")
SECONDS = 180
"""Time limit of one test."""

BESIDE = ("models", "tools/mtmd")
"""What the tests look for around their own folder."""


@dataclass(frozen=True)
class Session:
    """What is tested, and where."""

    source: Path  # llama.cpp, with its tests
    server: Path  # the program
    repositories: Repositories
    folder: Path  # of this session alone
    cache_type: str
    threads: int = 1

    @property
    def log(self) -> Path:
        """What pytest printed."""
        return self.folder / "pytest.out"

    def run_twice(self, tests: Sequence[str], *, limit: float) -> dict[str, outcome.Outcome]:
        """Run some tests, named as pytest does, or all for none; then those that failed again. Returns how they ended.

        Some tests wait for moments, and a busy machine misses them. One that passes the second time keeps its first error in ``detail``.
        """
        self._lay_out()
        found = self._run(tests, self.log, limit)
        failed = [name for name, one in found.items() if one.ended == "failed"]
        if failed:
            again = self._run(failed, self.folder / "pytest-again.out", limit)
            better = {
                name: replace(one, detail=found[name].detail) for name, one in again.items() if name in failed and one.ended == "passed"
            }
            found |= better
        return found

    def calibrations(self) -> int:
        """How many calibrations the servers made: a turbo type makes one per model."""
        return len(list((self.folder / "cache").glob("turbo-calibration-*.gguf")))

    def _run(self, tests: Sequence[str], log: Path, limit: float) -> dict[str, outcome.Outcome]:
        results = log.with_suffix(".jsonl")
        with Hub(self.repositories) as hub:
            command = [sys.executable, "-m", "pytest", "-p", "upstream_server.plugin", "-p", "no:cacheprovider"]
            options = ["-m", "not slow", "-q", "--tb=short", "--durations=15"]
            environment = self._environment(hub, results)
            run([*command, *options, *tests], log=log.with_suffix(""), cwd=self.folder / TESTS, env=environment, timeout=limit, check=False)
        return outcome.read(results)

    def _lay_out(self) -> None:
        """Make the folders that the tests expect around them; they write into their own."""
        shutil.rmtree(self.folder, ignore_errors=True)
        place = self.folder / TESTS
        shutil.copytree(self.source / TESTS, place)
        (place / "tmp").mkdir(exist_ok=True)
        for name in BESIDE:
            (self.folder / name).symlink_to(self.source / name)
        fill_cache({name: files for name, files in self.repositories.items() if "download" not in name}, self.folder / "cache")

    def _environment(self, hub: Hub, results: Path) -> dict[str, str]:
        here = Path(__file__).resolve().parents[1]
        return {
            "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "GIT_CEILING_DIRECTORIES": str(self.folder.resolve().parent),  # a test searches files, and git would leave out ignored ones
            "NO_PROXY": "127.0.0.1,::1,localhost",
            "no_proxy": "127.0.0.1,::1,localhost",
            "PORT": str(_free_port()),
            "LLAMA_SERVER_BIN_PATH": str(self.server),
            "LLAMA_CACHE": str(self.folder / "cache"),
            **{f"LLAMA_ARG_{which}CACHE_TYPE_{side}": self.cache_type for which in ("", "SPEC_DRAFT_") for side in "KV"},
            "LLAMA_ARG_THREADS": str(self.threads),
            "HF_ENDPOINT": hub.url,
            "UPSTREAM_SERVER_HUB": hub.url,
            "UPSTREAM_SERVER_SKIPS": str(skips.TABLE),
            "UPSTREAM_SERVER_RESULTS": str(results),
            "UPSTREAM_SERVER_SECONDS": str(SECONDS),
        }


def _free_port() -> int:
    """A port with the next three free: some tests start a second server beside the first."""
    for port in range(20000 + os.getpid() % 10000, 60000, 4):
        try:
            for one in range(port, port + 4):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", one))
        except OSError:
            continue
        return port
    raise RuntimeError("no four free ports in a row")
