"""scripts/bench/one_server.py: what is left of a server that does not start."""

from __future__ import annotations

import os
from pathlib import Path

import one_server
import pytest

from turbo_gguf.cache.spec import PLAIN
from turbo_gguf.errors import ToolFailed
from turbo_gguf.inputs import models
from turbo_gguf.make.build import Build
from turbo_gguf.patchset.tree import Tree


def test_a_server_that_does_not_start_is_ended_and_its_log_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "llama-server"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\necho no room\nexec sleep 60\n", encoding="utf-8")
    program.chmod(0o755)
    build = Build(id="", path=tmp_path, preset="cpu", tree=Tree(path=tmp_path, upstream="", commit="", digest=""), compiler="")
    monkeypatch.setattr(one_server, "START_SECONDS", 1)
    log = tmp_path / "server.log"
    serving = one_server.serve(build, models.embedded(), PLAIN, ctx=512, threads=1, log_path=log)
    with pytest.raises(ToolFailed, match=r"(?s)did not start with f16; log: .*server\.log.*no room"), serving:
        pytest.fail("it started")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text("utf-8")), 0)
