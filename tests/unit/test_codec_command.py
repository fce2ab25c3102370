"""``turbo-gguf codec``. Risks: numbers of another type or rule, a file that ends in a traceback, a picture that is empty."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import tiny_gguf
from click.testing import CliRunner, Result

from turbo_gguf import codec
from turbo_gguf.cli import main
from turbo_gguf.codec import picture, tables


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turbo_gguf.cli.codec.VALUES", 64 * 64)


def cli(*args: object) -> Result:
    return CliRunner().invoke(main, ["codec", *map(str, args)])


def rows_of(result: Result) -> dict[str, list[str]]:
    """Cells of the table by the name of a row."""
    lines = [line.strip("| ").split("|") for line in result.output.splitlines() if line.startswith("| ")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


@pytest.mark.parametrize("t", tables.ALL, ids=lambda t: t.name)
def test_every_type_is_described_by_its_constants(t: tables.TurboType) -> None:
    result = cli(t.name)
    expected = codec.expected(t)
    assert result.exit_code == 0, result.output
    assert f"{expected.bits_per_value:g} bits per value, {expected.ratio:.2f} times smaller than f16" in result.output
    assert f"Bound at these bits: {expected.bound:.5f}" in result.output
    assert ("without the search" in result.output) == (t.family == "scalar")
    rows = rows_of(result)
    assert rows["Gaussian values, by its constants"][0] == f"{expected.error:.5f}"
    assert float(rows["Gaussian values"][0]) == pytest.approx(expected.error, rel=0.1)


def test_the_rule_of_the_scale_is_taken() -> None:
    slopes = {scale: float(rows_of(cli("turbo2", "--scale", scale))["Gaussian values"][1]) for scale in tables.SCALES}
    assert slopes["ls"] < 0.92 < slopes["matched"] < 0.97 < slopes["ip"] == pytest.approx(1, abs=2e-3)


def test_values_of_a_file_are_measured_as_they_are_and_rotated(tmp_path: Path) -> None:
    x = np.zeros((3, 5, 128), np.float16)
    x[..., 7], x[..., 9] = 1, np.linspace(-2, 2, 15).reshape(3, 5)
    np.save(tmp_path / "k.npy", x)
    rows = rows_of(cli("turbo4", tmp_path / "k.npy"))
    for name, values in (("k.npy", x), ("k.npy, rotated", codec.rotate(x))):
        found = codec.measure("turbo4", values)
        assert rows[name] == [f"{found.error:.5f}", f"{found.slope:.4f}", f"{found.norm:.4f}", f"{x.size:,}"]


def test_the_first_values_of_a_large_file_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turbo_gguf.cli.codec.MOST_VALUES", 640)
    np.save(tmp_path / "k.npy", np.ones((100, 64), np.int32))
    assert rows_of(cli("turbo4", tmp_path / "k.npy"))["k.npy"][3] == "640"


def test_what_a_model_takes(tmp_path: Path) -> None:
    model = tiny_gguf.write(tmp_path / "tiny.gguf", ctx=65536)  # 2 layers, a KV head of 128
    for args, tokens in ((), 65536), (("--ctx", 4096), 4096):
        result = cli("turbo3t", "--model", model, *args)
        ours = 2 * 2 * tokens * 128 // 64 * 26
        assert f"at {tokens:,} tokens: {ours / 2**20:.2f} MiB, with f16 {2 * 2 * tokens * 128 * 2 / 2**20:.2f} MiB" in result.output


def test_a_picture(tmp_path: Path) -> None:
    np.save(tmp_path / "k.npy", np.random.default_rng(1).standard_normal((8, 64)))
    path = tmp_path / "new" / "codec.png"
    result = cli("turbo2t", tmp_path / "k.npy", "--plot", path)
    assert result.output.splitlines()[-1] == str(path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 20_000


@pytest.mark.parametrize("t", tables.ALL, ids=lambda t: t.name)
def test_drawn_levels_are_those_of_ordinary_blocks(t: tables.TurboType) -> None:
    drawn = np.concatenate(list(picture.levels(t.name).values()))
    x = np.random.default_rng(2).standard_normal((200, t.block))
    largest = np.abs(codec.round_trip(t, x)).max(axis=1)
    assert len(drawn) == (2**t.bits if t.family == "scalar" else 2 * 2 ** (t.bits + 1))
    assert np.median(largest) == pytest.approx(drawn.max(), rel=0.25)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.write_text("text"), "it is no array of numpy"),
        (lambda path: path.write_bytes(b""), "it is no array of numpy"),
        (lambda path: path.write_bytes(b"PK\x03\x04, and no archive"), "it is no array of numpy"),
        (lambda path: np.save(path, np.array(["a"])), "it holds no array of numbers"),
        (lambda path: np.savez(path.open("wb"), a=np.zeros(64)), "it holds no array of numbers"),
        (lambda path: np.save(path, np.zeros((4, 48))), "shape (4, 48) is no whole number of blocks of 64"),
        (lambda path: np.save(path, np.zeros((0, 64))), "shape (0, 64) is no whole number"),
        (lambda path: np.save(path, np.float32(1)), "shape () is no whole number"),
        (lambda path: np.save(path, np.zeros((4, 64))), "it holds nothing but zeros"),
        (lambda path: np.save(path, np.full((4, 64), np.nan)), "it holds values that are not finite"),
    ],
)
def test_a_file_that_cannot_be_measured(tmp_path: Path, make, message: str) -> None:
    path = tmp_path / "rows.npy"
    make(path)
    result = cli("turbo3t", path)
    assert result.exit_code == 2
    assert message in result.output and "hint: numpy.save(" in result.output and "Traceback" not in result.output


def test_other_refusals(tmp_path: Path) -> None:
    assert cli("turbo9").exit_code == 2
    result = cli("turbo3", "--ctx", 100)
    assert result.exit_code == 2 and "hint: name the model with --model" in result.output
    result = cli("turbo3t", "--model", tiny_gguf.write(tmp_path / "tiny.gguf", head=96))
    assert result.exit_code == 2 and re.search(r"can't have turbo3t: the K head size 96 is no multiple", result.output)
    result = cli("turbo3", "--plot", tmp_path)
    assert result.exit_code == 2
    (tmp_path / "file").touch()
    result = cli("turbo3", "--plot", tmp_path / "file" / "a.png")
    assert result.exit_code == 2 and "hint: name another file with --plot" in result.output
