"""Model files. Risks: a truncated or wrong file that is used, a part that is left out of a key, head sizes found out late."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_gguf

from turbo_gguf.errors import UsageError
from turbo_gguf.files import sha256_of
from turbo_gguf.inputs import models


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", head=64, n_layer=3, n_head=2, n_head_kv=1)


def test_metadata(tiny: Path) -> None:
    model = models.read(tiny)
    assert (model.arch, model.name, model.n_layer, model.n_head_kv) == ("llama", "tiny", 3, (1, 1, 1))
    assert (model.head_k, model.head_v, model.n_ctx_train, model.n_vocab, model.uniform) == (64, 64, 1024, 259, True)
    assert model.size == tiny.stat().st_size and model.sha256 == sha256_of(tiny)
    assert models.resolve(tiny) == model == models.read(tiny)


def test_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "m.gguf", head=32)
    first = models.read(path)
    path.unlink()
    tiny_gguf.write(path, head=64)
    assert (first.head_k, models.read(path).head_k) == (32, 64)


def test_every_truncation_is_a_usage_error(tiny: Path, tmp_path: Path) -> None:
    """Cut anywhere: in the magic, in the metadata, in the tensor list, in the last tensor."""
    data = tiny.read_bytes()
    cuts = [0, 3, 4, 11, 20, 30, 100, 333, 1000, 2500, 5000, 7000, 8500, len(data) // 2, len(data) - 4096, len(data) - 33, len(data) - 1]
    for cut in cuts:
        path = tmp_path / f"cut-{cut}.gguf"
        path.write_bytes(data[:cut])
        with pytest.raises(UsageError, match="GGUF") as caught:
            models.read(path)
        assert caught.value.hint


def test_file_that_is_no_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(UsageError, match="not a GGUF file"):
        models.resolve(path)


def test_gguf_without_a_language_model(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "clip")
    writer.add_tensor("a", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UsageError, match=r"clip\.block_count"):
        models.read(tmp_path / "x.gguf")


@pytest.mark.parametrize("spec", ["nowhere.gguf", "./no/such/model.gguf", "a b/c", "org", "org/model:file.bin", "../x/y/z"])
def test_spec_that_is_neither_path_nor_hub_id(spec: str) -> None:
    with pytest.raises(UsageError, match="no such file"):
        models.resolve(spec)


def test_text_files(tmp_path: Path) -> None:
    good = tmp_path / "text.txt"
    good.write_text("x = 1\n", encoding="utf-8")
    assert models.text_file(good).size == 6
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name in ("empty.txt", "latin.txt", "missing.txt"):
        with pytest.raises(UsageError, match=name):
            models.text_file(tmp_path / name)


def test_held_out_text_is_the_same_every_time() -> None:
    first = models.held_out_text()
    assert first == models.held_out_text() and first.size > 400_000


# --- several files --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["tensors first", "first without tensors"])
def several(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (tmp_path / "parts").mkdir()
    return tiny_gguf.write(tmp_path / "parts" / "tiny.gguf", head=64, n_layer=3, n_head=2, n_head_kv=1, split=10, small_first=request.param)


def files_of(first: Path) -> list[Path]:
    return sorted(first.parent.glob("*.gguf"))


def test_a_model_in_several_files_is_read_as_one(several: Path, tiny: Path) -> None:
    model, whole = models.read(several), models.read(tiny)
    assert model.parts == tuple(files_of(several)) and len(model.parts) >= 3 and model.path == several
    assert model.size == sum(path.stat().st_size for path in model.parts)
    assert (model.n_layer, model.n_head_kv, model.head_k, model.weights) == (whole.n_layer, whole.n_head_kv, whole.head_k, whole.weights)
    assert models.read(several) == model


def test_every_file_is_in_the_key(several: Path) -> None:
    seen = {models.read(several).sha256}
    for path in files_of(several):
        data = bytearray(path.read_bytes())
        data[-1 if len(data) > 20_000 else data.index(b"tiny")] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(1, len(seen)))  # the clock of a file may be coarse
        seen.add(models.read(several).sha256)
    assert len(seen) == len(files_of(several)) + 1


def test_links_are_followed_beside_the_link(several: Path, tmp_path: Path) -> None:
    """As in the hub's cache: the targets have other names, in another folder."""
    (tmp_path / "links").mkdir()
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(files_of(several)):
        path.rename(tmp_path / "blobs" / str(number))
        (tmp_path / "links" / path.name).symlink_to(f"../blobs/{number}")
    model = models.resolve(tmp_path / "links" / several.name)
    assert model.path == tmp_path / "links" / several.name and len(model.parts) >= 3


@pytest.mark.parametrize("again", [False, True], ids=["first", "after the whole model was read"])
def test_another_file_than_the_first_is_refused(several: Path, again: bool) -> None:
    if again:
        models.read(several)
    with pytest.raises(UsageError, match=r"00002-of-.*: part 2 of a model in \d files") as caught:
        models.read(files_of(several)[1])
    assert str(several) in caught.value.hint


@pytest.mark.parametrize("number", [1, -1])
def test_a_missing_part_is_named(several: Path, number: int) -> None:
    models.read(several)
    gone = files_of(several)[number]
    gone.unlink()
    with pytest.raises(UsageError, match=f"{gone.name}: No such file") as caught:
        models.read(several)
    assert "one folder" in caught.value.hint


@pytest.mark.parametrize("number", [1, -1])
def test_a_truncated_part_is_named(several: Path, number: int) -> None:
    cut = files_of(several)[number]
    data = cut.read_bytes()
    for size in (0, 30, 200, len(data) // 2, len(data) - 33):
        cut.write_bytes(data[:size])
        with pytest.raises(UsageError, match=f"{cut.name}: GGUF file (damaged or )?truncated"):
            models.read(several)


def test_parts_of_two_models_are_not_mixed(several: Path, tmp_path: Path) -> None:
    paths = files_of(several)
    right = paths[-1].read_bytes()
    paths[-1].write_bytes(paths[-2].read_bytes())
    with pytest.raises(UsageError, match=r"is not part \d of"):
        models.read(several)
    paths[-1].write_bytes(right)
    (tmp_path / "other").mkdir()
    tiny_gguf.write(tmp_path / "other" / "tiny.gguf", head=64, n_layer=2, n_head=2, n_head_kv=1, split=7, small_first=False)
    paths[1].write_bytes(files_of(tmp_path / "other" / "x")[1].read_bytes())
    with pytest.raises(UsageError, match=r"tensors in \d files, announced are"):
        models.read(several)


def test_a_renamed_first_file(several: Path, tmp_path: Path) -> None:
    renamed = several.rename(tmp_path / "model.gguf")
    with pytest.raises(UsageError, match=r"does not end in -00001-of-0000\d\.gguf"):
        models.read(renamed)
