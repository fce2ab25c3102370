"""What types get by default, as logs tell it. Risks: a default that silently was not had, one that was had although it is off.

Lines are put into the log of a real run by hand, from the format of the ``llama_turbo_cache`` line.
"""

from __future__ import annotations

import pytest
from cache_logs import cache_line, facts_of
from measuring import MODEL, facts

from turbo_gguf.cache.settings import OFF
from turbo_gguf.cache.spec import CacheSpec, parse_types
from turbo_gguf.errors import LogNotUnderstood, SilentFallback
from turbo_gguf.measure import guard
from turbo_gguf.measure.bits import bits_per_value
from turbo_gguf.measure.log import Calibrated, Copies, LogFacts

CALIBRATED = "calibrated K 4 4 V 4 4 of 4"
COPIES = "copies 96 rows in 1 streams, 0.38 MiB"
BITS = {"turbo3t": 3.25, "turbo3": 3.5, "q4_0": 4.5, "f16": 16.0}


def _logged(spec: str, *parts: str) -> LogFacts:
    """Facts of a cache; copies and calibrated layers go with what the specification names."""
    settings = spec.partition(" ")[2]
    said = [*([CALIBRATED] if "cal=" in settings else []), *([COPIES] if "sink=" in settings or "tail=" in settings else [])]
    bits = BITS[spec.partition(" ")[0]]
    return facts_of(cache_line(spec, *said, *parts, k=bits, v=bits))


def _check(found: LogFacts, types: str) -> None:
    guard.check(found, parse_types(types), backend="CPU", model=MODEL)


IN_FORCE = "turbo3t cal=1a2b3c4d sink=4 tail=64"


def test_the_line_of_a_type_as_it_is_typed() -> None:
    """The example of the line's definition."""
    found = _logged(IN_FORCE)
    (cache,) = found.caches
    assert str(cache.spec) == "turbo3t cal=#1a2b3c4d sink=4 tail=64" and (cache.no_calibration, cache.no_exact) == ("", "")
    assert cache.calibrated == Calibrated(4, 4, 4, 4, 4) and cache.copies == Copies(96, 1, 0.38)
    for types in ("turbo3t", "turbo3t cal=auto", "turbo3t sink=4", "turbo3t cal=auto sink=4 tail=64"):
        _check(found, types)
    bits = bits_per_value(found, parse_types("turbo3t"), MODEL)
    assert bits.nominal == 3.25 and bits.agrees and bits.exact > 0, "bits are those of the packed cache, copies beside them"


@pytest.mark.parametrize("tail", [4, 16, 32, 60, 64])
def test_a_tail_by_default_may_be_shorter(tail: int) -> None:
    found = _logged(f"turbo3t cal=1a2b3c4d sink=4 tail={tail}")
    _check(found, "turbo3t")
    _check(found, f"turbo3t tail={tail}")
    with pytest.raises(SilentFallback, match=rf"tail={tail}; asked for was turbo3t cal=auto sink=4 tail=128$"):
        _check(found, "turbo3t tail=128")


@pytest.mark.parametrize(
    ("logged", "types", "asked"),
    [
        # what is missing of the defaults
        ("turbo3t", "turbo3t", "turbo3t cal=auto sink=4 tail=64"),
        ("turbo3t sink=4 tail=64", "turbo3t", "turbo3t cal=auto sink=4 tail=64"),
        ("turbo3t cal=1a2b3c4d", "turbo3t", "turbo3t cal=auto sink=4 tail=64"),
        ("turbo3t cal=1a2b3c4d sink=4", "turbo3t", "turbo3t cal=auto sink=4 tail=64"),
        ("turbo3t cal=1a2b3c4d tail=64", "turbo3t", "turbo3t cal=auto sink=4 tail=64"),
        ("turbo3t cal=1a2b3c4d sink=4 tail=128", "turbo3t", "turbo3t cal=auto sink=4 tail=64"),
        ("turbo3t cal=1a2b3c4d sink=8 tail=64", "turbo3t", "turbo3t cal=auto sink=4 tail=64"),
        # what is named must be in force exactly
        ("turbo3t cal=1a2b3c4d sink=4 tail=32", "turbo3t tail=64", "turbo3t cal=auto sink=4 tail=64"),
        (IN_FORCE, "turbo3t sink=8", "turbo3t cal=auto sink=8 tail=64"),
        ("turbo3t sink=4 tail=64", "turbo3t cal=auto", "turbo3t cal=auto sink=4 tail=64"),
        ("q4_0", "q4_0 cal=auto", "q4_0 cal=auto"),
        ("q4_0 cal=1a2b3c4d sink=4 tail=32", "q4_0 cal=auto sink=4 tail=64", "q4_0 cal=auto sink=4 tail=64"),
        # what is off must be off
        (IN_FORCE, f"turbo3t {OFF}", "turbo3t cal=none sink=0 tail=0"),
        (IN_FORCE, "turbo3t cal=none", "turbo3t cal=none sink=4 tail=64"),
        (IN_FORCE, "turbo3t sink=0", "turbo3t cal=auto sink=0 tail=64"),
        (IN_FORCE, "turbo3t tail=0", "turbo3t cal=auto sink=4 tail=0"),
        # nothing is in force for other types that was not asked for
        ("q4_0 cal=1a2b3c4d", "q4_0", "q4_0"),
        ("q4_0 sink=4 tail=64", "q4_0", "q4_0"),
        ("q4_0 cal=1a2b3c4d sink=4 tail=64", "q4_0 cal=auto", "q4_0 cal=auto"),
        ("q4_0 cal=1a2b3c4d sink=4 tail=64", "q4_0 sink=4 tail=64", "q4_0 sink=4 tail=64"),
        ("f16 sink=4 tail=64", "f16", "f16"),
    ],
)
def test_what_is_in_force_is_not_what_was_asked_for(logged: str, types: str, asked: str) -> None:
    with pytest.raises(SilentFallback) as caught:
        _check(_logged(logged), types)
    assert caught.value.message == f"KV cache 1 of 1 is {logged.replace('cal=', 'cal=#')}; asked for was {asked}"


@pytest.mark.parametrize(
    ("logged", "types"),
    [
        ("turbo3t", f"turbo3t {OFF}"),
        ("turbo3t sink=4 tail=64", "turbo3t cal=none"),
        ("turbo3t cal=1a2b3c4d tail=64", "turbo3t sink=0"),
        ("turbo3t cal=1a2b3c4d sink=4", "turbo3t tail=0"),
        ("turbo3t cal=1a2b3c4d sink=128 tail=512", "turbo3t sink=128 tail=512"),
        ("q4_0", f"q4_0 {OFF}"),
        ("q4_0 cal=1a2b3c4d", "q4_0 cal=auto"),
        ("q4_0 cal=1a2b3c4d sink=4 tail=64", "q4_0 cal=auto sink=4 tail=64"),
        ("q4_0 sink=4 tail=64", "q4_0 sink=4 tail=64"),
    ],
)
def test_what_is_in_force_is_what_was_asked_for(logged: str, types: str) -> None:
    _check(_logged(logged), types)


@pytest.mark.parametrize(
    ("logged", "part", "types", "message", "hint"),
    [
        (
            "turbo3t sink=4 tail=64",
            "no calibration: /var/cache: Read-only file system",
            "turbo3t",
            "turbo3t has no calibration, which it gets by default: /var/cache: Read-only file system",
            "'turbo3t cal=none'",
        ),
        (
            "turbo3t cal=1a2b3c4d",
            "no exact tokens: multi-head latent attention",
            "turbo3t decay=balanced",
            "turbo3t decay=balanced has no exact tokens, which it gets by default: multi-head latent attention",
            "'turbo3t decay=balanced sink=0 tail=0'",
        ),
        (
            "turbo3t cal=1a2b3c4d sink=4",
            "no exact tokens: the context is too short",
            "turbo3t sink=4",
            "turbo3t sink=4 has no exact tokens, which it gets by default: the context is too short",
            "'turbo3t sink=4 tail=0'",
        ),
        (
            "turbo3t sink=4 tail=64",
            "no calibration: x",
            "turbo3t cal=none",
            "as if they were the default; asked for was turbo3t cal=none",
            "",
        ),
        ("turbo3t", "no calibration: x", "turbo3t cal=a.gguf#1a2b3c4d", "the log tells of no calibration (x), as if", ""),
        ("turbo3t", "no exact tokens: x", "turbo3t sink=8 tail=0", "the log tells of no exact tokens (x), as if", ""),
        ("turbo3t", "no exact tokens: x", f"turbo3t {OFF}", "the log tells of no exact tokens (x), as if", ""),
        ("q4_0", "no calibration: x", "q4_0", "the log tells of no calibration (x), as if they were the default; asked for was q4_0", ""),
    ],
)
def test_a_default_that_could_not_be_had(logged: str, part: str, types: str, message: str, hint: str) -> None:
    found = _logged(logged, part)
    with pytest.raises(SilentFallback) as caught:
        guard.check(found, CacheSpec.parse(types), backend="CPU", model=MODEL)
    assert message in caught.value.message and caught.value.message.startswith("KV cache 1 of 1: ") and hint in caught.value.hint
    assert bool(hint) == bool(caught.value.hint)


def test_both_reasons_are_read() -> None:
    (cache,) = _logged("turbo3t", "no calibration: the model refuses", "no exact tokens: no room: 12 MiB").caches
    assert (cache.no_calibration, cache.no_exact) == ("the model refuses", "no room: 12 MiB")
    assert not cache.spec.has_settings


def test_a_calibration_without_a_digest_is_no_proof() -> None:
    for word in ("auto", "none", "1a2b", "1A2B3C4D"):
        with pytest.raises(LogNotUnderstood, match=f"cal={word}: no digest"):
            _logged(f"turbo3t cal={word} sink=4 tail=64")


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((COPIES,), "no calibrated layers do not go with turbo3t cal=auto sink=4 tail=64"),
        ((CALIBRATED,), "no copies of exact tokens do not go with turbo3t cal=auto"),
        (("calibrated K 0 0 V 0 0 of 4", COPIES), "no layer is calibrated; asked for was turbo3t cal=auto"),
    ],
)
def test_what_is_named_must_be_at_work(parts: tuple[str, ...], words: str) -> None:
    found = facts_of(cache_line(IN_FORCE, *parts, k=3.25, v=3.25))
    with pytest.raises(SilentFallback, match=words):
        _check(found, "turbo3t")


def test_a_turbo_type_in_one_layer_brings_the_defaults() -> None:
    layers = "k=0:turbo3;1-3:f16 v=0-3:f16"
    cache = cache_line(f"f16 {layers} cal=1a2b3c4d sink=4 tail=64", CALIBRATED, COPIES, k=12.875, v=16.0, rotated="1/0")
    _check(facts_of(cache), "f16 k=0:turbo3")
    with pytest.raises(SilentFallback, match=r"asked for was f16 k=0:turbo3;1-3:f16 v=0-3:f16 cal=auto sink=4 tail=64$"):
        _check(facts_of(cache_line(f"f16 {layers}", k=12.875, v=16.0, rotated="1/0")), "f16 k=0:turbo3")


def test_a_map_that_leaves_no_layer_to_a_turbo_type_brings_none() -> None:
    _check(facts_of(cache_line("turbo3 k=0-3:q8_0 v=0-3:q8_0", k=8.5, v=8.5)), "turbo3 k=*:q8_0 v=*:q8_0")


def test_each_of_two_caches_has_what_the_context_has() -> None:
    """A model with a sliding window: its tail may be the shorter one."""
    whole = cache_line(IN_FORCE, CALIBRATED, COPIES, k=3.25, v=3.25)
    window = cache_line("turbo3t cal=1a2b3c4d sink=4 tail=16", CALIBRATED, COPIES, k=3.25, v=3.25, cells=256)
    _check(facts_of(whole, window), "turbo3t")
    with pytest.raises(SilentFallback, match=r"KV cache 2 of 2 is turbo3t; asked for was turbo3t cal=auto sink=4 tail=64"):
        _check(facts_of(whole, cache_line("turbo3t", k=3.25, v=3.25, cells=256)), "turbo3t")


def test_two_caches_have_the_same_calibration() -> None:
    caches = [cache_line(f"turbo3t cal={digest} sink=4 tail=64", CALIBRATED, COPIES, k=3.25, v=3.25) for digest in ("1a2b3c4d", "00000000")]
    with pytest.raises(SilentFallback, match="the KV caches have different calibrations: 1a2b3c4d, 00000000"):
        _check(facts_of(*caches), "turbo3t")


def test_records_of_the_tests_are_sound() -> None:
    for types in ("turbo3", f"turbo3 {OFF}", "q4_0", "q4_0 sink=4 tail=64", "turbo3 sink=0"):
        _check(facts(types), types)
