"""Sweeps of loads on a stand-in for llama-server. Risks: unequal budgets, loads lost or made twice, crashes that look like results."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import fake_server
import msgspec
import pytest
from click.testing import CliRunner, Result
from fake_server import Plan
from measuring import MODEL, fake_build

from turbo_gguf.cache.spec import CacheSpec, parse_types
from turbo_gguf.cli import bench_serve, main
from turbo_gguf.errors import SilentFallback, ToolFailed, UsageError
from turbo_gguf.inputs.models import TextFile
from turbo_gguf.judge import serving
from turbo_gguf.measure import serve
from turbo_gguf.measure.result import ServeRow
from turbo_gguf.measure.serve import ServePlan
from turbo_gguf.measure.store import Store

ROOT = Path(__file__).resolve().parents[2]
_PROGRAM = f"""#!{sys.executable}
import sys
sys.path[:0] = [{str(Path(fake_server.__file__).parent)!r}, {str(ROOT)!r}]
import fake_server
fake_server.main()
"""
F16, TURBO = parse_types("f16"), parse_types("turbo3t")


class Bench:
    def __init__(self, folder: Path) -> None:
        self.build = fake_build(folder, "llama-server", _PROGRAM)
        self.bin = self.build.path / "bin"
        self.text = TextFile(path=folder / "prose.txt", sha256="t", name="prose.txt", size=4)
        self.text.path.write_text("text")
        self.store = Store(folder / "results")
        self.words: list[str] = []

    def plan(self, **changes: object) -> ServePlan:
        plan = ServePlan(
            types=(F16, TURBO),
            clients=(1, 3),
            prompts=(500, 900),
            n_gen=4,
            requests=2,
            ctx=1024,
            budget_mib=None,
            plain_slots=4,
            batch=512,
            rounds=1,
            timeout=30,
            threads=2,
            backend="CPU",
        )
        return msgspec.structs.replace(plan, **changes)

    def run(self, **changes: object) -> list[ServeRow]:
        return serve.run(self.plan(**changes), self.build, MODEL, self.text, store=self.store, say=self.words.append)

    def go_wrong(self, **plan: object) -> None:
        (self.bin / "plan.json").write_bytes(msgspec.json.encode(Plan(**plan)))  # type: ignore[arg-type]

    def calls(self) -> list[str]:
        """Types and slots of each server, those of the probes among them."""
        path = self.bin / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        words = [line.split() for line in lines]
        return [f"{w[w.index('-ctk') + 1]} x{w[w.index('-np') + 1]}" for w in words]


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path))
    return Bench(tmp_path)


def test_every_type_has_the_slots_that_the_budget_holds(sweep: Bench) -> None:
    """A slot of 1,024 tokens takes 4 MiB in f16, and .8125 MiB and .375 MiB of copies in turbo3t."""
    types = tuple(map(parse_types, ("f16", "q8_0", "q4_0", "turbo3t", "turbo3t cal=none sink=0 tail=0")))
    rows = sweep.run(types=types, clients=(1,))
    assert sweep.calls() == ["f16 x1", "q8_0 x1", "q4_0 x1", "turbo3t x1", "turbo3t x1", *sweep.calls()[5:]], (
        "each is looked at with one slot"
    )
    assert [(str(row.types), row.slots) for row in rows] == list(zip(map(str, types), (4, 7, 14, 13, 19), strict=True))
    assert sweep.calls()[5:] == ["f16 x4", "q8_0 x7", "q4_0 x14", "turbo3t x13", "turbo3t x19"], "and then measured with all"
    assert {row.budget_mib for row in rows} == {16.0}
    assert [row.slot_mib for row in rows] == pytest.approx([4, 2.125, 1.125, 1.1875, 0.8125], abs=0.006)


def test_a_budget_that_is_named(sweep: Bench) -> None:
    assert [row.slots for row in sweep.run(budget_mib=9.0, clients=(1,))] == [2, 7]
    with pytest.raises(UsageError, match=r"a budget of 3.0 MiB has no room for a slot of f16, which takes 4.0 MiB"):
        sweep.run(budget_mib=3.0)
    assert serve.slots_in(1e9, 1.0) == serve.MAX_SLOTS


def test_a_budget_that_is_made_of_slots_holds_them() -> None:
    assert all(serve.slots_in(n * 0.1, 0.1) == n for n in range(1, 100)), "30 * .1 / .1 is a little less than 30"
    assert serve.slots_in(39.99, 10.0) == 3


def test_all_types_get_the_same_requests(sweep: Bench) -> None:
    plan, tokens = sweep.plan(), range(3000)
    made = serve.requests(tokens, plan, 5, 0)
    assert [len(request.prompt) for request in made] == [500, 900, 500, 900, 500]
    assert len({request.prompt[0] for request in made}) == 5, "no prompt begins as another one does"
    assert all(request.prompt == tuple(range(request.prompt[0], request.prompt[0] + len(request.prompt))) for request in made)
    assert len(serve.requests(tokens, plan, 1, 0)) == 2, "not fewer than asked for"
    assert serve.requests(tokens, plan, 5, 1) != made, "a second round asks for something else"


def test_loads_alternate_between_the_types_and_are_kept(sweep: Bench) -> None:
    rows = sweep.run()
    assert [(row.clients, str(row.types), len(row.answers)) for row in rows] == [
        (1, "f16", 2),
        (1, "turbo3t", 2),
        (3, "f16", 3),
        (3, "turbo3t", 3),
    ]
    assert sweep.calls() == ["f16 x1", "turbo3t x1"] + ["f16 x4", "turbo3t x13"] * 2
    assert all(answer.tokens == 4 and not answer.error for row in rows for answer in row.answers)
    if sys.platform == "linux":
        assert all(row.peak_mib is not None and 5 < row.peak_mib < 500 for row in rows)
    assert sweep.run() == rows == sweep.store.serve_rows()
    assert sweep.calls()[6:] == ["f16 x1", "turbo3t x1"], "nothing is measured again"


def test_an_interrupted_sweep_goes_on(sweep: Bench) -> None:
    def stop(words: str) -> None:
        if words.startswith("[3/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serve.run(sweep.plan(), sweep.build, MODEL, sweep.text, store=sweep.store, say=stop)
    first = sweep.store.serve_rows()
    assert [row.clients for row in first] == [1, 1]
    before = len(sweep.calls())
    assert sweep.run()[:2] == first
    assert sweep.calls()[before:] == ["f16 x1", "turbo3t x1", "f16 x4", "turbo3t x13"]


def test_another_set_up_starts_anew(sweep: Bench) -> None:
    sweep.run(clients=(1,))
    for changes in ({"n_gen": 5}, {"threads": 1}, {"budget_mib": 20.0}, {"prompts": (500,)}, {"batch": 256}, {"requests": 3}):
        before = len(sweep.calls())
        sweep.run(clients=(1,), **changes)
        assert len(sweep.calls()) == before + 4, changes
    assert len(sweep.run(clients=(1,), rounds=2)) == 4
    assert len(sweep.store.serve_rows()) == 2 * 7 + 2


def test_types_that_differ_in_a_setting_are_told_apart(sweep: Bench) -> None:
    plain = parse_types("turbo3t cal=none sink=0 tail=0")
    assert [row.types for row in sweep.run(types=(F16, TURBO), clients=(1,))] == [F16, TURBO]
    assert [row.types for row in sweep.run(types=(F16, plain), clients=(1,))] == [F16, plain]
    assert [row.slots for row in sweep.store.serve_rows()] == [4, 13, 19]


def test_more_slots_shorten_the_wait(sweep: Bench) -> None:
    """Eight clients, four slots of f16 and thirteen of turbo3t: half of the requests wait for a whole answer, or none does."""
    sweep.go_wrong(delay=0.05)
    found = serving.loads(sweep.run(clients=(8,), prompts=(500,), n_gen=10))
    f16, turbo = found
    assert f16.first_p99 > 10 * 0.05 and turbo.first_p99 < f16.first_p99 / 2
    assert turbo.speed > 1.2 * f16.speed


def test_failures_are_counted(sweep: Bench) -> None:
    sweep.go_wrong(length=900, failure="refused")
    rows = sweep.run(clients=(1,), requests=4)
    for found, row in zip(serving.loads(rows), rows, strict=True):
        assert found.failures == ("HTTP 503: no slot for you",) * 2 and found.requests == 4
        assert found.speed == pytest.approx(2 * 4 / row.seconds)
    assert len(sweep.store.serve_rows()) == 2


@pytest.mark.parametrize(
    ("plan", "error", "words"),
    [
        ({"length": 500, "failure": "refused"}, ToolFailed, "f16 answered none of 2 requests: HTTP 503: no slot for you; log: "),
        ({"length": 500, "failure": "killed"}, ToolFailed, "llama-server: exit code 1; log: "),
        ({"start": "dies"}, ToolFailed, "llama-server: exit code 1; log: (.|\n)*no such model"),
        ({"swap": "q8_0"}, SilentFallback, "is q8_0; asked for was f16; log: "),
        ({"ctx": 512}, SilentFallback, "a slot has 512 tokens; asked for were 1024; log: "),
        ({"factor": 1.2}, SilentFallback, r"the cache of f16 takes 19\.\d+ to 19\.\d+ bits per value"),
        ({"slots": 2}, SilentFallback, "has room for 2 sequences; asked for were 1 slots; log: "),
    ],
)
def test_what_is_not_sound_is_not_stored(sweep: Bench, plan: dict[str, object], error: type[Exception], words: str) -> None:
    sweep.go_wrong(**plan)
    with pytest.raises(error, match=words):
        sweep.run(prompts=(500,))
    assert sweep.store.serve_rows() == []


def test_a_server_that_takes_more_than_the_budget(sweep: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots need not take as much as one slot alone does."""
    monkeypatch.setattr(serve, "slots_in", lambda budget, slot: int(budget / slot) + 1)
    with pytest.raises(SilentFallback, match=r"5 slots take 20.00 MiB, the budget is 16.00 MiB"):
        sweep.run()
    assert sweep.store.serve_rows() == []


def test_plans_that_do_not_fit(sweep: Bench) -> None:
    with pytest.raises(UsageError, match="trained on 2048"):
        sweep.run(prompts=(2047,), ctx=2304)
    with pytest.raises(UsageError, match="slots of 768 tokens: a prompt of 900"):
        sweep.run(ctx=768)
    with pytest.raises(UsageError, match="there is no layer 4"):
        sweep.run(types=(F16, parse_types("turbo3 k=4:q8_0")))
    with pytest.raises(UsageError, match="head size 80"):
        serve.check_fit(sweep.plan(types=(CacheSpec("turbo3t", "turbo3t"),)), msgspec.structs.replace(MODEL, head_k=80, head_v=80))
    assert sweep.calls() == []
    sweep.go_wrong(tokens=900)
    with pytest.raises(UsageError, match=r"text prose.txt: 900 tokens, a prompt takes 900"):
        sweep.run()


@pytest.mark.parametrize(("prompts", "n_gen", "ctx"), [((512,), 64, 768), ((100, 4096), 64, 4352), ((192,), 63, 256), ((192,), 64, 512)])
def test_slots_hold_the_longest_prompt_and_its_answer(prompts: tuple[int, ...], n_gen: int, ctx: int) -> None:
    assert serve.slot_ctx(prompts, n_gen) == ctx


# --- the command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(sweep: Bench, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setattr(bench_serve, "ensure_build", lambda *_, **__: sweep.build)
    return lambda *args: CliRunner().invoke(main, ["bench-serve", *args])


def test_command_writes_table_plot_and_lines(sweep: Bench, command: Callable[..., Result], tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = "--types", "turbo3t,turbo4t/turbo3t sink=8", "-c", "2", "-c", "1", "-p", "300", "-p", "500", "-n", "4", "--requests", "2"
    result = command(*text, "--out", str(out))
    assert result.exit_code == 0, result.output
    assert result.stdout.count("### ") == 2 and "| `turbo4t/turbo3t sink=8` |" in result.stdout
    assert (out / "table.md").read_text().endswith(result.stdout) and (out / "plot.png").is_file()
    rows = [json.loads(line) for line in (out / "loads.jsonl").read_text().splitlines()]
    assert [(row["clients"], row["types"]["k"], row["ctx"], len(row["answers"])) for row in rows] == [
        (clients, types, 512, 2) for clients in (1, 2) for types in ("f16", "turbo3t", "turbo4t")
    ]
    assert str(tmp_path) not in (out / "loads.jsonl").read_text(), "it may be handed on"
    assert any(str(tmp_path) in word for row in sweep.store.serve_rows() for word in row.argv), "the store says it all"


def test_command_takes_the_prompts_that_the_model_was_trained_for(sweep: Bench, command: Callable[..., Result]) -> None:
    """The embedded model: 4,096 tokens, and the answer counts."""
    result = command("--types", "f16", "-c", "1", "-n", "4", "--requests", "5")
    assert result.exit_code == 0, result.output
    assert "prompts of 512, 1,024, 2,048 tokens, 4 generated" in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("-p", "4096"), "was trained on 4096"),
        (("--ctx", "512", "-p", "512"), "hint: use --ctx 768 or more"),
        (("--types", "turbo9"), "unknown cache type 'turbo9'"),
        (("--clients", "0"), "Invalid value for '--clients'"),
        (("--budget", "0"), "Invalid value for '--budget'"),
        (("--budget", "0.1", "-p", "100"), "hint: use a larger --budget"),
    ],
)
def test_wrong_command_lines_are_2(command: Callable[..., Result], args: tuple[str, ...], message: str) -> None:
    result = command(*args)
    assert result.exit_code == 2, result.output
    assert message in result.stderr


def test_a_crash_is_4_and_failures_are_a_result(sweep: Bench, command: Callable[..., Result]) -> None:
    args = ("--types", "f16", "-c", "1", "-p", "100", "-p", "200", "-n", "4", "--requests", "2")
    sweep.go_wrong(length=200, failure="killed")
    result = command(*args)
    assert result.exit_code == 4 and "hint: the log says more; a crash is no verdict on speed" in result.stderr
    sweep.go_wrong(length=200, failure="refused")
    result = command(*args)
    assert result.exit_code == 0 and "HTTP 503: no slot for you" in result.stdout
