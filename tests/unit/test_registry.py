"""The package registry as pip is set up for it: which files there are, and one of them, without running anything."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from registry_server import Registry, registry

from turbo_gguf.errors import EnvironmentMissing
from turbo_gguf.fetch import pip_settings
from turbo_gguf.fetch import registry as asking
from turbo_gguf.fetch.pip_settings import Settings, settings
from turbo_gguf.fetch.registry import Release, download, newer, releases

FILES = {
    "a_package-1.0.tar.gz": b"one" * 1000,
    "a_package-1.10.tar.gz": b"ten" * 1000,
    "a_package-1.9.tar.gz": b"nine" * 1000,
    "a_package-2.0rc1.tar.gz": b"soon",
    "a_package-1.11.tar.gz": b"withdrawn",
    "a_package-1.12-py3-none-any.whl": b"a wheel",
    "a_package_more-3.0.tar.gz": b"another package",
}


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "RETRY_SECONDS", 0.0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")


@pytest.fixture
def server() -> Iterator[Registry]:
    with registry(FILES) as running:
        running.yanked = {"a_package-1.11.tar.gz"}
        yield running


def versions(found: list[Release]) -> list[str]:
    return [release.version for release in found]


# pip's settings


@pytest.fixture
def fake_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in place of this Python: `-m pip config list` and `-m pip download --help` print what a test writes."""
    path = tmp_path / "fake-python"
    monkeypatch.setattr(pip_settings.sys, "executable", str(path))
    for name in ("INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS", "NO_INDEX", "CERT", "TIMEOUT", "DEFAULT_TIMEOUT", "PROXY"):
        monkeypatch.delenv(f"PIP_{name}", raising=False)
    return path


def script(path: Path, config: str, help_text: str = "") -> None:
    path.write_text(
        f'#!/bin/sh\ncase "$*" in\n"-m pip config list") cat <<\'END\'\n{config}\nEND\n;;\n'
        f"\"-m pip download --help\") cat <<'END'\n{help_text}\nEND\n;;\n*) exit 9;;\nesac\n"
    )
    path.chmod(0o755)


def test_settings_come_from_pips_files_and_variables(fake_pip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(
        fake_pip,
        "global.index-url='https://mirror.example/simple'\nglobal.cert='/a.pem'\ndownload.cert='/b.pem'\nglobal.timeout='60'\n"
        "install.proxy='no'\n:env:.find-links='ignored here'\nglobal.extra-index-url='https://one.example https://two.example'",
    )
    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels")
    found = settings()
    assert found.indexes == ("https://mirror.example/simple", "https://one.example", "https://two.example")
    assert (found.cert, found.proxy, found.timeout, found.links) == ("/b.pem", "", 60.0, ("/wheels",))


def test_the_default_index_is_the_one_that_pip_names(fake_pip: Path) -> None:
    script(fake_pip, "", "  -i, --index-url <url>   Base URL of the index (default https://index.example/simple). This should point")
    assert settings().indexes == ("https://index.example/simple",)


def test_no_index_is_heeded(fake_pip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(fake_pip, "global.extra-index-url='https://one.example'")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels")
    assert settings() == Settings(indexes=(), links=("/wheels",))


def test_a_python_without_pip_is_told_how_to_get_it(fake_pip: Path) -> None:
    fake_pip.write_text("#!/bin/sh\necho 'fake: No module named pip' >&2; exit 1\n")
    fake_pip.chmod(0o755)
    with pytest.raises(EnvironmentMissing, match="no pip") as caught:
        settings()
    assert caught.value.hint == f"{fake_pip} -m ensurepip"


def test_the_real_pip_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "https://index.example/simple")
    assert "https://index.example/simple" in settings().indexes
    monkeypatch.delenv("PIP_INDEX_URL")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    assert settings().indexes[0].startswith("https://")


# What there is


@pytest.mark.parametrize("as_html", [False, True])
def test_releases_are_source_distributions_newest_first(server: Registry, as_html: bool) -> None:
    server.html = as_html
    found = releases("A.Package", Settings((server.url,)))
    assert versions(found) == ["2.0rc1", "1.11", "1.10", "1.9", "1.0"]
    assert found[2].sha256 == hashlib.sha256(FILES["a_package-1.10.tar.gz"]).hexdigest()
    assert [release.yanked for release in found] == [False, True, False, False, False]


def test_newer_leaves_out_previews_and_what_was_withdrawn(server: Registry) -> None:
    found = releases("a-package", Settings((server.url,)))
    assert versions(newer(found, ["1.0", "1.9"])) == ["1.10"]
    assert newer(found, ["1.10"]) == []
    assert versions(newer(found, [])) == ["1.10", "1.9", "1.0"]


def test_an_index_that_does_not_know_a_package_is_no_error(server: Registry, tmp_path: Path) -> None:
    using = Settings((server.url, (tmp_path / "not-there").as_uri()))
    assert releases("other", using) == []


def test_indexes_in_folders_and_find_links_are_read(tmp_path: Path) -> None:
    (tmp_path / "simple/a-package").mkdir(parents=True)
    (tmp_path / "simple/a-package/index.html").write_text('<a href="../../files/a_package-1.0.tar.gz">x</a>')
    (tmp_path / "files").mkdir()
    (tmp_path / "files/a_package-1.0.tar.gz").write_bytes(b"one")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/a_package-1.5.tar.gz").write_bytes(b"five")
    (tmp_path / "page.html").write_text('<a href="links/a_package-1.5.tar.gz#sha256=' + "0" * 64 + '">x</a>')
    using = Settings(((tmp_path / "simple").as_uri(),), links=(str(tmp_path / "links"), str(tmp_path / "page.html"), "/nonexistent"))
    found = releases("a-package", using)
    assert versions(found) == ["1.5", "1.5", "1.0"]
    assert download(found[2], tmp_path / "out", using) == hashlib.sha256(b"one").hexdigest()


def test_one_index_that_fails_does_not_hide_another(server: Registry) -> None:
    using = Settings(("http://127.0.0.1:9/simple", server.url), timeout=2)
    assert "1.10" in versions(releases("a-package", using))


def test_no_answer_names_each_address_without_its_password() -> None:
    using = Settings(("http://me:secret@127.0.0.1:9/simple",), timeout=2)
    with pytest.raises(EnvironmentMissing, match=r"versions of a-package:\n  http://127\.0\.0\.1:9/simple/a-package/: .*refused") as caught:
        releases("a-package", using)
    assert "secret" not in caught.value.message
    assert "pip config list" in caught.value.hint


def test_a_login_reaches_pages_and_files(server: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.login = "me:se cret"
    using = Settings((server.url.replace("://", "://me:se%20cret@"),))
    found = releases("a-package", using)
    assert download(found[-1], tmp_path / "x", using) == found[-1].sha256
    netrc = tmp_path / "netrc"
    netrc.write_text('machine 127.0.0.1 login me password "se cret"\n')
    monkeypatch.setenv("NETRC", str(netrc))
    assert releases("a-package", Settings((server.url,)))
    monkeypatch.setenv("NETRC", "/nonexistent")
    with pytest.raises(EnvironmentMissing, match="401"):
        releases("a-package", Settings((server.url,)))


@pytest.mark.parametrize("as_html", [False, True])
def test_an_index_may_state_no_hashes(server: Registry, as_html: bool) -> None:
    server.html = as_html
    server.stated = dict.fromkeys(FILES, "")
    assert {release.sha256 for release in releases("a-package", Settings((server.url,)))} == {""}


# Files


def test_a_passing_failure_and_a_broken_transfer_are_tried_again(server: Registry, tmp_path: Path) -> None:
    server.failing, server.break_off = 1, 1
    using = Settings((server.url,))
    release = releases("a-package", using)[2]
    assert download(release, tmp_path / "x", using) == release.sha256
    assert (tmp_path / "x").read_bytes() == FILES["a_package-1.10.tar.gz"]
    assert server.asked == ["/simple/a-package/"] * 2 + ["/files/a_package-1.10.tar.gz"] * 2


def test_a_transfer_that_never_ends_well_is_an_error(server: Registry, tmp_path: Path) -> None:
    server.break_off = 99
    using = Settings((server.url,))
    with pytest.raises(EnvironmentMissing, match=r"cannot fetch a-package 1\.0: http://127.*IncompleteRead"):
        download(releases("a-package", using)[-1], tmp_path / "x", using)
