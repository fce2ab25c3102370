"""One HTML file of all that is in a store: from records alone, without scripts, and without anything that it would have to fetch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from turbo_gguf import __version__
from turbo_gguf.cache.spec import PLAIN
from turbo_gguf.judge.gate import Gates
from turbo_gguf.judge.page import history, quality, runs, timing
from turbo_gguf.judge.page.element import Child, Element, el, table, words, written
from turbo_gguf.judge.report import Table
from turbo_gguf.measure import drift
from turbo_gguf.measure.result import BenchRow, Result, ServeRow

STYLE = Path(__file__).with_name("style.css")

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""What a browser lets the page do: nothing but its own style sheet."""


SHORT_COMMIT = 8
"""Letters of a commit that llama-bench prints at least."""


class Records(msgspec.Struct, frozen=True):
    """What a store holds."""

    results: Sequence[Result]
    bench: Sequence[BenchRow]
    serving: Sequence[ServeRow]
    left_out: int = 0  # results whose numbers mean something else

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.results or self.bench or self.serving)

    @property
    def models(self) -> list[str]:
        """Names of all models; llama-bench knows that of the file only."""
        names = (*(r.model for r in self.results), *(runs.model_of(r) for r in self.bench), *(r.model for r in self.serving))
        return list(dict.fromkeys(names))

    def of(self, models: Sequence[str]) -> Records:
        """Those of these models."""
        return Records(
            [r for r in self.results if r.model in models],
            [r for r in self.bench if runs.model_of(r) in models],
            [r for r in self.serving if r.model in models],
            self.left_out,
        )


class Section(msgspec.Struct, frozen=True):
    """A part of the page, with a link at its top."""

    name: str
    about: str
    parts: Sequence[Element]


def document(records: Records, gates: Gates) -> str:
    """The page. Verdicts are by ``gates``, whatever they were when a result was measured."""
    qualities, speeds, served = runs.of_results(records.results), runs.of_bench(records.bench), runs.of_serving(records.serving)
    builds = _builds([run for group in (qualities, speeds, served) for past in group for run in past])
    sections = [s for s in _sections(qualities, speeds, served, gates) if s.parts]
    sections.append(
        Section("Builds", "Each table is of one of them. Numbers of different builds only meet in the history.", [table(builds)])
    )
    title = "KV cache types: what was measured"
    links = el("nav", *(el("a", section.name, href=f"#{section.name.lower()}") for section in sections))
    body = el("body", el("h1", title), el("p", *_summary(records, builds), class_="about"), links)
    body.extend(_shown(section) for section in sections)
    body.append(el("footer", el("p", f"Written by turbo-gguf {__version__}.")))
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", title),
        el("style", STYLE.read_text("utf-8")),
    )
    return written(el("html", head, body, lang="en"))


def _sections(
    qualities: Sequence[Sequence[runs.Run[Result]]],
    speeds: Sequence[Sequence[runs.Run[BenchRow]]],
    served: Sequence[Sequence[runs.Run[ServeRow]]],
    gates: Gates,
) -> list[Section]:
    drifts = [quality.unjudged(past[-1]) for past in qualities if drift.is_drift(past[-1].records)]
    qualities = [past for past in qualities if not drift.is_drift(past[-1].records)]
    found = [quality.judged(past[-1], gates) for past in qualities]
    past = [
        *(part for one, runs_ in zip(found, qualities, strict=True) for part in history.quality(runs_, one.title, gates.sigmas)),
        *(part for runs_ in speeds for part in history.speed(runs_, gates.sigmas)),
        *(part for runs_ in served for part in history.served(runs_, gates.sigmas)),
    ]
    return [
        Section(
            "Verdicts",
            "The newest build of each run, judged by the limits as they are now. A type without a limit is in no count.",
            quality.verdicts(found) if found else [],
        ),
        Section(
            "Quality",
            "What a cache type costs, against an f32 cache on the same text. Below and to the left is better.",
            [quality.section(one, opened=number == 0) for number, one in enumerate(found)],
        ),
        Section(
            "Speed",
            f"Tokens per second by llama-bench, of prefill and of decoding, with so many tokens in the cache. {_HOVER}",
            [timing.speed(past[-1], opened=number == 0) for number, past in enumerate(speeds)],
        ),
        Section(
            "Serving",
            f"llama-server with each type in the same KV memory: slots that fit, throughput, and waits. {_HOVER}",
            [timing.served(past[-1], opened=number == 0) for number, past in enumerate(served)],
        ),
        Section(
            "Memory",
            "The pale end of a bar is f16 copies of exact tokens, whose number does not grow with the context.",
            [quality.memory(one) for one in found],
        ),
        Section(
            "Drift",
            f"The loss along what the model writes greedily with {PLAIN}, and how many tokens a type writes alike, of {drift.ANSWER}.",
            [quality.section(one, opened=number == 0) for number, one in enumerate(drifts)],
        ),
        Section("History", "The same set-up measured by several builds, the newest on the right.", past),
    ]


_HOVER = "The pointer on a mark shows its numbers, and the tables have them all."


def _shown(section: Section) -> Element:
    about = el("p", *words(section.about), class_="about")
    return el("section", el("h2", section.name), about, *section.parts, id=section.name.lower())


def _builds(found: Sequence[runs.Run[Result] | runs.Run[BenchRow] | runs.Run[ServeRow]]) -> Table:
    """Upstream and patches of all builds, the newest first, and when they were last measured."""
    last: dict[tuple[str, str], tuple[str, str]] = {}
    for run in found:
        upstream, patches = run.build.upstream[:12], run.build.patches[:12] or "none"
        key = (upstream[:SHORT_COMMIT], patches)
        name, day = last.get(key, ("", ""))
        last[key] = (max(name, upstream, key=len), max(day, run.time[:10]))
    rows = sorted(((name, patches, day) for (_, patches), (name, day) in last.items()), key=lambda row: row[2], reverse=True)
    return Table(("llama.cpp", "patches", "last measured"), tuple(rows), left=3)


def _summary(records: Records, builds: Table) -> list[Child]:
    """What there is, in a sentence or two."""
    models = len({r.case.model_sha256 for r in records.results})
    upstreams, patches = (len({row[column] for row in builds.rows}) for column in (0, 1))
    quality, speed, load = len(records.results), len(records.bench), len(records.serving)
    parts = [
        f"{_many(quality, 'result')} of quality on {_many(models, 'model')}, {_many(speed, 'row')} of llama-bench, "
        f"{_many(load, 'load')} on servers; {_many(upstreams, 'upstream')}, {_many(patches, 'patch set')}."
    ]
    if records.left_out:
        parts.append(
            f" {_many(records.left_out, 'result')} of another version of the metrics {'is' if records.left_out == 1 else 'are'} left out."
        )
    return list(parts)


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
