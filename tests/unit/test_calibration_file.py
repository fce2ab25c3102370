"""Calibration files: what is read from them, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import calibration_writer
import gguf
import numpy as np
import pytest

from turbo_gguf.cache import calibration
from turbo_gguf.cache.calibration import Calibration, LayerCalibration
from turbo_gguf.errors import UsageError

HEADS, HEAD = 2, 8


def layer(heads: int = HEADS, head_k: int = HEAD, head_v: int = HEAD) -> LayerCalibration:
    rng = np.random.default_rng(heads)

    def values(head: int) -> calibration.Floats:
        return rng.uniform(0.5, 2.0, (heads, head)).astype(np.float32)

    return LayerCalibration(values(head_k), values(head_k), None, None, values(head_v), values(head_v))


def mapped(heads: int = HEADS) -> LayerCalibration:
    maps = np.random.default_rng(heads).uniform(-1, 1, (2, heads, HEAD, HEAD)).astype(np.float32)
    return dataclasses.replace(layer(heads), k_scale=None, k_map=maps[0], q_map=maps[1])


def made(**layers: LayerCalibration) -> Calibration:
    by_number = {int(name.removeprefix("layer")): values for name, values in layers.items()} or {0: layer()}
    return Calibration("llama", "tiny", "0123abcd", 77, by_number, sink=2, sink_distance=4.5)


SHAPES = {
    "plain": {"layer0": layer()},
    "one KV head": {"layer0": layer(heads=1), "layer1": layer(heads=1)},
    "heads that differ": {"layer0": layer(heads=1), "layer1": layer(heads=4)},
    "K and V that differ": {"layer0": layer(head_k=12), "layer3": layer(head_v=4, heads=1)},
    "nothing centered": {"layer0": LayerCalibration(None, layer().k_scale, None, None, None, None)},
    "maps": {"layer0": mapped(), "layer1": mapped(heads=1), "layer2": layer()},
}


@pytest.mark.parametrize("layers", SHAPES.values(), ids=SHAPES)
def test_what_was_written(tmp_path: Path, layers: dict[str, LayerCalibration]) -> None:
    meant = made(**layers)
    back = calibration.read(calibration_writer.write(meant, tmp_path / "a.gguf"))
    assert (back.arch, back.name, back.fingerprint, back.tokens) == ("llama", "tiny", "0123abcd", 77)
    assert (back.sink, back.sink_distance) == (2, 4.5)
    assert list(back.layers) == list(meant.layers)
    for number, values in meant.layers.items():
        for name in (field.name for field in dataclasses.fields(LayerCalibration)):
            got, want = getattr(back.layers[number], name), getattr(values, name)
            assert (got is None) == (want is None)
            if want is not None:
                assert got.shape == want.shape
                np.testing.assert_array_equal(got, want)
    assert calibration.digest(back) == calibration.digest(meant)


def test_the_digest_sees_each_value() -> None:
    digests = {calibration.digest(made(**layers)) for layers in SHAPES.values()}
    assert len(digests) == len(SHAPES)
    changed = layer()
    assert changed.v_scale is not None
    changed.v_scale[1, 3] *= 1.0001
    assert calibration.digest(made(layer0=changed)) != calibration.digest(made())


def test_what_an_older_file_does_not_say(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(calibration.TYPE)
    writer.add_uint32("turbo.calibration.version", calibration.VERSION)
    writer.add_string("turbo.calibration.model", "0123abcd")
    writer.add_tensor("blk.0.k_scale", np.ones((HEADS, HEAD), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    back = calibration.read(path)
    assert (back.tokens, back.sink, back.sink_distance) == (0, 0, 0.0)


def test_truncated_anywhere(tmp_path: Path) -> None:
    data = calibration_writer.write(made(), tmp_path / "a.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in range(0, len(data), 7):
        cut.write_bytes(data[:size])
        with pytest.raises(UsageError, match=r"calibration .*cut\.gguf"):
            calibration.read(cut)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "model"}, "no calibration"),
        ({"version": 1}, "version 1, known is 2"),
        ({"version": None}, "version None, known is 2"),
    ],
)
def test_other_files(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(str(change.get("type", calibration.TYPE)))
    if (version := change.get("version", calibration.VERSION)) is not None:
        writer.add_uint32("turbo.calibration.version", int(str(version)))
    writer.add_tensor("blk.0.k_scale", np.ones((HEADS, HEAD), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UsageError, match=message):
        calibration.read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "damaged: no turbo.calibration.model"),
        ({"model": "0123abcd", "tensor": "k_scale"}, "damaged: list index out of range"),
        ({"model": "0123abcd", "tensor": "blk.first.k_scale"}, "damaged: .*'first'"),
        ({"model": "0123abcd", "tensor": "blk.0.k_map"}, "damaged: blk.0.k_map is F32"),
    ],
)
def test_damaged_files(tmp_path: Path, change: dict[str, str], message: str) -> None:
    path = tmp_path / "damaged.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(calibration.TYPE)
    writer.add_uint32("turbo.calibration.version", calibration.VERSION)
    if "model" in change:
        writer.add_string("turbo.calibration.model", change["model"])
    writer.add_tensor(change.get("tensor", "blk.0.k_scale"), np.ones((HEADS, HEAD), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UsageError, match=message) as error:
        calibration.read(path)
    assert error.value.hint == "write it again: turbo-gguf calibrate"


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        calibration.read(tmp_path / "missing.gguf")
