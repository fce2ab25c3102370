"""The page of all results as a browser draws it. Risks: a phone that scrolls sideways, names on names, marks in no colour, a blank picture.

The page itself has no script, and its policy allows none. It is looked at from outside: a frame of the width of a screen holds it, and the
page around the frame measures what is in it. Then a screenshot must have the colours where the marks are said to be.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from measuring import result, run_of
from test_page import GATES, bench, of_build, served

from turbo_gguf.judge import page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell", "chrome-headless-shell")
PHONE, DESKTOP = 390, 1280
HEIGHT = 10_000
"""Pixels of a screenshot: more than the page has."""

AROUND = """<!DOCTYPE html><html><body style="margin:0"><iframe style="border:0;width:{width}px;height:{height}px" srcdoc="{page}"></iframe>
<script>
addEventListener('load', () => {{
  const page = frames[0].document, all = (what) => [...page.querySelectorAll(what)];
  all('details').forEach((one) => one.open = true);
  const box = (one) => {{ const r = one.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; }};
  const color = (one, what) => frames[0].getComputedStyle(one)[what];
  const facts = {{
    width: page.documentElement.scrollWidth,
    height: box(page.body)[3],
    paper: color(page.body, 'backgroundColor'),
    title: box(page.querySelector('h1')),
    charts: all('figure > svg').map((svg) => ({{
      box: box(svg),
      texts: [...svg.querySelectorAll('text')].map((one) => [one.textContent, box(one), parseFloat(color(one, 'fontSize'))]),
      names: [...svg.querySelectorAll('text.name')].map((one) => [one.textContent, box(one)]),
      marks: [...svg.querySelectorAll('.mark')].map((one) => [color(one, 'fill'), box(one)]),
    }})),
    tables: all('table').map((one) => [box(one), box(one.parentElement)]),
  }};
  document.body.append(Object.assign(document.createElement('pre'), {{ id: 'facts', textContent: JSON.stringify(facts) }}));
}});
</script></body></html>
"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed (Debian: apt-get install chromium)")
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with all sections, long names, many types at the same bits, and a history."""
    types = ("turbo4t", "turbo3t", "turbo2t", "turbo4/turbo3", "turbo3t cal=none sink=0 tail=0", "q4_0 sink=4 tail=64", "turbo3 adaptive=7")
    results = [*run_of(turbo4=0.002, turbo3=0.012), *(result(name, 0.004 * (i + 1)) for i, name in enumerate(types))]
    records = page.Records([*of_build(results, "1", 21), *of_build(results, "2", 22)], bench(), served())
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(page.document(records, GATES), encoding="utf-8")
    return path


def run(browser: str, folder: Path, *options: str) -> str:
    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    argv = [browser, "--headless", *root, "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}", *options]
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=120).stdout


class Drawn:
    """A page of a width, measured and photographed."""

    def __init__(self, browser: str, written: Path, folder: Path, width: int, *, dark: bool) -> None:
        around = folder / "around.html"
        around.write_text(AROUND.format(width=width, height=HEIGHT, page=html.escape(written.read_text("utf-8"))), encoding="utf-8")
        scheme = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
        dom = run(browser, folder, *scheme, "--dump-dom", around.as_uri())
        found = re.search(r'<pre id="facts">(.*?)</pre>', dom, re.DOTALL)
        assert found, "the page around it did not run"
        self.facts: dict[str, Any] = json.loads(html.unescape(found[1]))
        picture = folder / "picture.png"
        run(browser, folder, *scheme, f"--window-size={max(width, 800)},{HEIGHT}", f"--screenshot={picture}", around.as_uri())
        self.picture = np.round(imread(picture)[..., :3] * 255).astype(int)
        self.width, self.dark = width, dark

    @property
    def charts(self) -> list[dict[str, Any]]:
        return list(self.facts["charts"])


@pytest.fixture(scope="module", params=[(PHONE, False), (DESKTOP, False), (PHONE, True)], ids=["phone", "desktop", "phone-dark"])
def drawn(request: pytest.FixtureRequest, browser: str, written: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drawn]:
    width, dark = request.param
    return Drawn(browser, written, tmp_path_factory.mktemp("browser"), width, dark=dark)


def overlap(a: list[float], b: list[float], slack: float = 1.5) -> bool:
    return min(a[2], b[2]) - max(a[0], b[0]) > slack and min(a[3], b[3]) - max(a[1], b[1]) > slack


def rgb(text: str) -> list[int]:
    return [int(float(part)) for part in re.findall(r"[\d.]+", text)[:3]]


def test_nothing_scrolls_sideways_but_wide_tables(drawn: Drawn) -> None:
    assert drawn.facts["width"] == drawn.width
    assert all(outer[0] >= 0 and outer[2] <= drawn.width for _, outer in drawn.facts["tables"])
    assert all(chart["box"][0] >= 0 and chart["box"][2] <= drawn.width for chart in drawn.charts)
    assert drawn.facts["height"] < HEIGHT


def test_a_phone_has_charts_of_its_width_with_text_that_can_be_read(drawn: Drawn) -> None:
    for chart in drawn.charts:
        left, _, right, _ = chart["box"]
        assert right - left > (0.85 * PHONE if drawn.width == PHONE else 300)
        assert min(size for _, _, size in chart["texts"]) * (right - left) / 480 > 9


def test_texts_of_a_chart_are_inside_of_it_and_cover_none(drawn: Drawn) -> None:
    for chart in drawn.charts:
        left, top, right, bottom = chart["box"]
        for text, (x0, y0, x1, y1), _ in chart["texts"]:
            assert x0 >= left - 1 and x1 <= right + 1 and y0 >= top - 1 and y1 <= bottom + 1, text
        ticks = [(text, box) for text, box, _ in chart["texts"] if text not in dict(chart["names"])]
        assert not [(a, b) for (a, one), (b, other) in combinations(ticks, 2) if overlap(one, other)]


def test_names_of_points_can_be_told_apart(drawn: Drawn) -> None:
    names = drawn.charts[0]["names"]
    assert {"turbo4t", "turbo4/turbo3", "q4_0", "[1]"} <= {name for name, _ in names}
    assert not [(a, b) for (a, one), (b, other) in combinations(names, 2) if overlap(one, other)]


def test_marks_have_their_colours_where_they_are_said_to_be(drawn: Drawn) -> None:
    for chart in drawn.charts:
        centers = [(rgb(fill), round((x0 + x1) / 2), round((y0 + y1) / 2)) for fill, (x0, y0, x1, y1) in chart["marks"]]
        assert centers
        seen = [np.abs(drawn.picture[y, x] - color).max() < 24 for color, x, y in centers]
        # one mark may lie on another
        hidden = [any(overlap(one, other, 0) for _, other in chart["marks"][i + 1 :]) for i, (_, one) in enumerate(chart["marks"])]
        assert all(right or under for right, under in zip(seen, hidden, strict=True)) and np.mean(seen) > 0.3


def test_paper_and_ink_are_those_of_the_scheme(drawn: Drawn) -> None:
    paper = rgb(drawn.facts["paper"])
    assert (max(paper) < 64) == drawn.dark
    height = int(drawn.facts["height"])
    page_of = drawn.picture[:height, : drawn.width]
    assert np.abs(page_of[:, -3] - paper).max() < 3, "something runs over the right edge"
    x0, y0, x1, y1 = (int(value) for value in drawn.facts["title"])
    ink = np.abs(page_of[y0:y1, x0:x1] - paper).max(axis=2) > 128
    assert 0.02 < ink.mean() < 0.5, "a title"
