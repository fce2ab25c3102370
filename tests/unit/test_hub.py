"""Models from the hub. Risks: a wrong or cut file that is used, a download that starts from nothing, no work without a network."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_gguf
from hub_server import Hub, hub

from turbo_gguf.errors import EnvironmentMissing
from turbo_gguf.files import sha256_of
from turbo_gguf.inputs import hub as hub_models

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", head=64, n_layer=3, n_head=2, n_head_kv=1)


@pytest.fixture
def server(tiny: Path) -> Iterator[Hub]:
    with hub({"tiny.gguf": tiny.read_bytes(), "README.md": b"# tiny\n"}) as running:
        yield running


def _fetch(server: Hub, home: Path, spec: str, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
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
        **variables,
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
        hub_models._check(path, "org/model", None, 5)
    assert not path.exists()


# Several files


@pytest.fixture
def several(server: Hub, tmp_path: Path) -> list[str]:
    """The hub has a model in several files beside the other one."""
    first = tiny_gguf.write(tmp_path / "big.gguf", head=64, n_layer=3, n_head=2, n_head_kv=1, split=10, small_first=True)
    paths = sorted(first.parent.glob("big-*.gguf"))
    for path in paths:
        server.files[f"sub/{path.name}"], server.announced[f"sub/{path.name}"] = path.read_bytes(), sha256_of(path)
    return [f"sub/{path.name}" for path in paths]


def test_all_files_of_a_model_are_downloaded(server: Hub, home: Path, several: list[str]) -> None:
    done = _fetch(server, home, f"org/model:{several[0]}")
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path.name == Path(several[0]).name
    assert [(path.parent / Path(name).name).read_bytes() for name in several] == [server.files[name] for name in several]
    shown = _fetch(server, home, f"org/model:{several[0]}", "show")
    assert shown.stdout.count(".gguf") == len(several) >= 3


def test_a_model_in_several_files_is_one_to_choose(server: Hub, home: Path, several: list[str]) -> None:
    done = _fetch(server, home, "org/model")
    assert done.returncode == 2 and f"choose one: org/model:{several[0]}, org/model:tiny.gguf\n" in done.stderr
    del server.files["tiny.gguf"]
    assert _fetch(server, home, "org/model").returncode == 0


def test_another_part_than_the_first_is_refused_before_the_download(server: Hub, home: Path, several: list[str]) -> None:
    done = _fetch(server, home, f"org/model:{several[1]}")
    assert done.returncode == 2 and f"name the first one: org/model:{several[0]}" in done.stderr and not server.served


def test_a_part_that_the_hub_lacks_is_named_before_the_download(server: Hub, home: Path, several: list[str]) -> None:
    del server.files[several[-1]]
    done = _fetch(server, home, f"org/model:{several[0]}")
    assert done.returncode == 2 and f"no file {several[-1]}" in done.stderr and not server.served


# Without a network


@pytest.fixture(params=["offline", "unreachable", "failing"])
def away(request: pytest.FixtureRequest, server: Hub) -> Iterator[tuple[Hub, dict[str, str]]]:
    """A hub that cannot be asked, and variables."""
    if request.param == "failing":
        with hub({}) as other:
            other.failing = True
            yield other, {}
    else:
        with hub({}) as gone:
            pass
        yield gone, {"HF_HUB_OFFLINE": "1"} if request.param == "offline" else {}


def test_what_the_cache_has_is_used(server: Hub, home: Path, tiny: Path, away: tuple[Hub, dict[str, str]]) -> None:
    there = _fetch(server, home, "org/model").stdout
    gone, variables = away
    for spec in ("org/model", "org/model:tiny.gguf", "hf://org/model/tiny.gguf"):
        done = _fetch(gone, home, spec, **variables)
        assert (done.returncode, done.stdout) == (0, there), done.stderr
        assert ("taken from the hub's cache" in done.stderr) == (not variables)


def test_a_state_of_another_branch_is_found(server: Hub, home: Path, away: tuple[Hub, dict[str, str]]) -> None:
    there = _fetch(server, home, "org/model").stdout
    (main,) = (home / "hf").rglob("refs/main")
    main.rename(main.with_name("other"))
    assert _fetch(away[0], home, "org/model", **away[1]).stdout == there


def test_several_files_are_found_in_the_cache_and_a_missing_one_is_named(
    server: Hub, home: Path, several: list[str], away: tuple[Hub, dict[str, str]]
) -> None:
    there = _fetch(server, home, f"org/model:{several[0]}").stdout
    assert _fetch(away[0], home, "org/model", **away[1]).stdout == there
    (last,) = (home / "hf").rglob(Path(several[-1]).name)
    last.resolve().unlink()  # leaves a link to nothing
    for spec in ("org/model", f"org/model:{several[0]}"):
        done = _fetch(away[0], home, spec, **away[1])
        assert done.returncode == 3 and f"lacks {several[-1]}" in done.stderr, done.stderr


def test_what_the_cache_lacks_is_said(server: Hub, home: Path, away: tuple[Hub, dict[str, str]]) -> None:
    done = _fetch(away[0], home, "org/model:tiny.gguf", **away[1])
    assert done.returncode == 3 and "lacks tiny.gguf" in done.stderr and "Traceback" not in done.stderr
    assert ("unset HF_HUB_OFFLINE" in done.stderr) == bool(away[1])
