"""What cannot work is refused: with the reason, what does work, an error code, and without a crash."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
from conftest import Tool

pytestmark = pytest.mark.native

TURBO = ("turbo2", "turbo3", "turbo4")


def complete(tool: Tool, model: Path, *args: str) -> tuple[bool, str]:
    """Whether llama-completion refused, and what it said."""
    done = tool("llama-completion", "-m", model, "-p", "once", "-n", "4", "-c", "128", "-no-cnv", "-t", "1", *args)
    return done.refused, done.text


@pytest.mark.parametrize("head", [80, 112])
@pytest.mark.parametrize("name", TURBO)
def test_head_size_that_has_no_blocks(tool: Tool, tiny: Callable[[str], Path], head: int, name: str) -> None:
    for side, flag in (("K", "-ctk"), ("V", "-ctv")):
        refused, text = complete(tool, tiny(f"head{head}"), flag, name)
        assert refused, text
        assert f"{side} cache type {name} needs a head size that is a multiple of 32" in text
        assert f"has {head}" in text
        assert f"use {flag} f16 or bf16" in text


@pytest.mark.parametrize("head", [80, 112])
@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_the_types_that_the_refusal_names_do_work(tool: Tool, tiny: Callable[[str], Path], head: int, name: str) -> None:
    refused, text = complete(tool, tiny(f"head{head}"), "-ctk", name, "-ctv", name)
    assert not refused, text


@pytest.mark.parametrize("types", [("turbo3", "turbo3"), ("turbo3", "f16"), ("f16", "turbo3")])
def test_flash_attention_off(tool: Tool, tiny: Callable[[str], Path], types: tuple[str, str]) -> None:
    refused, text = complete(tool, tiny("head128"), "-ctk", types[0], "-ctv", types[1], "-fa", "off")
    assert refused, text
    assert "cache type turbo3 needs flash attention, which was switched off: use -fa auto or -fa on" in text


@pytest.mark.parametrize("program", ["llama-cli", "llama-server", "llama-completion", "llama-perplexity", "llama-bench"])
def test_unknown_cache_type(tool: Tool, tiny: Callable[[str], Path], program: str) -> None:
    done = tool(program, "-m", tiny("head64"), "-ctk", "turbo9", timeout=60)
    assert done.refused, done.text
    assert "turbo9" in done.text or "invalid parameter for argument: -ctk" in done.text


@pytest.mark.parametrize("program", ["llama-completion", "llama-perplexity", "llama-bench", "llama-server"])
def test_truncated_model(tool: Tool, tiny: Callable[[str], Path], prose: Path, tmp_path: Path, program: str) -> None:
    model = tiny_models.truncated(tiny("head128"), tmp_path)
    extra = {"llama-completion": ("-p", "once", "-n", "4", "-no-cnv"), "llama-perplexity": ("-f", str(prose), "-c", "128")}
    done = tool(program, "-m", model, "-ctk", "turbo3", "-ctv", "turbo3", *extra.get(program, ()), timeout=60)
    assert done.refused, done.text
    assert model.name in done.text


def test_missing_model(tool: Tool, tmp_path: Path) -> None:
    refused, text = complete(tool, tmp_path / "missing.gguf", "-ctk", "turbo3")
    assert refused, text
    assert "missing.gguf" in text
