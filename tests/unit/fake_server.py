"""A stand-in for llama-server: it says in its log what it was asked for, and streams tokens that it makes up.

``plan.json`` beside the program changes what it says and does; see :class:`Plan`. What it was asked is appended to ``calls``.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec

from turbo_gguf.cache.types import cache_type

LAYERS, VALUES = 4, 256  # of the model of tests/unit/measuring.py: layers, values of K in a token of a layer
DIGEST = "1a2b3c4d"
TEXT_TOKENS = 3000


class Plan(msgspec.Struct):
    """What goes wrong. Failures are of the requests whose prompt has ``length`` tokens."""

    length: int = 0
    failure: str = ""  # "refused", "error", "cut", "short", "lost", "silent", "no json", "no http", "killed"
    delay: float = 0.002  # seconds per token
    held: int = 1  # tokens that come at once
    body: str = "chunked"  # or "pieces": chunks that split lines; "plain": to the end of the connection
    swap: str = ""  # type that the log tells instead
    slots: int = 0  # sequences that the log tells instead
    ctx: int = 0
    factor: float = 1.0  # of the sizes that the log tells
    tokens: int = TEXT_TOKENS
    start: str = ""  # "dies": ends before it listens


class Server(ThreadingHTTPServer):
    """With so many slots, which requests wait for."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, slots: int, plan: Plan, calls: Path | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.calls = plan, calls
        self.slots = threading.Semaphore(slots)
        self.lock = threading.Lock()
        self.busy = self.most = 0
        self.bodies: list[dict[str, Any]] = []

    def handle_error(self, *_: object) -> None:
        """Clients go away here."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._json(200, {"status": "ok"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            self._json(200, {"tokens": list(range(self.server.plan.tokens))})
            return
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.busy += 1
            self.server.most = max(self.server.most, self.server.busy)
        self.is_busy = True
        try:
            with self.server.slots:
                self._complete(body)
        finally:
            self._leave()

    def _leave(self) -> None:
        """Before the client knows that it has all: it may ask again at once."""
        with self.server.lock:
            self.server.busy -= self.is_busy
            self.is_busy = False

    def _complete(self, body: dict[str, Any]) -> None:
        plan, length, n = self.server.plan, len(body["prompt"]), body["n_predict"]
        failure = plan.failure if length == plan.length else ""
        if failure == "killed":
            os._exit(1)
        if failure == "silent":
            time.sleep(30)
        if failure == "refused":
            self._json(503, {"error": {"code": 503, "message": "no slot for you"}})
            return
        if failure == "no http":
            self.wfile.write(b"what?\r\n\r\n")
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        if plan.body != "plain":
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._event({"tokens_predicted": 0, "stop": False})  # llama-server may say that it begins
        made = n // 2 if failure in ("cut", "short") else n
        for i in range(1, made + 1):
            time.sleep(plan.delay)
            if i % plan.held == 0 or i == made:
                self._event({"content": "x", "tokens_predicted": i, "tokens_evaluated": length, "stop": False})
        self._leave()
        if failure == "error":
            self._line(b'error: {"code":500,"message":"out of memory"}')
        elif failure == "no json":
            self._line(b"data: {")
        elif failure != "cut":
            read = length // 2 if failure == "lost" else length
            self._event({"tokens_predicted": made, "tokens_evaluated": read, "stop": True, "stop_type": "limit"})
            self._line(b"data: [DONE]")
        if plan.body != "plain":
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True

    def _event(self, event: dict[str, Any]) -> None:
        self._line(b"data: " + json.dumps(event).encode())

    def _line(self, line: bytes) -> None:
        data = line + b"\n\n"
        step = 7 if self.server.plan.body == "pieces" else len(data)
        for at in range(0, len(data), step):
            part = data[at : at + step]
            self.wfile.write(part if self.server.plan.body == "plain" else b"%x\r\n%b\r\n" % (len(part), part))
            self.wfile.flush()

    def _json(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def log(argv: list[str], plan: Plan) -> str:
    """What llama-server says of its cache with these arguments."""

    def option(name: str, other: str = "") -> str:
        return argv[argv.index(name) + 1] if name in argv else other

    slots = plan.slots or int(option("-np"))
    ctx = plan.ctx or int(option("-c")) // int(option("-np"))
    k, v = (plan.swap or option(name) for name in ("-ctk", "-ctv"))
    mib = [plan.factor * slots * ctx * LAYERS * VALUES * cache_type(name).bits / 8 / 2**20 for name in (k, v)]
    turbo = any(cache_type(name).turbo for name in (k, v))
    sink, tail = option("--cache-sink", "4"), option("--cache-tail", "64")
    exact = turbo and (sink, tail) != ("0", "0")
    calibrated = turbo and option("--cache-calibration", "auto") != "none"
    parts = ["/".join(dict.fromkeys((k, v))) + f" cal={DIGEST}" * calibrated + f" sink={sink} tail={tail}" * exact]
    parts += ["rotated " + "/".join(str(int(cache_type(name).is_quantized)) for name in (k, v))]
    parts += ["bits " + "/".join(f"{cache_type(name).bits:.3f}" for name in (k, v))]
    parts += [f"calibrated K {LAYERS} {LAYERS} V {LAYERS} {LAYERS} of {LAYERS}"] * calibrated
    parts += [f"copies 96 rows in {slots} streams, {plan.factor * slots * 96 * LAYERS * VALUES * 4 / 2**20:.2f} MiB"] * exact
    lines = [
        f"llama_context: n_ctx_seq             = {ctx}",
        f"llama_context: flash_attn            = {'enabled' if option('-fa') == 'on' else 'disabled'}",
        f"llama_kv_cache:        CPU KV buffer size = {sum(mib):7.2f} MiB",
        f"llama_kv_cache: size = {sum(mib):7.2f} MiB ({ctx:6} cells, {LAYERS:3} layers, {slots}/{slots} seqs), "
        f"K ({k}): {mib[0]:7.2f} MiB, V ({v}): {mib[1]:7.2f} MiB",
        f"llama_turbo_cache: {' | '.join(parts)}",
    ]
    return "".join(f"0.00.039.690 I {line}\n" for line in lines)


def main() -> None:
    """Run as the program."""
    here, argv = Path(sys.argv[0]).resolve().parent, sys.argv[1:]
    path = here / "plan.json"
    plan = msgspec.json.decode(path.read_bytes(), type=Plan) if path.exists() else Plan()
    with (here / "calls").open("a") as file:
        file.write(" ".join(argv[argv.index("--threads-http") :]) + "\n")
    sys.stderr.write(log(argv, plan))
    if plan.start == "dies":
        sys.stderr.write("0.00.039.700 E no such model\n")
        sys.exit(1)
    server = Server(int(argv[argv.index("-np") + 1]), plan)
    sys.stderr.write(f"0.00.039.700 I srv  llama_server: listening on http://127.0.0.1:{server.server_port}\n")
    sys.stderr.flush()
    server.serve_forever()
