"""Caches of several streams, on all architectures: with exact tokens they work, or are refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Tool
from test_calibration import made_by_upstream

pytestmark = pytest.mark.native

CACHES = {
    "two": ("-npl", "2", "-c", "512"),
    "ubatches that streams do not divide": ("-npl", "3", "-c", "768", "-ub", "10"),
    "all in one stream": ("-npl", "32", "-c", "2048", "-kvu"),
}
EXACT = ("-fa", "on", "--cache-sink", "4", "--cache-tail", "16")
REFUSAL = "leave out --cache-sink and --cache-tail"
NO_FLASH_ATTENTION = "which this architecture does not support"  # grok


def decode(tool: Tool, model: Path, *args: str) -> tuple[bool, str]:
    """Whether sequences were decoded side by side, and what was said. Anything but a refusal with its reason is a failure."""
    done = tool("llama-batched-bench", "-m", model, "-npp", "8", "-ntg", "4", "-t", "1", "-tb", "1", *args, timeout=60)
    assert done.rc == 0 or (done.refused and (REFUSAL in done.text or NO_FLASH_ATTENTION in done.text)), (
        f"{model.stem}: {done.text[-3000:]}"
    )
    return done.rc == 0, done.text


@pytest.mark.parametrize("arch", ["minimax-01", "kimi-linear"])
@pytest.mark.parametrize("tail", ["16", "64"])  # a prompt of few tokens is copied before it is attended
def test_graphs_reserved_for_one_sequence(tool: Tool, tmp_path: Path, arch: str, tail: str) -> None:
    """Upstream reserves the prompt of these for one sequence, whatever the number of streams."""
    model = made_by_upstream(tool, tmp_path, arch, "moe")
    for n_ubatch in ("64", "512"):
        works, text = decode(tool, model, "-npl", "2", "-c", "512", "-ub", n_ubatch, "-ctk", "q8_0", "-fa", "on", "--cache-tail", tail)
        assert works == (arch == "minimax-01"), text


def test_attention_of_streams_on_a_graph_reserved_for_one(tool: Tool, tmp_path: Path) -> None:
    model = made_by_upstream(tool, tmp_path, "minimax-01", "moe")
    done = tool("test-turbo-exact", model, "equal", "q8_0", "q4_0")
    assert done.rc == 0, done.text


def test_all_architectures(tool: Tool, tmp_path: Path) -> None:
    folder = tmp_path / "archs"
    folder.mkdir()
    done = tool("test-llama-archs", "-s", "1", "-o", f"{folder}/", timeout=300)
    models = sorted(folder.glob("*.gguf"))
    assert len(models) > 80, done.text[-3000:]
    works = 0
    for model in models:
        works += sum(decode(tool, model, *EXACT, *args)[0] for args in CACHES.values())
        model.unlink()  # together they are large
    assert works > 2 * len(models)
