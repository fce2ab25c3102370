"""The page of all results, by its structure. Risks: builds that are mixed, names that become markup, a page that fetches, odd numbers."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree as Tree

import msgspec
import pytest
from measuring import answer, bench_row, result, run_of, serve_row
from page_tree import rows, section, text, tree

from turbo_gguf.judge import gate, page
from turbo_gguf.judge.page import chart, runs
from turbo_gguf.judge.page.chart import Axis, Point, Rule, Series
from turbo_gguf.measure.bits import Bits
from turbo_gguf.measure.log import Copies
from turbo_gguf.measure.metrics import Metric, columns
from turbo_gguf.measure.result import BenchRow, Result, ServeRow

GATES = gate.Gates(type={"turbo4": gate.Gate(reference="q4_0", mean_kld=0.95), "turbo3": gate.Gate(reference="q4_0", mean_kld=1.0)})
EMPTY = page.Records([], [], [])
SHOWN = columns([result("q4_0", 0.003).stats])


def bench() -> list[BenchRow]:
    found = []
    for types, factor in (("f16", 1.0), ("q4_0", 0.7), ("turbo3", 0.8)):
        for depth in (0, 512, 1024):
            for number, noise in enumerate((1.0, 0.9, 1.1)):
                speed = 100 * factor * noise / (1 + depth / 1024)
                found += [
                    bench_row(types, depth, speed=speed, number=number),
                    bench_row(types, depth, speed=speed * 9, n_prompt=64, n_gen=0, number=number),
                ]
    return found


def served() -> list[ServeRow]:
    return [
        serve_row("f16", answer(4.0), clients=1),
        serve_row("turbo3t", answer(2.0), clients=1, seconds=5.0, slots=17),
        serve_row("f16", answer(8.0), answer(8.0), clients=4),
        serve_row("turbo3t", answer(1.0), answer(1.0, error="HTTP 503: <no>"), clients=4, slots=17),
    ]


def made(*results: Result, **others: object) -> Tree.Element:
    return tree(page.document(msgspec.structs.replace(EMPTY, results=results, **others), GATES))


def of_build(results: list[Result], build: str, day: int, **changes: object) -> list[Result]:
    """The same cases by another build, a day later."""
    return [
        msgspec.structs.replace(
            r,
            case=msgspec.structs.replace(r.case, build_id=build),
            patch_digest=build * 12,
            time=f"2026-11-{day}T00:00:00+00:00",
            **changes,
        )
        for r in results
    ]


def tables(root: Tree.Element, name: str) -> list[dict[str, dict[str, str]]]:
    return [rows(table) for table in section(root, name).iter("table")]


def test_everything_of_a_store_is_there() -> None:
    root = made(*run_of(turbo4=0.002, turbo3=0.012), *run_of(2048, turbo4=0.002), bench=bench(), serving=served())
    links = [a.get("href") for a in root.iter("a")]
    assert links == ["#verdicts", "#quality", "#speed", "#serving", "#memory", "#builds"], "no history of one build"
    assert [one.get("id") for one in root.iter("section")] == [link.removeprefix("#") for link in links]
    short, _, long, *_ = tables(root, "quality")
    assert short["turbo3"]["verdict"] == "fail" and short["turbo4"]["verdict"] == "pass" and "turbo3" not in long
    assert short["turbo3"]["mean KLD"] == "0.01200 ± 0.00024" and {row.column for row in SHOWN} <= set(short["turbo3"])
    assert tables(root, "speed")[0]["turbo3"]["depth 512"] == "53.3 ± 5.3 (0.80)"
    assert tables(root, "serving")[0]["turbo3t"]["slots that fit"] == "17" and "HTTP 503: <no>" in text(section(root, "serving"))
    assert "13 results of quality on 1 model, 54 rows of llama-bench, 4 loads on servers; 2 upstreams, 2 patch sets." in text(root)


def test_verdicts_name_what_did_not_pass() -> None:
    (verdicts,) = tables(made(*run_of(turbo4=0.002, turbo3=0.012)), "verdicts")
    (row,) = verdicts.values()
    assert (row["pass"], row["within error"], row["fail"], row["which did not pass"]) == ("1", "0", "1", "fail: turbo3")


def test_a_run_that_the_gate_refuses_says_why() -> None:
    """A page shows what there is; it is the gate that ends with an error."""
    root = made(*run_of(turbo4=0.000001), *run_of(2048, turbo4=0.002))
    assert "Not judged: turbo4 at ctx 512: mean KLD 0.000001 is not above the noise floor" in text(section(root, "quality"))
    assert "turbo4 at ctx 512" in text(section(root, "verdicts")) and tables(root, "quality")[1]["turbo4"]["verdict"] == "pass"


def test_the_newest_build_is_shown_and_older_ones_are_history() -> None:
    """Numbers of two builds in one table would be a lie, whichever upstream they come from."""
    old = of_build(run_of(turbo4=0.003, turbo3=0.012), "1", 21, upstream_commit="old-upstream")
    new = of_build(run_of(turbo4=0.002, turbo3=0.012), "2", 22)
    root = made(*new, *old)
    quality, *_ = tables(root, "quality")
    assert quality["turbo4"]["mean KLD"].startswith("0.002") and "old-upstream" not in text(section(root, "quality"))
    (past,) = tables(root, "history")
    assert list(past["turbo4"])[1:] == ["2026-11-21 old-upstream, patches 11111111", "2026-11-22 0c1e570980d0, patches 22222222"]
    assert list(past["turbo4"].values())[1:] == ["0.003000 ± 0.000060", "0.002000 ± 0.000040 ▼"]
    assert "▲" not in str(past["turbo3"]) and "▼" not in str(past["turbo3"])
    assert [list(row.values()) for row in tables(root, "builds")[0].values()] == [
        ["0c1e570980d0", "2" * 12, "2026-11-22"],
        ["old-upstream", "1" * 12, "2026-11-21"],
    ]


def test_llama_bench_shortens_the_commit_of_an_upstream() -> None:
    rows = [msgspec.structs.replace(row, patch_digest="d" * 64, row=row.row | {"build_commit": "0c1e57098"}) for row in bench()]
    (builds,) = tables(made(*run_of(), bench=rows), "builds")
    assert list(builds) == ["0c1e570980d0"], "one upstream"


def test_another_text_or_device_is_no_history() -> None:
    one = run_of(turbo4=0.002)
    for field, value in (("text_sha256", "other"), ("backend", "ROCm"), ("chunks", 9), ("model_sha256", "other")):
        other = of_build(one, "2", 22)
        other = [msgspec.structs.replace(r, case=msgspec.structs.replace(r.case, **{field: value})) for r in other]
        assert [len(past) for past in runs.of_results([*one, *other])] == [1, 1], field


def test_speed_and_serving_have_a_history_too() -> None:
    later = [
        msgspec.structs.replace(row, key="k2", tokens_per_second=Metric(50.0, 0.0), row=row.row | {"test_time": "2031-01-01T00:00:00Z"})
        for row in bench()
    ]
    decode, prefill = tables(made(bench=[*later, *bench()]), "history")
    assert list(decode["turbo3"].values())[1:] == ["40.0 ± 4.0", "50.0 ± 0.0 ▲"], "at the greatest depth"
    assert list(prefill["turbo3"].values())[1:] == ["360.0 ± 36.0", "50.0 ± 0.0 ▼"]
    loads = [msgspec.structs.replace(row, key="k2", time="2031-01-01T00:00:00+00:00", seconds=4.4) for row in served()]
    (load,) = tables(made(serving=[*loads, *served()]), "history")
    assert list(load["f16"].values())[1:] == ["2.2 ± 0.0", "5.0 ± 0.0"], "with the most clients; a load has no error, so nothing is marked"


def test_names_are_never_markup() -> None:
    nasty = '</title><script>alert(1)</script>&amp;"\x00'
    results = [msgspec.structs.replace(r, model=nasty, text='"><img src=x>') for r in run_of(turbo4=0.002)]
    root = made(*results, serving=[msgspec.structs.replace(row, model=nasty) for row in served()])
    assert not list(root.iter("script")) and not list(root.iter("img"))
    assert '</title><script>alert(1)</script>&amp;"\ufffd' in text(section(root, "quality"))


def test_it_fetches_nothing_and_runs_nothing() -> None:
    text_of = page.document(page.Records(run_of(turbo4=0.002), bench(), served()), GATES)
    root = tree(text_of)
    assert {tag for tag in ("script", "link", "img", "iframe", "object", "image", "use", "base", "form") if list(root.iter(tag))} == set()
    named = {(name, value) for one in root.iter() for name, value in one.attrib.items()}
    assert all(value.startswith("#") for name, value in named if name in ("href", "src", "action", "srcset", "data"))
    assert not [name for name, _ in named if name.startswith("on")]
    style = "".join(text(one) for one in root.iter("style"))
    assert "url(" not in style and "@import" not in style and "://" not in text_of
    (policy,) = (one.get("content") for one in root.iter("meta") if one.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_it_is_made_for_phones_and_for_both_schemes() -> None:
    root = made(*run_of(turbo4=0.002), bench=bench())
    assert any(one.get("name") == "viewport" and "width=device-width" in one.get("content", "") for one in root.iter("meta"))
    parents = {child: parent for parent in root.iter() for child in parent}
    assert all(parents[table].get("class") == "scroll" for table in root.iter("table")), "a wide table scrolls by itself"
    assert all(one.get("viewbox") and one.get("width") is None for one in root.iter("svg")), "charts are as wide as there is room"
    style = "".join(text(one) for one in root.iter("style"))
    assert "prefers-color-scheme: dark" in style
    used = {name for one in root.iter() for name in one.get("class", "").split() if re.fullmatch(r"(ours|theirs)(-\d)?|floor", name)}
    assert used and all(f".{name} {{ --c:" in style for name in used)
    light, dark = (set(re.findall(r"(--[\w-]+):", part)) for part in re.findall(r":root \{(.*?)\}", style, re.DOTALL))
    assert light == dark, "a colour of one scheme that the other lacks"


def test_what_the_pointer_rests_on_has_all_metrics() -> None:
    root = made(*run_of(turbo4=0.002))
    titles = [one.findtext("title") or "" for one in root.iter("g") if "point" in one.get("class", "")]
    (found,) = (title for title in titles if title.startswith("turbo4\n"))
    assert all(f"\n{row.column}: " in found for row in SHOWN) and "4.5 bits per value" in found


def test_memory_is_in_the_columns_of_others() -> None:
    plain, small = result("f16", 0.0001), result("turbo3", 0.012)
    cache = msgspec.structs.replace(small.facts.caches[0], copies=Copies(68, 1, 0.5), mib_k=1.0, mib_v=1.0, cells=512)
    small = msgspec.structs.replace(small, bits=Bits(3.5, 3.4, 3.6, exact=1.0), facts=msgspec.structs.replace(small.facts, caches=(cache,)))
    (found,) = tables(made(plain, small), "memory")
    row = found["turbo3"]
    assert (row["MiB"], row["of them copies"], row["% of f16"]) == ("2.50", "0.50", "28.1")
    assert row["% at 65,536"] == "21.9", "copies do not grow with the context"
    assert row["median KLD"].startswith("0.0072") and row["99.9 % KLD"].startswith("0.24") and found["f16"]["% of f16"] == "100.0"
    unknown = msgspec.structs.replace(small, bits=Bits(3.5))
    assert tables(made(plain, unknown), "memory")[0]["turbo3"]["% of f16"] == "", "the copies are a part of nobody knows what"


def test_numbers_that_have_no_place_are_named_or_left_out() -> None:
    nan = Metric(math.nan, math.nan)
    root = made(result("f32", 0.0, 0.0, batch=256), result("f16", 0.0), result("q4_0", 0.003), result("turbo4", math.nan, 0.0, median=nan))
    assert "noise floor and f16 below what can be shown" in text(section(root, "quality"))
    assert tables(root, "quality")[0]["turbo4"]["mean KLD"] == ""
    everything = Tree.tostring(root, encoding="unicode")
    assert "nan" not in re.sub(r">[^<]*<", "><", everything), "of a place in a picture"


def test_results_of_another_version_are_counted() -> None:
    assert "3 results of another version of the metrics are left out." in text(made(*run_of(), left_out=3))


# --- charts


AXES = Axis("x"), Axis("y")


def line(*values: tuple[float, float], **fields: object) -> Series:
    return Series(tuple(Point(x, y, f"{x} {y}") for x, y in values), "ours", **fields)


def places(figure: Tree.Element) -> list[tuple[float, float]]:
    hits = (one for one in figure.iter("circle") if one.get("class") == "hit")
    return [(float(one.get("cx", "nan")), float(one.get("cy", "nan"))) for one in hits]


@pytest.mark.parametrize("values", [[(1, 1)], [(1, 5), (2, 5)], [(0, 1e-6), (1, 1e6)], [(3, 0.004), (3, 0.005)], [(0, 0), (1, 0)]])
@pytest.mark.parametrize("log", [False, True])
def test_points_are_inside_of_the_frame(values: list[tuple[float, float]], log: bool) -> None:
    found = places(chart.chart("t", Axis("x"), Axis("y", log=log), [line(*values)]))
    assert len(found) == sum(y > 0 or not log for _, y in values)
    assert all(chart.LEFT <= x <= chart.RIGHT and chart.TOP <= y <= chart.BOTTOM for x, y in found)


def test_larger_is_higher_and_farther_right() -> None:
    (x0, y0), (x1, y1) = places(chart.chart("t", *AXES, [line((1, 1), (2, 2))]))
    assert x0 < x1 and y0 > y1


def test_a_factor_is_a_distance_on_a_logarithmic_axis() -> None:
    (_, a), (_, b), (_, c) = places(chart.chart("t", Axis("x"), Axis("y", log=True), [line((1, 0.001), (2, 0.01), (3, 0.1))]))
    assert a - b == pytest.approx(b - c, abs=0.02)


def test_ticks_are_round_and_few() -> None:
    for low, high in ((0, 1), (0, 16456.6), (0.003, 3.2), (0.0021, 0.0078), (1e-6, 20)):
        for log in (False, True):
            axis = Axis("y", log=log, zero=not log)
            ticks = chart.scale(axis, [low or (0.5 if log else 0), high], 0, 100).ticks()
            assert 2 <= len(ticks) <= 9, (low, high, log, ticks)
            assert all(float(label.replace(",", "")) == pytest.approx(value) for value, label in ticks)


def test_whiskers_and_errors_beyond_zero_stop_at_the_frame() -> None:
    point = Point(1, 0.001, "t", error=0.01, whisker=(0.0, 0.5))
    figure = chart.chart("t", Axis("x"), Axis("y", log=True), [Series((point,), "ours")], [Rule(0.2, "f16")])
    heights = [float(one.get(end, "nan")) for one in figure.iter("line") for end in ("y1", "y2")]
    assert heights and all(chart.TOP - 1 <= height <= chart.BOTTOM + 1 for height in heights)


def test_names_stay_inside_of_the_picture() -> None:
    points = tuple(Point(x, 1.0, "t", name="turbo4/turbo3") for x in (1.0, 2.0, 2.01, 3.0))
    figure = chart.chart("t", *AXES, [Series(points, "ours")])
    for one in figure.iter("text"):
        if one.get("class", "").endswith("name"):
            width = 7.8 * len(one.text or "")
            x = float(one.get("x", "nan"))
            left = x - width if one.get("text-anchor") == "end" else x
            assert left >= 0 and left + width <= chart.WIDTH


def test_a_chart_of_nothing_says_so() -> None:
    figure = chart.chart("t", Axis("x"), Axis("y", log=True), [line((1, 0.0))])
    assert "Nothing in it can be drawn." in text(figure) and not list(figure.iter("svg"))
