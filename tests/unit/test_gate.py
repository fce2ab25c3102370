"""Verdicts. Risks: a constant from elsewhere, noise taken for a result, a type that was not used, a broken measurement judged."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from measuring import result, run_of

from turbo_gguf import assets
from turbo_gguf.cache.settings import OFF
from turbo_gguf.errors import SilentFallback, ToolFailed, UsageError
from turbo_gguf.judge import gate, report
from turbo_gguf.judge.gate import FAIL, PASS, WITHIN_ERROR
from turbo_gguf.measure.bits import Bits
from turbo_gguf.measure.metrics import Metric
from turbo_gguf.measure.result import Result

GATES = gate.Gates(type={"turbo4": gate.Gate(reference="q4_0", mean_kld=0.95)}, order=("q8_0", "q5_0", "q4_0"))


def _status(results: list[Result], gates: gate.Gates = GATES) -> str:
    (verdict,) = gate.judge(results, gates)
    return verdict.status


@pytest.mark.parametrize(
    ("mean", "status"), [(0.0028 * 0.8, PASS), (0.0028 * 0.93, WITHIN_ERROR), (0.0028 * 0.97, WITHIN_ERROR), (0.0028 * 1.1, FAIL)]
)
def test_three_outcomes(mean: float, status: str) -> None:
    """2 % error each: about 2.5 % of the ratio, two of them around the limit of .95."""
    results = run_of(turbo4=mean)
    assert _status(results) == status
    assert gate.failed(gate.judge(results, GATES)) is (status == FAIL)


def test_limit_is_relative_to_the_same_run() -> None:
    """The same number passes or fails with what q4_0 shows beside it."""
    assert _status(run_of(q4_0=0.0028, turbo4=0.002)) == PASS
    assert _status(run_of(q4_0=0.0015, turbo4=0.002)) == FAIL


def test_other_contexts_builds_and_texts_are_not_compared() -> None:
    short, long = run_of(512, turbo4=0.002), run_of(2048, q4_0=0.0015, turbo4=0.002)
    assert [v.status for v in gate.judge([*short, *long], GATES)] == [PASS, FAIL]
    for field, value in (("build_id", "other"), ("model_sha256", "other"), ("text_sha256", "other"), ("chunks", 9), ("env", ("GGML_X=1",))):
        ours = [r for r in short if str(r.case.types) == "turbo4"]
        theirs = [
            msgspec.structs.replace(r, case=msgspec.structs.replace(r.case, **{field: value}))
            for r in short
            if str(r.case.types) != "turbo4"
        ]
        with pytest.raises(UsageError, match="q4_0 was not measured in this run"):
            gate.judge([*ours, *theirs], GATES)


def test_lossy_type_at_the_noise_floor_was_not_used() -> None:
    for mean in (0.000002, 0.0, -0.000001):
        with pytest.raises(SilentFallback, match="not above the noise floor"):
            gate.judge(run_of(turbo4=mean), GATES)


def test_lossy_type_with_the_numbers_of_f16_was_not_used() -> None:
    """On quantized weights f16 is far above the noise floor, and what fell back to it is as well."""
    run = run_of(f16=0.0033, turbo4=0.0033)
    with pytest.raises(SilentFallback, match=r"turbo4 at ctx 512: every number is that of f16.* a cache of 4\.5 bits was not used"):
        gate.judge(run, GATES)
    other = result("turbo4", 0.0033, p999=Metric(0.07, 0.001))
    assert gate.judge([*run[:-1], other], GATES), "as good as f16 on average, by other numbers: a good type"
    assert gate.judge(run_of(f16=0.0033, q8_0=0.0033, q5_0=0.004, q4_0=0.005, turbo4=0.0031), GATES), (
        "8 bits are as good, four better by chance"
    )


def test_noise_floor_goes_by_the_average_of_a_map() -> None:
    """turbo2 in all layers but one of four is 4 bits; in one layer of q8_0 it is 7: that may be at the noise floor."""
    for types, bits, lossy in (("turbo2 k=0:q8_0 v=0:q8_0", 4.0, True), ("turbo2 k=1-3:q8_0 v=1-3:q8_0", 7.0, False)):
        made = msgspec.structs.replace(result(types, 0.000001), bits=Bits(bits, bits - 0.1, bits + 0.1))
        if lossy:
            with pytest.raises(SilentFallback, match="a cache of 4 bits cannot be that good"):
                gate.judge([*run_of(), made], GATES)
        else:
            assert gate.judge([*run_of(), made], GATES) == []
    with pytest.raises(SilentFallback, match=r"turbo3 decay=balanced.* 3\.5 bits"):
        gate.judge([*run_of(), result("turbo3 decay=balanced", 0.000001)], GATES)


def test_gates_take_any_notation(tmp_path: Path) -> None:
    path = tmp_path / "gates.toml"
    path.write_text('[type."turbo4/turbo4  decay=balanced v=0:q8_0"]\nreference = "turbo4/turbo4"\nmean_kld = 2\n')
    limits = gate.load(path)
    assert gate.references(limits) == {"turbo4 v=0:q8_0 decay=balanced": ("turbo4",)}
    results = [*run_of(turbo4=0.002), result("turbo4 v=0:q8_0 decay=balanced", 0.003)]
    (verdict,) = gate.judge(results, limits)
    assert verdict.status == PASS and {check.reference for check in verdict.checks} == {"turbo4", ""}
    text = path.read_text()
    path.write_text(text + text.replace("turbo4/turbo4  decay", "turbo4 decay"))
    with pytest.raises(UsageError, match="turbo4 v=0:q8_0 decay=balanced has two tables"):
        gate.load(path)


def test_eight_bits_may_reach_the_noise_floor() -> None:
    assert _status(run_of(q8_0=0.000002, turbo4=0.002)) == PASS


def test_run_that_cannot_tell_upstream_types_apart_judges_nothing() -> None:
    """The negative control: q8_0 worse than q4_0 means that the machine or the build computes wrongly."""
    with pytest.raises(ToolFailed, match="unsound") as caught:
        gate.judge(run_of(q8_0=0.01, turbo4=0.002), GATES)
    assert caught.value.exit_code == 4


def test_types_that_have_collapsed_are_in_no_order() -> None:
    """Qwen2.5 at 512 tokens: q5_0 1.29, q4_0 1.21."""
    assert _status(run_of(q8_0=0.007, q5_0=1.29, q4_0=1.21, turbo4=0.01)) == PASS
    with pytest.raises(ToolFailed, match="unsound"):
        gate.judge(run_of(q8_0=0.9, q5_0=0.15, q4_0=1.21, turbo4=0.01), GATES)  # one of two has


def test_order_within_error_is_no_alarm() -> None:
    results = [*run_of(turbo4=0.002)[:-2], result("q4_0", 0.00069, 0.0001), result("turbo4", 0.0004, 0.00001)]
    assert gate.judge(results, GATES)


def test_perplexity_that_went_down_does_not_pass() -> None:
    """The classic: a broken type 42 % below f16 in perplexity, with a huge KL divergence."""
    limits = gate.Gates(type={"turbo4": gate.Gate(reference="q4_0", mean_kld=0.95, ppl=2.0)})
    broken = [r for r in run_of() if True] + [result("turbo4", 1.7, 0.02, ln_ppl_ratio=Metric(-0.54, 0.02))]
    (verdict,) = gate.judge(broken, limits)
    assert {c.name: c.status for c in verdict.checks if c.limit is not None} == {
        "mean KLD": FAIL,
        "PPL drift": FAIL,
        "bits per value": PASS,
    }


def test_every_limit_can_fail() -> None:
    worse = {
        "mean_kld": result("turbo4", 0.02),
        "median_kld": result("turbo4", 0.002, median=Metric(0.004, 0.00001)),
        "p99_kld": result("turbo4", 0.002, p99=Metric(0.4, 0.01)),
        "p999_kld": result("turbo4", 0.002, p999=Metric(0.4, 0.01)),
        "top_changes": result("turbo4", 0.002, same_top=Metric(60.0, 0.1)),
        "ppl": result("turbo4", 0.002, ln_ppl_ratio=Metric(0.1, 0.001)),
    }
    for name, bad in worse.items():
        limits = gate.Gates(type={"turbo4": gate.Gate(reference="q4_0", **{name: 1.2})})
        assert _status([*run_of(), bad], limits) == FAIL, name
        assert _status(run_of(turbo4=0.0014), limits) == PASS, name


def test_bits_that_disagree_with_the_layout_fail() -> None:
    results = run_of(turbo4=0.002)
    results[-1] = msgspec.structs.replace(results[-1], bits=Bits(4.5, 5.4, 5.6))
    assert _status(results) == FAIL


def test_one_failed_check_outweighs_all_others() -> None:
    limits = gate.Gates(type={"turbo4": gate.Gate(reference="q4_0", mean_kld=0.95, p99_kld=0.1)})
    assert _status(run_of(turbo4=0.002), limits) == FAIL


def test_ratio_of_a_type_without_loss_is_undecided_not_passed() -> None:
    assert gate.decide("x", gate.ratio(Metric(1.0, 0.1), Metric(0.0, 0.0)), 1.0, 2.0).status == WITHIN_ERROR


def test_error_of_a_ratio() -> None:
    r = gate.ratio(Metric(2.0, 0.2), Metric(4.0, 0.4))
    assert r.value == 0.5 and r.error == pytest.approx(0.5 * (0.1**2 + 0.1**2) ** 0.5)


def test_shipped_gates_pass_what_is_expected_and_fail_what_is_broken() -> None:
    """Design, of plain types: turbo4 about .85 of q4_0, turbo3 about 4.2 times, turbo2 about 27 times."""
    limits = gate.load(assets.eval_dir() / "gates.toml")
    expected = {f"{name} {OFF}": factor for name, factor in (("turbo4", 0.83), ("turbo3", 4.2), ("turbo2", 27))}
    good = run_of(**{types: 0.0028 * factor for types, factor in expected.items()})
    assert {str(v.types): v.status for v in gate.judge(good, limits)} == dict.fromkeys(expected, PASS)
    # a wrong table doubles the error (a real one shipped for months)
    bad = run_of(**{types: 0.0028 * 2 * factor for types, factor in expected.items()})
    assert {v.status for v in gate.judge(bad, limits)} == {FAIL}


def test_shipped_gates_hold_a_type_as_typed_to_more() -> None:
    """What a plain turbo4t shows is too much for one with a calibration and exact tokens."""
    limits = gate.load(assets.eval_dir() / "gates.toml")
    exact = {"q4_0 sink=4 tail=64": 0.0028 * 0.21}
    for factor, status in ((0.13, PASS), (0.6, FAIL)):
        (verdict,) = gate.judge(run_of(**exact, turbo4t=0.0028 * factor), limits)
        assert verdict.status == status and {c.reference for c in verdict.checks} == {"q4_0", "q4_0 sink=4 tail=64", ""}


TWO = """
[[type.turbo3t]]
reference = "q4_0"
mean_kld = 0.3
[[type.turbo3t]]
reference = "q4_0  sink=4 tail=64"
mean_kld = 1
"""


def test_a_type_is_judged_by_all_of_its_references(tmp_path: Path) -> None:
    path = tmp_path / "gates.toml"
    path.write_text(TWO)
    limits = gate.load(path)
    assert gate.references(limits) == {"turbo3t": ("q4_0", "q4_0 sink=4 tail=64")}
    for ours, exact, statuses in (
        (0.0005, 0.001, [PASS, PASS]),
        (0.0005, 0.0003, [PASS, FAIL]),
        (0.0015, 0.003, [FAIL, PASS]),
    ):
        (verdict,) = gate.judge(run_of(**{"q4_0 sink=4 tail=64": exact}, turbo3t=ours), limits)
        decided = [c for c in verdict.checks if c.limit is not None]
        assert [c.status for c in decided] == [*statuses, PASS] and verdict.status == (FAIL if FAIL in statuses else PASS)
        rows = str(report.checks([msgspec.structs.replace(verdict, checks=tuple(decided))])).splitlines()
        assert [row.split("|")[6].strip() for row in rows[2:]] == ["q4_0", "`q4_0 sink=4 tail=64`", ""]
    with pytest.raises(UsageError, match="its reference q4_0 sink=4 tail=64 was not measured in this run"):
        gate.judge(run_of(turbo3t=0.0005), limits)


def test_exact_tokens_that_cover_the_context_lose_nothing() -> None:
    """Asked for, or one of both by default: what was in force counts."""
    for types in ("turbo2 cal=none sink=0 tail=512", "turbo2 sink=448"):
        assert gate.judge([*run_of(), result(types, 0.0)], GATES) == []
    for types in ("turbo2", "turbo2 sink=440", "turbo2 tail=500"):
        with pytest.raises(SilentFallback, match=f"{types} at ctx 512.*not above the noise floor"):
            gate.judge([*run_of(), result(types, 0.0)], GATES)


def test_types_without_a_gate_get_no_verdict() -> None:
    assert gate.judge(run_of(), GATES) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[type.turbo9]\nreference = "q4_0"\nmean_kld = 1\n', "turbo9"),
        ('[type.turbo4]\nreference = "q4"\nmean_kld = 1\n', "q4"),
        ('[type.turbo4]\nreference = "q4_0"\n', "no limit"),
        ("type.turbo4 = []\n", "no limit"),
        (f'{TWO}[[type.turbo3t]]\nreference = "q8_0"\n', "no limit"),
        (f'{TWO}[[type.turbo3t]]\nreference = "q4_0/q4_0"\nppl = 1\n', "turbo3t has two tables with the same reference"),
        ('[type.turbo4]\nreference = "q4_0"\nmean_kdl = 1\n', "mean_kdl"),
        ("[type.turbo4]\nmean_kld = 1\n", "reference"),
        ('[type."turbo4 decay=mild"]\nreference = "q4_0"\nmean_kld = 1\n', "unknown decay 'mild'"),
        ("nonsense", "gates.toml"),
    ],
)
def test_wrong_gate_files(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "gates.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=words):
        gate.load(path)
