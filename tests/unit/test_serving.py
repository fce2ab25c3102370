"""Numbers, tables and plots of serving from records alone. Risks: failures that count as work, wrong quantiles, wrong ratios."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest
from measuring import answer, serve_row
from test_report import _size

from turbo_gguf.judge import plot, serving


@pytest.mark.parametrize(("count", "p50", "p99"), [(1, 1, 1), (2, 1, 2), (10, 5, 10), (99, 50, 99), (100, 50, 99), (200, 100, 198)])
def test_quantiles_are_values_that_were_measured(count: int, p50: int, p99: int) -> None:
    values = list(range(count, 0, -1))
    assert (serving.quantile(values, 0.5), serving.quantile(values, 0.99)) == (p50, p99)
    assert math.isnan(serving.quantile([], 0.5))


def test_numbers_of_a_load() -> None:
    (found,) = serving.loads([serve_row("f16", answer(1.0), answer(3.0), answer(2.0, gap=0.3))])
    assert (found.speed, found.speed_all) == (3.3, 33.3)
    assert found.speed_one == pytest.approx(11 / 4)
    assert (found.first_p50, found.first_p99, found.gap_p50, found.gap_p99) == (2.0, 3.0, 0.1, 0.3)
    assert (found.requests, found.failures, found.peak_mib) == (3, (), 200.0)


def test_what_failed_is_no_work() -> None:
    """Tokens of a stream that broke off were made, but nobody has an answer."""
    bad = answer(0.5, gap=0.01, error="the stream ended")
    (found,) = serving.loads([serve_row("f16", answer(), bad)])
    (alone,) = serving.loads([serve_row("f16", answer())])
    assert msgspec.structs.replace(found, requests=1, failures=()) == alone
    assert (found.requests, found.failures) == (2, ("the stream ended",))


def test_rounds_are_taken_together() -> None:
    rows = [serve_row("f16", answer(1.0)), serve_row("f16", answer(5.0), seconds=20.0, number=1, peak_mib=300.0)]
    (found,) = serving.loads(rows)
    assert (found.speed, found.first_p50, found.first_p99, found.peak_mib) == (22 / 30, 1.0, 5.0, 300.0)


def test_table_has_ratios_to_f16_at_the_same_clients() -> None:
    rows = [
        serve_row("f16", answer(4.0), clients=1),
        serve_row("turbo3t", answer(2.0), clients=1, seconds=5.0, slots=17, slot_mib=21.53),
        serve_row("f16", answer(8.0), answer(8.0), clients=2),
        serve_row("turbo3t", answer(1.0), answer(1.0, error="HTTP 503: no"), clients=2, slots=17, slot_mib=21.53, peak_mib=None),
    ]
    text = serving.table(rows)
    assert "prompts of 100 tokens, 11 generated" in text and "16.0 MiB" in text
    assert [line.split("|")[1:4] for line in text.splitlines() if "21.53" in line] == [
        [" turbo3t   ", "         21.53 ", "             17 "]
    ]
    one, two = (part.split("\n\n")[1] for part in text.split("### ")[1:3])
    assert "1 client, 1 request (" in text and "2 clients, 2 requests" in text
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for table in (one, two) for line in table.splitlines() if "turbo3t" in line]
    assert cells[0][1] == "2.2 (2.00)" and cells[0][5] == "2.0 s (0.50)" and cells[0][6] == "100 ms" and cells[0][-2:] == ["0", "200"]
    assert cells[1][1] == "1.1 (0.50)" and cells[1][5] == "1.0 s (0.12)" and cells[1][-2:] == ["1", ""]
    assert "### Failures" in text and "HTTP 503: no" in text and "Failures" not in serving.table(rows[:3])


def test_a_load_without_any_answer_has_no_times() -> None:
    text = serving.table([serve_row("f16", answer(error="no")), serve_row("turbo3t", answer())])
    assert "nan" not in text and "inf" not in text


def test_plot(tmp_path: Path) -> None:
    rows = [
        serve_row(types, answer(n * 0.5), clients=n) for types in ("f16", "turbo3t", "turbo3t cal=none sink=0 tail=0") for n in (1, 2, 32)
    ]
    width, height = _size(plot.serving(rows, tmp_path / "deep" / "plot.png"))
    assert width > 1500 and height > 600
    assert plot.serving(rows[:2], tmp_path / "plot.png").stat().st_size > 10_000
