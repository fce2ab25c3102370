"""Logs of types by layer and of decay. Risks: one layer of another type, the map of another run, decay of one side or of none.

One log is real; in the others the lines are put into the log of a real run by hand, from the format strings of ``llama-turbo-cache.cpp``.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
from measuring import MODEL, facts, log

from turbo_gguf.cache import calibration, spec
from turbo_gguf.cache.decay import DecayShares
from turbo_gguf.cache.spec import CacheSpec, parse_types
from turbo_gguf.errors import LogCut, SilentFallback, UsageError
from turbo_gguf.measure import guard, perplexity
from turbo_gguf.measure.bits import bits_per_value
from turbo_gguf.measure.log import CacheDecay, DecayCount, LogFacts, decayed_cells, log_facts

SIZE = r"llama_kv_cache: size = .*"


def _cache(base: str, *lines: str, k: float, v: float, cells: int = 512, layers: int = 4) -> str:
    """What a cache of ``base`` says when it is made, with K and V of so many bits per value."""
    mib = [bits * cells * layers * 256 / 8 / 2**20 for bits in (k, v)]
    sizes = f"({cells:6} cells, {layers:3} layers,  1/1 seqs), K ({base}): {mib[0]:7.2f} MiB, V ({base}): {mib[1]:7.2f} MiB"
    rotated = [f"llama_kv_cache: attn_rot_{side} = {int(base != 'f16')}, n_embd_head_k_all = 128" for side in "kv"]
    return "\n".join([f"llama_kv_cache: size = {sum(mib):7.2f} MiB {sizes}", *lines, *rotated])


def _facts(*caches: str, end: str = "") -> LogFacts:
    """Facts of a real log with these caches in place of its own, and an end."""
    err = re.sub(r"^.*attn_rot_.*\n", "", log("kld-turbo4-turbo3")[1], flags=re.MULTILINE)
    buffer = "llama_kv_cache:        CPU KV buffer size =     0.50 MiB\n"
    return log_facts(re.sub(SIZE, f"\n{buffer}".join(caches), err) + end)


def _by_layer(side: str, text: str, bits: float) -> str:
    return f"0.00.039.690 I llama_turbo_cache: {side} by layer: {text} ({bits:.3f} bits per value)"


def _announced(hot: int, warm: int, cold: int, *, k: int = 4, v: int = 4) -> str:
    return (
        f"0.00.039.691 I llama_turbo_cache: decay: the oldest {cold} % of each sequence lose one bit "
        f"(hot {hot} %, warm {warm} %, cold {cold} %), K of {k} layers, V of {v} layers"
    )


def _counted(k: int, v: int) -> str:
    return f"0.04.010.500 I llama_turbo_cache: decay: 12 passes, {k} cells of K, {v} cells of V\n"


def _check(found: LogFacts, types: str, model: object = MODEL) -> None:
    guard.check(found, parse_types(types), backend="CPU", model=model)  # type: ignore[arg-type]


MAP = "turbo3 k=0,-1:q8_0"
K_LINE, V_LINE = _by_layer("K", "0:q8_0;1-2:turbo3;3:q8_0", 6.0), _by_layer("V", "0-3:turbo3", 3.5)


def test_a_real_log_with_a_map_and_decay() -> None:
    out, err = log("kld-map-decay")
    found = log_facts(err)
    (cache,) = found.caches
    assert (cache.layers_k, cache.layers_v) == ("0-3:turbo4", "0-2:turbo3;3:q8_0")
    types = parse_types("turbo4/turbo3 v=-1:q8_0 decay=balanced")
    _check(found, str(types))
    assert bits_per_value(found, types, MODEL).agrees
    assert perplexity.kld_stats(out, err).chunks == 3
    with pytest.raises(SilentFallback):
        _check(found, "turbo4/turbo3 v=-2:q8_0 decay=balanced")


# --- types by layer -------------------------------------------------------------------------------------------------------


def test_map_that_is_what_was_asked_for() -> None:
    found = _facts(_cache("turbo3", K_LINE, V_LINE, k=6.0, v=3.5))
    (cache,) = found.caches
    assert (cache.layers_k, cache.layers_v, cache.bits_k, cache.bits_v) == ("0:q8_0;1-2:turbo3;3:q8_0", "0-3:turbo3", 6.0, 3.5)
    assert cache.rot_k and cache.rot_v
    _check(found, MAP)
    for same in ("turbo3 k=0:q8_0;-1:q8_0", "turbo3 k=1-2:turbo3;*:q8_0", "turbo3 k=0,3:q8_0 v=*:turbo3"):
        _check(found, same)


def test_bits_are_the_average_of_the_map() -> None:
    found = _facts(_cache("turbo3", K_LINE, V_LINE, k=6.0, v=3.5))
    bits = bits_per_value(found, parse_types(MAP), MODEL)
    assert bits.nominal == 4.75 and bits.agrees and bits.low is not None and bits.low > 4.6
    for other in ("turbo3", "turbo3 k=0:q8_0", "turbo3 k=0-2:q8_0"):
        assert not bits_per_value(found, parse_types(other), MODEL).agrees


@pytest.mark.parametrize(
    ("types", "words"),
    [
        ("turbo3 k=0:q8_0", "K by layer: layer 3 is q8_0; asked for was turbo3"),
        ("turbo3 k=*:q8_0", "K by layer: layer 1 is turbo3; asked for was q8_0"),
        ("turbo3 k=0,-1:q8_0 v=2:turbo4", "V by layer: layer 2 is turbo3; asked for was turbo4"),
        ("turbo3 v=0,-1:q8_0", "K by layer: layer 0 is q8_0; asked for was turbo3"),
        ("turbo3 adaptive=7", "K by layer: layer 0 is q8_0; asked for was turbo3"),
        ("turbo3", "is K 0:q8_0;1-2:turbo3;3:q8_0 / V 0-3:turbo3 by layer; asked for was turbo3 in all layers"),
        ("turbo4 k=0,-1:q8_0;*:turbo3 v=*:turbo3", "is K turbo3 / V turbo3; asked for was K turbo4 / V turbo4"),
    ],
)
def test_one_layer_of_another_type(types: str, words: str) -> None:
    with pytest.raises(SilentFallback) as caught:
        _check(_facts(_cache("turbo3", K_LINE, V_LINE, k=6.0, v=3.5)), types)
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ((), "K by layer is not in the log"),
        ((V_LINE,), "K by layer is not in the log"),
        ((K_LINE,), "V by layer is not in the log"),
        ((_by_layer("K", "0:q8_0;1-2:turbo3", 6.0), V_LINE), "has 4 layers; K by layer names 3: 0:q8_0;1-2:turbo3"),
        ((_by_layer("K", "0:q8_0;1-2:turbo3;2:turbo3", 6.0), V_LINE), "K of layer 2 is in 2 KV caches; it must be in one"),
        ((_by_layer("K", "0:q8_0;1-2:turbo3;3-7:q8_0", 6.0), V_LINE), "there is no layer 7, the model has 4 layers"),
        ((_by_layer("K", "zero:q8_0", 6.0), V_LINE), "K by layer: layer map 'zero:q8_0'"),
        (
            (_by_layer("K", "0:q8_0;1-2:turbo3;3:q8_0", 6.25), V_LINE),
            "K has 6.25 bits per value; the block layouts of its layers say 6.000",
        ),
        ((K_LINE, _by_layer("V", "0-3:turbo3", 2.5)), "V has 2.5 bits per value"),
    ],
)
def test_log_that_does_not_prove_the_map(lines: tuple[str, ...], words: str) -> None:
    with pytest.raises(SilentFallback) as caught:
        _check(_facts(_cache("turbo3", *lines, k=6.0, v=3.5)), MAP)
    assert words in caught.value.message


def test_map_with_the_sizes_of_another() -> None:
    """The log lies about its layers: the memory that they take gives it away."""
    found = _facts(_cache("turbo3", K_LINE, V_LINE, k=3.5, v=3.5))
    _check(found, MAP)
    with pytest.raises(SilentFallback, match=r"its block layout says 4\.750"):
        guard.check_bits(bits_per_value(found, parse_types(MAP), MODEL), parse_types(MAP))


SWA = msgspec.structs.replace(MODEL, n_layer=6, n_head_kv=(2,) * 6)
GLOBAL, LOCAL = _by_layer("K", "2:q8_0;5:turbo3", 6.0), _by_layer("K", "0-1:turbo3;3-4:turbo3", 3.5)


def test_layers_of_two_caches_are_those_of_the_model() -> None:
    v_global, v_local = _by_layer("V", "2:turbo3;5:turbo3", 3.5), _by_layer("V", "0-1:turbo3;3-4:turbo3", 3.5)
    caches = [
        _cache("turbo3", GLOBAL, v_global, k=6.0, v=3.5, layers=2),
        _cache("turbo3", LOCAL, v_local, k=3.5, v=3.5, cells=256),
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
    line = _by_layer("K", "0:q8_0;1-3:turbo3", (8.5 + 3.5 * 7) / 8)
    found = _facts(_cache("turbo3", line, V_LINE, k=33 / 8, v=3.5))
    _check(found, "turbo3 k=0:q8_0", model)
    bits = bits_per_value(found, parse_types("turbo3 k=0:q8_0"), model)
    assert bits.nominal == (33 / 8 + 3.5) / 2 and bits.agrees


def test_bits_of_a_model_whose_head_sizes_differ_are_nominal_only() -> None:
    model = msgspec.structs.replace(MODEL, uniform=False)
    found = _facts(_cache("turbo3", _by_layer("K", "0:q8_0;1-2:turbo3;3:q8_0", 5.9), V_LINE, k=5.9, v=3.5))
    _check(found, MAP, model)
    bits = bits_per_value(found, parse_types(MAP), model)
    assert (bits.nominal, bits.low) == (4.75, None)


@pytest.mark.parametrize(
    ("head", "types", "k_line", "rotated", "sound"),
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
def test_one_quantized_layer_rotates_all(head: int, types: str, k_line: str, rotated: bool, sound: bool) -> None:
    model = msgspec.structs.replace(MODEL, head_k=head, head_v=head, uniform=False)
    base = parse_types(types).v
    found = _facts(_cache(base, _by_layer("K", k_line, 8.0), _by_layer("V", f"0-3:{base}", 8.0), k=8.0, v=8.0))
    found = msgspec.structs.replace(found, caches=(msgspec.structs.replace(found.caches[0], rot_k=rotated),))
    if sound:
        _check(found, types, model)
    else:
        with pytest.raises(SilentFallback, match=f"{'is' if rotated else 'not'} rotated"):
            _check(found, types, model)


# --- decay ----------------------------------------------------------------------------------------------------------------


def _decaying(*lines: str, end: str = _counted(1344, 1344)) -> LogFacts:
    return _facts(_cache("turbo3", *lines, k=3.5, v=3.5), end=end)


def test_decay_that_is_what_was_asked_for() -> None:
    found = _decaying(_announced(15, 35, 50))
    assert found.caches[0].decay == CacheDecay(DecayShares(15, 35, 50), layers_k=4, layers_v=4)
    assert found.decayed == (DecayCount(12, 1344, 1344),) and decayed_cells(found) == (1344, 1344)
    for types in ("turbo3 decay=balanced", "turbo3 decay=15,35,50"):
        _check(found, types)
    guard.check_decayed(found, 3 * 448)


@pytest.mark.parametrize(
    ("lines", "types", "words"),
    [
        ((), "turbo3 decay=balanced", "decay is none; asked for was 15,35,50 in K of 4 and V of 4 layers"),
        ((_announced(25, 40, 35),), "turbo3 decay=balanced", "decay is 25,40,35 in K of 4 and V of 4 layers; asked for was 15,35,50"),
        ((_announced(15, 35, 50, v=0),), "turbo3 decay=balanced", "decay is 15,35,50 in K of 4 and V of 0 layers"),
        ((_announced(15, 35, 50, k=2),), "turbo3 decay=balanced", "in K of 2 and V of 4"),
        ((_announced(15, 35, 50),), "turbo3", "the log tells of decay; asked for was turbo3"),
        (("I llama_turbo_cache: decay: none, sliding window",), "turbo3", "the log tells of decay"),
        (
            ("W llama_turbo_cache: decay: no layer of this cache has a type that decays (turbo3, turbo4)",),
            "turbo3",
            "the log tells of decay",
        ),
        (("I llama_turbo_cache: decay: none, sliding window",), "turbo3 decay=balanced", "no KV cache decays"),
        (
            ("W llama_turbo_cache: decay: no layer of this cache has a type",),
            "turbo3 decay=balanced",
            "decay is none; asked for was 15,35,50",
        ),
    ],
)
def test_another_decay_than_asked_for(lines: tuple[str, ...], types: str, words: str) -> None:
    with pytest.raises(SilentFallback) as caught:
        _check(_decaying(*lines, end=""), types)
    assert words in caught.value.message


def test_count_without_decay() -> None:
    with pytest.raises(SilentFallback, match="the log tells of decay"):
        _check(_decaying(end=_counted(0, 0)), "turbo3")


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
    found = _decaying(_announced(15, 35, 50), end=_counted(k, v))
    _check(found, "turbo3 decay=balanced")
    with pytest.raises(SilentFallback, match=words):
        guard.check_decayed(found, 3 * 448)


def test_lost_count_is_worth_a_retry() -> None:
    for end in ("", _counted(1344, 1344)[:70]):
        found = _decaying(_announced(15, 35, 50), end=end)
        _check(found, "turbo3 decay=balanced")
        with pytest.raises(LogCut, match="counts the decayed cells of 0 of 1 KV caches"):
            guard.check_decayed(found, 3 * 448)


def test_decay_of_one_side() -> None:
    types = "turbo3 k=*:q8_0 decay=balanced"
    lines = (_by_layer("K", "0-3:q8_0", 8.5), V_LINE, _announced(15, 35, 50, k=0))
    found = _facts(_cache("turbo3", *lines, k=8.5, v=3.5), end=_counted(0, 1344))
    _check(found, types)
    guard.check_decayed(found, 1344)
    with pytest.raises(SilentFallback, match="1344 cells of K decayed; it must have been 0"):
        guard.check_decayed(msgspec.structs.replace(found, decayed=(DecayCount(12, 1344, 1344),)), 1344)


def test_sliding_window_does_not_decay() -> None:
    window = _cache("turbo3", "I llama_turbo_cache: decay: none, sliding window", k=3.5, v=3.5, cells=256)
    found = _facts(_cache("turbo3", _announced(15, 35, 50), k=3.5, v=3.5), window, end=_counted(1344, 1344))
    _check(found, "turbo3 decay=balanced")
    guard.check_decayed(found, 1344)
    both = _facts(*[_cache("turbo3", _announced(15, 35, 50), k=3.5, v=3.5)] * 2, end=_counted(1344, 1344))
    with pytest.raises(LogCut, match="1 of 2 KV caches"):
        guard.check_decayed(both, 1344)


# --- calibration ----------------------------------------------------------------------------------------------------------


def _calibrated(digest: str) -> str:
    return f"0.00.039.692 I llama_turbo_cache: calibration {digest}: of 4 layers, K of 4 centered, K of 4 scaled, V of 4 scaled"


@pytest.fixture
def calibrated(tmp_path: Path) -> CacheSpec:
    ones = np.ones((2, 128), np.float32)
    made = calibration.Calibration("llama", "tiny", "0123abcd", 0, {0: calibration.LayerCalibration(ones, ones, None, None)})
    return parse_types(f"turbo3 cal={calibration.write(made, tmp_path / 'a.gguf')}")


def test_calibration_is_part_of_the_types(calibrated: CacheSpec) -> None:
    name, _, digest = calibrated.calibration.partition("#")
    assert re.fullmatch("[0-9a-f]{8}", digest)
    assert parse_types(str(calibrated)) == calibrated
    assert list(spec.options(calibrated))[-2:] == ["--cache-calibration", name]
    with pytest.raises(UsageError, match="the file has changed"):
        parse_types(f"turbo3 cal={name}#00000000")
    with pytest.raises(UsageError, match="No such file"):
        parse_types("turbo3 cal=/no/such/file.gguf")


def test_the_log_tells_the_same_calibration(calibrated: CacheSpec) -> None:
    digest = calibrated.calibration.partition("#")[2]

    def logged(*lines: str) -> LogFacts:
        return _facts(_cache("turbo3", *lines, k=3.5, v=3.5))

    _check(logged(_calibrated(digest)), str(calibrated))
    _check(logged(), "turbo3")
    for lines, types, words in (
        ((), str(calibrated), f"has no calibration; asked for was {digest}"),
        ((_calibrated("00000000"),), str(calibrated), f"has 00000000 calibration; asked for was {digest}"),
        ((_calibrated(digest),), "turbo3", f"has {digest} calibration; asked for was none"),
    ):
        with pytest.raises(SilentFallback, match=words):
            _check(logged(*lines), types)


# --- exact sink and tail --------------------------------------------------------------------------------------------------


def _exact(sink: int, tail: int, mib: float = 2.0) -> str:
    return (
        f"0.00.039.692 I llama_turbo_cache: exact: first {sink} and last {tail} tokens of each sequence in f16, "
        f"1280 rows in each of 1 streams, {mib:.2f} MiB"
    )


def test_exact_tokens_are_part_of_the_types() -> None:
    types = parse_types("turbo3t sink=128 tail=512")
    assert (types.sink, types.tail, types.has_settings) == (128, 512, True)
    assert parse_types(str(types)) == types and str(types) == "turbo3t sink=128 tail=512"
    assert list(spec.options(types))[-4:] == ["--cache-sink", "128", "--cache-tail", "512"]
    assert not any("--cache-sink" in option for option in spec.options(parse_types("q4_0 tail=8")))
    for wrong in ("turbo3 sink=x", "turbo3 tail=-1", "turbo3 tail=1.5", "turbo3 tail=", "turbo3 sink=1 sink=2", "turbo3 tail=\u0661"):
        with pytest.raises(UsageError):
            parse_types(wrong)


def test_the_log_tells_the_same_exact_tokens() -> None:
    def logged(*lines: str) -> LogFacts:
        return _facts(_cache("turbo3", *lines, k=3.5, v=3.5))

    _check(logged(_exact(128, 512)), "turbo3 sink=128 tail=512")
    _check(logged(_exact(0, 512)), "turbo3 tail=512")
    for lines, types, words in (
        ((), "turbo3 tail=512", "sink of 0 and tail of 0 tokens; asked for was turbo3 tail=512"),
        ((_exact(128, 512),), "turbo3 tail=512", "sink of 128 and tail of 512 tokens; asked for was turbo3 tail=512"),
        ((_exact(128, 512),), "turbo3", "sink of 128 and tail of 512 tokens; asked for was turbo3"),
    ):
        with pytest.raises(SilentFallback, match=words):
            _check(logged(*lines), types)


def test_copies_are_counted_as_bits() -> None:
    plain = bits_per_value(_facts(_cache("turbo3", k=3.5, v=3.5)), parse_types("turbo3"), MODEL)
    facts = _facts(_cache("turbo3", _exact(0, 512, mib=plain.nominal), k=3.5, v=3.5))
    bits = bits_per_value(facts, parse_types("turbo3 tail=512"), MODEL)
    assert bits.agrees and bits.nominal == 3.5
    mib_of_cache = sum(cache.mib_k + cache.mib_v for cache in facts.caches)
    assert bits.exact == pytest.approx(plain.nominal * 3.5 / mib_of_cache, rel=0.02)
    assert bits.total == bits.nominal + bits.exact > plain.total == plain.nominal


# --------------------------------------------------------------------------------------------------------------------------


def test_runs_without_settings_need_none_of_this() -> None:
    for name, types in (("kld-turbo4-turbo3", "turbo4/turbo3"), ("kld-q4_0", "q4_0")):
        found = log_facts(log(name)[1])
        assert found.decayed == () and found.caches[0].decay is None and found.caches[0].layers_k == ""
        _check(found, types)
        guard.check_decayed(found, 0)
    assert facts("turbo3").caches[0].bits_k is None


# --- the environment ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", guard._CACHE_SETTINGS)
def test_settings_from_outside_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "")
    for prefixes in ((), (("GGML_", "TURBO_", "OMP_"),)):
        with pytest.raises(UsageError, match=f"the environment sets {name}") as caught:
            guard.settings_in_environment(*prefixes)
        assert caught.value.hint.startswith(f"unset {name}; ask for it in the type: --types")
