"""What came out, as a table: tests by cache types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from upstream_server import skips
from upstream_server.outcome import Outcome

Outcomes = Mapping[str, Mapping[str, Outcome]]
"""By cache type, then by test."""

BASE = "f16"


def failures(outcomes: Outcomes) -> dict[str, list[str]]:
    """Tests that failed, with the types that failed them."""
    found: dict[str, list[str]] = {}
    for name, tests in outcomes.items():
        for test, outcome in tests.items():
            if outcome.ended == "failed":
                found.setdefault(test, []).append(name)
    return found


def ours(outcomes: Outcomes) -> dict[str, list[str]]:
    """Failures that upstream's base type does not have on the same models, and whose reason is not known."""
    listed = skips.load()
    found = {test: types for test, types in failures(outcomes).items() if BASE not in types}
    unknown = {test: [name for name in types if not skips.known_reason_of(test, name, listed)] for test, types in found.items()}
    return {test: types for test, types in unknown.items() if types}


def write(outcomes: Outcomes, calibrations: Mapping[str, int]) -> str:
    """The tables: totals, tests, skips, failures."""
    return "\n".join([*_totals(outcomes, calibrations), "", *_tests(outcomes), "", *_skipped(outcomes), "", *_failed(outcomes)]) + "\n"


def _totals(outcomes: Outcomes, calibrations: Mapping[str, int]) -> list[str]:
    rows = ["| cache type | passed | at the second try | failed | skipped | calibrations made | seconds |", "|---|---|---|---|---|---|---|"]
    for name, tests in outcomes.items():
        ended = [outcome.ended for outcome in tests.values()]
        again = sum(outcome.ended == "passed" and bool(outcome.detail) for outcome in tests.values())
        seconds = sum(outcome.seconds for outcome in tests.values())
        counts = (ended.count("passed"), again, ended.count("failed"), ended.count("skipped"), calibrations.get(name, 0))
        rows.append(f"| {name} | " + " | ".join(str(n) for n in counts) + f" | {seconds:.0f} |")
    return rows


def _tests(outcomes: Outcomes) -> list[str]:
    """A row for each test function: how many of its cases passed, of those that ran."""
    functions: dict[str, dict[str, list[str]]] = {}
    for name, tests in outcomes.items():
        for test, outcome in tests.items():
            functions.setdefault(_function(test), {}).setdefault(name, []).append(outcome.ended)
    rows = ["## Tests", "", f"| test | {' | '.join(outcomes)} |", "|---|" + "---|" * len(outcomes)]
    for function in sorted(functions):
        cells = (_cell(functions[function].get(name, [])) for name in outcomes)
        rows.append(f"| {function} | {' | '.join(cells)} |")
    return rows


def _function(test: str) -> str:
    return test.removeprefix("unit/test_").partition("[")[0].replace(".py::test_", ": ")


def _cell(ended: Sequence[str]) -> str:
    ran = [one for one in ended if one != "skipped"]
    passed = ran.count("passed")
    if not ran:
        return "skipped" if ended else "-"
    return str(passed) if passed == len(ran) else f"**{passed} of {len(ran)}**"


def _skipped(outcomes: Outcomes) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for test, outcome in {test: outcome for tests in outcomes.values() for test, outcome in tests.items()}.items():
        if outcome.ended == "skipped":
            reasons.setdefault(outcome.detail, []).append(_function(test))
    rows = ["## Skipped", "", "| reason | tests | cases |", "|---|---|---|"]
    return [*rows, *(f"| {reason} | {', '.join(dict.fromkeys(tests))} | {len(tests)} |" for reason, tests in reasons.items())]


def _failed(outcomes: Outcomes) -> list[str]:
    found = failures(outcomes)
    rows = ["## Failed", ""]
    if not found:
        return [*rows, "None."]
    rows += ["| test | types | whose | what |", "|---|---|---|---|"]
    for test, types in found.items():
        detail = outcomes[types[0]][test].detail.replace("|", "\\|")
        rows.append(f"| `{test.replace('|', '/')}` | {', '.join(types)} | {_whose(test, types, outcomes)} | {detail} |")
    return rows


def _whose(test: str, types: Sequence[str], outcomes: Outcomes) -> str:
    if BASE in types:
        return "upstream's: f16 fails, too"
    known = skips.known_reason_of(test, types[0], skips.load())
    if known:
        return f"ours: {known}"
    return "ours" if BASE in outcomes else "f16 did not run"
