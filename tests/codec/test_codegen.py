"""The generated files are what the tables say, and the check notices when they are not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from turbo_gguf.assets import patches_dir
from turbo_gguf.codec import codegen, tables

each_file = pytest.mark.parametrize("name", codegen.GENERATED, ids=lambda name: name.name)


def written(tmp_path: Path) -> Path:
    assert codegen.main(["--root", str(tmp_path)]) == 0
    return tmp_path


def test_the_committed_files_are_current() -> None:
    assert codegen.main(["--check"]) == 0


@each_file
def test_a_changed_file_is_reported(name: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path) / name
    text = path.read_text(encoding="utf-8").replace("turbo", "turbp", 1)
    path.write_text(text, encoding="utf-8")
    assert codegen.main(["--check", "--root", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert str(path) in err
    assert "python -m turbo_gguf.codec.codegen" in err
    assert path.read_text(encoding="utf-8") == text  # --check writes nothing


@each_file
def test_a_missing_file_is_reported(name: Path, tmp_path: Path) -> None:
    (written(tmp_path) / name).unlink()
    assert codegen.main(["--check", "--root", str(tmp_path)]) == 1


def test_writing_makes_them_current(tmp_path: Path) -> None:
    assert codegen.outdated(tmp_path) == [tmp_path / name for name in codegen.GENERATED]
    assert not codegen.outdated(written(tmp_path))
    for name in codegen.GENERATED:
        assert (tmp_path / name).read_text(encoding="utf-8") == (patches_dir() / name).read_text(encoding="utf-8")


def test_ids_and_names_are_unique_and_ids_ascend() -> None:
    """Ids stand in files of users: these may not change, and no type may take one of another."""
    known = {"turbo2": 64, "turbo3": 65, "turbo4": 66, "turbo2t": 67, "turbo3t": 68, "turbo4t": 69}
    assert known.items() <= {t.name: t.type_id for t in tables.ALL}.items()
    ids = [t.type_id for t in tables.ALL]
    assert ids == sorted(set(ids))
    assert len({t.enum for t in tables.ALL}) == len({t.c_name for t in tables.ALL}) == len(tables.BY_NAME) == len(tables.ALL)


def test_pairs_are_grouped_by_k_and_named_once() -> None:
    keys = [k for k, _ in tables.DECODE_PAIRS]
    assert keys == sorted(keys, key=keys.index)
    assert len(set(tables.DECODE_PAIRS)) == len(tables.DECODE_PAIRS)
    for t in tables.ALL:
        assert {(t.name, t.name), ("f16", t.name)} <= set(tables.DECODE_PAIRS)


@pytest.mark.parametrize("macro", ["TURBO_DECODE_INSTANCE", "TURBO_DECODE_MMA_INSTANCE"])
def test_every_pair_is_compiled_in_one_file(macro: str) -> None:
    """No file has more than four default pairs, which is what a compiler takes up to two minutes for."""
    default, every = [], []
    for path, text in codegen.GENERATED.items():
        if path.suffix == ".cu":
            first, _, rest = text().partition("#ifdef GGML_TURBO_CUDA_ALL_PAIRS")
            pairs, others = (re.findall(rf"^{macro}\((\w+), (\w+)\);$", part, re.MULTILINE) for part in (first, rest))
            assert len(pairs) <= 4
            default += pairs
            every += pairs + others
    assert sorted(default) == sorted((tables.enum_of(k), tables.enum_of(v)) for k, v in tables.DECODE_PAIRS)
    names = ["f16", "q8_0", *tables.BY_NAME]
    allowed = {(k, v) for k in names for v in names if {k, v} & set(tables.BY_NAME)} | {("f16", "f16"), ("q8_0", "q8_0")}
    assert sorted(every) == sorted((tables.enum_of(k), tables.enum_of(v)) for k, v in allowed)


def test_the_list_imports_fast() -> None:
    """The driver takes its cache types from the list: that must not import numpy."""
    code = "import sys; from turbo_gguf.codec import tables; assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("t", tables.ALL, ids=lambda t: t.name)
def test_shaders_have_the_levels_as_words(t: tables.TurboType) -> None:
    """Four in a word, the first one lowest, of both codebooks of a trellis type."""
    text = codegen.glsl_tables()
    (line,) = re.findall(rf"^#define {t.enum}_WORDS (.*)$", text, re.MULTILINE)
    levels = [
        level - 256 if level > 127 else level for word in line.split(", ") for level in int(word.rstrip("u"), 16).to_bytes(4, "little")
    ]
    books = [t.codebook] if isinstance(t, tables.ScalarType) else t.codebooks
    assert levels == [level for book in books for level in book]
    assert f"#define {t.enum}_LEVELS {len(levels)}\n" in text
