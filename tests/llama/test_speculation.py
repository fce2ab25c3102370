"""What is drafted and verified is what would have been decoded: the same bits in batches of all widths, and the same greedy text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Tool
from server import serve

from turbo_gguf import assets
from turbo_gguf.codec import tables
from turbo_gguf.inputs import eval_text

pytestmark = pytest.mark.native

WIDTHS = (2, 5, 16)
"""Batches of drafts. Wider ones than a cache has room for are prompts, and round differently."""

DRAFT = ("-md", str(assets.embedded_model()), "-ctkd", "turbo2", "-ctvd", "turbo2", "--spec-type", "draft-simple")
"""A draft model whose cache is worse, so that some of its tokens are wrong."""

N_GRAMS = ("--spec-type", "ngram-simple", "--spec-ngram-simple-size-n")

SPECULATION: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "short": ((*DRAFT, "--spec-draft-n-max", "8"), ()),
    "long": ((*DRAFT, "--spec-draft-n-max", "48"), (*DRAFT, "--spec-draft-n-max", "48", "--spec-draft-p-min", "1.01")),
    "n-grams": ((*N_GRAMS, "3"), (*N_GRAMS, "500")),
}
"""Options that draft, and options that do not: longer drafts have more rows of exact tokens, whose sums have another order. So those that
they are compared with have these rows, too."""


def logits(tool: Tool, model: Path, name: str, width: int, tmp_path: Path) -> bytes:
    """What llama-perplexity keeps of a text that is read in batches of this width."""
    text, found = tmp_path / "text.txt", tmp_path / f"logits-{width}"
    text.write_text(eval_text.held_out_text()[:6000], "utf-8")
    sizes = ("-c", "512", "-b", "512", "-ub", str(width), "--chunks", "1", "-t", "2")
    done = tool("llama-perplexity", "-m", model, "-f", text, *sizes, "-ctk", name, "-ctv", name, "--save-all-logits", found)
    assert done.rc == 0, done.text
    return found.read_bytes()


def check_widths(tool: Tool, model: Path, name: str, tmp_path: Path) -> None:
    one = logits(tool, model, name, 1, tmp_path)
    assert [width for width in WIDTHS if logits(tool, model, name, width, tmp_path) != one] == []


@pytest.mark.parametrize("name", [t.name for t in tables.ALL])
def test_bits_of_all_widths(tool: Tool, tmp_path: Path, name: str) -> None:
    check_widths(tool, assets.embedded_model(), name, tmp_path)


@pytest.mark.parametrize("shape", ["head64", "bias", "swa6", "layers4"])
def test_bits_of_other_models(tool: Tool, tiny: Callable[[str], Path], tmp_path: Path, shape: str) -> None:
    """With weights that upstream multiplies in one way, whatever the width: f32 is not such a type."""
    model = tmp_path / "q8_0.gguf"
    done = tool("llama-quantize", tiny(shape), model, "q8_0")
    assert done.rc == 0, done.text
    check_widths(tool, model, "turbo3t", tmp_path)


def greedy(native_bin: Path, tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    text = eval_text.held_out_text()
    folder = tmp_path / f"server-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    with serve(native_bin, assets.embedded_model(), folder, "-c", "1024", "-ctk", "turbo3t", "-ctv", "turbo3t", *options) as server:
        return [
            server.call("/completion", {"prompt": text[begin : begin + 900], "n_predict": 160, "temperature": 0, "ignore_eos": True})
            for begin in (0, 3000, 6000)
        ]


@pytest.mark.parametrize(("drafts", "alone"), SPECULATION.values(), ids=SPECULATION)
def test_greedy_text(native_bin: Path, tmp_path: Path, drafts: tuple[str, ...], alone: tuple[str, ...]) -> None:
    found, expected = greedy(native_bin, tmp_path, *drafts), greedy(native_bin, tmp_path, *alone)
    assert [one["content"] for one in found] == [one["content"] for one in expected]

    n_drafted, n_accepted = (sum(one["timings"].get(key, 0) for one in found) for key in ("draft_n", "draft_n_accepted"))
    assert n_drafted > n_accepted > 0
    assert not any(one["timings"].get("draft_n") for one in expected)
