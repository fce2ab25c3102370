"""Logs of caches with settings. Risks: one layer of another type, the map of another run, decay of one side or of none.

One log is real; in the others the lines are put into the log of a real run by hand, from the format of the ``llama_turbo_cache`` line.
"""

from __future__ import annotations

import re
from pathlib import Path

import calibration_writer
import msgspec
import numpy as np
import pytest
from cache_logs import cache_line as _cache
from cache_logs import facts_of as _facts
from measuring import DIGEST, LOGS, MODEL, log

from turbo_gguf.cache import calibration
from turbo_gguf.cache.decay import DecayShares
from turbo_gguf.cache.settings import OFF, SETTINGS, CalibrationChoice
from turbo_gguf.cache.spec import CacheSpec, options, parse_types, with_settings
from turbo_gguf.errors import LogCut, LogNotUnderstood, SilentFallback, UsageError
from turbo_gguf.measure import environment, guard, perplexity
from turbo_gguf.measure.bits import bits_per_value
from turbo_gguf.measure.log import Calibrated, Copies, DecayCount, LogFacts, decayed_cells, log_facts


def _counted(k: int, v: int) -> str:
    return f"0.04.010.500 I llama_turbo_cache: decay: 12 passes, {k} cells of K, {v} cells of V\n"


def _check(found: LogFacts, types: str, model: object = MODEL) -> None:
    """Settings one by one: of those that have defaults, what a test does not name is off (test_guard_defaults.py has the others)."""
    guard.check(found, with_settings(parse_types(types), OFF), backend="CPU", model=model)  # type: ignore[arg-type]


MAP = "turbo3 k=0,-1:q8_0"
K_MAP, V_MAP = "k=0:q8_0;1-2:turbo3;3:q8_0", "v=0-3:turbo3"
LOGGED = f"turbo3 {K_MAP} {V_MAP}"


def test_a_real_log_with_a_map_and_decay() -> None:
    out, err = log("kld-map-decay")
    found = log_facts(err)
    (cache,) = found.caches
    assert str(cache.spec) == "turbo4/turbo3 k=0-3:turbo4 v=0-2:turbo3;3:q8_0 decay=balanced"
    types = parse_types("turbo4/turbo3 v=-1:q8_0 decay=balanced")
    _check(found, str(types))
    assert bits_per_value(found, types, MODEL).agrees
    assert perplexity.kld_stats(out, err).chunks == 3
    with pytest.raises(SilentFallback):
        _check(found, "turbo4/turbo3 v=-2:q8_0 decay=balanced")


def test_a_real_log_with_decay_and_exact_tokens() -> None:
    """Of upstream's newer form, in which rotations have sizes."""
    found = log_facts((LOGS / "cache-settings.err").read_text())
    _check(found, "turbo3/turbo4 decay=balanced sink=4 tail=16")
    guard.check_decayed(found, 96)
    (cache,) = found.caches
    assert cache.patched and cache.decaying == (4, 4) and cache.copies == Copies(64, 1, 0.25)
    for other in ("turbo3/turbo4", "turbo3/turbo4 decay=balanced sink=4", "turbo3/turbo4 decay=aggressive sink=4 tail=16"):
        with pytest.raises(SilentFallback):
            _check(found, other)


def test_all_that_the_line_tells() -> None:
    """The example of the line's definition, of a model with four layers."""
    spec = "turbo3/turbo4 decay=15,35,50 cal=1a2b3c4d sink=4 tail=16"
    parts = ("calibrated K 4 4 V 4 3 of 4", "decaying 4/4", "copies 32 rows in 1 streams, 1.25 MiB")
    (cache,) = _facts(_cache(spec, *parts, k=3.5, v=4.5)).caches
    assert cache.patched and (cache.rot_k, cache.rot_v, cache.bits_k, cache.bits_v) == (True, True, 3.5, 4.5)
    assert (cache.spec.k, cache.spec.v, cache.spec.sink, cache.spec.tail) == ("turbo3", "turbo4", 4, 16)
    assert cache.spec.decay == DecayShares(15, 35, 50)
    assert cache.spec.calibration is not None and (cache.spec.calibration.path, cache.spec.calibration.digest) == ("", "1a2b3c4d")
    assert cache.calibrated == Calibrated(4, 4, 4, 3, 4) and cache.decaying == (4, 4)
    assert cache.copies == Copies(32, 1, 1.25) and cache.no_decay == ""


@pytest.mark.parametrize(
    "line",
    [
        _cache("turbo3 window=4", k=3.5, v=3.5),
        _cache("turbo3 k=zero:q8_0", k=3.5, v=3.5),
        _cache("turbo3", "spun twice", k=3.5, v=3.5),
        _cache("turbo3", said="a/b", k=3.5, v=3.5),
    ],
)
def test_line_that_is_not_understood(line: str) -> None:
    with pytest.raises(LogNotUnderstood, match="the log tells of a KV cache"):
        _facts(line)


def test_turbo_types_without_our_line() -> None:
    plain = re.sub(r"\n.*llama_turbo_cache.*", "", _cache("turbo3", k=3.5, v=3.5))
    for types in ("turbo3", "turbo3 tail=16", "q4_0 tail=16"):
        with pytest.raises(SilentFallback, match=f"no llama_turbo_cache line; asked for was {types.split()[0]}"):
            _check(_facts(plain), types)


# --- types by layer -------------------------------------------------------------------------------------------------------


def test_map_that_is_what_was_asked_for() -> None:
    found = _facts(_cache(LOGGED, k=6.0, v=3.5))
    (cache,) = found.caches
    assert str(cache.spec) == LOGGED and (cache.bits_k, cache.bits_v) == (6.0, 3.5)
    _check(found, MAP)
    for same in ("turbo3 k=0:q8_0;-1:q8_0", "turbo3 k=1-2:turbo3;*:q8_0", "turbo3 k=0,3:q8_0 v=*:turbo3"):
        _check(found, same)


def test_bits_are_the_average_of_the_map() -> None:
    found = _facts(_cache(LOGGED, k=6.0, v=3.5))
    bits = bits_per_value(found, parse_types(MAP), MODEL)
    assert bits.nominal == 4.75 and bits.agrees and bits.low is not None and bits.low > 4.6
    for other in ("turbo3", "turbo3 k=0:q8_0", "turbo3 k=0-2:q8_0"):
        assert not bits_per_value(found, parse_types(other), MODEL).agrees


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ("turbo3 k=0:q8_0", "turbo3 k=0:q8_0;1-3:turbo3 v=0-3:turbo3"),
        ("turbo3 k=*:q8_0", "turbo3 k=0-3:q8_0 v=0-3:turbo3"),
        ("turbo3 k=0,-1:q8_0 v=2:turbo4", f"turbo3 {K_MAP} v=0-1:turbo3;2:turbo4;3:turbo3"),
        ("turbo3 v=0,-1:q8_0", "turbo3 k=0-3:turbo3 v=0:q8_0;1-2:turbo3;3:q8_0"),
        ("turbo3 adaptive=7", "turbo3 k=0-3:turbo3 v=0-3:q8_0"),
        ("turbo3", "turbo3"),
        ("turbo4 k=0,-1:q8_0;*:turbo3 v=*:turbo3", f"turbo4 {K_MAP} {V_MAP}"),
    ],
)
def test_one_layer_of_another_type(types: str, expected: str) -> None:
    with pytest.raises(SilentFallback) as caught:
        _check(_facts(_cache(LOGGED, k=6.0, v=3.5)), types)
    assert caught.value.message == f"KV cache 1 of 1 is {LOGGED}; asked for was {expected} {OFF}"


@pytest.mark.parametrize(
    ("cache", "words"),
    [
        (_cache("turbo3", k=6.0, v=3.5), "has 4 layers; its map of K names 0"),
        (_cache(f"turbo3 {V_MAP}", k=6.0, v=3.5), "has 4 layers; its map of K names 0"),
        (_cache(f"turbo3 {K_MAP}", k=6.0, v=3.5), "has 4 layers; its map of V names 0"),
        (_cache(f"turbo3 k=0:q8_0;1-2:turbo3 {V_MAP}", k=6.0, v=3.5), "has 4 layers; its map of K names 3"),
        (_cache(f"turbo3 k=0:q8_0;1-2:turbo3;2:turbo3 {V_MAP}", k=6.0, v=3.5), "K of layer 2 is in 2 KV caches; it must be in one"),
        (_cache(f"turbo3 k=0:q8_0;1-2:turbo3;3-7:q8_0 {V_MAP}", k=6.0, v=3.5), "there is no layer 7, the model has 4 layers"),
        (_cache(LOGGED, k=6.0, v=3.5, said="6.250/3.500"), "K has 6.25 bits per value; the block layouts of its layers say 6.000"),
        (_cache(LOGGED, k=6.0, v=3.5, said="6.000/2.500"), "V has 2.5 bits per value"),
    ],
)
def test_log_that_does_not_prove_the_map(cache: str, words: str) -> None:
    with pytest.raises(SilentFallback) as caught:
        _check(_facts(cache), MAP)
    assert words in caught.value.message


def test_bits_of_types_without_a_map_are_checked_too() -> None:
    _check(_facts(_cache("turbo3", k=3.5, v=3.5)), "turbo3")
    with pytest.raises(SilentFallback, match=r"V has 4\.5 bits per value; the block layouts of its layers say 3\.500"):
        _check(_facts(_cache("turbo3", k=3.5, v=3.5, said="3.500/4.500")), "turbo3")


def test_map_with_the_sizes_of_another() -> None:
    """The log lies about its layers: the memory that they take gives it away."""
    found = _facts(_cache(LOGGED, k=3.5, v=3.5, said="6.000/3.500"))
    _check(found, MAP)
    with pytest.raises(SilentFallback, match=r"its block layout says 4\.750"):
        guard.check_bits(bits_per_value(found, parse_types(MAP), MODEL), parse_types(MAP))


SWA = msgspec.structs.replace(MODEL, n_layer=6, n_head_kv=(2,) * 6)


def test_layers_of_two_caches_are_those_of_the_model() -> None:
    caches = [
        _cache("turbo3 k=2:q8_0;5:turbo3 v=2:turbo3;5:turbo3", k=6.0, v=3.5, layers=2),
        _cache("turbo3 k=0-1:turbo3;3-4:turbo3 v=0-1:turbo3;3-4:turbo3", k=3.5, v=3.5, cells=256),
    ]
    found = _facts(*caches)
    _check(found, "turbo3 k=2:q8_0", SWA)
    bits = bits_per_value(found, parse_types("turbo3 k=2:q8_0"), SWA)
    assert bits.nominal == (6.0 * 2 + 3.5 * 2 + 3.5 * 4) / 8 and bits.agrees, "a layer of the window has half the cells"
    with pytest.raises(SilentFallback, match="K of layer 0 is in 0 KV caches"):
        _check(_facts(caches[0]), "turbo3 k=2:q8_0", SWA)
    with pytest.raises(SilentFallback, match="K of layer 2 is in 2 KV caches"):
        _check(_facts(*caches, caches[0]), "turbo3 k=2:q8_0", SWA)


def test_bits_weigh_layers_by_their_heads() -> None:
    model = msgspec.structs.replace(MODEL, n_layer=5, n_head_kv=(1, 0, 2, 2, 3))
    found = _facts(_cache(f"turbo3 k=0:q8_0;1-3:turbo3 {V_MAP}", k=33 / 8, v=3.5, said=f"{(8.5 + 3.5 * 7) / 8:.3f}/3.500"))
    _check(found, "turbo3 k=0:q8_0", model)
    bits = bits_per_value(found, parse_types("turbo3 k=0:q8_0"), model)
    assert bits.nominal == (33 / 8 + 3.5) / 2 and bits.agrees


def test_bits_of_a_model_whose_head_sizes_differ_are_nominal_only() -> None:
    model = msgspec.structs.replace(MODEL, uniform=False)
    found = _facts(_cache(LOGGED, k=5.9, v=3.5))
    _check(found, MAP, model)
    bits = bits_per_value(found, parse_types(MAP), model)
    assert (bits.nominal, bits.low) == (4.75, None)


@pytest.mark.parametrize(
    ("head", "types", "k_map", "rotated", "sound"),
    [
        (128, "f16 k=0:turbo3", "0:turbo3;1-3:f16", True, True),
        (128, "f16 k=0:turbo3", "0:turbo3;1-3:f16", False, False),
        (128, "f16 k=0:q8_0", "0:q8_0;1-3:f16", False, False),
        (128, "f16 k=0:f16", "0-3:f16", True, False),
        (96, "f16 k=0:turbo3", "0:turbo3;1-3:f16", False, False),
        (96, "f16 k=0:q8_0", "0:q8_0;1-3:f16", False, True),
        (128, "q8_0 k=*:f16", "0-3:f16", True, True),  # upstream goes by -ctk alone
    ],
)
def test_one_quantized_layer_rotates_all(head: int, types: str, k_map: str, rotated: bool, sound: bool) -> None:
    model = msgspec.structs.replace(MODEL, head_k=head, head_v=head, uniform=False)
    base = parse_types(types).v
    flags = f"{int(rotated)}/{int(base != 'f16')}"
    found = _facts(_cache(f"{base} k={k_map} v=0-3:{base}", k=8.0, v=8.0, rotated=flags))
    if sound:
        _check(found, types, model)
    else:
        with pytest.raises(SilentFallback, match=f"{'is' if rotated else 'not'} rotated|{'' if rotated else 'not '}rotated"):
            _check(found, types, model)


# --- decay ----------------------------------------------------------------------------------------------------------------


def _decaying(spec: str, *parts: str, end: str = _counted(1344, 1344)) -> LogFacts:
    return _facts(_cache(spec, *parts, k=3.5, v=3.5), end=end)


DECAYS = "turbo3 decay=15,35,50"


def test_decay_that_is_what_was_asked_for() -> None:
    found = _decaying(DECAYS, "decaying 4/4")
    assert found.decayed == (DecayCount(12, 1344, 1344),) and decayed_cells(found) == (1344, 1344)
    for types in ("turbo3 decay=balanced", "turbo3 decay=15,35,50"):
        _check(found, types)
    guard.check_decayed(found, 3 * 448)


@pytest.mark.parametrize(
    ("spec", "parts", "types", "words"),
    [
        ("turbo3", (), "turbo3 decay=balanced", "is turbo3; asked for was turbo3 decay=balanced"),
        (
            "turbo3 decay=25,40,35",
            ("decaying 4/4",),
            "turbo3 decay=balanced",
            "is turbo3 decay=conservative; asked for was turbo3 decay=balanced",
        ),
        (DECAYS, ("decaying 4/0",), "turbo3 decay=balanced", "K of 4 and V of 0 layers decay; it must be K of 4 and V of 4 layers decay"),
        (DECAYS, ("decaying 2/4",), "turbo3 decay=balanced", "K of 2 and V of 4 layers decay"),
        (DECAYS, ("decaying 4/4",), "turbo3", "is turbo3 decay=balanced; asked for was turbo3"),
        (DECAYS, (), "turbo3 decay=balanced", "nothing decays; it must be K of 4 and V of 4 layers decay"),
        ("turbo3", ("no decay: sliding window",), "turbo3", "the log tells of decay"),
        (DECAYS, ("no decay: sliding window",), "turbo3 decay=balanced", "no KV cache decays"),
        (DECAYS, ("no decay: no layer of a type that decays",), "turbo3 decay=balanced", "nothing decays; it must be K of 4"),
    ],
)
def test_another_decay_than_asked_for(spec: str, parts: tuple[str, ...], types: str, words: str) -> None:
    with pytest.raises(SilentFallback) as caught:
        _check(_decaying(spec, *parts, end=""), types)
    assert words in caught.value.message


def test_count_without_decay() -> None:
    with pytest.raises(SilentFallback, match="the log tells of decay"):
        _check(_decaying("turbo3", end=_counted(0, 0)), "turbo3")


@pytest.mark.parametrize(
    ("k", "v", "words"),
    [
        (0, 0, "0 cells of K decayed; it must have been 1344"),
        (1344, 0, "0 cells of V decayed; it must have been 1344"),  # one cursor for both
        (0, 1344, "0 cells of K decayed"),
        (448, 448, "448 cells of K decayed; it must have been 1344"),  # the first chunk only: a cursor that is never reset
        (1344, 1376, "1376 cells of V decayed"),
    ],
)
def test_decay_that_did_too_little_or_too_much(k: int, v: int, words: str) -> None:
    found = _decaying(DECAYS, "decaying 4/4", end=_counted(k, v))
    _check(found, "turbo3 decay=balanced")
    with pytest.raises(SilentFallback, match=words):
        guard.check_decayed(found, 3 * 448)


def test_lost_count_is_worth_a_retry() -> None:
    for end in ("", _counted(1344, 1344)[:70]):
        found = _decaying(DECAYS, "decaying 4/4", end=end)
        _check(found, "turbo3 decay=balanced")
        with pytest.raises(LogCut, match="counts the decayed cells of 0 of 1 KV caches"):
            guard.check_decayed(found, 3 * 448)


def test_decay_of_one_side() -> None:
    types = "turbo3 k=*:q8_0 decay=balanced"
    found = _facts(_cache(f"turbo3 k=0-3:q8_0 {V_MAP} decay=15,35,50", "decaying 0/4", k=8.5, v=3.5), end=_counted(0, 1344))
    _check(found, types)
    guard.check_decayed(found, 1344)
    with pytest.raises(SilentFallback, match="1344 cells of K decayed; it must have been 0"):
        guard.check_decayed(msgspec.structs.replace(found, decayed=(DecayCount(12, 1344, 1344),)), 1344)


def test_sliding_window_does_not_decay() -> None:
    window = _cache(DECAYS, "no decay: sliding window", k=3.5, v=3.5, cells=256)
    found = _facts(_cache(DECAYS, "decaying 4/4", k=3.5, v=3.5), window, end=_counted(1344, 1344))
    _check(found, "turbo3 decay=balanced")
    guard.check_decayed(found, 1344)
    both = _facts(*[_cache(DECAYS, "decaying 4/4", k=3.5, v=3.5)] * 2, end=_counted(1344, 1344))
    with pytest.raises(LogCut, match="1 of 2 KV caches"):
        guard.check_decayed(both, 1344)


# --- calibration ----------------------------------------------------------------------------------------------------------


_CALIBRATED = "calibrated K 4 4 V 4 4 of 4"


@pytest.fixture
def calibrated(tmp_path: Path) -> CacheSpec:
    ones = np.ones((2, 128), np.float32)
    made = calibration.Calibration("llama", "tiny", "0123abcd", 0, {0: calibration.LayerCalibration(ones, ones, None, None, None, None)})
    return parse_types(f"turbo3 cal={calibration_writer.write(made, tmp_path / 'a.gguf')}")


def test_calibration_is_part_of_the_types(calibrated: CacheSpec) -> None:
    assert calibrated.calibration is not None
    name, digest = calibrated.calibration.path, calibrated.calibration.digest
    assert re.fullmatch(r"[0-9a-f]{8}", digest) and Path(name).is_file()
    assert str(calibrated) == f"turbo3 cal={name}#{digest}" and parse_types(str(calibrated)) == calibrated
    assert list(options(calibrated))[-2:] == ["--cache-calibration", name]
    with pytest.raises(UsageError, match="the file has changed"):
        parse_types(f"turbo3 cal={name}#00000000")
    with pytest.raises(UsageError, match="No such file"):
        parse_types("turbo3 cal=/no/such/file.gguf")


def test_a_path_may_have_a_mark_of_its_own(calibrated: CacheSpec, tmp_path: Path) -> None:
    assert calibrated.calibration is not None
    digest = calibrated.calibration.digest
    path = Path(calibrated.calibration.path).rename(tmp_path / "a#2.gguf")
    for text in (f"turbo3 cal={path}", f"turbo3 cal={path}#{digest}"):
        types = parse_types(text)
        assert types.calibration is not None and (types.calibration.path, types.calibration.digest) == (str(path), digest)
        assert list(options(types))[-1] == str(path)


def test_parts_that_settings_need(calibrated: CacheSpec) -> None:
    assert calibrated.calibration is not None
    cal = f"cal={calibrated.calibration.digest}"
    for spec, parts, types, words in (
        ("turbo3 sink=4 tail=16", (), "turbo3 sink=4 tail=16", "no copies of exact tokens do not go with turbo3 cal=none sink=4"),
        ("turbo3", (_copies(),), "turbo3", "copies of exact tokens do not go with turbo3"),
        (f"turbo3 {cal}", (), str(calibrated), "no calibrated layers do not go with turbo3 cal="),
        ("turbo3", (_CALIBRATED,), "turbo3", "calibrated layers do not go with turbo3"),
    ):
        with pytest.raises(SilentFallback) as caught:
            _check(_facts(_cache(spec, *parts, k=3.5, v=3.5)), types)
        assert caught.value.message.startswith(f"KV cache 1 of 1: {words}")


def test_the_log_tells_the_same_calibration(calibrated: CacheSpec) -> None:
    assert calibrated.calibration is not None
    digest = calibrated.calibration.digest

    def logged(digest: str) -> LogFacts:
        return _facts(_cache(f"turbo3 cal={digest}" if digest else "turbo3", *([_CALIBRATED] if digest else []), k=3.5, v=3.5))

    _check(logged(digest), str(calibrated))
    _check(logged(""), "turbo3")
    for told, types, words in (
        ("", str(calibrated), f"is turbo3; asked for was turbo3 cal=#{digest}"),
        ("00000000", str(calibrated), f"is turbo3 cal=#00000000; asked for was turbo3 cal=#{digest}"),
        (digest, "turbo3", f"is turbo3 cal=#{digest}; asked for was turbo3 cal=none"),
    ):
        with pytest.raises(SilentFallback, match=words):
            _check(logged(told), types)


# --- exact sink and tail --------------------------------------------------------------------------------------------------


def _copies(mib: float = 2.0) -> str:
    return f"copies 1280 rows in 1 streams, {mib:.2f} MiB"


def test_exact_tokens_are_part_of_the_types() -> None:
    types = parse_types("turbo3t sink=128 tail=512")
    assert (types.sink, types.tail, types.has_settings) == (128, 512, True)
    assert parse_types(str(types)) == types and str(types) == "turbo3t sink=128 tail=512"
    assert list(options(types))[-4:] == ["--cache-sink", "128", "--cache-tail", "512"]
    assert not any("--cache-sink" in option for option in options(parse_types("q4_0 tail=8")))
    for wrong in ("turbo3 sink=x", "turbo3 tail=-1", "turbo3 tail=1.5", "turbo3 tail=", "turbo3 sink=1 sink=2", "turbo3 tail=\u0661"):
        with pytest.raises(UsageError):
            parse_types(wrong)


def test_the_log_tells_the_same_exact_tokens() -> None:
    def logged(settings: str) -> LogFacts:
        return _facts(_cache(f"turbo3{settings}", *([_copies()] if settings else []), k=3.5, v=3.5))

    _check(logged(" sink=128 tail=512"), "turbo3 sink=128 tail=512")
    _check(logged(" tail=512"), "turbo3 tail=512")
    for told, types in (("", " tail=512"), (" sink=128 tail=512", " tail=512"), (" sink=128 tail=512", "")):
        with pytest.raises(SilentFallback, match=f"is turbo3{told}; asked for was turbo3 cal=none .*{types.lstrip()}"):
            _check(logged(told), f"turbo3{types}")


def test_copies_are_counted_as_bits() -> None:
    plain = bits_per_value(_facts(_cache("turbo3", k=3.5, v=3.5)), parse_types("turbo3"), MODEL)
    facts = _facts(_cache("turbo3 tail=512", _copies(plain.nominal), k=3.5, v=3.5))
    bits = bits_per_value(facts, parse_types("turbo3 tail=512"), MODEL)
    assert bits.agrees and bits.nominal == 3.5
    mib_of_cache = sum(cache.mib_k + cache.mib_v for cache in facts.caches)
    assert bits.exact == pytest.approx(plain.nominal * 3.5 / mib_of_cache, rel=0.02)
    assert bits.total == bits.nominal + bits.exact > plain.total == plain.nominal


# --------------------------------------------------------------------------------------------------------------------------


def test_runs_without_settings_need_none_of_this() -> None:
    for name, types in (("kld-turbo4-turbo3", "turbo4/turbo3"), ("kld-q4_0", "q4_0")):
        found = log_facts(log(name)[1])
        assert found.decayed == () and found.caches[0].decaying is None and not found.caches[0].spec.has_settings
        _check(found, types)
        guard.check_decayed(found, 0)


# --- the table of settings ------------------------------------------------------------------------------------------------

SAMPLES = {"k": "0:q8_0", "v": "*:turbo2", "adaptive": "7", "decay": "aggressive", "cal": "a.gguf", "sink": "4", "tail": "16"}


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.word)
def test_a_setting_goes_all_ways(setting: object) -> None:
    """Notation, field, option, log and store: a new row needs a sample here and nothing else."""
    word = setting.word  # type: ignore[attr-defined]
    text = f"turbo3 {word}={SAMPLES[word]}"
    types = CacheSpec.parse(text)
    assert str(types) == text and types.has_settings
    assert list(options(types)) == ["-ctk", "turbo3", "-ctv", "turbo3", setting.option, SAMPLES[word]]  # type: ignore[attr-defined]
    logged = "0123abcd" if word == "cal" else SAMPLES[word]
    assert CacheSpec.parse(f"turbo3 {word}={logged}", logged=True).has_settings
    assert all(name.startswith("TURBO_") for name in setting.variables)  # type: ignore[attr-defined]


# --- the environment ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", environment.CACHE_SETTINGS)
def test_settings_from_outside_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "")
    for prefixes in ((), (("GGML_", "TURBO_", "OMP_"),)):
        with pytest.raises(UsageError, match=f"the environment sets {name}") as caught:
            environment.settings_in_environment(*prefixes)
        assert caught.value.hint.startswith(f"unset {name}; ask for it in the type: --types")


@pytest.mark.parametrize("path", ["a b/c  d.gguf", "/a / b/x=1 sink.gguf", "tail 4.gguf"])
def test_a_path_of_a_calibration_may_have_spaces(path: str) -> None:
    types = CacheSpec.parse(f"turbo4 / turbo3 cal={path}#{DIGEST} sink=4")
    assert (types.k, types.v, types.sink) == ("turbo4", "turbo3", 4)
    assert types.calibration == CalibrationChoice(path, DIGEST)
    assert CacheSpec.parse(str(types)) == types
