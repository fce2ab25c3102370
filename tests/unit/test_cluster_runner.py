"""Cases on a cluster that is no Ray but acts as one, with a stand-in for llama-perplexity.

Risks: a case lost or stored twice, a machine of another kind in a table, an error that names neither node nor log, a wait for nothing.
"""

from __future__ import annotations

import io
import json
import socket
import sys
import threading
from collections import Counter
from pathlib import Path
from unittest import mock

import msgspec
import pytest
import tiny_gguf
from click.testing import CliRunner
from fake_pool import FakePool
from measuring import DIGEST, program

from turbo_gguf.cache.spec import CacheSpec
from turbo_gguf.cli import main
from turbo_gguf.cluster import node, pool
from turbo_gguf.cluster.runner import Cluster, needs_of
from turbo_gguf.errors import EnvironmentMissing, ToolFailed, UsageError
from turbo_gguf.inputs import models
from turbo_gguf.make.build import MANIFEST, Build, Manifest
from turbo_gguf.measure import kld, sweep
from turbo_gguf.measure.case import Case
from turbo_gguf.measure.kld import Job
from turbo_gguf.measure.result import Result
from turbo_gguf.measure.store import Store
from turbo_gguf.patchset.tree import Tree

HERE = Path(__file__).parent


class Place:
    """A driver with a fake build, a tiny model and a text, and a cluster of two nodes that have the build, too."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        build = folder / "build"
        fake = f"#!{sys.executable}\nimport runpy\nrunpy.run_path({str(HERE / 'fake_perplexity.py')!r}, run_name='__main__')\n"
        program(build / "bin" / "llama-perplexity", fake)
        (build / MANIFEST).write_bytes(msgspec.json.encode(Manifest("b", str(build), "c", "d" * 64, "cc", {}, ())))
        monkeypatch.setenv("TURBO_GGUF_HOME", str(folder / "home"))
        monkeypatch.setenv("FAKE_PLAN", str(folder / "plan.json"))
        monkeypatch.setenv(node.BUILD_FOLDER, str(build))
        tiny_gguf.write(folder / "tiny.gguf")
        (folder / "text.txt").write_text("def f(x):\n    return x\n" * 2000)
        self.plan()
        tree = Tree(path=folder, upstream="test", commit="c", digest="d" * 64)
        self.job = Job(
            build=Build(id="b", path=build, preset="cpu", tree=tree, compiler="cc"),
            model=models.read(folder / "tiny.gguf"),
            text=models.text_file(folder / "text.txt"),
            threads=2,
        )
        self.pool = FakePool(folder)
        self.said = io.StringIO()
        self.store = Store(folder / "results")

    def plan(self, **what: object) -> None:
        (self.folder / "plan.json").write_text(json.dumps({"count": str(self.folder / "count"), **what}))

    def cases(self, *types: str, ctx: tuple[int, ...] = (512,)) -> list[Case]:
        setup = sweep.Setup("b", self.job.model.sha256, self.job.text.sha256, "CPU")
        runs = tuple(sweep.SweepRun(n, 3, types) for n in ctx)
        return [case for case in sweep.cases(sweep.Sweep(run=runs), setup) if str(case.types) in types]

    def measure(self, cases: list[Case], model: str | None = "") -> list[Result]:
        model = str(self.folder / "tiny.gguf") if model == "" else model
        far = Cluster(self.pool, upstream=None, model=model)
        return kld.measure(cases, msgspec.structs.replace(self.job, elsewhere=far), self.store, self.said)

    def stored(self) -> Counter[str]:
        path = self.store.path
        return Counter(json.loads(line)["key"] for line in path.read_text().splitlines()) if path.exists() else Counter()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, monkeypatch)


def test_results_are_those_of_one_machine(place: Place) -> None:
    cases = place.cases("f16", "q4_0", "turbo4")
    far = place.measure(cases)
    near = kld.measure(cases, place.job, Store(place.folder / "near"), io.StringIO())
    assert [r.case for r in far] == [r.case for r in near] == cases
    assert [(r.key, r.stats, r.bits, r.facts) for r in far] == [(r.key, r.stats, r.bits, r.facts) for r in near]
    assert place.stored() == Counter(case.key for case in cases)
    assert {name for name, task, _ in place.pool.ran if task == "measure"} == {"one", "two"}
    said = place.said.getvalue()
    assert "one: ctx 512, f32 (base logits)" in said and "two: ctx 512, f32 (base logits)" in said, "each node makes its own"
    assert "[3/3] " in said and said.count(": mean KLD") == 3
    assert not place.pool.cancelled


def test_text_travels_and_each_node_measures_with_what_is_its_own(place: Place) -> None:
    (result, _) = place.measure(place.cases("f16", "q4_0"))
    text = Path(result.argv[result.argv.index("-f") + 1])
    base = Path(result.argv[result.argv.index("--kl-divergence-base") + 1])
    homes = [place.pool.home(name) for name in ("one", "two")]
    assert any(text.is_relative_to(home) and base.is_relative_to(home) for home in homes)
    assert text.read_bytes() == (place.folder / "text.txt").read_bytes() and result.text == "text.txt"


def test_what_is_stored_is_not_measured_and_nodes_are_prepared_once(place: Place) -> None:
    far = Cluster(place.pool, upstream=None, model=str(place.folder / "tiny.gguf"))
    job = msgspec.structs.replace(place.job, elsewhere=far)
    for types in (("f16",), ("f16", "q4_0"), ("f16", "q4_0")):
        kld.measure(place.cases(*types), job, place.store, place.said)
    assert Counter(task for _, task, _ in place.pool.ran) == {"prepare": 2, "measure": 2}


def test_a_result_that_can_not_be_kept_ends_what_still_runs(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Store, results: object) -> None:
        raise EnvironmentMissing("the disk is full")

    monkeypatch.setattr(Store, "append", full)
    try:
        place.measure(place.cases("f16", "q4_0", "turbo4"))
    except EnvironmentMissing:
        assert len(place.pool.cancelled) == 2, "before the driver leaves the cluster"
    else:
        pytest.fail("the disk was not full")


def test_contexts_come_one_after_the_other(place: Place) -> None:
    """Each takes a file of base logits on each node, so nodes should not work on all of them at a time."""
    place.pool = FakePool(place.folder, ("one",))
    place.measure(place.cases("f16", "q4_0", "turbo4", ctx=(512, 1024)))
    measured = [args[0].ctx for _, task, args in place.pool.ran if task == "measure"]  # type: ignore[attr-defined]
    assert measured == [512] * 3 + [1024] * 3


def test_each_model_is_calibrated_by_itself(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp shares the calibration of a model between its quantizations: on a node, that which came first would decide."""
    seen: list[str] = []
    run = kld.tools.run
    monkeypatch.setattr(kld.tools, "run", lambda argv, **how: (seen.append(how["env"]["LLAMA_CACHE"]), run(argv, **how))[1])
    place.measure(place.cases("f16", "turbo4"))
    place.job = msgspec.structs.replace(place.job, model=models.read(tiny_gguf.write(place.folder / "tiny.gguf", seed=1)))
    place.measure(place.cases("f16", "turbo4"))
    assert len(seen) == 8 and len(set(seen)) == 4, "two nodes, two models"


# --- lost nodes -----------------------------------------------------------------------------------------------------------


def test_node_that_dies(place: Place) -> None:
    place.pool.dies_after["two"] = 2  # it was prepared, and has measured one case
    cases = place.cases("f16", "q8_0", "q4_0", "turbo4")
    assert [r.case for r in place.measure(cases)] == cases and place.stored() == Counter(case.key for case in cases)
    assert "two is lost: its case runs again elsewhere" in place.said.getvalue()


def test_all_nodes_die_and_what_was_finished_is_kept(place: Place) -> None:
    place.pool.dies_after = {"one": 2, "two": 2}
    with pytest.raises((EnvironmentMissing, ToolFailed)) as caught:
        place.measure(place.cases("f16", "q8_0", "q4_0", "turbo4"))
    assert "again" in caught.value.hint or "again" in caught.value.message
    assert place.stored().total() == 2


def test_case_that_is_lost_again_and_again(place: Place) -> None:
    task = place.pool._attempt
    place.pool._attempt = lambda n: task(n) if n < 2 else pool.Lost("worker died: out of memory")  # type: ignore[method-assign]
    with pytest.raises(ToolFailed, match="ctx 512, f16: lost with its node or worker 4 times, the last time: worker died: out of memory"):
        place.measure(place.cases("f16", "q4_0"))
    assert place.pool.cancelled


# --- nodes that take no part ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        (lambda: mock.patch.object(node, "cpu_mark", lambda: "x"), "two: it has another CPU than the driver: features x, there "),
        (lambda: mock.patch.object(node, "gpu_names", lambda _: ("H200",)), "two: it has other GPUs than the driver: H200, there none"),
        (lambda: mock.patch.object(node, "__version__", "0.0.1"), "two: turbo-gguf is 0.0.1, the driver's is"),
        (lambda: mock.patch.dict("os.environ", {"GGML_KNOB": "1"}), "two: the environment of `ray start` sets GGML_KNOB"),
        (lambda: mock.patch.dict("os.environ", {"LLAMA_ARG_CTX_SIZE": "1"}), "two: the environment sets LLAMA_ARG_CTX_SIZE"),
        (lambda: mock.patch.dict("os.environ", {node.BUILD_FOLDER: "/nowhere"}), "two: TURBO_GGUF_BUILD=/nowhere: no finished build"),
    ],
)
def test_another_kind_of_machine_takes_no_part(place: Place, patch: object, words: str) -> None:
    place.pool.patches["two"] = patch  # type: ignore[assignment]
    cases = place.cases("f16", "q4_0")
    assert len(place.measure(cases)) == 2 and f"without {words}" in place.said.getvalue(), place.said.getvalue()
    assert {name for name, task, _ in place.pool.ran if task == "measure"} == {"one"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"compiler": "g++ 14"}, "its build b2 is not the driver's b: compiler g++ 14, there cc"),
        ({"digest": "e" * 64}, "patches eeeeeeeeeeee, there dddddddddddd"),
        ({"options": {"X": "1"}}, "CMake options differ"),
    ],
)
def test_another_build_takes_no_part(place: Place, changes: dict[str, object], words: str) -> None:
    other = place.folder / "other"
    program(other / "bin" / "llama-perplexity", "#!/bin/false\n")
    same = Manifest("b2", str(other), "c", "d" * 64, "cc", {}, ())
    (other / MANIFEST).write_bytes(msgspec.json.encode(msgspec.structs.replace(same, **changes)))
    place.pool.variables = {"two": {node.BUILD_FOLDER: str(other)}}
    place.measure(place.cases("f16"))
    assert words in place.said.getvalue(), place.said.getvalue()


def test_no_node_is_like_this_machine(place: Place) -> None:
    for name in ("one", "two"):
        place.pool.patches[name] = lambda: mock.patch.object(node, "cpu_mark", lambda: "other")
    with pytest.raises(EnvironmentMissing, match="no node can take part: one: it has another CPU") as caught:
        place.measure(place.cases("f16"))
    assert "measure on it by itself" in caught.value.hint and not place.stored()


def test_node_without_a_named_build_makes_one(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def ensure(preset: str, **options: object) -> Build:
        asked.append((preset, options))
        return place.job.build

    monkeypatch.setattr(node, "ensure_build", ensure)
    monkeypatch.delenv(node.BUILD_FOLDER)
    place.measure(place.cases("f16"))
    assert asked == [("cpu", {"upstream": None, "targets": ("llama-perplexity",), "jobs": 2})] * 2
    assert "one: builds cpu where it is not there yet" in place.said.getvalue()


# --- the model ------------------------------------------------------------------------------------------------------------


def moved(place: Place) -> Path:
    """The driver's model, at a path that no node has."""
    there = place.folder / "drivers" / "tiny.gguf"
    there.parent.mkdir()
    (place.folder / "tiny.gguf").rename(there)
    place.job = msgspec.structs.replace(place.job, model=models.read(there))
    data = there.read_bytes()
    there.unlink()
    (place.folder / "tiny.gguf").write_bytes(data)
    return there


def test_model_that_a_node_keeps_elsewhere(place: Place) -> None:
    path = moved(place)
    data = (place.folder / "tiny.gguf").read_bytes()
    for name in ("one", "two"):
        kept = place.pool.home(name) / "models" / path.name
        kept.parent.mkdir(parents=True)
        kept.write_bytes(data)
    (result,) = place.measure(place.cases("f16"))
    assert Path(result.argv[2]).is_relative_to(place.folder) and "models/tiny.gguf" in result.argv[2]


def test_model_that_a_node_lacks(place: Place) -> None:
    path = moved(place)
    with pytest.raises(EnvironmentMissing) as caught:
        place.measure(place.cases("f16"))
    kept = place.pool.home("one") / "models"
    assert f"one: model tiny.gguf is neither {path} nor {kept / 'tiny.gguf'}" in caught.value.message
    assert caught.value.hint == f"copy it to {kept}"


def test_model_of_another_digest(place: Place) -> None:
    tiny_gguf.write(place.folder / "tiny.gguf", seed=1)
    with pytest.raises(EnvironmentMissing, match=r"one: .*tiny\.gguf: sha256 is .*, the driver's is " + place.job.model.sha256):
        place.measure(place.cases("f16"))


def test_model_with_a_name_is_fetched_by_it(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(models, "resolve", lambda spec: asked.append(spec) or place.job.model)
    place.measure(place.cases("f16"), model="smollm2")
    assert asked == ["smollm2", "smollm2"]


def widened(place: Place) -> Path:
    """Give the build a llama-quantize, and the job a model with unpacked weights; returns where each home keeps them."""
    packed = place.job.model
    wide = tiny_gguf.write(place.folder / "wide.gguf", seed=1)
    program(place.job.build.tool("llama-quantize"), f'#!/bin/sh\ncp {wide} "$3"\n')
    place.job = msgspec.structs.replace(place.job, model=models.read(wide), packed=packed)
    return Path("models", "unpacked", f"tiny-{packed.sha256[:12]}.gguf")


def test_weights_are_unpacked_on_each_node(place: Place) -> None:
    path = widened(place)
    results = place.measure(place.cases("f16", "q4_0"))
    assert {Path(result.argv[2]) for result in results} == {place.pool.home(name) / path for name in ("one", "two")}
    assert {result.case.model_sha256 for result in results} == {place.job.model.sha256}
    assert "one: unpacks the weights of tiny.gguf where they are not there yet" in place.said.getvalue()


def test_weights_that_were_unpacked_otherwise(place: Place) -> None:
    path = place.pool.home("two") / widened(place)
    path.parent.mkdir(parents=True)
    tiny_gguf.write(path, seed=2)
    place.measure(place.cases("f16"))
    assert f"without two: {path}: sha256 is " in place.said.getvalue()
    assert f"remove it here and {place.job.model.path} there" in place.said.getvalue()


def test_node_that_can_unpack_no_weights(place: Place) -> None:
    widened(place)
    place.job.build.tool("llama-quantize").unlink()
    with pytest.raises(EnvironmentMissing, match="no finished build with llama-perplexity and llama-quantize"):
        place.measure(place.cases("f16"))


def test_a_calibration_from_a_file_travels(place: Place) -> None:
    own = place.folder / "own.gguf"
    own.write_bytes(b"a calibration")
    types = CacheSpec.parse(f"turbo3 cal={own}#{DIGEST}")
    cases = [*place.cases("f16"), *(msgspec.structs.replace(case, types=types) for case in place.cases("f16"))]
    plain, result = place.measure(cases)
    kept = Path(result.argv[result.argv.index("--cache-calibration") + 1])
    assert kept == place.pool.home("two") / "calibrations" / f"{DIGEST}.gguf" and kept.read_bytes() == b"a calibration"
    assert "--cache-calibration" not in plain.argv
    assert [found.case for found in place.store.results()] == cases, "with the path of the driver"


# --- errors of tools ------------------------------------------------------------------------------------------------------


def test_crash_on_a_node_comes_with_its_log(place: Place) -> None:
    place.plan(crash=["q4_0-512"])
    with pytest.raises(ToolFailed, match="SIGSEGV") as caught:
        place.measure(place.cases("f16", "q4_0", "turbo4"))
    name = caught.value.message.partition(":")[0]
    (log,) = (place.folder / "home" / "logs" / "cluster" / name).rglob("*.err")
    assert name in ("one", "two") and f"log: {log}" in caught.value.message and "llama_turbo_cache" in log.read_text()
    assert str(place.pool.home(name)) not in caught.value.message, "a path of the node is of no use here"
    assert place.stored().total() == 1 and place.pool.cancelled, "what is under way ends"


def test_silent_fallback_on_a_node_is_never_stored(place: Place) -> None:
    place.plan(swap={"turbo4": "q8_0"})
    with pytest.raises(ToolFailed, match="is q8_0; asked for was turbo4"):
        place.measure(place.cases("turbo4"))
    assert not place.stored()


def test_what_nobody_expected_is_a_fault_with_a_log(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node.kld, "measure_case", mock.Mock(side_effect=KeyError("x")))
    with pytest.raises(ToolFailed, match="internal error: KeyError") as caught:
        place.measure(place.cases("f16"))
    (log,) = (place.folder / "home" / "logs" / "cluster").rglob("internal-error.log")
    assert str(log) in caught.value.message and "Traceback" in log.read_text()


# --- room -----------------------------------------------------------------------------------------------------------------


def test_needs_of_a_case(place: Place) -> None:
    (case,) = place.cases("f16")
    needs = needs_of(case, place.job)
    assert (needs.cpus, needs.gpus) == (2, 0) and place.job.model.size < needs.memory < 1 << 30
    assert needs_of(msgspec.structs.replace(case, backend="CUDA"), place.job).gpus == 1


@pytest.mark.parametrize(
    ("cluster", "backend", "words", "hint"),
    [
        ({"cpus": 1}, "CPU", "takes 2 CPUs, and the largest node of the Ray cluster has 1", "--threads 1"),
        ({"cpus": 0}, "CPU", "the largest node of the Ray cluster has 0", "ray start --address"),
        ({}, "CUDA", "no node of the Ray cluster has a GPU", "--num-gpus=1"),
        ({"gib": 0.25}, "CPU", "GB of memory, and no node has them all", "--memory=BYTES"),
        ({"names": ()}, "CPU", "no node is left", "start one"),
    ],
)
def test_no_node_has_room(place: Place, cluster: dict[str, object], backend: str, words: str, hint: str) -> None:
    place.pool = FakePool(place.folder, **cluster)  # type: ignore[arg-type]
    cases = [msgspec.structs.replace(case, backend=backend) for case in place.cases("f16")]
    with pytest.raises(EnvironmentMissing) as caught:
        place.measure(cases)
    assert words in caught.value.message and hint in caught.value.hint and not place.pool.ran


# --- Ray itself -----------------------------------------------------------------------------------------------------------


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EnvironmentMissing, match="Ray is not installed") as caught, pool.connected("auto"):
        pass
    assert caught.value.hint == "pip install 'turbo-gguf[ray]'"


@pytest.mark.parametrize(
    ("address", "error", "words"),
    [
        ("127.0.0.1:1", EnvironmentMissing, "--ray 127.0.0.1:1: nobody answers"),
        ("127.0.0.1:99999", EnvironmentMissing, "nobody answers"),
        ("ray://127.0.0.1:10001", UsageError, "neither HOST:PORT nor auto nor local"),
        ("somewhere", UsageError, "neither HOST:PORT nor auto nor local"),
    ],
)
def test_no_cluster_is_said_at_once(address: str, error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", mock.Mock())
    with pytest.raises(error, match=words) as caught, pool.connected(address):
        pass
    assert "ray start --head" in caught.value.hint  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "what answers is no Ray"),
        (b"-ERR\r\n", "what answers is no Ray"),
        (None, "nobody answers: timed out"),
    ],
)
def test_a_port_of_something_else_is_noticed(answer: bytes | None, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would wait for minutes. Its own port is that of Redis, too."""
    monkeypatch.setitem(sys.modules, "ray", mock.Mock())
    monkeypatch.setattr(pool, "CONNECT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                if answer is None:
                    done.wait()
                else:
                    connection.sendall(answer)

        done, thread = threading.Event(), threading.Thread(target=serve)
        thread.start()
        with pytest.raises(EnvironmentMissing, match=words), pool.connected(f"127.0.0.1:{server.getsockname()[1]}"):
            pass
        done.set()
        thread.join()


def test_ray_that_finds_no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ray", mock.Mock(init=mock.Mock(side_effect=ConnectionError("no running Ray instance\nmore"))))
    with pytest.raises(EnvironmentMissing, match="--ray auto: no running Ray instance; log: "), pool.connected("auto"):
        pass


def test_exit_codes_before_anything_is_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ray", mock.Mock())
    ended = {address: CliRunner().invoke(main, ["ppl-gate", "--ray", address]).exit_code for address in ("127.0.0.1:1", "nonsense")}
    assert ended == {"127.0.0.1:1": 3, "nonsense": 2} and not (tmp_path / "builds").exists()
