"""The patches change nothing for the cache types that upstream has: logits and text are the same to the last bit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Tool

pytestmark = pytest.mark.native

TYPES = ("f32", "f16", "bf16", "q8_0", "q5_0", "q5_1", "q4_0", "q4_1", "iq4_nl")
PAIRS = [("head128", name, name) for name in TYPES] + [
    ("head128", "q8_0", "f16"),
    ("head128", "f16", "q4_0"),
    *((model, name, name) for model in ("head64", "head96", "head192-128", "swa") for name in ("f16", "q8_0", "q4_0")),
    ("head80", "f16", "f16"),
]


def logits(tool: Tool, model: Path, text: Path, folder: Path, *args: str) -> str:
    """Digest of the logits of a text, as llama-perplexity writes them (16 bits each)."""
    folder.mkdir()
    base = folder / "logits"
    done = tool("llama-perplexity", "-m", model, "-f", text, "-c", "256", "--chunks", "4", "-t", "1", "--kl-divergence-base", base, *args)
    assert done.rc == 0, done.text[-3000:]
    assert base.stat().st_size > 4 * 127 * 259 * 2
    return hashlib.sha256(base.read_bytes()).hexdigest()


@pytest.fixture
def builds(tool: Tool, pristine_tool: Tool) -> dict[str, Tool]:
    return {"patched": tool, "pristine": pristine_tool}


@pytest.mark.parametrize("case", PAIRS, ids="-".join)
def test_logits(builds: dict[str, Tool], tiny: Callable[[str], Path], prose: Path, tmp_path: Path, case: tuple[str, str, str]) -> None:
    model, type_k, type_v = case
    types = ("-ctk", type_k, "-ctv", type_v)
    digests = {name: logits(tool, tiny(model), prose, tmp_path / name, *types) for name, tool in builds.items()}
    assert digests["patched"] == digests["pristine"]


def test_the_digest_sees_the_cache_type(tool: Tool, tiny: Callable[[str], Path], prose: Path, tmp_path: Path) -> None:
    digests = {logits(tool, tiny("head128"), prose, tmp_path / name, "-ctk", name, "-ctv", name) for name in TYPES}
    # flash attention reads f32 as f16, so that these two may agree
    assert len(digests) >= len(TYPES) - 1


@pytest.mark.parametrize("name", ["f32", "f16", "q8_0"])
def test_text_over_a_context_shift(tool: Tool, pristine_tool: Tool, tiny: Callable[[str], Path], name: str) -> None:
    args = (
        "-m",
        tiny("head128"),
        "-p",
        "once",
        "-n",
        "300",
        "-c",
        "128",
        "--context-shift",
        "--ignore-eos",
        "-no-cnv",
        "--temp",
        "0",
        "-t",
        "1",
    )
    patched = tool("llama-completion", *args, "-ctk", name, "-ctv", name)
    pristine = pristine_tool("llama-completion", *args, "-ctk", name, "-ctv", name)
    assert patched.rc == pristine.rc == 0, patched.text[-3000:]
    printed = pristine.out.rstrip("\ufffd\n")  # the unpatched logger may lose the end, see hooks/common-log.patch
    assert len(printed) > 100
    assert patched.out.startswith(printed)
