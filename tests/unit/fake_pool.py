"""Stands in for Ray: nodes with homes of their own, in this process. What travels is pickled, as Ray does."""

from __future__ import annotations

import itertools
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

from turbo_gguf.cluster.pool import Act, Here, Lost, Needs, Node

GIB = 1 << 30


class FakePool:
    """Runs tasks in turn on the nodes that they may run on. A node dies after so many tasks; Ray runs its last one again elsewhere."""

    def __init__(self, folder: Path, names: Sequence[str] = ("one", "two"), *, gpus: int = 0, cpus: int = 2, gib: float = 8) -> None:
        self.folder = folder
        self.all = {f"id-{name}": Node(f"id-{name}", name, cpus, gpus, int(gib * GIB)) for name in names}
        self.dead: set[str] = set()
        self.dies_after: dict[str, int] = {}  # name -> tasks
        self.variables: dict[str, dict[str, str]] = {}  # name -> of that node
        self.patches: dict[str, Callable[[], mock._patch[object]]] = {}  # name -> what is different there
        self.ran: list[tuple[str, str, tuple[object, ...]]] = []  # name, task, arguments
        self.cancelled: list[int] = []
        self._tasks: dict[int, tuple[Act, bytes, Needs, Sequence[str], int]] = {}
        self._results: dict[int, object] = {}
        self._numbers = itertools.count()
        self._news: list[tuple[str, str]] = []

    def home(self, name: str) -> Path:
        return self.folder / f"home-{name}"

    def nodes(self) -> list[Node]:
        return [node for id, node in self.all.items() if id not in self.dead]

    def share(self, value: object) -> object:
        return value

    def submit(self, act: Act, *args: object, needs: Needs, on: Sequence[str], retries: int = 3) -> int:
        number = next(self._numbers)
        self._tasks[number] = (act, pickle.dumps(args), needs, tuple(on), retries)
        return number

    def finished(self, tasks: Sequence[int], seconds: float) -> list[int]:
        for number in tasks:
            if number not in self._results:
                self._results[number] = self._attempt(number)
            return [number]
        return []

    def result(self, task: int) -> object:
        found = self._results[task]
        if isinstance(found, Exception):
            raise found
        return pickle.loads(pickle.dumps(found))

    def cancel(self, tasks: Sequence[int]) -> None:
        self.cancelled += tasks

    def news(self) -> list[tuple[str, str]]:
        lines, self._news = self._news, []
        return lines

    def _attempt(self, number: int) -> object:
        act, args, needs, on, retries = self._tasks[number]
        for _ in range(retries + 1):
            able = [node for node in self.nodes() if node.id in on and needs.times(node)]
            if not able:
                break
            node = able[number % len(able)]
            if self.dies_after.get(node.name) == sum(name == node.name for name, *_ in self.ran):
                self.dead.add(node.id)
                continue
            values = pickle.loads(args)
            self.ran.append((node.name, act.__name__, values))
            here = Here(node.id, lambda text, node=node: self._news.append((node.id, text)))  # type: ignore[misc]
            variables = {"TURBO_GGUF_HOME": str(self.home(node.name)), **self.variables.get(node.name, {})}
            different = self.patches.get(node.name, lambda: mock.patch.dict(os.environ))()
            with mock.patch.dict(os.environ, variables), different:
                return act(here, *values)
        return Lost("the node died")
