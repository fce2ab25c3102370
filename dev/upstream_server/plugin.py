"""A pytest plugin for upstream's server tests: ``-p upstream_server.plugin``. Their text stays as it is.

Environment variables:
    UPSTREAM_SERVER_HUB: URL of the local hub that stands for the real one.
    UPSTREAM_SERVER_SKIPS: the table of what is skipped, with reasons.
    UPSTREAM_SERVER_RESULTS: a file for one line of JSON per test.
    UPSTREAM_SERVER_SECONDS: time limit of a test.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from turbo_gguf.cache.settings import SETTINGS
from upstream_server import skips
from upstream_server.outcome import Outcome, last_line

HUB = "https://huggingface.co/"


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Replace what reaches out to the network, before anything of upstream's is imported."""
    del early_config
    for variable in (variable for setting in SETTINGS for variable in setting.variables):
        os.environ.pop(variable, None)  # the defaults, whatever is set outside
    stub: Any = types.ModuleType("wget")
    stub.download = _download
    sys.modules["wget"] = stub
    requests = importlib.import_module("requests")
    get = requests.get
    requests.get = lambda url, *args, **kwargs: get(_local(url), *args, **kwargs)
    utils = importlib.import_module("utils")
    utils.ServerPreset.load_all = staticmethod(lambda: None)  # every model is in the cache already
    _wrap(utils.ServerProcess)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what the table names."""
    table = skips.load(Path(os.environ["UPSTREAM_SERVER_SKIPS"]))
    for item in items:
        reason = skips.reason_of(item.nodeid, table)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """End a test that takes too long."""

    def expired(signum: int, frame: object) -> None:
        raise TimeoutError(f"took more than {limit} seconds")

    limit = int(os.environ["UPSTREAM_SERVER_SECONDS"])
    before = signal.signal(signal.SIGALRM, expired)
    signal.alarm(limit)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write down how a test ended: in its call, or before it."""
    if report.when == "call" or report.outcome != "passed":
        detail = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else last_line(report.longreprtext)
        outcome = Outcome(report.nodeid, report.outcome, report.duration, detail)
        with Path(os.environ["UPSTREAM_SERVER_RESULTS"]).open("a", encoding="utf-8") as file:
            file.write(outcome.line())


def _local(value: Any) -> Any:
    """A value with the hub's address replaced by that of the local one, however deep it lies."""
    if isinstance(value, str):
        return value.replace(HUB, os.environ["UPSTREAM_SERVER_HUB"])
    if isinstance(value, list):
        return [_local(item) for item in value]
    if isinstance(value, dict):
        return {key: _local(item) for key, item in value.items()}
    return value


def _download(url: str, out: str) -> None:
    response = sys.modules["requests"].get(url)
    response.raise_for_status()
    Path(out).parent.mkdir(exist_ok=True)
    Path(out).write_bytes(response.content)


def _wrap(process: Any) -> None:
    """Change what a test's server is started with, and the addresses in its requests."""
    start, request, stream = process.start, process.make_request, process.make_stream_request

    def start_packed(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.fa == "off" and os.environ["LLAMA_ARG_CACHE_TYPE_V"] != "f16":
            self.fa = None  # no packed V without flash attention, upstream's own types included
        start(self, *args, **kwargs)

    process.start = start_packed
    process.make_request = lambda self, method, path, data=None, *a, **k: request(self, method, path, _local(data), *a, **k)
    process.make_stream_request = lambda self, method, path, data=None, *a, **k: stream(self, method, path, _local(data), *a, **k)
