"""A llama-server with one slot that a benchmark asks, with any options beside its cache types."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from turbo_gguf.cache import spec
from turbo_gguf.cache.spec import CacheSpec
from turbo_gguf.errors import ToolFailed
from turbo_gguf.inputs.models import ModelFile
from turbo_gguf.make import presets
from turbo_gguf.make.build import Build
from turbo_gguf.make.toolkits import gpu_layers
from turbo_gguf.measure import guard, log
from turbo_gguf.measure.log import LogFacts
from turbo_gguf.measure.server import LISTENING
from turbo_gguf.tools import tail

START_SECONDS, ANSWER_SECONDS = 300, 600


class Server:
    """A running llama-server."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Send JSON, and return the JSON that comes back.

        Raises:
            ToolFailed: the server answers with an error, or not at all.
        """
        request = urllib.request.Request(self._url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            raise ToolFailed(f"llama-server: {path}: {error.code}: {error.read().decode(errors='replace')[:500]}") from error
        except OSError as error:
            raise ToolFailed(f"llama-server: {path}: {error}") from error

    def is_ready(self) -> bool:
        """Whether the model is loaded."""
        try:
            with urllib.request.urlopen(f"{self._url}/health", timeout=5) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def tokens(self, text: str) -> list[int]:
        """Tokens of a text, as the model has them."""
        return list(self.post("/tokenize", {"content": text})["tokens"])


@contextlib.contextmanager
def serve(build: Build, model: ModelFile, types: CacheSpec, *options: str, ctx: int, threads: int, log_path: Path) -> Iterator[Server]:
    """Run llama-server with a cache of these types, until the block ends.

    Raises:
        ToolFailed: it does not start; its log says why.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [build.tool("llama-server"), "-m", model.path, "-c", str(ctx), "-np", "1", "-t", str(threads), *spec.options(types)]
    argv += ["-fa", "on", "-fit", "off", "--jinja", "--no-webui", "--host", "127.0.0.1", "--port", str(port), "-lv", "4", *options]
    argv += gpu_layers(presets.backend_of(build.preset))
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("wb") as out:
        process = subprocess.Popen([str(part) for part in argv], stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        server, deadline = Server(port), time.monotonic() + START_SECONDS
        while not (server.is_ready() and LISTENING.search(log_path.read_text("utf-8", errors="replace"))):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ToolFailed(f"llama-server did not start with {types}; log: {log_path}\n{tail(log_path)}")
            time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def check(build: Build, model: ModelFile, types: CacheSpec, log_path: Path) -> LogFacts:
    """What a server without a draft model runs, which must be what was asked for.

    Raises:
        SilentFallback: it is not.
    """
    facts = log.log_facts(log_path.read_text("utf-8", errors="replace"))
    guard.check(facts, types, backend=presets.backend_of(build.preset), model=model)
    return facts
