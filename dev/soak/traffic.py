"""What clients do, well-meaning ones and others: each draws its actions from a seed of its own.

The same seed draws the same requests for each client. How those of several clients interleave is up to the machine.
"""

from __future__ import annotations

import http.client
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from server import Server
from slots import Client

from soak.malformed import MALFORMED, WITHOUT_SLOTS

N_SLOTS = 3
N_CTX = 512  # of a slot
BATCH = 64  # small, so that a prompt is read in several steps, and may be left between two
FILES = ("one", "two", "three")


NUDGE_SECONDS = 2.0
"""How long clients work before :func:`nudge`."""


class Wrong(Exception):
    """An answer that should not have come."""


class Refused(Wrong):
    """An error where an answer was due."""


@dataclass(frozen=True)
class Worker:
    """A client: where it sends to, what it writes about, and what it draws."""

    server: Server
    tokens: Sequence[int]
    rng: random.Random
    names_slots: bool

    def prompt(self, longest: int = 300) -> list[int]:
        """A shared beginning, and something else behind it."""
        shared = self.rng.choice((0, 0, longest // 8, longest // 3, longest // 2))
        at, n = self.rng.randrange(len(self.tokens) - longest), self.rng.randint(1, longest - shared)
        return [*self.tokens[:shared], *self.tokens[at : at + n]]

    def completion(self, **more: Any) -> dict[str, Any]:
        """A well-formed request."""
        slot = self.rng.choice((-1, -1, self.rng.randrange(N_SLOTS))) if self.names_slots else -1
        body = {"prompt": self.prompt(), "n_predict": self.rng.randint(1, 40), "id_slot": slot, "ignore_eos": True}
        greedy = {"temperature": self.rng.choice((0, 0.8)), "seed": self.rng.randrange(1000)}
        return body | greedy | {"cache_prompt": self.rng.random() < 0.8, "n_probs": self.rng.choice((0, 0, 5))} | more

    def post(self, path: str, body: Any) -> bytes:
        """The answer to what has to be answered."""
        status, answer = self.server.send(path, json.dumps(body).encode())
        if status != http.HTTPStatus.OK:
            raise Refused(f"{path} answers {status}: {answer[:300]!r}; asked was {json.dumps(body)[:300]}")
        if (error := answer.find(b'data: {"error"')) >= 0:
            raise Refused(f"{path} ends with {answer[error : error + 300]!r}; asked was {json.dumps(body)[:300]}")
        return answer


# --- what a client may do: each returns a word for how it went --------------------------------------------------------------------


def plain(worker: Worker) -> str:
    body = worker.completion()
    found = json.loads(worker.post("/completion", body))
    if found["tokens_predicted"] < body["n_predict"] and found["stop_type"] != "limit":
        raise Wrong(f"{found['tokens_predicted']} tokens of {body['n_predict']}: {found['stop_type']}")
    return "200"


def streamed(worker: Worker) -> str:
    lines = worker.post("/completion", worker.completion(stream=True)).splitlines()
    events = [json.loads(line.removeprefix(b"data: ")) for line in lines if line.startswith(b"data: {")]
    if not events or not events[-1].get("stop"):
        raise Wrong(f"a stream that does not end: {lines[-3:]}")
    return "200"


def chat(worker: Worker) -> str:
    words = "".join(chr(97 + worker.rng.randrange(26)) for _ in range(worker.rng.randint(1, 80)))
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": words}]
    body = {"messages": messages, "max_tokens": worker.rng.randint(1, 20), "stream": worker.rng.random() < 0.5}
    worker.post("/v1/chat/completions", body)
    return "200"


def embedding(worker: Worker) -> str:
    found = json.loads(worker.post("/v1/embeddings", {"input": worker.prompt(BATCH)}))
    if not found["data"][0]["embedding"]:
        raise Wrong("an empty embedding")
    return "200"


def filling(worker: Worker) -> str:
    """A prompt that nearly fills a slot, and more to generate than fits."""
    prompt = [*worker.tokens[: N_CTX - 60], *worker.prompt(30)]
    found = json.loads(worker.post("/completion", worker.completion(prompt=prompt, n_predict=worker.rng.choice((200, 10**9)))))
    if not found["truncated"] or found["stop_type"] != "limit":
        raise Wrong(f"a full slot answers {found['stop_type']} after {found['tokens_predicted']} tokens")
    return "full"


def oversized(worker: Worker) -> str:
    """A prompt that can't fit is refused."""
    body = worker.completion(prompt=[*worker.tokens[: N_CTX + worker.rng.choice((0, 1, 100))]])
    status, answer = worker.server.send("/completion", json.dumps(body).encode())
    if status != http.HTTPStatus.BAD_REQUEST:
        raise Wrong(f"a prompt of {len(body['prompt'])} tokens is answered with {status}: {answer[:200]!r}")
    return str(status)


def left_in_prefill(worker: Worker) -> str:
    body = worker.completion(prompt=[*worker.tokens[:200], *worker.prompt(200)], id_slot=-1, cache_prompt=False)
    worker.server.leave(body, worker.rng.randint(1, 3))
    return "left"


def left_in_decode(worker: Worker) -> str:
    worker.server.leave(worker.completion(n_predict=300, prompt=worker.prompt(60)), worker.rng.randint(4, 40))
    return "left"


def malformed(worker: Worker) -> str:
    """Whatever it is, it has an answer."""
    path, data = worker.rng.choice(MALFORMED if worker.names_slots else WITHOUT_SLOTS)
    status, _ = worker.server.send(path, data)
    return f"{path.partition('?')[0]} {status}"


def slot_action(worker: Worker) -> str:
    """Save, restore or erase whatever is in a slot; a file may not be there, or may be of another client."""
    slot, action = worker.rng.randrange(N_SLOTS), worker.rng.choice(("save", "save", "restore", "restore", "erase"))
    data = json.dumps({"filename": worker.rng.choice(FILES)}).encode()
    status, answer = worker.server.send(f"/slots/{slot}?action={action}", data)
    if status not in (http.HTTPStatus.OK, http.HTTPStatus.BAD_REQUEST) or (action == "erase" and status != http.HTTPStatus.OK):
        raise Refused(f"{action} answers {status}: {answer[:300]!r}")
    return f"{action} {status}"


ACTIONS: dict[Callable[[Worker], str], int] = {
    **{plain: 5, streamed: 5, chat: 2, embedding: 2, filling: 1, oversized: 1},
    **{left_in_prefill: 2, left_in_decode: 2, malformed: 4, slot_action: 4},
}
"""How often each is drawn."""


def drive(
    server: Server, tokens: Sequence[int], seed: str, *, clients: int, actions: int, names_slots: bool
) -> tuple[Counter[str], tuple[float, str]]:
    """So many clients do so many things each, at once. Returns how often each thing went how, and which took longest.

    Raises:
        Wrong: an answer that should not have come.
        OSError, HTTPException: the server is gone.
    """

    slowest = (0.0, "")

    def run(client: int) -> Counter[str]:
        nonlocal slowest
        worker = Worker(server, tokens, random.Random(f"{seed}/{client}"), names_slots)
        found: Counter[str] = Counter()
        for action in worker.rng.choices(list(ACTIONS), list(ACTIONS.values()), k=actions):
            began = time.monotonic()
            try:
                how = f"{action.__name__} {action(worker)}"
            except (Wrong, TimeoutError) as wrong:
                raise (Refused if isinstance(wrong, Refused) else Wrong)(f"{action.__name__}: {wrong}") from wrong
            found[how] += 1
            slowest = max(slowest, (round(time.monotonic() - began, 2), how))
        return found

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(run, client) for client in range(clients)]
        while wait(running, NUDGE_SECONDS).not_done:
            nudge(server)
        return sum((one.result() for one in running), Counter()), slowest


def nudge(server: Server) -> None:
    """Let waiting requests go on. When a slot becomes free upstream wakes one of them. That may be to save a slot, which takes none, and
    then the others wait until another completion ends (server-queue.cpp, pop_deferred_task; with f16, too).
    """
    with suppress(OSError, http.client.HTTPException):  # of a server that is gone, clients tell
        server.send("/completion", b'{"prompt": [1], "n_predict": 1, "cache_prompt": false}')


def settle(client: Client) -> None:
    """Wait for what was left to end, and empty all slots."""
    client.wait()
    for slot in range(N_SLOTS):
        client.erase(slot)
