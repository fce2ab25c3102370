"""A short soak of the real llama-server, and what a soak has to find."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import cast

import pytest
from server import Server
from soak import traffic
from soak.__main__ import main

pytestmark = pytest.mark.native

HALF_A_MINUTE = ("--minutes", "0.5", "--types", "turbo3t", "--seed", "1")


def run(native_bin: Path, out: Path, *options: str) -> tuple[int, list[dict[str, object]]]:
    """Exit code, and what is in the log."""
    rc = main([*HALF_A_MINUTE, "--bin", str(native_bin), "--out", str(out), *options])
    return rc, [json.loads(line) for line in (out / "soak.jsonl").read_text("utf-8").splitlines()]


def wrapper(native_bin: Path, folder: Path, script: str) -> Path:
    """Folder of a llama-server that is started by a script: ``$n`` counts the starts, ``$server`` is the real one."""
    folder.mkdir()
    program = folder / "llama-server"
    program.write_text(f'#!/bin/sh\nserver={native_bin}/llama-server\necho >> "$0.starts"\nn=$(grep -c "" "$0.starts")\n{script}\n')
    program.chmod(0o755)
    return folder


def failed(events: list[dict[str, object]]) -> str:
    """Why the first server failed."""
    return next(f"{event['phase']}: {event['why']}" for event in events if event["event"] == "failed")


def test_a_short_soak(native_bin: Path, tmp_path: Path) -> None:
    rc, events = run(native_bin, tmp_path, "--minutes", "1", "--types", "turbo3t tail=1024")
    assert rc == 0, (tmp_path / "summary.md").read_text("utf-8")
    assert [event["server"] for event in events if event["event"] == "begin"] == ["parts", "pool"]
    kinds = {event["event"] for event in events}
    assert kinds == {"begin", "traffic", "probes", "resident", "memory", "full disk", "kill", "starved"}
    assert {event["when"] for event in events if event["event"] == "probes"} >= {"fresh", "life", "restored"}
    done = {what.split()[0] for event in events for what in event.get("counts", ())}  # type: ignore[attr-defined]
    assert done == {action.__name__ for action in traffic.ACTIONS}
    assert any(str(event["how"]).startswith("ended") for event in events if event["event"] == "starved")
    assert "against f16" in (tmp_path / "summary.md").read_text("utf-8")


def test_a_wrong_answer_fails(native_bin: Path, tmp_path: Path) -> None:
    """From the second start on the server has another cache."""
    other = wrapper(native_bin, tmp_path / "bin", 'test $n -gt 1 && set -- "$@" --cache-tail 0\nexec "$server" "$@"')
    rc, events = run(other, tmp_path)
    assert rc == 1
    assert failed(events).startswith("long life: Wrong: answers differ from a fresh server's by ")


def test_a_server_that_dies_fails(native_bin: Path, tmp_path: Path) -> None:
    """Not by our hand."""
    mortal = wrapper(native_bin, tmp_path / "bin", '(sleep 5; kill -KILL $$) & exec "$server" "$@"')
    rc, events = run(mortal, tmp_path)
    assert rc == 1
    why = failed(events)
    assert why.startswith("long life: Ended: llama-server ended with ") and "; log: " in why


def test_a_stream_that_ends_with_an_error_is_refused() -> None:
    """Which a server without room may do, and no other."""

    class Failing:
        def send(self, path: str, body: bytes) -> tuple[int, bytes]:
            del path, body
            return 200, b'data: {"content":"a","stop":false}\n\ndata: {"error":{"code":500,"message":"no room"}}\n\n'

    worker = traffic.Worker(cast(Server, Failing()), range(1000), random.Random(1), names_slots=False)
    for action in (traffic.streamed, traffic.chat):
        with pytest.raises(traffic.Refused, match="no room"):
            action(worker)


def test_memory_that_grows_fails(native_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By ten MiB in each round."""
    sizes = (n << 20 for n in itertools.count(30, 10))
    monkeypatch.setattr(Server, "memory", lambda *_: next(sizes))
    rc, events = run(native_bin, tmp_path)
    assert rc == 1
    assert failed(events).startswith("long life: Wrong: resident memory grew by ")


def test_an_interrupted_soak_keeps_what_it_has(native_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds, drive = itertools.count(), traffic.drive

    def interrupted(*args: object, **more: object) -> object:
        if next(rounds) == 3:
            raise KeyboardInterrupt
        return drive(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(traffic, "drive", interrupted)
    rc, events = run(native_bin, tmp_path)
    assert rc == 130
    assert [event["event"] for event in events].count("traffic") == 3
    assert events[-1]["event"] == "interrupted"
    assert "| turbo3t, parts |" in (tmp_path / "summary.md").read_text("utf-8")


@pytest.mark.parametrize(
    "options", [("--minutes", "0"), ("--types", "turbo9"), ("--model", "missing.gguf"), ("--preset", "nonsense")], ids=str
)
def test_bad_input(tmp_path: Path, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), *options]) == 2
    assert capsys.readouterr().err.startswith("error: ")
