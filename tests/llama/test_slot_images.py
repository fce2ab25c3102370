"""Slots whose prompts have images: a turbo cache whose tokens are all exact answers as an f16 cache does (slots.py).

Tokens of an image have no text, and they look at those behind them: upstream decodes them without a causal mask.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from slots import EXACT, LOSS, NOISE, PACKED, WINDOW, Reply, Start, apart, characters, farthest, reply, request, starter
from upstream_server import vision

pytestmark = pytest.mark.native

MARK = "<image>"
N_IMAGE = vision.IMAGE_SIDE**2
MODELS = ("partial64", "bias", "hybrid")  # of the width that the projector has


@pytest.fixture(autouse=True)
def mark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers know where an image stands in a prompt."""
    monkeypatch.setenv("LLAMA_MEDIA_MARKER", MARK)


def images(folder: Path) -> list[str]:
    """A blue one and a red one."""
    files = [vision.write_image(folder / f"{red}.png", red=red) for red in (False, True)]
    return [base64.b64encode(file.read_bytes()).decode() for file in files]


def seen(prompt: str, *shown: str) -> dict[str, Any]:
    """A prompt with an image in each place that is marked."""
    return {"prompt_string": prompt, "multimodal_data": list(shown)}


def ask_about_images(start: Start, text: str, shown: list[str]) -> list[Reply]:
    """An image, the same with more text behind it, another image, both, one in another slot, none, and one again, which is saved."""
    blue, red = shown
    begin, end = text[:40] + MARK, text[40:100]
    with start("-np", "2", "--no-kv-unified", "-c", "2048") as server, ThreadPoolExecutor(2) as pool:

        def read(prompt: Any, slot: int = 0) -> Reply:
            then = text[500:512]
            return reply(server.server.call("/completion", request("", then, slot) | {"prompt": prompt}), then)

        found = [read(seen(begin + end, blue)), read(seen(begin + end + text[100:150], blue)), read(seen(begin + end, red))]
        found.append(read(seen(begin + end + MARK, red, blue)))
        found += pool.map(read, (seen(begin, red), text[:300]), (0, 1))
        found += [read(text[:400]), read(seen(begin + end, blue))]
        n_saved = server.save()
        server.erase()
        assert server.restore(1) == n_saved
        found.append(read(seen(begin + end + text[100:120], blue), 1))
    first, more, other, *_, restored = found
    assert min(more.reused, restored.reused) > N_IMAGE > other.reused
    assert apart(first, other) > LOSS  # an image is looked at
    return found


@pytest.mark.parametrize("model", MODELS)
def test_images(native_bin: Path, tiny: Callable[[str], Path], prose: Path, tmp_path: Path, model: str) -> None:
    projector = vision.write_projector(tmp_path / "projector.gguf")
    found: dict[str, list[Reply]] = {}
    for kind, settings in {"exact": EXACT, "window": WINDOW, "packed": PACKED}.items():
        start = starter(native_bin, tiny(model), tmp_path / kind, *settings, "--mmproj", str(projector))
        found[kind] = ask_about_images(start, characters(prose), images(tmp_path))
    noise, loss = (farthest(found["exact"], found[kind]) for kind in ("window", "packed"))
    print(f"{model}: noise {noise:.4f}, packed {loss:.3f}")
    assert noise <= NOISE
    assert loss >= LOSS
    assert [reply.reused for reply in found["exact"]] == [reply.reused for reply in found["window"]]
