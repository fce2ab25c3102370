"""Tables and plots from records alone."""

from __future__ import annotations

import math
import struct
import warnings
from pathlib import Path

import msgspec
import pytest
from measuring import bench_row, result, run_of

from turbo_gguf.cache.spec import PLAIN, CacheSpec
from turbo_gguf.judge import drawing, gate, plot, report
from turbo_gguf.measure.bits import Bits
from turbo_gguf.measure.metrics import Metric
from turbo_gguf.measure.result import BenchRow, Result

GATES = gate.Gates(type={"turbo4": gate.Gate(reference="q4_0", mean_kld=0.95), "turbo3": gate.Gate(reference="q4_0", mean_kld=1.0)})


def _size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_table_has_every_type_with_its_verdict() -> None:
    results = [*run_of(turbo4=0.002, turbo3=0.012), *run_of(2048, turbo4=0.002)]
    text = report.quality(results, gate.judge(results, GATES))
    assert text.count("### ") == 2 and "context 2048" in text
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "pass" in rows["turbo4"] and "fail" in rows["turbo3"] and "3.5" in rows["turbo3"]
    assert "pass" not in rows["q4_0"] and "noise floor" in "".join(rows)
    assert "0.01200 ± 0.00024" in rows["turbo3"]


def test_tables_show_median_and_last_quantile_beside_the_mean() -> None:
    """A mean alone hides a type that is fine on average and wrong now and then."""
    results = run_of(turbo4=0.002)
    header = next(line for line in report.quality(results).splitlines() if line.startswith("|")).split("|")
    names = [cell.strip() for cell in header]
    assert names[3:8] == ["above f16", "mean KLD", "median", "99 %", "99.9 %"] and "PPL / f32" in names
    checks = {
        line.split("|")[3].strip(): [c.strip() for c in line.split("|")[4:8]]
        for line in str(report.checks(_only_mean(results))).splitlines()
    }
    assert checks["mean KLD"][1:] == ["0.95", "q4_0", "pass"]
    assert checks["median KLD"] == ["0.714 ± 0.034", "", "q4_0", "no limit"], "shown, and judged by nothing"
    assert checks["99.9 % KLD"][3] == "no limit"


def _only_mean(results: list[Result]) -> list[gate.Verdict]:
    return gate.judge(results, gate.Gates(type={"turbo4": gate.Gate(reference="q4_0", mean_kld=0.95)}))


def test_f16_is_a_row_and_the_base_is_named() -> None:
    text = report.quality(run_of())
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "0.000003" in rows["f16"] and rows["f16"].split("|")[3].strip() == ""
    assert (
        rows["q4_0"].split("|")[3].strip() == "0.002797 ± 0.000056"
        and "f32, batch 256 (noise floor)" in rows
        and "perplexity with f32 cache" in text
    )


def test_tables_are_well_formed_markdown() -> None:
    results = run_of(turbo4=0.002, turbo3=0.012)
    verdicts = gate.judge(results, GATES)
    for text in (report.quality(results, verdicts), str(report.checks(verdicts))):
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in rows}) == 1 and len({len(line) for line in rows}) == 1


def _bench() -> list[BenchRow]:
    rows = []
    for types, factor in (("f16", 1.0), ("q4_0", 0.7), ("turbo3", 0.8)):
        for depth in (0, 512, 1024):
            for number, noise in enumerate((1.0, 0.4, 1.1)):
                speed = 100 * factor * noise / (1 + depth / 1024)
                rows.append(bench_row(types, depth, speed=speed, number=number))
                rows.append(bench_row(types, depth, speed=speed * 10, n_prompt=128, n_gen=0, number=number))
    return rows


def test_speed_is_the_median_of_the_rounds_relative_to_f16() -> None:
    found = report.by_setting(_bench())
    assert found[PLAIN, "tg32", 0] == Metric(100.0, pytest.approx(35.0))
    text = report.speed(_bench(), PLAIN)
    assert "100.0 ± 35.0 (1.00)" in text and "70.0 ± 24.5 (0.70)" in text and "Prefill of 128 tokens" in text


def test_plots_are_written(tmp_path: Path) -> None:
    results = [*run_of(turbo4=0.002, turbo3=0.012, turbo2=0.07), result("turbo4/turbo3", 0.006), *run_of(2048, turbo4=0.002)]
    width, height = _size(plot.quality(results, tmp_path / "deep" / "quality.png"))
    assert width > 1500 and height > 600
    assert _size(plot.speed(_bench(), tmp_path / "speed.png"))[0] > 1000


def test_plot_of_a_noise_floor_of_zero_and_a_single_type(tmp_path: Path) -> None:
    for plain in (0.0, 0.001):
        results = [result("f32", 0.0, 0.0, batch=256), result("f16", plain), result("q4_0", 0.003)]
        _size(plot.quality(results, tmp_path / "plot.png"))


SETTINGS = (
    "turbo3 k=*:q8_0 v=0,-1:q8_0",
    "turbo4/turbo3 decay=conservative",
    "turbo3 adaptive=7",
    "turbo2 " + "k=" + ";".join(f"{i},-{i}:turbo4" for i in range(1, 40)) + ";*:turbo3",
)


def test_settings_in_tables_are_code_and_bits_are_averages() -> None:
    results = [*run_of(turbo4=0.002), *(result(types, 0.01) for types in SETTINGS)]
    results[-1] = msgspec.structs.replace(results[-1], bits=Bits(13 / 3, 4.3, 4.4))
    limits = gate.Gates(
        type={SETTINGS[0]: gate.Gate(reference="q4_0", mean_kld=9.0), SETTINGS[-1]: gate.Gate(reference="q4_0", mean_kld=9.0)}
    )
    verdicts = gate.judge(results, limits)
    text = report.quality(results, verdicts)
    rows = {line.split("|")[1].strip(): line.split("|") for line in text.splitlines() if line.startswith("|")}
    assert all(f"`{types}`" in rows for types in SETTINGS) and "turbo4" in rows
    assert rows[f"`{SETTINGS[-1]}`"][2].strip() == "4.333" and rows[f"`{SETTINGS[0]}`"][-2].strip() == "pass"
    checks = str(report.checks(verdicts))
    assert f"`{SETTINGS[0]}`" in checks and "4.333" in checks and "4.3333" not in checks
    rows = [bench_row(types, 0, speed=1.0) for types in ("f16", *SETTINGS)]
    assert f"`{SETTINGS[1]}`" in report.speed(rows, PLAIN)


def test_long_names_stand_below_the_panels(tmp_path: Path) -> None:
    """Labels in the panels would squeeze them to nothing; a name longer than the figure is cut."""
    plain = _size(plot.quality(run_of(turbo4=0.002, turbo3=0.01), tmp_path / "plain.png"))
    results = [*run_of(turbo4=0.002, turbo3=0.01), *(result(types, 0.01 * (i + 1)) for i, types in enumerate(SETTINGS))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns when a layout collapses
        found = _size(plot.quality(results, tmp_path / "long.png"))
        rows = [bench_row(types, depth, speed=9.0 - depth / 512) for types in ("f16", *SETTINGS) for depth in (0, 512)]
        speed = _size(plot.speed(rows, tmp_path / "speed.png"))
    assert found[0] == plain[0] and found[1] > plain[1] + 3 * 20
    assert speed[1] > _size(plot.speed(_bench(), tmp_path / "short.png"))[1] + 4 * 20


def test_short_names_of_points() -> None:
    types = [CacheSpec.parse(text) for text in ("turbo4/turbo3", *SETTINGS)]
    assert list(drawing.short_names(types).values()) == ["turbo4/turbo3", "[1]", "[2]", "[3]", "[4]"]


@pytest.mark.parametrize(
    ("value", "error", "digits", "text"),
    [
        (0.00123, 0.00004, 6, "0.001230 ± 0.000040"),
        (7.159761, 0.212525, 6, "7.160 ± 0.213"),
        (734.68145, 195.18502, 5, "734.7 ± 195.2"),
        (16456.6, 269.5, 1, "16457 ± 270"),
        (1.00316, 0.0031, 5, "1.0032 ± 0.0031"),
        (100.0, 0.0, 2, "100.00 ± 0.00"),
        (-0.0000001, 0.0000001, 6, "0.000000 ± 0.000000"),
        (256.0, math.inf, 1, "256.0 ± inf"),
        (math.nan, math.nan, 3, ""),
    ],
)
def test_digits(value: float, error: float, digits: int, text: str) -> None:
    """No more than are known, and no more than the column has."""
    assert report.plus_minus(Metric(value, error), digits) == text
