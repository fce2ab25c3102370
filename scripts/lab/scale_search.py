"""How the scalar turbo encoders were chosen: error against candidates and rules, cost of the int8 codebook, encode and dot speed.

    python scripts/lab/scale_search.py > eval/results/codec-error.txt     # a minute
    python scripts/check_results.py --stamp eval/results/codec-error.txt

Errors are relative squared errors on N(0, 1) blocks of 32 without the rounding of d to fp16, which changes no digit shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from turbo_gguf.codec import oracle, scalar
from turbo_gguf.codec.tables import QK_SCALAR, SCALAR, ScalarType, Scale
from turbo_gguf.tools import capture

BLOCKS = 40_000
Gain = tuple[np.ndarray, np.ndarray, np.ndarray]  # magnitude indices, best scale, squared error that it removes


def encode(a: np.ndarray, magnitudes: np.ndarray, steps: Sequence[np.ndarray], refits: int = 0) -> Gain:
    """Nearest magnitudes for each step (shape (blocks, 1)) in turn, then for the least-squares refit; keep the best."""
    best: Gain | None = None
    for i in range(len(steps) + refits):
        m = np.searchsorted((magnitudes[1:] + magnitudes[:-1]) / 2, a / (steps[i] if i < len(steps) else best[1]))
        c = magnitudes[m]
        tc, cc = (a * c).sum(axis=1, keepdims=True), (c * c).sum(axis=1, keepdims=True)
        tried = (m, tc / cc, tc * tc / cc)
        better = best is not None and tried[2] > best[2]
        best = tried if best is None else tuple(np.where(better, new, old) for new, old in zip(tried, best, strict=True))
    return best


def error(a: np.ndarray, gain: Gain) -> float:
    return float(1 - gain[2].sum() / (a * a).sum())


def candidates(t: ScalarType, a: np.ndarray) -> None:
    magnitudes = np.array(t.magnitudes, dtype=float)
    rms = np.sqrt((a * a).mean(axis=1, keepdims=True)) / t.int_scale
    amax = a.max(axis=1, keepdims=True) / magnitudes[-1]
    low, high = t.ratios[0], t.ratios[-1]
    for name, base, lo, hi in (("RMS", rms, 0.7, 1.4 if t.bits < 4 else 1.2), ("max|x|", amax, low, high)):
        for count in (1, 2, 3, 4, 5, 6, 8, 12):
            middle = 1.0 if name == "RMS" else t.plain_ratio
            ratios = [middle] if count == 1 else np.linspace(lo, hi, count)
            steps = [base * r for r in ratios]
            print(f"{t.name}  {count:2d} x {name:6s}  {error(a, encode(a, magnitudes, steps)):.5f}", end="")
            print(f"   with a refit {error(a, encode(a, magnitudes, steps, refits=1)):.5f}")
    many = [rms * r for r in np.linspace(0.5, 1.6, 100)] + [amax * r for r in np.linspace(0.4, 1.4, 100)]
    print(f"{t.name} 200 of both    {error(a, encode(a, magnitudes, many)):.5f}")


def float_codebook_and_retraining(t: ScalarType, a: np.ndarray, held_out: np.ndarray) -> None:
    """What exact Lloyd-Max levels, or levels trained with the search in the loop, would gain."""

    def steps(x: np.ndarray, magnitudes: np.ndarray) -> list[np.ndarray]:
        return [x.max(axis=1, keepdims=True) / magnitudes[-1] * r for r in t.ratios]

    results = {}
    magnitudes = np.array(t.magnitudes, dtype=float)
    results["int8"] = magnitudes
    results["exact Lloyd-Max"] = np.array(t.levels)
    for _ in range(40):
        m, d, _gain = encode(a, magnitudes, steps(a, magnitudes))
        d = np.broadcast_to(d, m.shape)
        magnitudes = np.array([(d * a)[m == k].sum() / (d * d)[m == k].sum() for k in range(len(magnitudes))])
    results["retrained"] = magnitudes
    print(f"{t.name}  " + "   ".join(f"{k} {error(held_out, encode(held_out, v, steps(held_out, v))):.5f}" for k, v in results.items()))


def rules(t: ScalarType, x: np.ndarray) -> None:
    for search in (True, False):
        row = []
        for scale in Scale:
            decoded = scalar.dequantize(t, scalar.quantize(t, x, scale=scale, search=search)).astype(np.float64)
            norm = np.linalg.norm(decoded, axis=1).mean() / np.linalg.norm(x, axis=1).mean()
            slope = (decoded * x).sum() / (x * x).sum()
            row.append(f"{scale.name.lower()} {((decoded - x) ** 2).sum() / (x * x).sum():.5f} (norm {norm:.4f}, slope {slope:.4f})")
        print(f"{t.name} {'search' if search else 'plain '}  " + "   ".join(row))


def fastest(repeats: int, call: Callable[..., object], *args: object) -> float:
    """Nanoseconds of the fastest of several calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        call(*args)
        times.append(time.perf_counter_ns() - start)
    return float(min(times))


def speed(flags: tuple[str, ...]) -> None:
    o = oracle.load(*flags)
    x = np.random.default_rng(2).standard_normal(64 * 1024).astype(np.float32)
    y = np.zeros(x.size // QK_SCALAR, dtype=oracle.Q8_0)
    y["d"], y["qs"] = 0.01, np.random.default_rng(3).integers(-127, 128, (y.size, QK_SCALAR))
    for t in SCALAR:
        cpu = fastest(100, o.quantize_cpu, t, x) * 1024 / x.size
        ref = fastest(100, o.quantize_ref, t, x) * 1024 / x.size
        dot = fastest(300, o.vec_dot, t, o.quantize(t, x), y) * 128 / x.size
        print(f"{o.isa:8s} {' '.join(flags) or '(baseline)':28s} {t.name}  {cpu:6.0f}  {ref:6.0f}  {dot:6.1f}")


def machine() -> str:
    """CPU and compiler, which decide the times."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "an unknown CPU")
    return f"{cpu}, {capture(['cc', '--version']).splitlines()[0]}"


def main() -> None:
    print(f"# scripts/lab/scale_search.py, {datetime.now(UTC):%Y-%m-%d}; one core of {machine()}\n")
    rng = np.random.default_rng(1)
    x, held_out = rng.standard_normal((2, BLOCKS, QK_SCALAR)).astype(np.float32)
    print("# error against the number of steps tried; steps relative to the block's RMS, or to its largest magnitude")
    for t in SCALAR:
        candidates(t, np.abs(x).astype(np.float64))
    print("\n# codebook: as defined, exact levels, levels retrained with the search in the loop (held-out data)")
    for t in SCALAR:
        float_codebook_and_retraining(t, np.abs(x).astype(np.float64), np.abs(held_out).astype(np.float64))
    print("\n# scale rules, real blocks (fp16 scale); norm and slope <x, decoded>/|x|^2 relative to 1")
    for t in SCALAR:
        rules(t, x)
    print("\n# ns: CPU encoder per 1024 values, reference encoder per 1024 values, vec_dot per 128 values")
    for flags in ((), ("-mavx2", "-mfma", "-mf16c"), ("-march=native",)):
        speed(flags)


if __name__ == "__main__":
    main()
