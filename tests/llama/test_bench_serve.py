"""``bench-serve`` with the real llama-server: slots that fit, complete answers under load, and a budget that is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from turbo_gguf.cache.spec import parse_types
from turbo_gguf.inputs import models
from turbo_gguf.judge import serving
from turbo_gguf.make.build import Build
from turbo_gguf.measure import serve, server
from turbo_gguf.measure.serve import ServePlan
from turbo_gguf.measure.store import Store
from turbo_gguf.patchset.tree import Tree

pytestmark = pytest.mark.native

TYPES = tuple(map(parse_types, ("f16", "q4_0", "turbo3t", "turbo3t cal=none sink=0 tail=0", "turbo4t/turbo2t tail=16")))


def build_of(native_bin: Path) -> Build:
    tree = Tree(path=native_bin, upstream="u", commit="c", digest="d")
    return Build(id="b", path=native_bin.parent, preset="cpu", tree=tree, compiler="cc")


def test_loads(native_bin: Path, tiny: Callable[[str], Path], prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More clients than f16 has slots: all types answer everything, and those of few bits have more slots in the same memory."""
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path / "home"))
    build = build_of(native_bin)
    plan = ServePlan(
        types=TYPES,
        clients=(5,),
        prompts=(40, 400),
        n_gen=8,
        requests=6,
        ctx=serve.slot_ctx((400,), 8),
        budget_mib=None,
        plain_slots=2,
        batch=128,
        rounds=1,
        timeout=120,
        threads=1,
        backend="CPU",
    )
    said: list[str] = []
    rows = serve.run(
        plan, build, models.read(tiny("layers12")), models.text_file(prose), store=Store(tmp_path / "results"), say=said.append
    )
    for row in rows:
        assert [answer.error for answer in row.answers] == [""] * 6
        assert [answer.prompt for answer in row.answers] == [40, 400] * 3
        assert all(answer.tokens >= 8 and answer.first is not None for answer in row.answers)
        mib = sum(cache.mib_k + cache.mib_v + (cache.copies.mib if cache.copies else 0) for cache in row.facts.caches)
        assert mib < row.budget_mib + 0.02 and mib + row.slot_mib > row.budget_mib - 0.02, "all that fit, and no more"
        assert row.facts.caches[0].streams == row.slots and row.facts.n_ctx_seq == 512
    slots = dict(zip(map(str, TYPES), (row.slots for row in rows), strict=True))
    assert slots["f16"] == 2 and slots["q4_0"] == 7, "4.5 of 16 bits"
    assert slots["turbo3t cal=none sink=0 tail=0"] == 9, "3.25 bits"
    assert slots["turbo3t"] < 9, "copies of exact tokens take memory"
    assert all(load.speed > 0 and load.failures == () for load in serving.loads(rows))
    assert serving.table(rows).count("turbo4t/turbo2t tail=16") == 2


def test_a_slot_that_is_too_short_is_a_failure(
    native_bin: Path, tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server cuts the answer, and says so: a request with fewer tokens than asked for is not counted."""
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path / "home"))
    build = build_of(native_bin)
    shape = server.Shape(TYPES[0], 1, 256, 128, 1, "CPU", 1)
    requests = [serve.Request(tuple(range(3, 243)), 8), serve.Request(tuple(range(3, 243)), 64), serve.Request(tuple(range(3, 259)) * 2, 8)]
    with server.started(shape, build, models.read(tiny("head64")), tmp_path / "server") as running:
        answers, _ = serve.load.drive(running.port, requests, clients=1, timeout=60)
    assert answers[0].error == "" and answers[0].tokens == 8
    assert answers[1].error.endswith("tokens of 64 (limit)")
    assert "exceeds the available context size" in answers[2].error
