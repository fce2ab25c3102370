"""A llama-server as tests and the soak start it, ask it, and treat it badly."""

from __future__ import annotations

import http.client
import json
import os
import re
import resource
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

QUIET = {"GGML_NO_BACKTRACE": "1"}  # an abort must not start a debugger
VERBOSE = ("-lv", "4")  # what the cache holds is logged at this level

START_SECONDS = 120
END_SECONDS = 20
GONE_SECONDS = 2
ASK_SECONDS = 120


class Ended(AssertionError):
    """A server that is not there, or did not end as it should."""

    def __init__(self, rc: int, log: Path) -> None:
        super().__init__(f"llama-server ended with {rc}; log: {log}\n{log.read_text('utf-8', errors='replace')[-3000:]}")
        self.rc = rc


class Server:
    """A running llama-server."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.is_killed = False

    def send(self, path: str, data: bytes | None = None) -> tuple[int, bytes]:
        """Status and body of an answer, a refusal included, to whatever is sent."""
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=ASK_SECONDS) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as refusal:
            with refusal:
                return refusal.code, refusal.read()

    def ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=ASK_SECONDS) as answer:
            return json.load(answer)

    def call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """What answers with a dictionary."""
        return dict(self.ask(path, body))

    def complete(self, prompt: str | list[int], n: int, **more: Any) -> dict[str, Any]:
        """Greedy continuation with the most likely tokens and their log probabilities at each step."""
        body = {"prompt": prompt, "n_predict": n, "temperature": 0, "id_slot": 0, "cache_prompt": True, "n_probs": 4, "ignore_eos": True}
        return self.call("/completion", body | more)

    def leave(self, body: dict[str, Any], events: int) -> None:
        """Begin a completion, and go away after some events, of which a prompt has one for each batch, and the text one for each token."""
        connection = http.client.HTTPConnection(urllib.parse.urlsplit(self.url).netloc, timeout=ASK_SECONDS)
        try:
            stream = json.dumps(body | {"stream": True, "return_progress": True})
            connection.request("POST", "/completion", stream, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            assert answer.status == http.HTTPStatus.OK, answer.read()
            for line in answer:
                events -= line.startswith(b"data: ")
                if events == 0:
                    break
        finally:
            connection.close()

    def memory(self, what: str = "VmRSS") -> int:
        """Bytes of memory, as Linux counts them under this name."""
        found = re.search(rf"^{what}:\s*(\d+) kB$", Path(f"/proc/{self.process.pid}/status").read_text("ascii"), re.MULTILINE)
        assert found, what
        return int(found[1]) * 1024

    @contextmanager
    def full_disk(self, n_bytes: int) -> Iterator[None]:
        """No file of the server grows beyond so many bytes, its log neither: writing fails as on a full disk."""
        old = resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (n_bytes, old[1]))
        try:
            yield
        finally:
            resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, old)

    def said(self) -> str:
        """The log of a server that has ended: while it runs, a thread of its own writes the log, behind the answers."""
        assert self.process.poll() is not None, "the log may not be whole yet"
        return self.log.read_text("utf-8", errors="replace")

    def kill(self) -> None:
        """At once, whatever it does."""
        self.is_killed = True
        self.process.kill()
        self.process.wait()


@contextmanager
def serve(
    native_bin: Path, model: Path, folder: Path, *args: str, env: dict[str, str] | None = None, address_space: int | None = None
) -> Iterator[Server]:
    """A server for a block, in a folder of its own, with a limit of its address space in bytes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / f"server-{port}.log"
    argv = [native_bin / "llama-server", "-m", model, "--host", "127.0.0.1", "--port", str(port), "-np", "1", "-t", "1", *VERBOSE, *args]
    with log.open("wb") as out:
        process = subprocess.Popen(
            argv,
            stdout=out,
            stderr=out,
            env={**os.environ, **QUIET, **(env or {})},
            cwd=folder,
            restore_signals=False,  # SIGXFSZ stays ignored, so that writing fails instead
            preexec_fn=None if address_space is None else lambda: resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space)),
        )
    server = Server(process, port, log)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                server.call("/health")
                break
            except (urllib.error.URLError, ConnectionError):
                ended = process.poll()
                if ended is not None:
                    raise Ended(ended, log) from None
                assert time.monotonic() < deadline, "llama-server does not answer"
                time.sleep(0.1)
        yield server
    except (OSError, http.client.HTTPException) as error:
        with suppress(subprocess.TimeoutExpired):  # connections break before it is gone
            rc = process.wait(0 if isinstance(error, urllib.error.HTTPError) or server.is_killed else GONE_SECONDS)
            if not server.is_killed:
                raise Ended(rc, log) from error
        raise
    finally:
        process.send_signal(signal.SIGINT)
        try:
            rc = process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            rc = process.wait()
    if rc and not server.is_killed:
        raise Ended(rc, log)


def steps(answer: dict[str, Any]) -> list[Any]:
    """Tokens and log probabilities of an answer: equal only if the logits are."""
    found = answer["completion_probabilities"]
    assert found
    return [[(token["id"], token["logprob"]) for token in step["top_logprobs"]] for step in found]
