"""Logs to records. Risks: taking what is there of an incomplete log, NaN, another type or device than asked for."""

from __future__ import annotations

import math
import re

import msgspec
import numpy as np
import pytest
from measuring import LOGS, MODEL, facts, log

from turbo_gguf import errors
from turbo_gguf.cache.settings import OFF
from turbo_gguf.cache.spec import CacheSpec, with_settings
from turbo_gguf.cache.types import cache_type
from turbo_gguf.errors import LogNotUnderstood, SilentFallback, UsageError
from turbo_gguf.make import presets
from turbo_gguf.measure import environment, guard, perplexity, quantiles
from turbo_gguf.measure.bits import bits_per_value, memory_mib
from turbo_gguf.measure.log import log_facts
from turbo_gguf.measure.metrics import Metric


def test_statistics_of_a_real_log() -> None:
    stats = perplexity.kld_stats(*log("kld-q4_0"))
    out, _ = log("kld-q4_0")
    printed = re.search(r"Mean    KLD:\s+(\S+) ±\s+(\S+)", out)
    assert printed and stats.mean == Metric(float(printed[1]), float(printed[2]))
    assert stats.chunks == 3 and stats.tokens == 3 * 255
    assert 0 < stats.median.value < stats.mean.value < stats.p90.value < stats.p99.value < stats.p999.value <= stats.max
    assert 90 < stats.same_top.value < 100 and stats.same_top.error > 0
    assert stats.ppl_base.value == 209.078021
    assert math.isclose(math.log(stats.ppl.value / stats.ppl_base.value), stats.ln_ppl_ratio.value, abs_tol=2e-6)


def test_two_equal_runs_have_nan_errors_that_mean_zero() -> None:
    out, err = log("kld-f16-same")
    assert "-nan" in out
    stats = perplexity.kld_stats(out, err)
    assert stats.ln_ppl_ratio.error == 0 and stats.same_top == Metric(100.0, 0.0)


def test_lost_end_of_the_log_is_worth_a_retry() -> None:
    with pytest.raises(errors.LogCut):
        perplexity.kld_stats(*log("kld-cut"))


@pytest.mark.parametrize("name", ["kld-q4_0", "kld-q8_0-q4_0", "kld-f16-batch256"])
def test_every_line_of_the_statistics_is_required_from_the_end(name: str) -> None:
    """Whatever the tool lost, from one line to everything: never a result."""
    out, err = log(name)
    lines = out.splitlines(keepends=True)
    last = next(i for i, line in enumerate(lines) if line.startswith("Same top p:"))
    for kept in range(last + 1):
        with pytest.raises(errors.LogCut):
            perplexity.kld_stats("".join(lines[:kept]), err)
    perplexity.kld_stats("".join(lines[: last + 1]), err)


def test_a_chunk_lost_in_the_middle_is_noticed() -> None:
    out, err = log("kld-q4_0")
    without = re.sub(r"^   2 .*\n", "", out, flags=re.MULTILINE)
    assert without != out
    with pytest.raises(errors.LogCut, match="2 of 3"):
        perplexity.kld_stats(without, err)


@pytest.mark.parametrize("bad", ["nan", "-nan", "inf"])
def test_nan_and_infinity_are_no_results(bad: str) -> None:
    with pytest.raises(LogNotUnderstood, match="NaN") as caught:
        perplexity.kld_stats(*log("kld-nan"))
    assert not isinstance(caught.value, errors.LogCut)
    out, err = log("kld-q4_0")
    for label in ("Mean    KLD", "Maximum KLD", r"99\.9%   KLD", r"Mean PPL\(Q\)", "Same top p"):
        broken = re.sub(rf"^({label}\s*:\s*)[-\d.]+", rf"\g<1>{bad}", out, flags=re.MULTILINE)
        assert broken != out, label
        with pytest.raises(LogNotUnderstood, match="NaN") as caught:
            perplexity.kld_stats(broken, err)
        assert not isinstance(caught.value, errors.LogCut)


def test_base_with_nan() -> None:
    with pytest.raises(LogNotUnderstood, match="NaN") as caught:
        perplexity.perplexity(*log("base-nan"))
    assert not isinstance(caught.value, errors.LogCut)


def test_plain_perplexity() -> None:
    ppl, chunks = perplexity.perplexity(*log("base-f16"))
    assert chunks == 3 and math.isclose(ppl.value, 209.078, rel_tol=1e-4) and ppl.error > 0
    out, err = log("base-f16")
    with pytest.raises(errors.LogCut):
        perplexity.perplexity(out, err[: err.index("Final estimate")])


def test_text_that_is_too_short_ends_with_zero_and_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="needs at least 1024"):
        perplexity.perplexity(*log("text-too-short"))


def test_run_that_stopped_before_it_computed() -> None:
    with pytest.raises(LogNotUnderstood) as caught:
        perplexity.kld_stats(*log("kld-no-context"))
    assert not isinstance(caught.value, errors.LogCut)


def test_error_of_quantiles_is_about_right() -> None:
    """Against the spread of the sample quantiles of many samples, of a distribution that is not the log-normal one."""
    rng = np.random.default_rng(1)
    samples = rng.gamma(0.7, 0.004, size=(400, 4000))
    ps = list(perplexity._QUANTILES)
    table = np.quantile(samples, ps, axis=1)
    for p, tolerance in ((0.5, 0.35), (0.9, 0.35), (0.99, 0.4), (0.999, 0.6)):
        real = table[ps.index(p)].std()
        guesses = [quantiles.quantile_error(dict(zip(ps, table[:, i], strict=True)), samples[i].max(), p, 4000) for i in range(100)]
        assert abs(np.median(guesses) / real - 1) < tolerance, p


# --- what really ran ------------------------------------------------------------------------------------------------------


def test_facts_of_a_real_log() -> None:
    found = log_facts(log("kld-q8_0-q4_0")[1])
    (cache,) = found.caches
    assert (cache.spec, cache.cells, cache.layers, cache.streams) == (CacheSpec("q8_0", "q4_0"), 512, 4, 1)
    assert (cache.mib_k, cache.mib_v, cache.buffers) == (0.53, 0.28, ("CPU",))
    assert (cache.rot_k, cache.rot_v) == (True, True)
    assert found.flash_attn == "enabled" and found.backends[0] == "CPU" and found.splits == 1 and found.offloaded is None
    assert found.n_ctx_seq == 512


def test_facts_of_llama_bench() -> None:
    found = log_facts((LOGS / "bench-verbose.err").read_text())
    assert (found.caches[0].spec, found.flash_attn, found.splits) == (CacheSpec("q8_0", "q4_0"), "enabled", 1)


def test_two_caches_of_sliding_window_attention() -> None:
    found = log_facts((LOGS / "kld-swa.err").read_text())
    assert [c.cells for c in found.caches] == [512, 256]
    assert all(c.rot_k and c.rot_v and c.buffers == ("CPU",) for c in found.caches)
    bits = bits_per_value(found, CacheSpec("q4_0", "q4_0"), MODEL)
    assert bits.low is not None and bits.high is not None and bits.low < 4.5 < bits.high < 4.7


def test_log_without_trace_lines_proves_nothing() -> None:
    err = "\n".join(line for line in log("kld-q4_0")[1].splitlines() if "llama_kv_cache" not in line)
    with pytest.raises(LogNotUnderstood, match="llama_kv_cache"):
        log_facts(err)


def test_flash_attention_resolved_from_auto() -> None:
    err = log("kld-q4_0")[1]
    auto = err.replace("flash_attn            = enabled", "flash_attn            = auto")
    assert log_facts(auto).flash_attn == ""
    assert log_facts(auto + "0.00.1 I resolve_fused_ops: Flash Attention enabled\n").flash_attn == "enabled"
    assert log_facts(auto + "0.00.1 W resolve_fused_ops: Flash Attention not supported, set to disabled\n").flash_attn == "disabled"


def test_rotation_in_both_forms_of_upstream() -> None:
    """A flag up to snapshot 0.3.36, then a size."""
    err = log("kld-q4_0")[1]
    for k, v in ((1, 0), (0, 1)):
        flags = err.replace("attn_rot_k = 1", f"attn_rot_k = {k}").replace("attn_rot_v = 1", f"attn_rot_v = {v}")
        sizes = re.sub(r"attn_rot_([kv]) = (\d)", lambda m: f"n_rot_{m[1]} = {128 * int(m[2])}", flags)
        for text in (flags, sizes):
            (cache,) = log_facts(text).caches
            assert (cache.rot_k, cache.rot_v, cache.patched) == (k == 1, v == 1, False)


def test_older_snapshots_print_graph_splits_otherwise() -> None:
    err = log("kld-q4_0")[1].replace("graph: nodes = 178, splits = 1,", "graph splits = 7 (with bs=512), 3 (with bs=1)")
    assert log_facts(err).splits == 7


def test_layers_on_a_gpu() -> None:
    err = log("kld-q4_0")[1] + "0.00.000.001 I load_tensors: offloaded 4/5 layers to GPU\n"
    assert log_facts(err).offloaded == (4, 5)


@pytest.mark.parametrize(
    ("name", "types"),
    [("kld-q4_0", "q4_0"), ("kld-q8_0-q4_0", "q8_0/q4_0"), ("kld-f16-batch256", "f16"), ("kld-turbo4-turbo3", "turbo4/turbo3")],
)
def test_bits_per_value_of_real_logs(name: str, types: str) -> None:
    t = CacheSpec.parse(types)
    found = log_facts(log(name)[1])
    bits = bits_per_value(found, t, MODEL)
    assert bits.low is not None and bits.high is not None and bits.agrees and bits.high - bits.low < 0.2
    guard.check_bits(bits, t)
    wrong = bits_per_value(found, CacheSpec("turbo3", "turbo3"), MODEL)
    assert not wrong.agrees
    with pytest.raises(SilentFallback, match="bits per value"):
        guard.check_bits(wrong, CacheSpec("turbo3", "turbo3"))


def test_memory_of_a_cache_is_exact_where_the_log_rounds() -> None:
    """512 cells of 4 layers with 2 heads of 128 values, K and V. The log gives K and V as .28 MiB each."""
    found, types = log_facts(log("kld-q4_0")[1]), CacheSpec.parse("q4_0")
    assert memory_mib(found, types, MODEL) == (512 * 4 * 2 * 128 * 2 * 4.5 / 8 / 2**20, 0.0)
    mib, error = memory_mib(found, types, msgspec.structs.replace(MODEL, uniform=False))
    assert mib == pytest.approx(0.56) and abs(mib - 0.5625) <= error < 0.011
    mib, error = memory_mib(facts("q4_0 tail=16"), types, MODEL)
    assert mib == pytest.approx(0.5625 + 0.38) and error == pytest.approx(0.005, abs=1e-5), "copies as the log gives them"


@pytest.mark.parametrize("types", ["q8_0", "q5_0", "q4_0", "turbo4", "turbo3", "turbo2", "turbo4/turbo3", "f16/turbo3"])
@pytest.mark.parametrize("cells", [256, 512, 1024, 2048, 3072, 4096, 32768])
def test_bits_agree_for_every_size_that_the_tool_rounds(types: str, cells: int) -> None:
    """Sizes are often halves of the last digit: 1.125 MiB is printed as 1.12, 1.375 as 1.38."""
    t = CacheSpec.parse(types)
    mib = [float(f"{cache_type(name).bits * cells * 4 * 2 * 128 / 8 / 2**20:7.2f}") for name in (t.k, t.v)]
    cache = msgspec.structs.replace(facts(types).caches[0], cells=cells, mib_k=mib[0], mib_v=mib[1])
    bits = bits_per_value(facts(types, caches=(cache,)), t, MODEL)
    assert bits.agrees and bits.low is not None and bits.high is not None
    if cells >= 1024:
        off = CacheSpec(t.k, "q4_1" if t.v != "q4_1" else "q4_0")
        assert not bits_per_value(facts(types, caches=(cache,)), off, MODEL).agrees


def test_bits_are_nominal_only_when_layers_differ() -> None:
    model = msgspec.structs.replace(MODEL, uniform=False)
    bits = bits_per_value(log_facts(log("kld-q4_0")[1]), CacheSpec("q4_0", "q4_0"), model)
    assert bits.low is None and bits.nominal == 4.5 and bits.agrees


def test_bits_with_a_different_number_of_heads_per_layer() -> None:
    hybrid = msgspec.structs.replace(MODEL, n_layer=6, n_head_kv=(1, 0, 2, 0, 3, 2))  # 8 in all, as 4 x 2
    bits = bits_per_value(log_facts(log("kld-q4_0")[1]), CacheSpec("q4_0", "q4_0"), hybrid)
    assert bits.low is not None and bits.agrees


# --- the guard ------------------------------------------------------------------------------------------------------------


def _check(name: str, types: str) -> None:
    """The logs are of builds without defaults."""
    guard.check(log_facts(log(name)[1]), with_settings(CacheSpec.parse(types), OFF), backend="CPU", model=MODEL)


def test_sound_runs_pass_the_guard() -> None:
    for name, types in (
        ("kld-q4_0", "q4_0"),
        ("kld-q8_0-q4_0", "q8_0/q4_0"),
        ("kld-f16-batch256", "f16"),
        ("base-f16", "f16"),
        ("kld-turbo4-turbo3", "turbo4/turbo3"),
    ):
        _check(name, types)


@pytest.mark.parametrize(
    ("name", "types", "words"),
    [
        ("kld-q4_0", "turbo3", "no llama_turbo_cache line; asked for was turbo3"),
        ("kld-q8_0-q4_0", "q8_0", "is q8_0/q4_0; asked for was q8_0"),
        ("kld-q8_0-q4_0", "q4_0", "is q8_0/q4_0; asked for was q4_0"),
        ("kld-turbo4-turbo3", "turbo4", "is turbo4/turbo3; asked for was turbo4"),
        ("kld-q4_0-unrotated", "q4_0", "not rotated"),
        ("kld-f16-no-flash", "f16", "flash attention is disabled"),
    ],
)
def test_silent_fallback_is_an_error(name: str, types: str, words: str) -> None:
    with pytest.raises(SilentFallback, match=words):
        _check(name, types)


def test_cache_on_another_device() -> None:
    with pytest.raises(SilentFallback, match="CPU buffer; asked for was ROCm"):
        guard.check(facts("q4_0"), CacheSpec.parse("q4_0"), backend="ROCm", model=MODEL)


def _gpu(**changes: object) -> object:
    cache = msgspec.structs.replace(facts("q4_0").caches[0], buffers=("ROCm0",))
    return msgspec.structs.replace(facts("q4_0", offloaded=(5, 5), splits=2), caches=(cache,), **changes)


def test_gpu_run_with_all_layers_passes_and_with_fewer_does_not() -> None:
    q4 = CacheSpec.parse("q4_0")
    guard.check(_gpu(), q4, backend="ROCm", model=MODEL, base_splits=2)  # type: ignore[arg-type]
    for changes in ({"offloaded": (4, 5)}, {"offloaded": None}, {"splits": 10}):
        with pytest.raises(SilentFallback):
            guard.check(_gpu(**changes), q4, backend="ROCm", model=MODEL, base_splits=2)  # type: ignore[arg-type]


def test_second_cache_of_another_type() -> None:
    swa = msgspec.structs.replace(facts("q4_0").caches[0], spec=CacheSpec("q4_0", "f16"))
    with pytest.raises(SilentFallback, match="2 of 2"):
        guard.check(facts("q4_0", caches=(facts("q4_0").caches[0], swa)), CacheSpec.parse("q4_0"), backend="CPU", model=MODEL)


def test_turbo_types_must_be_rotated_at_any_head_size() -> None:
    model = msgspec.structs.replace(MODEL, head_k=96, head_v=96)
    q4 = msgspec.structs.replace(facts("q4_0").caches[0], rot_k=False, rot_v=False)
    guard.check(facts("q4_0", caches=(q4,)), CacheSpec.parse("q4_0"), backend="CPU", model=model)
    turbo = msgspec.structs.replace(facts("turbo3").caches[0], rot_k=False, rot_v=False)
    with pytest.raises(SilentFallback, match="not rotated"):
        guard.check(facts("turbo3", caches=(turbo,)), CacheSpec.parse("turbo3"), backend="CPU", model=model)


def test_f16_must_not_be_rotated() -> None:
    cache = msgspec.structs.replace(facts("f16").caches[0], rot_v=True)
    with pytest.raises(SilentFallback, match="is rotated"):
        guard.check(facts("f16", caches=(cache,)), CacheSpec.parse("f16"), backend="CPU", model=MODEL)


def test_variables_that_change_the_measurement_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGML_TURBO_SCALE", "ls")
    assert "GGML_TURBO_SCALE=ls" in environment.settings_in_environment()
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
    with pytest.raises(UsageError, match="LLAMA_ATTN_ROT_DISABLE"):
        environment.settings_in_environment()


def test_backend_of_a_preset() -> None:
    assert [presets.backend_of(p) for p in ("cpu", "cpu-debug", "rocm", "cuda")] == ["CPU", "CPU", "ROCm", "CUDA"]
