"""Random walks over what may happen to the slots of a server: each answer is f16's within the noise, and a replay gives the same bits.

``TURBO_GGUF_WALKS=100`` takes so many walks for each way to start a server, and new ones each time. A walk that fails is made shorter,
and printed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st
from slots import EXACT, LOSS, NOISE, PACKED, WINDOW, Client, Reply, Start, apart, characters, starter

pytestmark = pytest.mark.native

WALKS = int(os.environ.get("TURBO_GGUF_WALKS", "0"))

N_SLOTS = 3
N_CTX = 256  # of a slot

SERVERS = {
    "streams": ("--no-kv-unified", "--cache-ram", "0"),
    "unified": ("--kv-unified-per-slot", str(N_CTX), "--kv-unified", "--cache-ram", "64", "--no-cache-idle-slots"),
    "idle": ("--kv-unified-per-slot", str(N_CTX), "--kv-unified", "--cache-ram", "64", "--cache-idle-slots", "-b", "64", "-ub", "32"),
}
"""Cells of its own for each slot, shared ones, and slots that wait in memory."""

OPTIONS = ("-np", str(N_SLOTS), "-c", str(N_SLOTS * N_CTX), "--context-shift", "--cache-reuse", "8")


@dataclass(frozen=True)
class Read:
    """A prompt with a part left out, and text that may be longer than what is left of the context."""

    slot: int  # -1: the server chooses
    begin: int
    end: int
    gap: int
    n: int

    def run(self, server: Client, text: str, *, is_replay: bool) -> Reply:
        del is_replay
        part = text[self.begin : self.begin + self.end]
        prompt = part[: len(part) // 3] + part[len(part) // 3 + self.gap :]
        return server.read(prompt, text[3000 : 3000 + self.n], self.slot, n_keep=8)


@dataclass(frozen=True)
class Save:
    slot: int
    name: str

    def run(self, server: Client, text: str, *, is_replay: bool) -> None:
        del text, is_replay
        server.save(self.slot, self.name)


@dataclass(frozen=True)
class Restore:
    """Of a file that may not be there yet."""

    slot: int
    name: str

    def run(self, server: Client, text: str, *, is_replay: bool) -> None:
        del text, is_replay
        if (server.folder / self.name).exists():
            server.restore(self.slot, self.name)


@dataclass(frozen=True)
class Erase:
    slot: int

    def run(self, server: Client, text: str, *, is_replay: bool) -> None:
        del text, is_replay
        server.erase(self.slot)


@dataclass(frozen=True)
class Cancel:
    """A client that goes away, and one that asks the same. A replay is without the first: how far the server came is never the same, and
    cells that are taken then are others.
    """

    slot: int
    end: int
    events: int

    def run(self, server: Client, text: str, *, is_replay: bool) -> Reply:
        if is_replay:
            server.erase(self.slot)
        else:
            server.cancel(text[: self.end], text[3000:3060], self.events, self.slot)
        return replace(server.read(text[: self.end], text[3000:3008], self.slot), reused=0, computed=0)


@dataclass(frozen=True)
class Restart:
    """The server ends, and starts with empty slots."""


Step = Read | Save | Restore | Erase | Cancel | Restart

SLOTS = st.integers(0, N_SLOTS - 1)
NAMES = st.sampled_from(["one", "two"])
READS = st.builds(
    Read,
    slot=st.integers(-1, N_SLOTS - 1),
    begin=st.sampled_from([0, 0, 0, 700]),
    end=st.integers(1, 230),
    gap=st.sampled_from([0, 0, 5, 40]),
    n=st.sampled_from([1, 3, 8, 20, 200]),
)
STEPS = st.one_of(
    *[READS] * 5,
    st.builds(Save, SLOTS, NAMES),
    st.builds(Restore, SLOTS, NAMES),
    st.builds(Erase, SLOTS),
    st.builds(Cancel, SLOTS, st.integers(1, 150), st.integers(1, 20)),
    st.just(Restart()),
)


def walk(start: Start, steps: list[Step], text: str, *, is_replay: bool) -> list[Reply]:
    """All answers."""
    found: list[Reply] = []
    rest = iter(steps)
    is_over, is_new = False, True
    while not is_over:
        with start(*OPTIONS) as server:
            if is_new:
                for name in ("one", "two"):
                    (server.folder / name).unlink(missing_ok=True)
            is_new = False
            for step in rest:
                if isinstance(step, Restart):
                    break
                reply = step.run(server, text, is_replay=is_replay)
                if reply is not None:
                    found.append(reply)
            else:
                is_over = True
    return found


def same(a: list[Reply], b: list[Reply]) -> list[bool]:
    """Bit by bit."""
    return [
        bool((x.rows == y.rows).all()) and (x.reused, x.computed, x.truncated) == (y.reused, y.computed, y.truncated)
        for x, y in zip(a, b, strict=True)
    ]


def known(steps: list[Step], reused: list[int]) -> list[int]:
    """Those of answers without a cancelled request before them: how far a server came with it decides whether it keeps the prompt."""
    found: list[int] = []
    rest = iter(reused)
    is_known = True
    for step in steps:
        if isinstance(step, Restart):
            is_known = True
        if isinstance(step, Cancel):
            is_known = False
        if isinstance(step, Read | Cancel):
            n = next(rest)
            found += [n] * is_known
    return found


def test_known() -> None:
    read = Read(0, 0, 9, 0, 1)
    steps: list[Step] = [read, Cancel(0, 9, 1), read, Restart(), Save(0, "one"), read]
    assert known(steps, [1, 0, 2, 3]) == [1, 3]


@pytest.mark.parametrize("server", SERVERS)
def test_walks(native_bin: Path, tiny: Callable[[str], Path], prose: Path, tmp_path: Path, server: str) -> None:
    text = characters(prose)
    kinds = {"exact": EXACT, "window": WINDOW, "packed": PACKED}
    starts = {kind: starter(native_bin, tiny("head64"), tmp_path / kind, *kinds[kind], *SERVERS[server]) for kind in kinds}
    noises, losses, shifts = [], [], 0

    @seed(int.from_bytes(os.urandom(4)) if WALKS else list(SERVERS).index(server))
    @settings(
        max_examples=WALKS or 3,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(STEPS, min_size=20, max_size=40))
    def check(steps: list[Step]) -> None:
        nonlocal shifts
        exact, window, packed = (walk(starts[kind], steps, text, is_replay=kind == "packed") for kind in kinds)
        noise = [apart(*pair) for pair in zip(exact, window, strict=True)]
        note(f"noise {[f'{value:.4f}' for value in noise]}")
        assert max(noise, default=0) <= NOISE
        assert known(steps, [reply.reused for reply in exact]) == known(steps, [reply.reused for reply in window])
        assert all(same(packed, walk(starts["packed"], steps, text, is_replay=True)))
        noises.extend(noise)
        losses.extend(apart(*pair) for pair in zip(exact, packed, strict=True))
        shifts += sum(reply.truncated for reply in exact)

    check()
    print(f"{server}: {len(noises)} answers, {shifts} with shifts, noise up to {max(noises):.4f}, packed up to {max(losses):.3f}")
    assert len(noises) > 10 and shifts > 0
    assert max(losses) > LOSS  # control: a cache that is not exact is far away


@pytest.mark.parametrize("slot", [0, -1])
def test_a_walk_with_a_fault_shows(native_bin: Path, tiny: Callable[[str], Path], prose: Path, tmp_path: Path, slot: int) -> None:
    """Control: one other character in what an earlier step has left in the cache."""
    text = characters(prose)
    steps: list[Step] = [Read(slot, 0, 150, 0, 8), Read(1, 700, 100, 5, 8), Read(slot, 0, 200, 0, 8)]
    start = starter(native_bin, tiny("head64"), tmp_path / "exact", *EXACT, *SERVERS["streams"])
    found, other = (walk(start, steps, read, is_replay=True) for read in (text, f"{text[:50]}#{text[51:]}"))
    assert same(found, other) == [False, True, False]
    assert apart(found[2], other[2]) > NOISE
