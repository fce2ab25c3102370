"""``--device`` with devices of a real build: those behind two ``ggml-rpc-server``s, whose memory is that of this machine.

Risks: a list that is read wrongly, a plan for another device, a command that llama-server does not take.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import rpc
from click.testing import CliRunner

from turbo_gguf.cache.spec import parse_types
from turbo_gguf.cli import main
from turbo_gguf.inputs import headers
from turbo_gguf.plan import devices
from turbo_gguf.plan.memory import Context
from turbo_gguf.plan.planner import MARGIN, Planner

pytestmark = pytest.mark.native
MIB = 1 << 20


@pytest.fixture(scope="module")
def variables(native_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """With which programs of the build have two devices."""
    beside = rpc.beside(native_bin, tmp_path_factory.mktemp("rpc"))
    with ExitStack() as stack:
        yield {**beside.env, "LLAMA_ARG_RPC": ",".join(stack.enter_context(beside.server()) for _ in range(2))}


@pytest.fixture(autouse=True)
def two_devices(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_the_list(native_bin: Path) -> None:
    found = devices.listed(native_bin / "llama-server")
    assert len(found) == 2 and all(device.name.startswith("RPC") and 0 < device.free <= device.total for device in found)
    assert [device.name for device in devices.named(native_bin / "llama-server", "1,0")] == [found[1].name, found[0].name]


def test_a_plan_for_one_of_them(native_bin: Path, trained: Path) -> None:
    server = native_bin / "llama-server"
    name = devices.listed(server)[1].name
    done = CliRunner().invoke(main, ["plan", str(trained), "--server", str(server), "--device", "1", "--types", "turbo4t", "--ctx", "1024"])
    assert done.exit_code == 0, done.output
    assert re.search(rf"memory [\d.]+ GiB \(free of [\d.]+ MiB on {re.escape(name)}, less 1 GiB\); dry run", done.output), done.output
    assert done.output.count("-dev") == 1 and name in done.output.split("-dev", 1)[1]


def test_what_lies_there_is_what_counts(native_bin: Path, trained: Path) -> None:
    server = native_bin / "llama-server"
    plans = Planner(headers.read(str(trained)), server=server, backend="CPU", on=devices.named(server, "0"))
    types, context = parse_types("f16"), Context(4096)
    run = plans.ask(types, context)
    there = [device for device in run.devices if device.free is not None]
    assert len(there) == 1 and 0 < plans.charged(types, context) == there[0].used * MIB
    assert there[0].context >= plans.memory(types, context).kv // MIB, "the cache is on the device"
    assert 0 < plans.budget(None, [types], context).bytes < there[0].free * MIB + MARGIN
