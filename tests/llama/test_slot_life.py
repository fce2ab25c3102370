"""Whatever happens to a slot of llama-server, a turbo cache whose tokens are all exact answers as an f16 cache does (slots.py)."""

from __future__ import annotations

import urllib.error
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from slots import EXACT, LOSS, NOISE, PACKED, WINDOW, Client, Reply, Start, apart, characters, farthest, starter
from test_defaults_everywhere import lora

pytestmark = pytest.mark.native

STEADY = 1e-4
"""Difference of answers that are asked for again, in batches that are all narrow: 6e-6 was measured, and .0006 to .009 with lost copies."""

FRONT = 4
"""Tokens in front of a prompt: the beginning, and three for a space. The last token of a text is not in the cache."""


# --- what happens to slots -------------------------------------------------------------------------------------------------------


def prompt_cache(start: Start, text: str) -> list[Reply]:
    """A prompt that goes on, one that goes another way, and the first again."""
    with start() as server:
        found = [server.read(text[:end], text[end : end + 12]) for end in (300, 500)]
        found.append(server.read(text[:400] + text[900:1000], text[1000:1012]))
        found.append(server.read(text[:500], text[500:512]))
    assert [reply.reused for reply in found] == [0, FRONT + 311, FRONT + 400, FRONT + 400]
    return found


def cache_reuse(start: Start, text: str) -> list[Reply]:
    """Parts of a prompt that have moved."""
    with start("--cache-reuse", "16") as server:
        found = [server.read(text[:400], text[400:408])]
        found.append(server.read(text[:100] + text[140:300], text[300:320]))
        found.append(server.read(text[:60] + text[180:250], text[1000:1020]))
    assert [reply.reused for reply in found] == [0, FRONT + 260 - 1, FRONT + 60 + 70 - 1]
    return found


def context_shift(start: Start, text: str) -> list[Reply]:
    """Texts that are longer than the context, twice, and a prompt that goes on behind a shift."""
    with start("-c", "256", "--context-shift") as server:
        found = [server.read(text[:150], text[150:380], n_keep=40), server.read(text[:150], text[150:300])]
    assert all(reply.truncated for reply in found)
    return found


def unified(start: Start, text: str) -> list[Reply]:
    """Slots of different lengths in the same cells, at once and one after the other."""
    begins = (0, 1000, 2000)
    with start("-np", "3", "--kv-unified", "--no-cache-idle-slots") as server, ThreadPoolExecutor(3) as pool:
        found = []
        for lengths in ((20, 150, 400), (60, 200, 420), (250, 220, 70)):
            prompts = [text[begin : begin + n] for begin, n in zip(begins, lengths, strict=True)]
            found += pool.map(lambda slot, prompt: server.read(prompt, text[3000:3016], slot), range(3), prompts)
    assert [reply.reused > 0 for reply in found] == [False] * 3 + [True] * 6
    return found


def apart_slots(start: Start, text: str) -> list[Reply]:
    """Slots that have cells of their own."""
    with start("-np", "2") as server, ThreadPoolExecutor(2) as pool:
        found = []
        for ends in ((300, 40), (320, 300), (100, 330)):
            found += pool.map(lambda slot, end: server.read(text[slot * 999 : slot * 999 + end], text[2000:2016], slot), range(2), ends)
    return found


def copied(start: Start, text: str, *options: str) -> list[Reply]:
    """Two answers to a prompt that is read once: another slot takes it over."""
    with start("-np", "2", "--cache-ram", "0", *options) as server:
        server.read(text[1000:1100], text[:4], 1)
        found = server.read_twice(text[:300], text[300:340])
        found.append(server.read(text[:340] + text[700:720], text[:10]))
    assert found[2].reused == FRONT + 339
    assert apart(*found[:2]) <= NOISE
    return found


def copied_unified(start: Start, text: str) -> list[Reply]:
    """The same in shared cells."""
    return copied(start, text, "--kv-unified")


def restored(start: Start, text: str) -> list[Reply]:
    """A slot that is saved, and goes on elsewhere: in the same slot after something else, in another one, after a start."""
    with start("-np", "2") as server:
        found = [server.read(text[:300], text[300:310])]
        n_saved = server.save()
        server.erase()
        server.read(text[2000:2300], text[:10])
        for slot in (0, 1):
            assert server.restore(slot) == n_saved
            found.append(server.read(text[:320], text[320:330], slot))
    with start("-np", "2") as server:
        assert server.restore(1) == n_saved
        found.append(server.read(text[:320], text[320:330], 1))
        server.save(1, "more")
    with start("-np", "2") as server:
        server.restore(0, "more")
        found.append(server.read(text[:199] + text[700:720], text[720:730]))
    assert [reply.reused for reply in found] == [0, *[FRONT + 309] * 3, FRONT + 199]
    return found


def ram_cache(start: Start, text: str) -> list[Reply]:
    """Prompts that come back from memory."""
    prompts = text[:300], text[2000:2300], text[:310], text[2000:2350]
    with start("--cache-ram", "64") as server:
        found = [server.read(prompt, text[1000:1012], -1) for prompt in prompts]
    assert [reply.reused >= 299 for reply in found] == [False, False, True, True]
    return found


def idle_slots(start: Start, text: str) -> list[Reply]:
    """Slots of a unified cache that wait in memory while another works."""
    with start("-np", "2", "--kv-unified", "--cache-ram", "64", "--cache-idle-slots") as server:
        found = [server.read(prompt, text[1000:1012], slot) for prompt, slot in ((text[:500], 0), (text[2000:2400], 1))]
        found.append(server.read(text[:510], text[1000:1012], -1))
    assert found[-1].reused == FRONT + 500
    return found


def cancelled(start: Start, text: str) -> list[Reply]:
    """Clients that go away in the middle of a prompt and of a text, and what follows."""
    with start("-b", "16", "-ub", "16") as server:

        def reused_after_cancel(n_prompt: int, n_then: int, events: int) -> Reply:
            server.cancel(text[:n_prompt], text[n_prompt : n_prompt + n_then], events)
            return server.read(text[: n_prompt + n_then], text[1000:1010])

        found = []
        for n_prompt, n_then, events, least, most in ((800, 20, 4, 16, 800), (100, 700, 20, 101, 800)):
            for _ in range(5):  # the machine may be so busy that it is too late
                reply = reused_after_cancel(n_prompt, n_then, events)
                if reply.reused < most:
                    break
                server.erase()
            assert least <= reply.reused < most
            found.append(reply)
            server.erase()
    return found


def full(start: Start, text: str) -> list[Reply]:
    """A slot without room for the text, a prompt that can't fit, and one that does."""
    with start("-c", "256") as server:
        found = []
        for _ in range(2):
            cut = server.server.complete(text[:200], 100, n_probs=0)
            assert cut["truncated"] is True and cut["tokens_predicted"] < 100
            with pytest.raises(OSError, match="400"):
                server.read(text[:300], text[300:310])
            found.append(server.read(text[:240], text[240:250]))
    return found


def overbooked(start: Start, text: str) -> list[Reply]:
    """Texts that do not fit into a pool together: some end with an error, and what follows is right."""

    def fits(slot: int) -> bool:
        try:
            server.read(text[slot * 1000 :][:200], text[2000:2100], slot)
        except urllib.error.HTTPError as error:
            assert "Context size has been exceeded" in error.read().decode()
            return False
        return True

    with start("-np", "2", "--kv-unified", "-c", "512", "--cache-ram", "0") as server, ThreadPoolExecutor(2) as pool:
        for _ in range(10):  # the first may be ready before the second begins
            all_fit = all(pool.map(fits, range(2)))
            found = [server.read(text[slot * 1000 :][:150], text[2000:2020], slot) for slot in range(2)]
            if not all_fit:
                break
    assert not all_fit
    return found


def adapters(start: Start, text: str) -> list[Reply]:
    """A LoRA for all, off for one request, with half of its weight for all, and with none."""
    prompt, then = text[:300], text[300:312]
    with start("--lora", "lora.gguf") as server:
        found = [server.read(prompt, then), *(server.read(prompt, then, lora=[{"id": 0, "scale": scale}]) for scale in (0.0, 1.0))]
        for scale in (0.5, 0.0):
            assert server.swap(scale)
            server.erase()
            found.append(server.read(prompt, then))
    on, off, again, half, none = found
    assert min(apart(on, off), apart(on, half), apart(half, none)) > LOSS  # it does something
    assert max(apart(on, again), apart(off, none)) <= NOISE
    return found


def embeddings(start: Start, text: str) -> list[Reply]:
    """Texts that are embedded while others go on."""
    with start("-np", "2", "--embeddings", "--pooling", "last") as server, ThreadPoolExecutor(2) as pool:
        found, vectors = [], []
        for n in (100, 200, 250):
            vector = pool.submit(server.embed, text[1000 : 1000 + n])
            found.append(server.read(text[:n], text[n : n + 30]))
            vectors.append(vector.result())
    return [*found, *(Reply(vector[None, :], 0, 0, False) for vector in vectors)]


def ranked(start: Start, text: str) -> list[Reply]:
    """Texts that are ranked while others go on."""
    with start("-np", "2", "--rerank") as server, ThreadPoolExecutor(2) as pool:
        found, ranks = [], []
        for n in (100, 200, 250):
            rank = pool.submit(server.rank, text[:40], [text[begin : begin + n] for begin in (1000, 2000, 3000)])
            found.append(server.read(text[:n], text[n : n + 30]))
            ranks.append(rank.result())
    return [*found, *(Reply(rank[None, :], 0, 0, False) for rank in ranks)]


def checkpoints(start: Start, text: str) -> list[Reply]:
    """Prompts that end another way where a model can't go back: its state of 68 tokens before is kept, and saved with the slot."""
    options = ("-b", "64", "-ub", "64", "--checkpoint-min-step", "0", "--cache-ram", "0")
    with start(*options) as server:
        found = [server.read(text[:end], text[end : end + 10]) for end in (300, 900)]
        found.append(server.read(text[:280] + text[1000:1600], text[1600:1610]))
        server.save()
    assert "restored context checkpoint (" in server.said()
    with start(*options) as server:
        server.restore()
        found.append(server.read(text[:270] + text[2000:2040], text[2040:2050]))
    assert "restored context checkpoint (" in server.said()
    assert all(abs(reply.reused - (300 - 68)) <= 2 * FRONT for reply in found[2:])
    return found


@dataclass(frozen=True)
class Case:
    happens: Callable[[Start, str], list[Reply]]
    model: str = "head64"
    times: bool = False  # how much is reused depends on what is faster


CASES = {
    **{happens.__name__: Case(happens) for happens in (prompt_cache, cache_reuse, context_shift, apart_slots, restored, ram_cache)},
    **{happens.__name__: Case(happens) for happens in (idle_slots, full, adapters, embeddings, copied, copied_unified)},
    "cancelled": Case(cancelled, times=True),
    "unified": Case(unified),
    "overbooked": Case(overbooked, times=True),
    "ranked": Case(ranked, "ranks", times=True),
    **{
        f"{happens.__name__}-{model}": Case(happens, model)
        for happens in (context_shift, restored)
        for model in ("partial128", "heads-differ")
    },
    **{f"{happens.__name__}-{model}": Case(happens, model) for happens in (checkpoints, ram_cache) for model in ("swa6", "hybrid")},
}


@pytest.mark.parametrize("name", CASES)
def test_a_slot_is_as_one_of_f16(native_bin: Path, tiny: Callable[[str], Path], prose: Path, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    found: dict[str, list[Reply]] = {}
    for kind, settings in {"exact": EXACT, "window": WINDOW, "packed": PACKED}.items():
        folder = tmp_path / kind
        folder.mkdir()
        if case.happens is adapters:
            lora(tiny(case.model), folder)
        found[kind] = case.happens(starter(native_bin, tiny(case.model), folder, *settings), characters(prose))
    noise, loss = (farthest(found["exact"], found[kind]) for kind in ("window", "packed"))
    print(f"{name}: noise {noise:.4f}, packed {loss:.3f}")
    assert noise <= NOISE
    assert loss >= LOSS  # without the window it is another cache
    if not case.times:
        assert [reply.reused for reply in found["exact"]] == [reply.reused for reply in found["window"]]


def test_another_token_shows(native_bin: Path, tiny: Callable[[str], Path], prose: Path, tmp_path: Path) -> None:
    """Control: a row that is not what it should be makes more of a difference than noise does, wherever it is."""
    text = characters(prose)
    prompt, then = text[:300], text[300:312]
    with starter(native_bin, tiny("head64"), tmp_path / "exact", *EXACT)() as server:
        right = server.read(prompt, then)
        differences = [apart(right, server.read(f"{prompt[:place]}#{prompt[place + 1 :]}", then)) for place in range(0, 300, 23)]
    print("one of 300 tokens:", *(f"{difference:.3f}" for difference in differences))
    assert min(differences) > 2 * NOISE


def test_a_pool_keeps_what_others_need(native_bin: Path, tiny: Callable[[str], Path], prose: Path, tmp_path: Path) -> None:
    """Slots of a pool that go back a few tokens answer as before, whatever the others have read since, here and in another server."""
    text = characters(prose)
    prompts = text[:5], text[:60], text[1000:1290], text[2000:2440]
    pool = ("-c", "1536", "-np", "3", "-b", "64", "-ub", "64", "--kv-unified", "--cache-ram", "0", "--no-cache-idle-slots")
    start = starter(native_bin, tiny("head64"), tmp_path, "-ctk", "turbo2", "-ctv", "turbo2", *pool)

    def answers(server: Client) -> list[Reply]:
        return [server.read(prompt, text[3000:3006], number % 3) for number, prompt in enumerate(prompts)]

    with start() as server:
        first, again = answers(server), answers(server)
        for slot in range(3):
            server.save(slot, f"slot-{slot}")
    with start() as server:
        for slot in (2, 1, 0):
            server.restore(slot, f"slot-{slot}")
        restored = answers(server)
    assert all(reply.reused > 0 for reply in again + restored)
    assert max(farthest(first, again), farthest(first, restored)) <= STEADY
