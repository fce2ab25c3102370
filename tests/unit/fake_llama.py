"""A stand-in for llama-server that plans and serves: its log has sizes by its options, and it answers /health.

``mode`` beside the program says what goes wrong: "memory", "dies", "port", "killed"; "quiet" is without a line about its address.
``devices`` has a line for each GPU, as --list-devices prints it.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FrameType

from turbo_gguf.cache.types import cache_type

LAYERS, VALUES = 2, 128  # of tiny_gguf's model: K of a token of a layer
COMPUTE_MIB = 10
MIB = 1 << 20


def option(name: str, default: str = "") -> str:
    args = sys.argv[1:]
    return args[args.index(name) + 1] if name in args else default


def say(line: str) -> None:
    print(f"0.00.000.001 {line}", file=sys.stderr, flush=True)


def devices() -> list[str]:
    """Lines of the list."""
    path = Path(sys.argv[0]).with_name("devices")
    return path.read_text().splitlines() if path.is_file() else []


def taken() -> list[tuple[str, str, str]]:
    """Name, total and free memory of the GPUs that -dev names."""
    rows = [re.fullmatch(r"(\S+): .* \((\d+) MiB, (\d+) MiB free\)", line) for line in devices()]
    found = [(row[1], row[2], row[3]) for row in rows if row]
    return [row for row in found if row[0] in (option("-dev") or row[0]).split(",")]


def plan() -> None:
    """What upstream's --fit writes, and then nothing: a server that loads."""
    cells, types = int(option("-c")), (cache_type(option("-ctk")), cache_type(option("-ctv")))
    sides = [LAYERS * cells * VALUES // kind.block * kind.size / MIB for kind in types]
    if option("-m").endswith("refused.gguf") and types[0].turbo:
        say("E llama_check: this model can't have it")
        say("E common_fit_params: encountered an error: failed to create llama_context from model")
        say("I common_fit_params: fitting params to free memory took 0.02 seconds")
    else:
        say(
            f"I llama_kv_cache: size = {sum(sides):.2f} MiB ({cells} cells, {LAYERS} layers, 1/1 seqs), "
            f"K ({types[0].name}): {sides[0]:.2f} MiB, V ({types[1].name}): {sides[1]:.2f} MiB"
        )
        say(f"I sched_reserve:        CPU compute buffer size = {COMPUTE_MIB:.2f} MiB")
        say(
            "I common_memory_breakdown_print: | memory breakdown [MiB] | total   free     self   model   context   compute    unaccounted |"
        )
        on = taken()
        for name, total, free in on:
            size = int(sum(sides)) // len(on)
            say(f"I common_memory_breakdown_print: |   - {name} (GPU) | {total} = {free} + ({size + 1} = 1 + {size} + 0) + 0 |")
        say(
            f"I common_memory_breakdown_print: |   - Host               |     15 =     1 +       {int(sum(sides))} +      {COMPUTE_MIB}   |"
        )
        say("I common_params_fit_impl: projected to use 15 MiB of host memory vs. 24105 MiB of total host memory")
    time.sleep(60)


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        ready = time.monotonic() - STARTED > 0.3
        data = b'{"status":"ok"}' if ready else b'{"error":{"code":503}}'
        self.send_response(200 if ready else 503)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


STARTED = time.monotonic()


def main() -> int:
    mode = Path(sys.argv[0]).with_name("mode")
    what = mode.read_text() if mode.is_file() else ""
    if "--list-devices" in sys.argv:
        print("Available devices:", *(devices() or ["(none)"]), sep="\n  ")
        return 0
    if "--nonsense" in sys.argv:
        print("error: invalid argument: --nonsense", file=sys.stderr)
        return 1
    if option("-fit") == "on":
        plan()
    say("I srv: loading")
    if what == "memory":
        say("E ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 99999999999")
        return 1
    if what == "port":
        say("E srv: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 8080")
        return 1
    if what == "dies":
        return 3
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)

    def end(number: int, frame: FrameType | None) -> None:
        del number, frame
        Path(sys.argv[0]).with_name("ended").touch()
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    server = ThreadingHTTPServer(("127.0.0.1", int(option("--port", "8080"))), Handler)
    if what != "quiet":
        say(f"I srv: listening on http://127.0.0.1:{server.server_port}")
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
