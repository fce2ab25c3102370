"""What one cache goes through: a long life, short ones that end by SIGKILL, full disks, and starts without room.

After each of them the server has to be there, and to answer as a fresh one does. A cache whose tail covers the whole slot has to answer
as f16 does, too.
"""

from __future__ import annotations

import http.client
import random
import shutil
import signal
import threading
import time
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from server import Ended, Server, serve
from slots import EXACT, NOISE, Client

from soak import probes, traffic
from soak.journal import Journal
from soak.probes import Answers
from soak.traffic import BATCH, N_CTX, N_SLOTS, Refused, Wrong
from turbo_gguf.cache import spec
from turbo_gguf.cache.spec import PLAIN, CacheSpec

SERVERS = {
    "parts": ("--no-kv-unified", "--cache-ram", "0"),
    "pool": ("--kv-unified-per-slot", str(N_CTX), "--kv-unified", "--cache-ram", "1", "--no-cache-idle-slots"),
}
"""Cells of its own for each slot, and shared ones with a cache of prompts in memory, so small that it is full before memory is looked at.

On a server with such a cache clients do not name a slot: upstream loads the prompt from the cache into the slot before it looks whether
the slot is busy. The request that is in it goes on with another prompt, or never ends (server-context.cpp, get_available_slot; f16, too).
"""

OPTIONS = (
    "-np",
    str(N_SLOTS),
    "-c",
    str(N_SLOTS * N_CTX),
    "-b",
    str(BATCH),
    "-ub",
    str(BATCH),
    "-lv",
    "2",
    "--embeddings",
    "--pooling",
    "last",
)

CLIENTS = 4
ACTIONS = 15
"""Of each client in a round."""

LEAST_ROUNDS = 5
"""Of a long life, however little time it has."""

GROWTH = 0.02
"""Most by which the lowest resident memory of the last quarter of the rounds may be above the highest of the first half.

The heap goes up and down by steps of a MiB. What leaks does not come back.
"""

MANY_ROUNDS, SLACK = 100, 4 << 20
"""Fewer rounds than these may grow by so many bytes more: not all requests have come."""

MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""glibc gives back what is freed. Otherwise each thread keeps what its largest request took, and a server grows by a third in a minute."""

SANITIZERS = {
    "ASAN_OPTIONS": "allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "LSAN_OPTIONS": f"suppressions={Path(__file__).with_name('leaks.txt')}",
}
"""A server ends with an error where they find something, at its end, too."""

DISK = (0, 4096, 20_000)
"""Bytes that a file may have on a full disk: nothing, the tokens of a slot, some of its rows."""

SPACE = (0.3, 0.6, 0.8, 0.9, 0.95, 0.98, 1.0, 1.02)
"""Limits of the address space, in parts of what a server takes that has answered."""

LOSS = 0.05
"""Largest difference where older rows are packed, and a prompt comes from a file: its last token is computed alone."""


@dataclass
class Session:
    """A cache, a model, and where its files are."""

    types: CacheSpec
    kind: str  # of SERVERS
    native_bin: Path
    model: Path
    folder: Path
    journal: Journal
    seed: str
    is_sanitized: bool = False  # a sanitizer looks at memory, and keeps what is freed
    tokens: list[int] = field(default_factory=list)
    fresh: Answers | None = None
    exact: Answers | None = None  # f16's
    rounds: int = 0

    @property
    def name(self) -> str:
        """In the log."""
        return f"{self.types}, {self.kind}"

    def run(self, text: str, minutes: float) -> None:
        """All phases. One that fails ends the session, and the journal says why."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.journal.write("begin", types=self.name, server=self.kind, seed=self.seed)
        phases = {
            "fresh": lambda: self.begin(text),
            "long life": lambda: self.live(60 * minutes * 0.6),
            "short lives": lambda: self.die(60 * minutes * 0.3),
            "no room": lambda: self.starve(60 * minutes * 0.1),
        }
        for phase, act in phases.items():
            try:
                act()
            except (Wrong, AssertionError, OSError, http.client.HTTPException) as error:
                why = f"{type(error).__name__}: {error}" + (f"; before it {error.__cause__}" if error.__cause__ else "")
                self.journal.failed(self.name, phase, f"{why}; logs: {self.folder}")
                return

    @contextmanager
    def server(self, address_space: int | None = None, types: CacheSpec | None = None) -> Iterator[Client]:
        """A new server with the files of the last one."""
        asked = types or self.types
        cache = EXACT if asked == PLAIN else tuple(spec.options(asked))
        options = (*OPTIONS, *SERVERS[self.kind], *cache, "--slot-save-path", str(self.folder))
        env = {"LLAMA_CACHE": str(self.folder / "cache"), **(SANITIZERS if self.is_sanitized else MALLOC)}
        with serve(self.native_bin, self.model, self.folder, *options, env=env, address_space=address_space) as server:
            yield Client(server, self.folder)

    # --- phases -------------------------------------------------------------------------------------------------------------------

    def begin(self, text: str) -> None:
        """What a fresh server answers, and f16 where all tokens are exact."""
        with self.server() as client:
            self.tokens = client.server.call("/tokenize", {"content": text})["tokens"]
            self.fresh = probes.ask(client, self.tokens)
        if isinstance(self.types.tail, int) and self.types.tail >= N_CTX:
            with self.server(types=PLAIN) as client:
                self.exact = probes.ask(client, self.tokens)
            self.check("fresh", self.fresh)

    def live(self, seconds: float) -> None:
        """One server, for long: traffic, full disks, and memory that stays as it is."""
        end, sizes = time.monotonic() + seconds, []
        with self.server() as client:
            while time.monotonic() < end or len(sizes) < LEAST_ROUNDS:
                self.traffic(client.server)
                if self.rounds % 3 == 0:
                    self.fill_disk(client)
                traffic.settle(client)
                self.check("life", probes.ask(client, self.tokens))
                traffic.settle(client)
                sizes.append(client.server.memory())
                self.journal.write("resident", types=self.name, n_bytes=sizes[-1])
            n = len(sizes)
            warm, last = max(sizes[: n // 2]), min(sizes[n - n // 4 :])
            growth = last / warm - 1
            self.journal.write("memory", types=self.name, warm=warm, last=last, growth=round(growth, 5))
            slack = 0 if n >= MANY_ROUNDS else SLACK
            if not self.is_sanitized and last > warm * (1 + GROWTH) + slack:
                raise Wrong(f"resident memory grew by {growth:.2%}, from {warm} to {last} bytes; log: {client.server.log}")

    def fill_disk(self, client: Client) -> None:
        """Saves fail, or what they leave is refused, or it is right: in any case the server goes on."""
        prompt = self.tokens[:200]
        for n_bytes in DISK:
            client.server.complete(prompt, 1)
            with client.server.full_disk(n_bytes):
                saved, _ = client.server.send("/slots/0?action=save", b'{"filename": "full"}')
            restored, _ = client.server.send("/slots/0?action=restore", b'{"filename": "full"}')
            self.journal.write("full disk", types=self.name, n_bytes=n_bytes, saved=saved, restored=restored)
            if http.HTTPStatus.OK in (saved, restored):
                raise Wrong(f"a slot is saved ({saved}) and restored ({restored}) on a disk with {n_bytes} bytes; log: {client.server.log}")

    def die(self, seconds: float) -> None:
        """Servers that are killed at some moment, and what they had saved."""
        end, rng = time.monotonic() + seconds, random.Random(f"{self.seed}/kills")
        with self.server() as client:
            probes.save(client, self.tokens)
        while time.monotonic() < end:
            with self.server() as client:
                self.check("restored", probes.ask_restored(client, self.tokens))
                traffic.settle(client)
                after = rng.uniform(0.2, 4)
                killer = threading.Timer(after, client.server.kill)
                killer.start()
                try:
                    while True:
                        self.traffic(client.server)
                except (OSError, http.client.HTTPException) as error:
                    if isinstance(error, urllib.error.HTTPError):
                        raise
                    killer.join()
                    if not client.server.is_killed:
                        raise
                finally:
                    killer.cancel()
                self.journal.write("kill", types=self.name, after=round(after, 2))

    def starve(self, seconds: float) -> None:
        """Starts that have less address space than they need: an error, or right answers.

        Upstream aborts where it can't make a thread or a context, with f16, too: SIGABRT with a message is an error here.
        """
        if self.is_sanitized:  # it takes terabytes of address space
            return
        end = time.monotonic() + seconds
        with self.server() as client:
            probes.ask(client, self.tokens)
            needs = client.server.memory("VmPeak")
        for part in SPACE:
            if time.monotonic() > end:
                break
            try:
                with self.server(int(part * needs)) as client:
                    self.check("starved", probes.ask(client, self.tokens))
                    traffic.settle(client)
                    self.traffic(client.server)
                    traffic.settle(client)
                    self.check("starved", probes.ask(client, self.tokens))
                how = "answers"
            except (Refused, urllib.error.HTTPError) as refused:
                how = f"refuses a request: {refused}"
            except Ended as ended:
                if ended.rc < 0 and ended.rc != -signal.SIGABRT:
                    raise
                how = f"ended with {ended.rc}"
            self.journal.write("starved", types=self.name, part=part, address_space=int(part * needs), how=how)

    # --- parts of them ------------------------------------------------------------------------------------------------------------

    def traffic(self, server: Server) -> None:
        """A round of it."""
        self.rounds += 1
        began = time.monotonic()
        seed, names_slots = f"{self.seed}/{self.types}/{self.rounds}", self.kind == "parts"
        found, slowest = traffic.drive(server, self.tokens, seed, clients=CLIENTS, actions=ACTIONS, names_slots=names_slots)
        took = round(time.monotonic() - began, 2)
        self.journal.write("traffic", types=self.name, round=self.rounds, took=took, slowest=slowest, counts=dict(sorted(found.items())))

    def check(self, when: str, answers: Answers) -> None:
        """The same questions have the same answers."""
        assert self.fresh is not None
        limit = LOSS if self.exact is None and when == "restored" else NOISE
        noise = self.fresh.noise(answers)
        exact = None if self.exact is None else self.exact.noise(answers)
        self.journal.write("probes", types=self.name, when=when, noise=noise, against_f16=exact)
        if noise > limit or (exact is not None and exact > NOISE):
            raise Wrong(f"answers differ from a fresh server's by {noise:.4f}, from f16's by {exact}; log: see the newest in {self.folder}")
