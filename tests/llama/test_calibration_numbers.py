"""What llama-turbo-calibrate computes, against numpy (calibration_by_hand.py).

Risks: moments of other tokens or heads, RoPE turned the wrong way, heads of several layers mixed up, positions or chunks off by one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import calibration_by_hand
import numpy as np
import pytest
import tiny_models
from conftest import Tool

from turbo_gguf.cache import calibration

pytestmark = pytest.mark.native

MODELS = {
    "head64": "RoPE of neighbours",
    "bias": "RoPE of channels half a head apart, and biases",
    "partial64": "RoPE of half of a head",
    "layers4": "four layers",
    "one-kv-head": "one KV head",
    "heads-differ": "other numbers of heads in each layer",
    "many-heads": "columns of the output projection of two query heads at once",
}
ERROR = 2e-4
"""Largest error of a vector, over its root mean square; of binary32 it is at most 2e-5."""

ERRORS = {
    "k_metric": 1e-3,  # rows are at right angles up to 1e-4
    ("many-heads", "k_metric"): 3e-3,
    ("many-heads", "v_scale"): 0.15,  # columns of several heads are projected at once
}
"""The same, where it may be larger."""


def written(tool: Tool, model: Path, *args: str | Path) -> calibration.Calibration:
    """Run the tool, and read what it wrote."""
    out = model.parent / f"{model.stem}.calibration.gguf"
    done = tool("llama-turbo-calibrate", "-m", model, "-o", out, *args)
    assert done.rc == 0, done.text
    made = calibration.read(out)
    assert re.match(rf"{made.tokens} tokens, {len(made.layers)} layers, digest {calibration.digest(made)}\n", done.out), done.text
    return made


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("n_tokens", [200, 900])  # one chunk; two whole ones and a short one
def test_numbers(tool: Tool, tiny: Callable[[str], Path], prose: Path, model: str, n_tokens: int) -> None:
    shape = tiny_models.SHAPES[model]
    made = written(tool, tiny(model), "-f", prose, "-n", str(n_tokens))
    tokens, by_hand = calibration_by_hand.calibrate(tiny(model), shape, prose.read_text("ascii"), n_tokens)
    assert made.tokens == tokens
    assert list(made.layers) == list(range(shape.n_layer))
    for number, expected in enumerate(by_hand):
        layer = made.layers[number]
        assert layer.k_map is not None and layer.q_map is not None and layer.k_scale is None
        np.testing.assert_allclose(
            layer.q_map.swapaxes(1, 2) @ layer.k_map, np.broadcast_to(np.eye(shape.head_k), layer.k_map.shape), atol=1e-4
        )
        found = {
            "k_metric": layer.k_map.swapaxes(1, 2) @ layer.k_map,
            "k_mean": layer.k_mean,
            "v_mean": layer.v_mean,
            "v_scale": layer.v_scale,
        }
        for name, got in found.items():
            want = getattr(expected, name)
            assert got.shape == want.shape, (number, name)
            error = np.abs(got - want).max() / np.sqrt(np.square(want).mean())
            print(f"{model} {number} {name}: {error:.1e}")
            assert error < ERRORS.get((model, name), ERRORS.get(name, ERROR)), (number, name)
    distances = np.max([layer.distances for layer in by_hand], axis=0)
    np.testing.assert_allclose([made.sink_distance, distances[made.sink]], distances.max(), rtol=1e-3)  # equal tokens are equally far
