"""A Ray cluster of two nodes on this machine, which measure with the real build; one of them dies in the middle of a case.

Risks: a case lost or stored twice, results that are not those of one machine, programs that outlive their node or driver.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from turbo_gguf.cache.spec import CacheSpec, measured
from turbo_gguf.inputs import models
from turbo_gguf.make.build import MANIFEST, Manifest
from turbo_gguf.measure.result import Result
from turbo_gguf.measure.store import Store
from turbo_gguf.tune import preset

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'turbo-gguf[ray]'")
pytestmark = pytest.mark.native

REPOSITORY = Path(__file__).resolve().parents[2]
OBJECT_BYTES = 80 << 20
GONE_SECONDS = 30.0

_RUN = """
import sys
from pathlib import Path
from turbo_gguf.cli import main
from turbo_gguf.make import build
from turbo_gguf.patchset.tree import Tree
folder = Path(sys.argv[1])
there = build.read_manifest(folder)
tree = Tree(path=folder, upstream="test", commit=there.commit, digest=there.digest)
build.ensure_build = lambda *a, **k: build.Build(id=there.id, path=folder, preset="cpu", tree=tree, compiler=there.compiler)
main([*sys.argv[2:], "--threads", "1"])
"""


class Machines:
    """Two nodes with homes of their own, a head that measures nothing, and a driver."""

    def __init__(self, folder: Path, programs: Path) -> None:
        from ray.cluster_utils import Cluster  # noqa: PLC0415

        self.folder = folder
        self.build = folder / "build"
        self.build.mkdir()
        (self.build / "bin").symlink_to(programs)
        manifest = Manifest("test", str(self.build), "c", "d" * 64, "cc", {}, ("llama-perplexity",))
        (self.build / MANIFEST).write_bytes(msgspec.json.encode(manifest))
        common: dict[str, Any] = {"object_store_memory": OBJECT_BYTES, "plasma_directory": str(folder)}
        head = {"num_cpus": 0, "include_dashboard": False, **common}
        self.cluster = Cluster(initialize_head=True, shutdown_at_exit=False, head_node_args=head)
        self.nodes = {
            name: self.cluster.add_node(num_cpus=1, node_name=name, env_vars={**self.environment(name)}, **common)
            for name in ("one", "two")
        }

    def environment(self, name: str) -> dict[str, str]:
        """Variables of a node, or of a driver."""
        home = self.folder / name
        return {
            "TURBO_GGUF_HOME": str(home),
            "TURBO_GGUF_BUILD": str(self.build),
            "PYTHONPATH": str(REPOSITORY),
        }

    def driver(self, name: str, *args: str) -> subprocess.Popen[str]:
        """``turbo-gguf`` with a home of its own."""
        env = {key: value for key, value in os.environ.items() if not key.startswith(("LLAMA_", "GGML_", "TURBO_"))}
        allow = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen(
            [sys.executable, "-c", _RUN, str(self.build), *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env | self.environment(name),
            cwd=self.folder,
            preexec_fn=allow,
        )

    def measuring(self, name: str) -> list[str]:
        """Command lines of llama-perplexity on a node."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = path.read_bytes().decode(errors="replace")
            except OSError:
                continue
            if "llama-perplexity" in line and f"{self.folder / name}/" in line:
                found.append(line)
        return found

    def kill(self, name: str) -> None:
        """End a node outright: nothing of it gets a chance to tidy up."""
        self.cluster.remove_node(self.nodes.pop(name), allow_graceful=False)

    def results(self, name: str) -> list[Result]:
        return Store(self.folder / name / "results").results()

    def wait_until_nothing_runs(self, name: str) -> None:
        deadline = time.monotonic() + GONE_SECONDS
        while self.measuring(name):
            assert time.monotonic() < deadline, "a program outlived those that wanted its result"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def machines(native_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    folder = tmp_path_factory.mktemp("r")  # short: Ray's sockets are in it, and their paths have 107 characters at most
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(folder))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        made = Machines(folder, native_bin)
        try:
            yield made
        finally:
            made.cluster.shutdown()
    assert not made.measuring("one") + made.measuring("two")


def read(driver: subprocess.Popen[str], act: Callable[[str], None]) -> tuple[int, str]:
    """Hand each line of standard error to ``act``; returns the exit code and all of them."""
    lines = []
    assert driver.stderr is not None
    for line in driver.stderr:
        lines.append(line)
        act(line)
    driver.communicate(timeout=60)
    return driver.returncode, "".join(lines)


def test_tune_finds_what_one_machine_finds(machines: Machines) -> None:
    """Nodes unpack the weights themselves, and get the calibration that the driver made."""
    short = ("--bits", "3.25", "--chunks", "1", "--proof-chunks", "1", "--minutes", "0")
    found: dict[str, CacheSpec] = {}
    for name, way in (("tuned-far", ("--ray", machines.cluster.address)), ("tuned-near", ())):
        out = machines.folder / name / "own.cache.toml"
        rc, said = read(machines.driver(name, "tune", str(models.embedded().path), *short, "--out", str(out), *way), lambda line: None)
        print(said)
        assert rc == 0, said
        found[name] = measured(preset.read(out).types)
    assert found["tuned-far"] == found["tuned-near"] and found["tuned-far"].by_layer
    far, near = ({result.key: result.stats for result in machines.results(name)} for name in found)
    assert far == near and len(far) > 20
    for name in ("one", "two"):
        home = machines.folder / name
        (wide,) = (home / "models" / "unpacked").iterdir()
        assert any(str(wide) in result.argv for result in machines.results("tuned-far"))
    given = [word for result in machines.results("tuned-far") for word in result.argv if "/calibrations/" in word]
    assert given and not any("tuned-far" in word for word in given)


def test_node_that_dies_in_the_middle_of_a_case(machines: Machines) -> None:
    killed: list[str] = []
    done: list[str] = []

    def kill_while_it_measures(line: str) -> None:
        done.extend(re.findall(r"\] two: ctx 512, .*: mean KLD", line))
        begun = re.match(r"two: ctx 512, ((?!f32).*)$", line)
        if done and begun and not killed and any(f"\0{begun[1].partition(' ')[0]}\0" in argv for argv in machines.measuring("two")):
            machines.kill("two")
            killed.append(begun[1])

    rc, said = read(machines.driver("far", "ppl-gate", "--ray", machines.cluster.address, "--config", "smoke"), kill_while_it_measures)
    print(said)
    assert rc in (0, 1), said  # the gate may fail on so few tokens
    assert killed and f"one: ctx 512, {killed[0]}: mean KLD" in said and "two is lost" in said
    machines.wait_until_nothing_runs("two")
    far = machines.results("far")
    stored = (machines.folder / "far" / "results" / "results.jsonl").read_text().splitlines()
    assert len(stored) == len(far) == 12 and max(Counter(result.key for result in far).values()) == 1
    rc, said = read(machines.driver("near", "ppl-gate", "--config", "smoke"), lambda line: None)
    near = {result.key: result for result in machines.results("near")}
    assert rc in (0, 1) and near.keys() == {result.key for result in far}, said
    for result in far:
        same = near[result.key]
        assert (result.stats, result.bits) == (same.stats, same.bits), str(result.case.types)
        told, also = (msgspec.structs.replace(one.facts, warnings=()) for one in (result, same))  # which name files
        assert told == also


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_driver_that_ends_in_the_middle(machines: Machines, number: signal.Signals) -> None:
    """What was measured is kept, and nothing runs on for nobody."""
    home = f"driver-{number}"

    def end(line: str) -> None:
        if re.match("one: ctx 512, (?!f32)", line) and machines.results(home) and machines.measuring("one"):
            driver.send_signal(number)

    few = ("--config", "smoke", "--types", "turbo4,turbo3,turbo2")
    driver = machines.driver(home, "ppl-gate", "--ray", machines.cluster.address, *few)
    rc, said = read(driver, end)
    assert rc == (130 if number == signal.SIGINT else -number), said
    machines.wait_until_nothing_runs("one")
    assert 0 < len(machines.results(home)) < 9, said
