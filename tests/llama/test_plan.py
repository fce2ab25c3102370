"""What is planned is what is allocated. Risks: a cache that the formula forgets, another size, a plan that is not what a server does."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import msgspec
import plan_proof
import pytest
from click.testing import CliRunner
from conftest import Tool

from turbo_gguf.cache.spec import CacheSpec, parse_types
from turbo_gguf.cli import main
from turbo_gguf.errors import UsageError
from turbo_gguf.inputs import headers
from turbo_gguf.plan import devices, dry_run, memory
from turbo_gguf.plan.memory import Context
from turbo_gguf.plan.planner import Planner
from turbo_gguf.plan.shape import shape_of

pytestmark = pytest.mark.native

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def architectures(native_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    folder = tmp_path_factory.mktemp("plan")
    yield plan_proof.made(native_bin, folder)
    shutil.rmtree(folder)


def test_all_architectures(native_bin: Path, architectures: list[Path], tmp_path: Path) -> None:
    """Bytes of KV caches at a million tokens, and everything that a server of two slots allocates."""
    proofs = list(plan_proof.architectures(native_bin / "llama-server", architectures, tmp_path))
    assert len(proofs) > 110
    assert not [proof for proof in proofs if not proof.holds]
    assert sum(proof.planned.copies > 0 for proof in proofs) > 90
    assert sum(proof.planned.state > 0 for proof in proofs) > 10


NOT_SAVED = {
    "apertus": (2, 2, 128, {}),
    "bitnet": (2, 2, 128, {}),
    "gemma3n": (22, 1, 64, {"attention.sliding_window": 32, "attention.sliding_window_pattern": 2}),
}
"""Architectures that upstream's program makes, and does not save: layers, KV heads, head size, and more keys."""


@pytest.mark.parametrize("arch", NOT_SAVED)
def test_architectures_that_are_not_saved(tool: Tool, arch: str) -> None:
    n_layer, heads, head, more = NOT_SAVED[arch]
    keys = {"block_count": n_layer, "context_length": 256, "embedding_length": heads * head, "attention.head_count": heads, **more}
    fields = {"general.architecture": arch, **{f"{arch}.{name}": value for name, value in keys.items()}}
    done = tool("test-llama-archs", "-s", "1", "-v", "5", "-a", arch)
    for name, value in (("n_layer", n_layer), ("n_head_kv", heads), ("n_embd_head_k", head)):
        assert re.search(rf"print_info: {name} += {value}$", done.text, re.MULTILINE), done.text[-3000:]
    planned = memory.kv_bytes(shape_of(fields, ()), CacheSpec("f16", "f16"), Context(256))
    run = dry_run.sizes(done.text)
    assert dry_run.same_kv(planned, msgspec.structs.replace(run, mib=run.mib[: len(planned)]))


@pytest.mark.parametrize(
    ("context", "types"),
    [
        (Context(1024, 3), "q8_0/q4_0"),
        (Context(3000, 4, unified=True), "turbo4/turbo3"),
        (Context(512, 1), "turbo3 sink=0"),
        (Context(8192, 2, unified=True), "f16 sink=4 tail=100"),
    ],
)
def test_slots_and_pools(native_bin: Path, architectures: list[Path], context: Context, types: str) -> None:
    """With windows, layers with a state, and both, by dry runs."""
    for name in ("llama-dense", "gemma2-dense", "llama4-moe", "falcon-h1-dense", "qwen3next-moe", "nemotron_h-dense"):
        path = next(path for path in architectures if path.stem == name)
        header = headers.read(str(path))
        shape = shape_of(header.fields, header.tensors)
        run = Planner(header, server=native_bin / "llama-server", backend="CPU").ask(parse_types(types), context)
        assert dry_run.same_kv(memory.kv_bytes(shape, parse_types(types), context), run), name
        planned = memory.estimate(shape, parse_types(types), context)
        assert abs(planned.copies - run.copies) < 2**20 * 0.02, name
        assert abs(planned.state - run.state) < 2**20 * 0.02, name


def test_types_by_layer(native_bin: Path, trained: Path, architectures: list[Path], tmp_path: Path) -> None:
    hybrid = next(path for path in architectures if path.stem == "qwen3next-moe")
    for path, types in ((trained, "turbo3 k=0,-1:q8_0 v=0:turbo4"), (trained, "turbo4 adaptive=7"), (hybrid, "turbo4 k=0:q8_0")):
        proof = plan_proof.prove(native_bin / "llama-server", path, parse_types(types), Context(2048), logs=tmp_path)
        assert proof.holds, (path.name, types, proof)


def test_a_refusal_is_llama_cpps(native_bin: Path, architectures: list[Path]) -> None:
    """What the header refuses, llama.cpp refuses too; and the other way round."""
    for path in architectures:
        header = headers.read(str(path))
        shape = shape_of(header.fields, header.tensors)
        if not shape.has_cache or not (shape.refusal or path.stem in ("laguna-moe", "llama-dense")):
            continue
        planner = Planner(header, server=native_bin / "llama-server", backend="CPU")
        for types in map(parse_types, ("turbo4t", "turbo3", "q8_0")):
            refused = False
            try:
                planner.ask(types, Context(1024))
            except UsageError:
                refused = True
            assert refused == bool(memory.why_not(shape, types)), (path.name, types)


def test_the_longest_context_fits_and_the_next_does_not(native_bin: Path, trained: Path) -> None:
    header = headers.read(str(trained))
    planner = Planner(header, server=native_bin / "llama-server", backend="CPU")
    types, context = parse_types("turbo3"), Context(1024)
    limit = planner.charged(types, msgspec.structs.replace(context, ctx=2000))
    plan = planner.plan([types, parse_types("f16")], context, limit)
    ours, plain = plan.rows
    assert not plan.estimated
    assert not plan.note, "header and llama-server agree"
    assert plain.longest < ours.longest
    assert planner.charged(types, msgspec.structs.replace(context, ctx=ours.longest)) <= limit
    assert planner.charged(types, msgspec.structs.replace(context, ctx=ours.longest + 256)) > limit


def test_an_architecture_that_is_not_known(native_bin: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The build tells it: there is no formula, and the numbers are those of the log."""
    header = headers.read(str(trained))
    known = Planner(header, server=native_bin / "llama-server", backend="CPU").memory(parse_types("turbo3"), Context(4096))
    monkeypatch.setattr("turbo_gguf.plan.architectures.KNOWN", frozenset())
    with pytest.raises(UsageError, match="is not known here"):
        Planner(header, server=None, backend="CPU")
    found = Planner(header, server=native_bin / "llama-server", backend="CPU").memory(parse_types("turbo3"), Context(4096))
    assert abs(found.kv - known.kv) < 2**20 * 0.02
    assert found.compute == known.compute


def test_serve(native_bin: Path, trained: Path) -> None:
    """A server of a user: it answers, with the type that was announced, and ends with Ctrl-C."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = [sys.executable, "-m", "turbo_gguf", "serve", str(trained), "--server", str(native_bin / "llama-server"), "--ctx", "1024"]
    argv = [*program, "--memory", "1GiB", "--", "--port", str(port), "-lv", "4"]
    # a parent that ignores SIGINT (nohup, a job in the background) hands that on
    allow = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, preexec_fn=allow) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("ready: "):
                break
        body = json.dumps({"prompt": "def f(", "n_predict": 4}).encode()
        request = Request(f"http://127.0.0.1:{port}/completion", body, {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as answer:
            assert json.load(answer)["tokens_predicted"] == 4
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=60)
    assert process.returncode == 0, "".join(said) + rest
    assert "-c 1024 -np 1 -ctk turbo4t -ctv turbo4t" in out
    assert any("llama_turbo_cache: turbo4t cal=" in line for line in said)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))  # nobody is left who listens


def test_a_device_of_a_build_for_the_cpu(native_bin: Path, trained: Path) -> None:
    server = native_bin / "llama-server"
    assert devices.listed(server) == ()
    done = CliRunner().invoke(main, ["plan", str(trained), "--server", str(server), "--device", "0"])
    assert done.exit_code == 3 and f"--device 0: {server} lists no device" in done.output


def test_the_command_line(native_bin: Path, trained: Path) -> None:
    args = [
        "plan",
        str(trained),
        "--server",
        str(native_bin / "llama-server"),
        "--types",
        "f16,turbo4t",
        "--ctx",
        "1024",
        "--memory",
        "1GiB",
    ]
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 0, done.output
    assert "dry run of llama-server" in done.output
    assert f"turbo4t: llama-server -m {trained} -c 1024 -np 1 -ctk turbo4t -ctv turbo4t" in done.output
