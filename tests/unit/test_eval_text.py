"""The evaluation text: present, deterministic, large enough, and never trained on."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from turbo_gguf.errors import EnvironmentMissing
from turbo_gguf.inputs.eval_text import HELD_OUT, MIN_BYTES, held_out_text, read_source, stdlib_dir, write_held_out_text

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.lab.train_eval_model.corpus import is_test, is_training_file, training_files


def test_every_module_exists_in_this_interpreter() -> None:
    assert [name for name in HELD_OUT if not (stdlib_dir() / name).is_file()] == []


def test_names_are_unique_posix_paths() -> None:
    assert len(set(HELD_OUT)) == len(HELD_OUT)
    assert all(name.endswith(".py") and "\\" not in name for name in HELD_OUT)


def test_text_is_deterministic_and_bounded() -> None:
    text = held_out_text()
    assert text == held_out_text()
    assert MIN_BYTES <= len(text.encode("utf-8")) <= 1_500_000


def test_text_is_modules_in_order_with_unix_line_ends() -> None:
    text = held_out_text()
    places = [text.index(read_source(stdlib_dir() / name).rstrip("\n")) for name in HELD_OUT]
    assert places == sorted(places)
    assert places[0] == 0
    assert "\r" not in text
    assert text.endswith("\n")


def test_missing_module_is_skipped(tmp_path: Path) -> None:
    (tmp_path / HELD_OUT[0]).write_text("a = 1\n\n\n", encoding="utf-8")
    (tmp_path / HELD_OUT[1]).write_bytes(b"b = 2\r\n")
    assert held_out_text(tmp_path, min_bytes=1) == "a = 1\n\nb = 2\n"


def test_too_little_text_raises(tmp_path: Path) -> None:
    (tmp_path / HELD_OUT[0]).write_text("a = 1\n", encoding="utf-8")
    with pytest.raises(EnvironmentMissing, match=r"6 bytes .* 500000 are needed"):
        held_out_text(tmp_path)
    with pytest.raises(EnvironmentMissing, match="holds 0 bytes"):
        held_out_text(tmp_path / "absent")


def test_declared_encoding_is_honoured(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_bytes("# -*- coding: latin-1 -*-\r\nx = 'é'\r\n".encode("latin-1"))
    assert read_source(path) == "# -*- coding: latin-1 -*-\nx = 'é'\n"


def test_written_file_has_the_returned_hash(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    assert write_held_out_text(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.read_bytes().decode("utf-8") == held_out_text()


def test_no_held_out_module_is_trained_on() -> None:
    names = training_files(stdlib_dir())
    assert len(names) > 300
    assert set(HELD_OUT).isdisjoint(names)


@pytest.mark.parametrize(
    "name",
    [
        *HELD_OUT,
        "test/test_argparse.py",
        "test/test_dataclasses/dataclass_module_1.py",
        "test/test_csv.py",
        "unittest/test/testmock/testmock.py",
        "test/test_unittest/testmock/support.py",
        "test/test_http_cookiejar.py",
        "test/test_json/test_decode.py",
        "typing/__init__.py",
        "encodings/cp437.py",
        "site-packages/pip/__init__.py",
        "_sysconfigdata__linux_x86_64-linux-gnu.py",
        "pydoc_data/topics.py",
    ],
)
def test_excluded_from_training(name: str) -> None:
    assert not is_training_file(name)


@pytest.mark.parametrize("name", ["os.py", "asyncio/tasks.py", "email/message.py", "test/test_os.py", "json/scanner.py"])
def test_kept_for_training(name: str) -> None:
    assert is_training_file(name)


def test_tests_are_told_from_library_code() -> None:
    assert is_test("test/test_os.py")
    assert is_test("lib2to3/tests/test_util.py")
    assert not is_test("unittest/case.py")
