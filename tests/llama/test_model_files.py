"""Model files, as llama.cpp takes them. Risk: the driver refuses what llama.cpp runs, or takes what it refuses."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
from conftest import Tool

from turbo_gguf.errors import UsageError
from turbo_gguf.inputs import models

pytestmark = pytest.mark.native

BENCH = ("-p", "16", "-n", "0", "-r", "1", "-t", "1", "--no-warmup")


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, native_bin: Path) -> None:
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path_factory.mktemp("home")))


def split(model: Path, out: Path, *, small_first: bool) -> list[Path]:
    """Write a model into several files, as llama-gguf-split does."""
    reader = gguf.GGUFReader(model)
    writer = gguf.GGUFWriter(out / "m.gguf", "llama", split_max_tensors=15, small_first_shard=small_first)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(out.glob("m-*.gguf"))


@pytest.mark.parametrize("small_first", [False, True], ids=["tensors first", "first without tensors"])
@pytest.mark.parametrize("linked", [False, True], ids=["files", "links"])
def test_several_files(tool: Tool, trained: Path, tmp_path_factory: pytest.TempPathFactory, small_first: bool, linked: bool) -> None:
    paths = split(trained, tmp_path_factory.mktemp("parts"), small_first=small_first)
    if linked:
        folder = tmp_path_factory.mktemp("links")
        for number, path in enumerate(paths):
            path.rename(path.with_name(str(number)))
            (folder / path.name).symlink_to(path.with_name(str(number)))
        paths = [folder / path.name for path in paths]
    model = models.resolve(paths[0])
    assert model.parts == tuple(paths) and model.weights == models.read(trained).weights
    assert tool("llama-bench", "-m", model.path, *BENCH).rc == 0
    with pytest.raises(UsageError, match="part 2"):
        models.resolve(paths[1])
    assert tool("llama-bench", "-m", paths[1], *BENCH).refused
    paths[-1].unlink()
    with pytest.raises(UsageError, match=paths[-1].name):
        models.resolve(paths[0])
    assert tool("llama-bench", "-m", paths[0], *BENCH).refused


def test_a_type_that_the_package_gguf_does_not_know(tool: Tool, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("quantized") / "q2_0.gguf"
    done = tool("llama-quantize", "--allow-requantize", trained, path, "Q2_0", "1")
    if "invalid ftype" in done.text:
        pytest.skip("this upstream has no Q2_0")
    assert done.rc == 0, done.text
    model = models.resolve(path)
    assert any(kind.startswith("Q2_0 ") for kind in model.weights) and model.n_layer == models.read(trained).n_layer
    assert tool("llama-bench", "-m", model.path, *BENCH).rc == 0
