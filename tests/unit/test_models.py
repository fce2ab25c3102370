"""Model files. Risks: a truncated or wrong file that is used, a download that starts again from nothing, head sizes found out late."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_gguf
from hub_server import Hub, hub

from turbo_gguf.errors import EnvironmentMissing, UsageError
from turbo_gguf.files import sha256_of
from turbo_gguf.inputs import models

REPOSITORY = Path(__file__).resolve().parents[2]


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


# --- hub ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tiny: Path) -> Iterator[Hub]:
    with hub({"tiny.gguf": tiny.read_bytes(), "README.md": b"# tiny\n"}) as running:
        yield running


def _fetch(server: Hub, home: Path, spec: str, *command: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads its variables when it is imported."""
    env = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home / "hf"),
        "TURBO_GGUF_HOME": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        "NO_PROXY": "*",
        "no_proxy": "*",
    }
    argv = [sys.executable, "-c", "from turbo_gguf.cli import main; main()", "models", *(command or ("fetch",)), spec]
    return subprocess.run(argv, capture_output=True, text=True, env=env, cwd=REPOSITORY, timeout=120, check=False)


def test_download_by_repository_and_by_file(server: Hub, home: Path, tiny: Path) -> None:
    done = _fetch(server, home, "org/model")
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path.read_bytes() == tiny.read_bytes()
    served = len(server.served)
    for spec in ("org/model:tiny.gguf", "hf://org/model/tiny.gguf"):
        again = _fetch(server, home, spec)
        assert again.returncode == 0 and Path(again.stdout.strip()).samefile(path), again.stderr
    assert len(server.served) == served, "what is there already is not downloaded again"
    shown = _fetch(server, home, "org/model", "show")
    assert "head size    K 64, V 64" in shown.stdout and "turbo3" in shown.stdout


def test_broken_download_resumes(server: Hub, home: Path, tmp_path: Path) -> None:
    """The library writes pieces of 10 MB, so the file has to be larger than that."""
    large = tiny_gguf.write(tmp_path / "large.gguf", n_layer=1, n_head=6)
    server.files, server.announced = {"large.gguf": large.read_bytes()}, {"large.gguf": sha256_of(large)}
    server.break_after = 12_000_000
    first = _fetch(server, home, "org/model")
    if first.returncode != 0:  # the library gave up: the next call must go on where it stopped
        assert first.returncode == 3 and "run the same command again" in first.stderr
        first = _fetch(server, home, "org/model")
    assert first.returncode == 0, first.stderr
    assert Path(first.stdout.strip()).read_bytes() == large.read_bytes()
    assert server.served[0] == ("GET", 0, 12_000_000)
    assert len(server.served) > 1 and all(start >= 10_000_000 for _, start, _ in server.served[1:]), (
        "the second request asks for the rest only"
    )


def test_file_that_is_not_what_the_hub_announced_is_removed(server: Hub, home: Path) -> None:
    right = server.files["tiny.gguf"]
    server.files["tiny.gguf"] = right[:-1] + bytes([right[-1] ^ 1])
    done = _fetch(server, home, "org/model")
    assert done.returncode == 3 and "not what the hub announced" in done.stderr and "sha256" in done.stderr
    assert not [p for p in home.rglob("*") if p.is_file() and p.stat().st_size >= len(right)]
    server.files["tiny.gguf"] = right
    assert _fetch(server, home, "org/model").returncode == 0


def test_truncated_upload_is_a_usage_error(server: Hub, home: Path) -> None:
    server.files["tiny.gguf"] = server.files["tiny.gguf"][:100_000]
    server.announced["tiny.gguf"] = hashlib.sha256(server.files["tiny.gguf"]).hexdigest()
    done = _fetch(server, home, "org/model")
    assert done.returncode == 2 and "truncated" in done.stderr


def test_repository_or_file_that_does_not_exist(server: Hub, home: Path) -> None:
    for spec in ("org/nothing", "org/nothing:tiny.gguf", "org/model:other.gguf"):
        done = _fetch(server, home, spec)
        assert done.returncode == 2 and done.stderr.startswith("error: hub model org/"), (spec, done.stderr)


def test_several_files_have_to_be_chosen_from(server: Hub, home: Path) -> None:
    server.files["other.gguf"] = b"GGUF"
    done = _fetch(server, home, "org/model")
    assert done.returncode == 2 and "org/model:other.gguf, org/model:tiny.gguf" in done.stderr


def test_hub_that_cannot_be_reached(home: Path) -> None:
    with hub({}) as gone:
        pass
    done = _fetch(gone, home, "org/model:tiny.gguf")
    assert done.returncode == 3 and "failed" in done.stderr and "Traceback" not in done.stderr


def test_wrong_size_is_told_before_hashing(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(EnvironmentMissing, match="4 bytes, announced were 5"):
        models._check(path, "org/model", None, 5)
    assert not path.exists()
