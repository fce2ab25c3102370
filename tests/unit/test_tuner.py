"""A whole search on models whose losses are known. Risks: a budget that is exceeded, a setting that is taken though worse, a claim that the
measurements do not make."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from fake_meter import FakeMeter, bits
from measuring import DIGEST

from turbo_gguf.cache.settings import AUTO, NONE, CalibrationChoice
from turbo_gguf.cache.spec import CacheSpec
from turbo_gguf.errors import UsageError
from turbo_gguf.measure.metrics import Metric
from turbo_gguf.measure.result import Result
from turbo_gguf.plan import memory
from turbo_gguf.plan.memory import Context
from turbo_gguf.plan.shape import Cache, Layer, Shape
from turbo_gguf.tune import tuner
from turbo_gguf.tune.tuner import FLOOR, RIVAL, SAME_CALIBRATION, WINNER, Goal, Outcome, Row, Subject, Tuner

LAYERS = 4
LOSSES = (0.02, 0.0003, 0.002, 0.0006, 0.0004, 0.0002, 0.0001, 0.0003)
TRELLIS = {"turbo2t", "turbo3t", "turbo4t"}
FILE = CalibrationChoice("own.gguf", DIGEST)
CONTEXT = Context(8192)


def shape(head: int = 64) -> Shape:
    layers = tuple(Layer(i, 2, head, head) for i in range(LAYERS))
    return Shape("llama", 8192, 256, 512, 4, 100, 1, (Cache(layers),), numbers=tuple(range(LAYERS)))


def subject(cheap: FakeMeter, real: FakeMeter | None = None, *, head: int = 64, backend: str = "CPU") -> Subject:
    file = real or FakeMeter(LAYERS, LOSSES, floor=0.003, own=cheap.own, long_tail=cheap.long_tail)
    return Subject(shape(head), CONTEXT, backend, cheap, file, file, lambda: FILE)  # type: ignore[arg-type]


def run(goal: Goal, cheap: FakeMeter | None = None, **options: object) -> tuple[Outcome, list[str]]:
    said: list[str] = []
    made = Tuner(subject(cheap or FakeMeter(LAYERS, LOSSES)), minutes=30, say=said.append, speed=options.pop("speed", None))  # type: ignore[arg-type]
    return made.run(goal, **options), said  # type: ignore[arg-type]


def test_the_winner_is_within_the_bits_and_beats_types_by_hand():
    outcome, _ = run(Goal(bits=3.25))
    assert bits(outcome.types, LAYERS) == pytest.approx(outcome.bits)
    assert outcome.bits <= 3.25
    assert outcome.types.layers_k is not None
    assert (outcome.types.calibration, outcome.types.sink, outcome.types.tail) == (AUTO, 4, 64)
    assert outcome.winner.about == WINNER
    assert outcome.rows[-1].about == FLOOR
    rivals = [str(row.types) for row in outcome.rows if row.about == RIVAL]
    assert rivals[0] == "turbo4t/turbo2t"  # the best pair of 3.25 bits, for K loses most
    assert outcome.equal is not None
    assert outcome.gain is not None
    assert outcome.gain.value == pytest.approx(1 - outcome.winner.kld.value / outcome.equal.kld.value)
    assert outcome.gain.value > 5 * outcome.gain.error


def test_a_calibration_from_the_text_is_taken_where_it_is_better_and_told_apart():
    outcome, said = run(Goal(bits=3.25), FakeMeter(LAYERS, LOSSES, own=0.7))
    assert outcome.types.calibration == FILE
    assert any("that is taken" in line for line in said)
    same = [row for row in outcome.rows if row.about == SAME_CALIBRATION]
    assert [row.types.calibration for row in same] == [FILE]
    worse, _ = run(Goal(bits=3.25), FakeMeter(LAYERS, LOSSES, own=0.995))
    assert worse.types.calibration == AUTO, "within the error"


def test_a_longer_tail_is_paid_for():
    outcome, _ = run(Goal(bits=3.25), FakeMeter(LAYERS, LOSSES, long_tail=0.3))
    assert outcome.types.tail == 128
    extra = memory.copies_bytes(shape(), outcome.types, CONTEXT) - memory.copies_bytes(shape(), CacheSpec("turbo3t", "turbo3t"), CONTEXT)
    values = sum(layer.k + layer.v for layer in shape().caches[0].layers) * 8192
    assert outcome.bits == pytest.approx(bits(outcome.types, LAYERS) + 8 * extra / values)
    assert bits(outcome.types, LAYERS) < outcome.bits <= 3.25
    kept, _ = run(Goal(bits=3.25), FakeMeter(LAYERS, LOSSES, long_tail=0.99))
    assert kept.types.tail == 64


def test_a_memory_counts_copies():
    size = 3_000_000
    outcome, _ = run(Goal(bytes=size))
    taken = sum(map(sum, memory.kv_bytes(shape(), outcome.types, CONTEXT))) + memory.copies_bytes(shape(), outcome.types, CONTEXT)
    assert taken <= size
    assert taken > 0.97 * size


def test_the_fewest_bits_for_a_limit_of_loss_on_the_file_itself():
    outcome, _ = run(Goal(max_kld=0.006))
    assert outcome.winner.kld.value <= 0.006
    assert outcome.bits < 4.25
    closer, _ = run(Goal(max_kld=0.0035))
    assert closer.bits > outcome.bits
    assert closer.winner.kld.value <= 0.0035


@pytest.mark.parametrize(
    ("goal", "words"),
    [
        (Goal(bits=2.0), "turbo2t everywhere takes 2.25"),
        (Goal(bytes=1000), "bits per value or less"),
        (Goal(bytes=-1000), "no allocation takes 0.000 bits"),
        (Goal(max_kld=0.002), "f16 itself loses 0.0030"),
    ],
)
def test_what_can_not_be_had_is_said_before_a_price_is_measured(goal: Goal, words: str):
    cheap = FakeMeter(LAYERS, LOSSES)
    with pytest.raises(UsageError, match=words) as caught:
        run(goal, cheap)
    assert caught.value.hint
    assert not cheap.asked


def test_a_loss_that_no_allocation_reaches():
    with pytest.raises(UsageError, match="not even q8_0 everywhere") as caught:
        run(Goal(max_kld=0.0030001))
    assert caught.value.hint


def test_a_text_that_is_too_short_for_the_end_result_ends_the_search_at_its_begin():
    class ShortMeter(FakeMeter):
        def results(self, asked: Sequence[CacheSpec]) -> list[Result]:
            raise UsageError("the text has 3000 tokens")

    cheap, file = FakeMeter(LAYERS, LOSSES), FakeMeter(LAYERS, LOSSES)
    short = Subject(shape(), CONTEXT, "CPU", cheap, file, ShortMeter(LAYERS, LOSSES), lambda: FILE)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="3000 tokens"):
        Tuner(short, minutes=30, say=lambda text: None).run(Goal(bits=3.25))
    assert not cheap.asked


def test_scalar_types_where_head_sizes_or_speed_ask_for_them():
    made = Tuner(subject(FakeMeter(LAYERS, LOSSES), head=96), minutes=30, say=lambda text: None)
    assert not TRELLIS & set(spec_types(made.run(Goal(bits=3.5)).types))
    outcome, said = run(Goal(bits=3.5), target_tps=20.0, speed=lambda types: 10.0 if TRELLIS & set(spec_types(types)) else 25.0)
    assert not TRELLIS & set(spec_types(outcome.types))
    assert any("10.0 tokens per second" in line for line in said)
    with pytest.raises(UsageError, match=r"measured are .*: 10\.0; .*: 12\.0") as caught:
        run(Goal(bits=3.5), target_tps=20.0, speed=lambda types: 10.0 if TRELLIS & set(spec_types(types)) else 12.0)
    assert "--target-tps" in caught.value.hint


def spec_types(types: CacheSpec) -> tuple[str, ...]:
    maps = [found.types for found in (types.layers_k, types.layers_v) if found]
    return (types.k, types.v, *(name for found in maps for name in found))


def test_a_gpu_gets_no_type_that_it_has_no_kernel_for():
    for backend, has in (("CPU", True), ("ROCm", False), ("CUDA", False)):
        cheap = FakeMeter(LAYERS, LOSSES)
        Tuner(subject(cheap, backend=backend), minutes=30, say=lambda text: None).run(Goal(bits=4.25))
        assert any("q5_0" in spec_types(types) for types in cheap.asked) == has
        assert any("q8_0" in spec_types(types) for types in cheap.asked)


def test_an_architecture_that_can_have_types_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuner.architectures, "OWN_ATTENTION", frozenset({"llama"}))
    cheap = FakeMeter(LAYERS, LOSSES)
    outcome, _ = run(Goal(bits=3.25), cheap)
    asked = [types for types in cheap.asked if types.layers_k or types.layers_v]
    shown = [row.types for row in outcome.rows if row.about != FLOOR]
    assert {(types.calibration, types.sink, types.tail) for types in (*asked, *shown)} == {(NONE, 0, 0)}


def test_a_model_without_any_of_our_types():
    with pytest.raises(UsageError, match="none of our types: the K head size 80"):
        Tuner(subject(FakeMeter(LAYERS, LOSSES), head=80), minutes=1, say=lambda text: None).run(Goal(bits=3.5))


def test_the_error_of_a_gain_is_that_of_both():
    found = tuner.gain(Metric(0.6, 0.06), Metric(1.0, 0.1))
    assert found.value == pytest.approx(0.4)
    assert found.error == pytest.approx(0.6 * math.sqrt(0.02))


def test_no_rival_of_so_few_bits_makes_no_claim():
    row = Row(WINNER, CacheSpec("turbo3t", "turbo3t"), 3.25, Metric(0.1, 0.01))
    more = Row(RIVAL, CacheSpec("turbo4t", "turbo4t"), 4.25, Metric(0.05, 0.01))
    assert Outcome(row.types, 3.25, (row, more), {}, 3.25, 100, 512).gain is None
