"""Upstream's own server tests on the patched llama-server, with turbo types: those that touch a cache.

``make test-server`` runs all of them, beside f16 and q8_0.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from upstream_server import repositories, table
from upstream_server.hub import Repositories
from upstream_server.session import Session

from turbo_gguf.make import upstream

pytestmark = pytest.mark.native

FILES = (
    "chat_completion",
    "completion",
    "compat_oai_responses",
    "ctx_shift",
    "infill",
    "kv_keep_only_active",
    "lora",
    "slot_save",
    "speculative",
    "systemone",
    "vision_api",
)
AT_LEAST = 160  # cases that pass; 169 at b11549
CALIBRATIONS = 6  # of the models with a KV cache in these files, a draft among them
LIMIT = 600.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Repositories:
    """What stands for the hub's models."""
    return repositories.make(tmp_path_factory.mktemp("hub"))


@pytest.mark.parametrize("name", ["turbo4t", "turbo3t"])
def test_upstreams_server_tests(native_bin: Path, models: Repositories, tmp_path: Path, name: str) -> None:
    for package in ("openai", "requests"):
        pytest.importorskip(package, reason="upstream's server tests need it; make setup-dev installs it")
    server = native_bin / "llama-server"
    if not server.is_file():
        pytest.skip(f"{server} is not built")
    source = upstream.fetch(upstream.resolve()).path
    tests = [f"unit/test_{file}.py" for file in FILES]
    session = Session(source, server, models, tmp_path / "session", name)
    outcomes = {name: session.run_twice(tests, limit=LIMIT)}
    failed = sorted(table.failures(outcomes))
    if failed:  # upstream's own type decides whose they are
        outcomes[table.BASE] = Session(source, server, models, tmp_path / "base", table.BASE).run_twice(failed, limit=LIMIT)
    bad = {test: outcomes[name][test].detail for test in table.ours(outcomes)}
    assert not bad, f"{bad}; log: {session.log}"
    assert sum(outcome.ended == "passed" for outcome in outcomes[name].values()) >= AT_LEAST, session.log.read_text()[-3000:]
    assert session.calibrations() == CALIBRATIONS
