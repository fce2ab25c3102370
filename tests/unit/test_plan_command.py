"""``plan`` and ``serve`` with a stand-in for llama-server. Risks: a wrong command, a server left behind, a message that does not help."""

from __future__ import annotations

import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import fake_llama
import pytest
import tiny_gguf
from click.testing import CliRunner, Result

from turbo_gguf.cli import main
from turbo_gguf.inputs import headers
from turbo_gguf.inputs.headers import Header
from turbo_gguf.make import build
from turbo_gguf.plan import launch

REPOSITORY = Path(__file__).resolve().parents[2]
Cli = Callable[..., Result]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", ctx=65536)


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """The stand-in as a program."""
    folder = tmp_path / "bin"
    folder.mkdir()
    path = folder / "llama-server"
    tests = [str(REPOSITORY), str(REPOSITORY / "tests/unit")]
    path.write_text(f"#!{sys.executable}\nimport sys\nsys.path[:0] = {tests}\nimport fake_llama\nsys.exit(fake_llama.main())\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def port() -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = probe.getsockname()[1]
    yield number


def cli(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def mib(types: str, ctx: int) -> float:
    kind = fake_llama.cache_type(types)
    return 2 * fake_llama.LAYERS * ctx * fake_llama.VALUES // kind.block * kind.size / 2**20


def cells(output: str, types: str) -> list[str]:
    line = next(line for line in output.splitlines() if line.startswith(f"| {types} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


# --- plan -----------------------------------------------------------------------------------------------------------------


def test_without_a_build_the_header_tells(model: Path) -> None:
    done = cli("plan", model, "--ctx", "32768", "--memory", "100MiB")
    assert done.exit_code == 0, done.output
    assert "estimate from the header" in done.output and "Compute buffers are guessed" in done.output
    assert cells(done.output, "f16")[1:3] == ["1,024", f"{mib('f16', 32768):.2f} MiB"]
    longest = [cells(done.output, name)[-1] for name in ("f16", "turbo4t", "turbo2t")]
    assert all(name.replace(",", "").isdecimal() for name in longest)
    assert f"turbo3t: llama-server -m {model} -c 32768 -np 1 -ctk turbo3t -ctv turbo3t" in done.output


def test_a_build_is_asked(model: Path, server: Path) -> None:
    limit = 1 + fake_llama.COMPUTE_MIB + 20
    done = cli("plan", model, "--ctx", "4096", "--memory", f"{limit}MiB", "--server", server, "--types", "f16,q8_0")
    assert done.exit_code == 0, done.output
    assert "dry run of llama-server" in done.output and "estimate" not in done.output
    found = cells(done.output, "f16")
    assert found[2] == "4.00 MiB" and found[6] == "10.00 MiB"
    longest = int(found[-1].replace(",", ""))
    weights = float(found[7].split()[0]) - float(found[2].split()[0]) - fake_llama.COMPUTE_MIB
    assert longest % 256 == 0
    assert weights + fake_llama.COMPUTE_MIB + mib("f16", longest) <= limit < weights + fake_llama.COMPUTE_MIB + mib("f16", longest + 256)


def test_slots_and_pools(model: Path) -> None:
    assert "-c 8192 -np 4 -no-kvu" in cli("plan", model, "--ctx", "2048", "-np", "4").output
    assert "-c 2048 -np 4 -kvu" in cli("plan", model, "--ctx", "2048", "-np", "4", "-kvu").output


GPUS = "CUDA0: NVIDIA GeForce RTX 4090 (24077 MiB, 23000 MiB free)\nCUDA1: NVIDIA RTX A2000 (5000 MiB, 4000 MiB free)\n"


def test_the_memory_of_a_gpu(model: Path, server: Path) -> None:
    server.with_name("devices").write_text(GPUS)
    args = ("plan", model, "--ctx", "4096", "--server", server, "--types", "f16")
    one = cli(*args, "--device", "1")
    assert one.exit_code == 0, one.output
    assert "memory 2.91 GiB (free of 5000.00 MiB on CUDA1, less 1 GiB)" in one.output
    assert f"llama-server -m {model} -c 4096 -np 1 -ctk f16 -ctv f16 -dev CUDA1" in one.output
    assert "memory 24.37 GiB (free of 29077.00 MiB on CUDA0, CUDA1, less 1 GiB each)" in cli(*args, "--device", "cuda0,1").output
    by_itself = cli(*args).output
    assert "memory 24.37 GiB (free on CUDA0, CUDA1, less 1 GiB each)" in by_itself and "-dev" not in by_itself
    assert "memory 1.00 GiB (as asked for)" in cli(*args, "--device", "0", "--memory", "1GiB").output


def test_a_device_that_is_not_there(model: Path, server: Path) -> None:
    args = ("plan", model, "--types", "f16", "--device", "2")
    none = cli(*args)
    assert none.exit_code == 3 and "there is no build to ask" in none.output and "--memory 24GiB" in none.output
    empty = cli(*args, "--server", server)
    assert empty.exit_code == 3 and "lists no device" in empty.output and "--preset vulkan or rocm or cuda" in empty.output
    server.with_name("devices").write_text(GPUS)
    other = cli(*args, "--server", server)
    assert other.exit_code == 2 and "there are 0: CUDA0 (NVIDIA GeForce RTX 4090), 1: CUDA1" in other.output


def test_nothing_fits(model: Path) -> None:
    done = cli("plan", model, "--memory", "1MiB", "--types", "f16")
    assert done.exit_code == 0
    assert cells(done.output, "f16")[-1] == "none fits"
    assert "llama-server -m" not in done.output


def test_head_sizes(tmp_path: Path) -> None:
    done = cli("plan", tiny_gguf.write(tmp_path / "odd.gguf", head=80), "--memory", "1GiB")
    assert "turbo4t: the K head size 80 is no multiple of the block of 64 values of turbo4t" in done.output
    assert cells(done.output, "turbo3")[1] == "-" and cells(done.output, "f16")[1] != "-"


def test_types_by_layer(model: Path) -> None:
    done = cli("plan", model, "--ctx", "1024", "--memory", "1GiB", "--types", "turbo3 k=0,-1:f16,q8_0")
    assert done.exit_code == 0, done.output
    per_token = fake_llama.VALUES // 32 * 14 * 2 + fake_llama.VALUES * 2 * 2  # two layers: V in turbo3, K in f16
    assert cells(done.output, "turbo3 k=0,-1:f16")[1] == f"{per_token:,}"
    assert "-ctk turbo3 -ctv turbo3 --cache-type-k-layers 0,-1:f16" in done.output


def test_latent_attention_is_refused_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"key_length": 576, "value_length": 512, "kv_lora_rank": 512, "key_length_mla": 192, "value_length_mla": 128}
    keys = {"block_count": 2, "context_length": 4096, "embedding_length": 512, "attention.head_count": 8, "attention.head_count_kv": 1}
    keys |= {f"attention.{name}": value for name, value in sizes.items()}
    fields = {"general.architecture": "deepseek2", **{f"deepseek2.{name}": value for name, value in keys.items()}}
    monkeypatch.setattr(headers, "read", lambda spec: Header(spec, "latent", fields, (), None))
    done = cli("plan", "org/latent", "--memory", "1GiB")
    assert done.exit_code == 0, done.output
    assert "turbo4t: it has multi-head latent attention" in done.output
    assert cells(done.output, "f16")[1] == "2,304" and cells(done.output, "turbo4t")[1] == "-"
    served = cli("serve", "org/latent", "--dry-run", "--memory", "1GiB")
    assert command_of(served)[-1] == "f16"
    asked = cli("serve", "org/latent", "--dry-run", "--memory", "1GiB", "--type", "turbo3")
    assert asked.exit_code == 2 and "can have none of turbo3: it has multi-head latent attention" in asked.output


@pytest.mark.parametrize("text", ["24", "24GiB", "1.5G", "512M", "100 kB"])
def test_amounts(model: Path, text: str) -> None:
    assert cli("plan", model, "--memory", text, "--types", "f16").exit_code == 0


def test_wrong_usage(model: Path, tmp_path: Path) -> None:
    assert cli("plan", model, "--memory", "much").exit_code == 2
    assert cli("plan", tmp_path / "nothing.gguf").exit_code == 2
    assert cli("plan", model, "--types", "f17").exit_code == 2


def test_a_build_that_was_made(model: Path, server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "found", lambda *_, **__: server)
    assert "dry run of llama-server" in cli("plan", model, "--types", "f16", "--ctx", "512").output


# --- serve ----------------------------------------------------------------------------------------------------------------


def command_of(done: Result) -> list[str]:
    """The command that was printed."""
    return shlex.split(next(line for line in done.stdout.splitlines() if "llama-server" in line))


def test_the_best_type_that_fits(model: Path, server: Path) -> None:
    """turbo4t, and a smaller one where its cache is too large."""
    base = ("serve", model, "--dry-run", "--server", server, "--ctx", "65536", "--memory")
    done = cli(*base, "1GiB")
    assert done.exit_code == 0, done.output
    assert command_of(done) == [str(server), "-m", str(model), *["-c", "65536", "-np", "1", "-ctk", "turbo4t", "-ctv", "turbo4t"]]
    assert "turbo4t: 65,536 tokens; takes" in done.stderr
    small = cli(*base, f"{fake_llama.COMPUTE_MIB + 4 + int(mib('turbo3t', 65536))}MiB")
    assert command_of(small)[-1] == "turbo3t"
    assert "turbo4t would not fit" in small.stderr


def test_as_many_tokens_as_fit(model: Path, server: Path) -> None:
    done = cli("serve", model, "--dry-run", "--server", server, "--memory", f"{fake_llama.COMPUTE_MIB + 12}MiB")
    command = command_of(done)
    assert command[-1] == "turbo4t" and 256 < int(command[4]) < 65536


def test_a_type_of_ones_own_and_options(model: Path, server: Path) -> None:
    args = ("--dry-run", "--server", server, "--type", "q8_0 sink=4 tail=64", "--ctx", "1024", "--", "-t", "3")
    done = cli("serve", model, *args)
    assert " ".join(command_of(done)).endswith("-ctk q8_0 -ctv q8_0 --cache-sink 4 --cache-tail 64 -t 3")


def test_serve_on_a_gpu(model: Path, server: Path) -> None:
    """The type that fits the memory of the GPU that was named."""
    server.with_name("devices").write_text(GPUS.replace("4000 MiB free", f"{1024 + 1 + int(mib('turbo3t', 65536)) + 1} MiB free"))
    done = cli("serve", model, "--dry-run", "--server", server, "--ctx", "65536", "--device", "1")
    assert " ".join(command_of(done)).endswith("-ctk turbo3t -ctv turbo3t -dev CUDA1")
    assert "(free of 5000.00 MiB on CUDA1, less 1 GiB)" in done.stderr and "turbo4t would not fit" in done.stderr
    assert cli("serve", model, "--dry-run", "--server", server, "--", "-dev", "CUDA1").exit_code == 2


def test_a_model_that_can_have_none_of_ours(tmp_path: Path, server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama-server says so, of an architecture that is not known here."""
    monkeypatch.setattr("turbo_gguf.plan.architectures.KNOWN", frozenset())
    path = tiny_gguf.write(tmp_path / "refused.gguf")
    done = cli("serve", path, "--dry-run", "--server", server, "--ctx", "1024")
    assert command_of(done)[-1] == "f16", done.output
    refused = cli("serve", path, "--dry-run", "--server", server, "--type", "turbo3")
    assert refused.exit_code == 2 and "can have none of turbo3: this model can't have it" in refused.output
    assert cli("plan", path, "--types", "f16").exit_code == 2, "without a build nobody can tell"


def test_nothing_to_serve_with(model: Path, server: Path) -> None:
    done = cli("serve", model, "--dry-run", "--server", server, "--ctx", "65536", "--memory", "20MiB")
    assert done.exit_code == 3
    assert "65,536 tokens in turbo2t take" in done.output and "hint: --ctx" in done.output
    assert "hint: take a smaller model" in cli("serve", model, "--dry-run", "--server", server, "--memory", "2MiB").output


def test_options_that_a_plan_decides(model: Path, server: Path) -> None:
    for option, hint in (("-c", "say --ctx"), ("--cache-type-k=f16", "say --type"), ("-m", "name the model in front")):
        done = cli("serve", model, "--dry-run", "--server", server, "--", option, "1")
        assert done.exit_code == 2 and hint in done.output, done.output


@pytest.mark.parametrize(
    ("mode", "ending"),
    [
        ("memory", (3, "hint: name a shorter --ctx")),
        ("killed", (3, "hint: name a shorter --ctx")),
        ("port", (3, "is in use")),
        ("dies", (4, "exit code 3")),
    ],
)
def test_a_server_that_ends(model: Path, server: Path, port: int, mode: str, ending: tuple[int, str]) -> None:
    code, message = ending
    server.with_name("mode").write_text(mode)
    done = cli("serve", model, "--server", server, "--ctx", "1024", "--", "--port", port)
    assert done.exit_code == code, done.output
    assert (message in done.output and "log: " in done.output) or "is in use" in done.output


def test_a_port_that_is_taken(model: Path, server: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        done = cli("serve", model, "--server", server, "--", "--port", number)
    assert done.exit_code == 3
    assert f"port {number} of 127.0.0.1 is in use" in done.output and f"--port {number + 1}" in done.output
    for wrong in ("x", "80000"):
        assert cli("serve", model, "--server", server, "--", "--port", wrong).exit_code == 2


def test_where_it_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.address(["-t", "2"]) == launch.Address("127.0.0.1", 8080)
    monkeypatch.setenv("LLAMA_ARG_PORT", "9")
    assert launch.address(["--host", "0.0.0.0", "--api-prefix", "/v"]) == launch.Address("0.0.0.0", 9, "/v")
    assert launch.address(["--port", "7"]).port == 7
    assert launch.Address("::", 7).url == "http://127.0.0.1:7" and launch.Address("::1", 7).url == "http://[::1]:7"


def test_options_that_llama_server_does_not_know(model: Path, server: Path) -> None:
    done = cli("serve", model, "--server", server, "--ctx", "1024", "--", "--nonsense")
    assert done.exit_code == 2, done.output
    assert "error: llama-server: invalid argument: --nonsense" in done.output and f"{server} --help" in done.output
    before = cli("serve", model, "--port", "8081")
    assert before.exit_code == 2 and "Options of llama-server stand behind --: -- --port" in before.output


def test_more_tokens_than_the_model_was_trained_for(model: Path, server: Path) -> None:
    args = ("serve", model, "--dry-run", "--server", server, "--ctx")
    assert "note: the model was trained for 65,536 tokens" in cli(*args, "65537").stderr
    assert "note:" not in cli(*args, "65536").stderr + cli(*args, "131072", "-np", "4", "-kvu").stderr, "a pool is for all slots"


class Serving(NamedTuple):
    """A server of a user that was ended."""

    code: int
    out: str
    said: str  # before it was ready
    rest: str


def serve(model: Path, server: Path, port: int, sign: signal.Signals) -> Serving:
    """Start it, wait until it is ready, and end it."""
    argv = [sys.executable, "-m", "turbo_gguf", "serve", str(model), "--server", str(server), "--ctx", "1024", "--", "--port", str(port)]
    # a parent that ignores SIGINT (nohup, a job in the background) hands that on
    allow = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(argv, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=allow) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("ready: "):
                break
        process.send_signal(sign)
        out, rest = process.communicate(timeout=30)
    return Serving(process.returncode, out, "".join(said), rest)


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_ctrl_c_ends_both(model: Path, server: Path, port: int, sign: signal.Signals, code: int) -> None:
    done = serve(model, server, port, sign)
    assert done.code == code, done
    assert f"listening on http://127.0.0.1:{port}\n" in done.said and f"ready: http://127.0.0.1:{port}\n" in done.said
    assert "-ctk turbo4t" in done.out
    deadline = time.monotonic() + 5
    while not server.with_name("ended").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.with_name("ended").exists(), "the server was asked to end"


def test_any_port_and_a_server_that_says_nothing(model: Path, server: Path, port: int) -> None:
    """The log tells the one, /health the other."""
    said = serve(model, server, 0, signal.SIGINT).said
    assert re.search(r"^ready: http://127\.0\.0\.1:[1-9]\d+$", said, re.MULTILINE), said
    server.with_name("mode").write_text("quiet")
    said = serve(model, server, port, signal.SIGINT).said
    assert f"ready: http://127.0.0.1:{port}\n" in said and "listening" not in said
