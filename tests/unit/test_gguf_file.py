"""Headers of GGUF files. Risks: a type that is newer than the package gguf, a lost dimension, a damaged header that is believed."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_gguf

from turbo_gguf.errors import UsageError
from turbo_gguf.inputs import models
from turbo_gguf.inputs.gguf_file import GgufFile, part_names

Q2_0, UNKNOWN = 42, 999


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path / "home"))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return tiny_gguf.write(tmp_path / "tiny.gguf", head=64, n_layer=1, n_head=1)


def with_type(path: Path, tensor: str, number: int) -> Path:
    """Change the type of one tensor in a header, whatever that makes of its values."""
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack("<Q", len(tensor)) + tensor.encode()) + 8 + len(tensor)
    n_dims = struct.unpack_from("<I", data, at)[0]
    struct.pack_into("<I", data, at + 4 + 8 * n_dims, number)
    path.write_bytes(data)
    return path


def small(path: Path, **tensors: np.ndarray) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_it_reads_what_the_package_reads() -> None:
    path = Path(models.assets.embedded_model())
    mine, theirs = GgufFile(path), gguf.GGUFReader(path)
    assert mine.fields == {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert len(mine.tensors) == len(theirs.tensors) > 30 and mine.size == path.stat().st_size
    for a, b in zip(mine.tensors, theirs.tensors, strict=True):
        assert (a.name, a.type_id, a.ne, a.offset, a.n_bytes) == (b.name, b.tensor_type, tuple(b.shape), b.data_offset, b.n_bytes)
        np.testing.assert_array_equal(a.values(), gguf.dequantize(b.data, b.tensor_type))


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, np.int8, np.int16, np.int32, np.int64])
def test_values_of_plain_types(tmp_path: Path, kind: type) -> None:
    values = np.arange(-3, 3).reshape(2, 3).astype(kind)
    (found,) = GgufFile(small(tmp_path / "x.gguf", x=values)).tensors
    np.testing.assert_array_equal(found.values(), values)


@pytest.mark.parametrize(("number", "name", "size"), [(Q2_0, "Q2_0", 64 * 64 // 64 * 18), (UNKNOWN, "type 999", None)])
def test_a_type_that_the_package_does_not_know(tiny: Path, number: int, name: str, size: int | None) -> None:
    model = models.read(with_type(tiny, "blk.0.attn_k.weight", number))
    assert (model.n_layer, model.head_k) == (1, 64) and f"{name} 1" in model.weights
    (tensor,) = [tensor for tensor in GgufFile(tiny).tensors if tensor.name == "blk.0.attn_k.weight"]
    assert (tensor.type_name, tensor.n_bytes, tensor.ne) == (name, size, (64, 64))
    with pytest.raises(UsageError, match=rf"tensor blk\.0\.attn_k\.weight is of {name} \(id {number}\)") as caught:
        tensor.values()
    assert "another quantization" in caught.value.hint


def test_a_truncated_file_with_an_unknown_type(tiny: Path) -> None:
    """The size of the last tensor is not known, but it begins within the file."""
    last = max(GgufFile(tiny).tensors, key=lambda tensor: tensor.offset)
    data = with_type(tiny, last.name, UNKNOWN).read_bytes()
    tiny.write_bytes(data[: last.offset + 1])
    assert models.read(tiny).n_layer == 1
    tiny.write_bytes(data[: last.offset])
    with pytest.raises(UsageError, match="GGUF file truncated"):
        models.read(tiny)


def test_one_row_has_two_dimensions(tmp_path: Path) -> None:
    """As llama.cpp writes [head, 1]: with one dimension."""
    (found,) = GgufFile(small(tmp_path / "x.gguf", x=np.arange(8, dtype=np.float32))).tensors
    assert found.ne == (8,) and found.rows().shape == (1, 8) and found.values().shape == (8,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({4: struct.pack("<I", 1)}, "version 1, known are 2, 3"),
        ({4: struct.pack(">I", 3)}, "byte order"),
        ({8: struct.pack("<Q", 1 << 60)}, "cut off|unknown type|is there twice|dimensions"),
        ({16: struct.pack("<Q", 1 << 60)}, "cut off|unknown type|is there twice"),
        ({24: struct.pack("<Q", (1 << 64) - 1)}, "cut off"),
    ],
)
def test_headers_that_are_not_believed(tmp_path: Path, change: dict[int, bytes], message: str) -> None:
    path = small(tmp_path / "x.gguf", x=np.zeros(8, np.float32))
    data = bytearray(path.read_bytes())
    for at, value in change.items():
        data[at : at + len(value)] = value
    path.write_bytes(data)
    with pytest.raises(UsageError, match=rf"x\.gguf: GGUF file damaged or truncated .*({message})"):
        GgufFile(path)


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("a/x-00002-of-00003.gguf", ["a/x-00001-of-00003.gguf", "a/x-00002-of-00003.gguf", "a/x-00003-of-00003.gguf"]),
        ("x-00001-of-00001.gguf", ["x-00001-of-00001.gguf"]),
        ("x-1-of-3.gguf", ["x-1-of-3.gguf"]),
        ("x.gguf", ["x.gguf"]),
    ],
)
def test_names_of_parts(name: str, names: list[str]) -> None:
    assert part_names(name) == names
