"""Upstream's own tests in the patched build, with our cases in them: that they pass, and that ours ran."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

import pytest
from conftest import Tool

from turbo_gguf.codec import tables

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("plain")]

TURBO = tuple(t.name for t in tables.ALL)
OTHERS = ("f16", "bf16", "q8_0", "q5_0", "q4_0")
PAIRS = {*product(TURBO, TURBO), *product(TURBO, OTHERS), *product(OTHERS, TURBO)}
HEAD_SIZES = {(64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)}


def allows(pair: tuple[str, str], sizes: tuple[int, int]) -> bool:
    """Whether heads can be cut into blocks of these types."""
    return all(name not in tables.BY_NAME or size % tables.BY_NAME[name].block == 0 for name, size in zip(pair, sizes, strict=True))


ANSI = re.compile(r"\x1b\[[0-9;]*m")


HALVES = ("hsk=(64|128|256),.*turbo", "hsk=(?!(64|128|256),).*turbo")
"""The cases of attention, each in one of two parts that take as long."""


def backend_ops(tool: Tool, op: str, pattern: str = "turbo") -> list[str]:
    """Parameters of the turbo cases of one op that ran; all of them must be OK."""
    done = tool("test-backend-ops", "test", "-b", "CPU", "-o", op, "-p", pattern, timeout=900)
    text = ANSI.sub("", done.out)
    assert done.rc == 0, text[-3000:]
    cases = re.findall(rf"^  {op}\((.*)\): (.*)$", text, re.MULTILINE)
    bad = [case for case in cases if not case[1].endswith("OK") or "not supported" in case[1]]
    assert not bad
    assert f"{len(cases)}/{len(cases)} tests passed" in text
    return [params for params, _ in cases]


@pytest.mark.parametrize(
    ("op", "key", "at_least"),
    [("SET_ROWS", "type_dst", 40), ("GET_ROWS", "type", 8), ("CPY", "type_src", 4), ("CPY", "type_dst", 8), ("MUL_MAT", "type_a", 2)],
)
def test_backend_ops(tool: Tool, op: str, key: str, at_least: int) -> None:
    cases = backend_ops(tool, op)
    for name in TURBO:
        assert sum(f"{key}={name}" in re.split(r",\s*", case) for case in cases) >= at_least, name


def test_flash_attn_ext(tool: Tool) -> None:
    with ThreadPoolExecutor(len(HALVES)) as pool:
        halves = pool.map(partial(backend_ops, tool, "FLASH_ATTN_EXT"), HALVES)
        cases = [dict(re.findall(r"(\w+)=(\w+)", case)) for half in halves for case in half]
    ran = {(case["type_K"], case["type_V"], int(case["hsk"]), int(case["hsv"])) for case in cases}
    assert {(*pair, *sizes) for pair in PAIRS for sizes in HEAD_SIZES if allows(pair, sizes)} <= ran


def test_quantize_fns(tool: Tool) -> None:
    done = tool("test-quantize-fns", "-v")
    assert done.rc == 0, done.text
    for name in TURBO:
        for what in ("absolute quantization error", "reference implementation error", "dot product error"):
            assert re.search(rf"^\s*{name} {what}:\s+ok", done.out, re.MULTILINE), f"{name} {what}\n{done.out}"


def test_arg_parser(tool: Tool) -> None:
    done = tool("test-arg-parser")
    # what follows downloads over https, which our builds leave out
    assert done.rc == 0 or done.out.rstrip().endswith("test-arg-parser: test good URL"), done.text[-3000:]


def test_gguf(tool: Tool) -> None:
    done = tool("test-gguf", "1")
    assert done.rc == 0, done.text[-3000:]
    passed, total = re.findall(r"^(\d+)/(\d+) tests passed", done.out, re.MULTILINE)[-1]
    assert passed == total != "0"


def test_llama_archs(tool: Tool) -> None:
    done = tool("test-llama-archs", "-s", "1", timeout=900)
    assert done.rc == 0, done.text[-3000:]
    assert "FAIL" not in done.text


QUOTE = "The quick brown fox jumps over the lazy dog"


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_save_load_state(tool: Tool, tiny: Callable[[str], Path], name: str) -> None:
    done = tool("test-save-load-state", "-m", tiny("head128"), "-p", QUOTE, "-ctk", name, "-ctv", name)
    assert done.rc == 0, done.text[-3000:]
    assert "All tests passed" in done.text


SAVED = [("turbo2", "turbo4"), ("turbo3", "turbo3"), ("f16", "turbo4"), ("turbo4", "f16")]
SAVED_TRELLIS = [("turbo2t", "turbo4t"), ("turbo3t", "turbo3t"), ("f16", "turbo4t"), ("turbo4t", "f16")]


@pytest.mark.parametrize(("model", "types"), [*product(("head96", "head128"), SAVED), *product(("head128",), SAVED_TRELLIS)])
def test_save_load_state_turbo(tool: Tool, tiny: Callable[[str], Path], model: str, types: tuple[str, str]) -> None:
    # Tests 5 and 7 copy a sequence on the device: upstream counts the blocks of a quantized cache as values there (q8_0 and q4_0
    # fail alike, no tool uses it), and the program aborts at 7. What its log still has queued is lost then, in a twentieth of all
    # runs a verdict of test 6 or of an earlier one, too: such a run is repeated.
    for _ in range(8):
        done = tool("test-save-load-state", "-m", tiny(model), "-p", QUOTE, "-ctk", types[0], "-ctv", types[1])
        parts = dict(re.findall(r"=== Test (\d): [^\n]*===(.*?)(?==== Test|\Z)", done.text, re.DOTALL))
        if all("PASS" in parts.get(number, "") for number in "2346"):
            return
    raise AssertionError(done.text[-3000:])
