"""A llama-server for a user: started, followed until it answers, and ended with this process. What goes wrong is said in its words."""

from __future__ import annotations

import errno
import http.client
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import msgspec

from turbo_gguf import tools
from turbo_gguf.errors import EnvironmentMissing, ToolFailed, TurboError, UsageError
from turbo_gguf.measure import server

_DEFAULTS = {
    "--host": ("LLAMA_ARG_HOST", "127.0.0.1"),
    "--port": ("LLAMA_ARG_PORT", "8080"),
    "--api-prefix": ("LLAMA_ARG_API_PREFIX", ""),
}
"""Variables and values of llama-server's where an option is not named."""

LAST_PORT = 65535
POLL_SECONDS = 0.1

_LISTENING = re.compile(r"listening on (\S+)$")

_NO_MEMORY = re.compile(
    r"(?:failed|unable) to (?:allocate|reserve)|out of memory|cudaMalloc failed|bad_alloc|killed by SIGKILL|mmap failed", re.IGNORECASE
)
_NO_PORT = re.compile(r"couldn't bind|address already in use", re.IGNORECASE)


class Address(msgspec.Struct, frozen=True):
    """Where it listens."""

    host: str
    port: int
    prefix: str = ""  # of paths

    @property
    def url(self) -> str:
        """For a browser or a client."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::", "") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


def address(options: Sequence[str]) -> Address:
    """The address among options of llama-server.

    Raises:
        UsageError: the port is none.
    """
    found = {name: os.environ.get(variable, value) for name, (variable, value) in _DEFAULTS.items()}
    for name, value in pairwise(options):
        if name in found:
            found[name] = value
    if not found["--port"].isdecimal() or int(found["--port"]) > LAST_PORT:
        raise UsageError(f"--port {found['--port']}: no number from 0 to {LAST_PORT}")
    return Address(found["--host"], int(found["--port"]), found["--api-prefix"])


def require_free(where: Address) -> None:
    """Refuse a port that is taken, before a model is loaded.

    Raises:
        EnvironmentMissing: it is, or the address is none of this machine.
    """
    if "/" in where.host or not where.port:
        return  # a socket in the file system, or any port
    family = socket.AF_INET6 if ":" in where.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((where.host, where.port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise _port_taken(where) from error
            raise EnvironmentMissing(
                f"can't listen on {where.host}:{where.port}: {error.strerror}", "name another --host or --port"
            ) from error


def _port_taken(where: Address) -> EnvironmentMissing:
    return EnvironmentMissing(f"port {where.port} of {where.host} is in use", f"name another one: -- --port {where.port + 1}")


def run(argv: Sequence[str], where: Address, *, log: Path, say: Callable[[str], None], env: Mapping[str, str] | None = None) -> None:
    """Run a server until it ends, or until Ctrl-C.

    Args:
        argv: the program and its options.
        where: it listens.
        log: name of its log.
        say: gets each line of the log, and where it answers.
        env: variables on top of ours.

    Raises:
        EnvironmentMissing: a port is taken, or memory is short.
        ToolFailed: it crashed.
        KeyboardInterrupt: Ctrl-C before it was ready.
    """
    require_free(where)
    with tools.serving(argv, log=log, env=env) as service:
        url = _until_ready(service, where, say)
        try:
            say(f"ready: {url}")
            _follow(service, where, say)
        except KeyboardInterrupt:
            say("stopping")


def _until_ready(service: tools.Service, where: Address, say: Callable[[str], None]) -> str:
    """Wait for the model. Returns where it answers: as its log says, which knows a port that was left open, else as it was asked for."""
    while True:
        answers = where.port and _is_healthy(where)  # asked first: what it has said by then is repeated before "ready"
        for line in _told(service, say):
            if found := _LISTENING.search(line):
                return re.sub(r"//(0\.0\.0\.0|\[::\])", "//127.0.0.1", found[1])
        if service.ended() is not None:
            raise _why(service, where)
        if answers:
            return where.url
        time.sleep(POLL_SECONDS)


def _follow(service: tools.Service, where: Address, say: Callable[[str], None]) -> None:
    """Repeat what it says until it ends."""
    while (rc := service.ended()) is None:
        _told(service, say)
        time.sleep(POLL_SECONDS)
    _told(service, say)
    if rc:
        raise _why(service, where)


def _told(service: tools.Service, say: Callable[[str], None]) -> list[str]:
    """Repeat what it has said since the last time."""
    lines = service.lines()
    for line in lines:
        say(line)
    return lines


def _is_healthy(where: Address) -> bool:
    host = where.url.removeprefix("http://").rpartition(":")[0].strip("[]")
    try:
        return server.ask(where.port, f"{where.prefix}/health", None, host=host)[0] == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException, ValueError):
        return False


def _why(service: tools.Service, where: Address) -> TurboError:
    """What a server ended of."""
    try:
        service.require_alive("the log says more")
    except ToolFailed as error:
        text = f"{error.message}\n{tools.tail(service.stderr, 50)}"
        if _NO_PORT.search(text):
            return _port_taken(where)
        if _NO_MEMORY.search(text):
            return EnvironmentMissing(f"memory is short: {error.message}", "name a shorter --ctx, less --memory, or a smaller model")
        return error
    except TurboError as error:  # a full disk
        return error
    return ToolFailed(f"llama-server ended; log: {service.stderr}")
