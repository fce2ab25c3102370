"""Ray behind a few verbs. It is imported when it is asked for, and nothing else of the package knows it.

A task that ends with its worker or its node (killed, out of memory, unplugged) is run again by Ray, elsewhere if need be. What our own code
says is a value that a task returns, so it is never tried again.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from turbo_gguf import __version__, assets, tools
from turbo_gguf.errors import EnvironmentMissing, UsageError

LOCAL = "local"
AUTO = "auto"

RETRIES = 3
"""How often a task is run again that was lost."""

CONNECT_SECONDS = 5.0
END_SECONDS = 10.0

_START = "ray start --head on one machine, ray start --address=HOST:6379 on the others, and this command on one of them"
_NODE_LABEL = "ray.io/node-id"

_SETTINGS = b"\0\0\0\x04\0\0\0\0\0"
"""An empty SETTINGS frame of HTTP/2: length, type, flags, stream."""


class Node(msgspec.Struct, frozen=True):
    """A machine of the cluster, or a part of one."""

    id: str
    name: str  # that of `ray start --node-name`, its address without one
    cpus: float
    gpus: float
    memory: float  # bytes that Ray hands out


class Needs(msgspec.Struct, frozen=True):
    """What a task takes of a node."""

    cpus: int
    gpus: int
    memory: int  # bytes

    def times(self, node: Node) -> int:
        """How many such tasks an idle node runs at a time."""
        pairs = ((node.cpus, self.cpus), (node.gpus, self.gpus), (node.memory, self.memory))
        return min(int(has // takes) for has, takes in pairs if takes)


class Lost(Exception):
    """A task was lost with its worker or its node, again and again."""


class Here(msgspec.Struct, frozen=True):
    """What a task knows of where it runs."""

    node: str  # id
    tell: Callable[[str], None]  # sends a line to the driver


Act = Callable[..., object]
"""What a task does. Its first argument is a :class:`Here`; it raises nothing."""


class Pool(Protocol):
    """A cluster that runs tasks."""

    def nodes(self) -> list[Node]:
        """Nodes that are alive."""

    def share(self, value: object) -> Any:
        """A handle to a value, with which it travels to each node once at most."""

    def submit(self, act: Act, *args: object, needs: Needs, on: Sequence[str], retries: int = RETRIES) -> Any:
        """Start a task on one of the nodes ``on``, as soon as one has room, and return its handle."""

    def finished(self, tasks: Sequence[Any], seconds: float) -> list[Any]:
        """Those of some tasks that have ended, as soon as one has, or none after ``seconds``."""

    def result(self, task: Any) -> object:
        """What a task returned.

        Raises:
            Lost: it was lost, the last time that it may be.
            EnvironmentMissing: it could not even begin: the package is not installed there.
        """

    def cancel(self, tasks: Sequence[Any]) -> None:
        """End tasks, and the programs that they run."""

    def news(self) -> list[tuple[str, str]]:
        """Node and words of what tasks have told since the last call."""


@contextlib.contextmanager
def connected(address: str) -> Iterator[Pool]:
    """The cluster at an address as long as the block runs; ``local`` starts one of this machine alone. Its own words go to a log.

    Raises:
        EnvironmentMissing: Ray is not installed, or there is no cluster.
        UsageError: this is no address.
    """
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise EnvironmentMissing(f"--ray {address}: Ray is not installed", "pip install 'turbo-gguf[ray]'") from error
    _require_answer(address)
    log = assets.home() / "logs" / "ray.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as words, contextlib.redirect_stdout(words):  # where Ray says what nodes say
        _connect(ray, address, log)
        try:
            yield _RayPool(ray)
        finally:
            ray.shutdown()


def _require_answer(address: str) -> None:
    """Find out quickly that nobody is there: Ray itself waits for minutes."""
    if address in (LOCAL, AUTO):
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise UsageError(f"--ray {address}: neither HOST:PORT nor {AUTO} nor {LOCAL}", _START)
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS) as connection:
            spoken = os.environ.get("RAY_USE_TLS", "0") != "0" or _speaks_http2(connection)
    except (OSError, OverflowError) as error:
        raise EnvironmentMissing(f"--ray {address}: nobody answers: {error}", _START) from error
    if not spoken:
        raise EnvironmentMissing(f"--ray {address}: what answers is no Ray", _START)


def _speaks_http2(connection: socket.socket) -> bool:
    """Whether somebody answers the opening of HTTP/2 (RFC 9113, 3.4), which Ray's protocol gRPC uses, with settings of his own."""
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _SETTINGS)
    return connection.recv(len(_SETTINGS))[3:4] == _SETTINGS[3:4]


def _connect(ray: Any, address: str, log: Path) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    starts = {"include_dashboard": False} if address == LOCAL else {}
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error", **starts)
    except Exception as error:  # ConnectionError, RuntimeError, ValueError: what it raises is no contract
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EnvironmentMissing(f"--ray {address}: {first}; log: {log}", _START) from error
    finally:
        with contextlib.suppress(ValueError):  # not the main thread, where Ray sets none, either
            signal.signal(signal.SIGTERM, before)


def _on_node(act: Act, board: Any, *args: object) -> object:
    """Run on a node. A worker is killed outright when its node or the driver is gone, and takes with it what it runs."""
    ray = importlib.import_module("ray")
    tools.end_with_us()
    node = str(ray.get_runtime_context().get_node_id())
    return act(Here(node, lambda text: board.add.remote(node, text)), *args)


class Board:
    """What tasks tell, until the driver asks for it."""

    def __init__(self) -> None:
        self._lines: list[tuple[str, str]] = []

    def add(self, node: str, text: str) -> None:
        """Keep a line."""
        self._lines.append((node, text))

    def take(self) -> list[tuple[str, str]]:
        """Lines since the last call."""
        lines, self._lines = self._lines, []
        return lines


class _RayPool:
    """The :class:`Pool` that Ray is."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        here = {_NODE_LABEL: ray.get_runtime_context().get_node_id()}
        self._board = ray.remote(Board).options(num_cpus=0, label_selector=here).remote()
        self._run = ray.remote(_on_node)

    def nodes(self) -> list[Node]:
        found = [(row, row["Resources"]) for row in self._ray.nodes() if row["Alive"]]
        return [
            Node(row["NodeID"], row["NodeName"], has.get("CPU", 0.0), has.get("GPU", 0.0), has.get("memory", 0.0)) for row, has in found
        ]

    def share(self, value: object) -> Any:
        return self._ray.put(value)

    def submit(self, act: Act, *args: object, needs: Needs, on: Sequence[str], retries: int = RETRIES) -> Any:
        return self._run.options(
            name=act.__name__,
            num_cpus=needs.cpus,
            num_gpus=needs.gpus,
            memory=needs.memory,
            label_selector={_NODE_LABEL: f"in({','.join(on)})"},
            max_retries=retries,
            retry_exceptions=False,
        ).remote(act, self._board, *args)

    def finished(self, tasks: Sequence[Any], seconds: float) -> list[Any]:
        ready, _ = self._ray.wait(list(tasks), num_returns=1, timeout=seconds)
        return list(ready)

    def result(self, task: Any) -> object:
        errors = self._ray.exceptions
        try:
            return self._ray.get(task)
        except errors.RayTaskError as error:
            last = str(error).strip().splitlines()[-1]
            hint = f"install turbo-gguf {__version__} there, for the Python that runs `ray start`"
            raise EnvironmentMissing(f"a task of turbo-gguf could not begin: {last}", hint) from error
        except errors.RayError as error:
            raise Lost(str(error).strip().partition("\n")[0] or type(error).__name__) from error

    def cancel(self, tasks: Sequence[Any]) -> None:
        if tasks:
            for task in tasks:
                self._ray.cancel(task)  # an interrupt in the worker, as Ctrl-C
            self._ray.wait(list(tasks), num_returns=len(tasks), timeout=END_SECONDS)

    def news(self) -> list[tuple[str, str]]:
        lines: list[tuple[str, str]] = []
        with contextlib.suppress(self._ray.exceptions.RayError):  # words are lost, and results are not
            lines = self._ray.get(self._board.take.remote())
        return lines
