"""A llama-server of the build: start it, wait until it answers, and what its log says that it runs.

It is started with all that a load needs, and with nothing beside the KV cache that keeps prompts: no cache of prompts in RAM, no
checkpoints of contexts. What is measured under a budget has no other memory to fall back on.
"""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from turbo_gguf import tools
from turbo_gguf.cache import spec
from turbo_gguf.cache.spec import CacheSpec
from turbo_gguf.errors import LogNotUnderstood, SilentFallback, ToolFailed, with_log
from turbo_gguf.inputs.models import ModelFile
from turbo_gguf.make.build import Build
from turbo_gguf.make.toolkits import gpu_layers
from turbo_gguf.measure import guard, log
from turbo_gguf.measure.bits import bits_per_value, memory_mib
from turbo_gguf.measure.load import HOST
from turbo_gguf.measure.log import LogFacts

START_SECONDS = 900.0
"""Longest wait for a server: it may load a large model from a slow disk, and calibrate it."""

POLL_SECONDS = 0.05

HTTP_SECONDS = 60.0
"""Longest wait for an answer that takes no computing."""

SPARE_HTTP_THREADS = 4
"""Beside one for each client: a stream holds its thread, and health must be answered, too."""

UBATCH = 512
"""Tokens that are computed at a time."""

CRASHED = "the log says more; a crash is no verdict on speed"

LISTENING = re.compile(rf"listening on http://{re.escape(HOST)}:(\d+)")
"""In the log, behind what runs: a thread writes it, which may be later than an answer."""


class Shape(msgspec.Struct, frozen=True):
    """How a server is started."""

    types: CacheSpec
    slots: int
    ctx: int  # tokens of a slot
    batch: int  # tokens of a llama_decode call
    threads: int
    backend: str
    clients: int


class Running(msgspec.Struct, frozen=True):
    """A server that answers."""

    port: int
    service: tools.Service
    facts: LogFacts
    mib: float  # of all KV caches and copies of exact tokens
    mib_error: float

    def call(self, path: str, body: dict[str, Any] | None = None, seconds: float = HTTP_SECONDS) -> dict[str, Any]:
        """Ask for something small, or for what may take so many ``seconds``.

        Raises:
            ToolFailed: it does not answer, or not with what was asked for.
        """
        try:
            status, found = ask(self.port, path, body, seconds=seconds)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.service.require_alive(CRASHED)
            raise ToolFailed(f"llama-server does not answer {path}: {error}; log: {self.service.stderr}") from error
        if status != http.HTTPStatus.OK:
            raise ToolFailed(f"llama-server answers {path} with {status}: {found}; log: {self.service.stderr}")
        return found


@contextmanager
def started(shape: Shape, build: Build, model: ModelFile, name: Path) -> Iterator[Running]:
    """Run a server as long as the block does; it answers when the block begins, and runs what was asked for.

    Raises:
        ToolFailed: it ended, does not answer, or runs something else.
    """
    with tools.serving(argv(shape, build, model), log=name) as service:
        port = _port(service)
        facts = _facts(service, shape, model)
        running = Running(port, service, facts, *memory_mib(facts, shape.types, model))
        _wait_until_healthy(running)
        yield running


def argv(shape: Shape, build: Build, model: ModelFile) -> list[str]:
    """Command line: everything that decides the numbers is said, nothing is left to a default."""
    return [
        str(build.tool("llama-server")),
        *("-m", str(model.path), "--host", HOST, "--port", "0", "--no-webui", "--threads-http", str(shape.clients + SPARE_HTTP_THREADS)),
        *("-np", str(shape.slots), "-c", str(shape.slots * shape.ctx), "--no-kv-unified"),
        *("-b", str(shape.batch), "-ub", str(min(UBATCH, shape.batch)), "-t", str(shape.threads)),
        *spec.options(shape.types),
        *("-fa", "on" if spec.flash_attention(shape.types) else "off", "-fit", "off"),
        *("--cache-ram", "0", "--ctx-checkpoints", "0", "--slot-prompt-similarity", "0"),
        *gpu_layers(shape.backend),
        *("-lv", "4"),  # the lines about the KV cache are of level trace; a request has ten more, a token none
    ]


def _port(service: tools.Service) -> int:
    """Wait until the log names the port that the server took."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        service.require_alive(CRASHED)
        if found := LISTENING.search(_text(service.stderr)):
            return int(found[1])
        time.sleep(POLL_SECONDS)
    raise ToolFailed(f"llama-server does not listen after {START_SECONDS:g} s; log: {service.stderr}")


def _wait_until_healthy(running: Running) -> None:
    """Wait until the model is there."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        running.service.require_alive(CRASHED)
        try:
            if ask(running.port, "/health", None)[0] == http.HTTPStatus.OK:
                return
        except (OSError, http.client.HTTPException, ValueError):
            pass  # not yet
        time.sleep(POLL_SECONDS)
    raise ToolFailed(f"llama-server is not ready after {START_SECONDS:g} s; log: {running.service.stderr}")


def _facts(service: tools.Service, shape: Shape, model: ModelFile) -> LogFacts:
    """What the server runs, when it is what was asked for."""
    try:
        facts = log.log_facts(_text(service.stderr))
        guard.check(facts, shape.types, backend=shape.backend, model=model)
        guard.check_bits(bits_per_value(facts, shape.types, model), shape.types)
        if facts.n_ctx_seq != shape.ctx:
            raise SilentFallback(f"a slot has {facts.n_ctx_seq} tokens; asked for were {shape.ctx}")
        for cache in facts.caches:
            if cache.streams != shape.slots:
                raise SilentFallback(f"a KV cache has room for {cache.streams} sequences; asked for were {shape.slots} slots")
    except (LogNotUnderstood, SilentFallback) as error:
        raise with_log(error, service.stderr) from error
    return facts


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def ask(
    port: int, path: str, body: dict[str, Any] | None, *, host: str = HOST, seconds: float = HTTP_SECONDS
) -> tuple[int, dict[str, Any]]:
    """Status and answer of a server, which may be no more than a list.

    Raises:
        OSError, http.client.HTTPException, ValueError: there is none, or it is no JSON.
    """
    connection = http.client.HTTPConnection(host, port, timeout=seconds)
    try:
        if body is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        found = json.loads(answer.read())
        return answer.status, found if isinstance(found, dict) else {"answer": found}
    finally:
        connection.close()
