"""Records for tests of gate, report and store."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import msgspec

from turbo_gguf.cache.settings import AUTO, NONE, CalibrationChoice
from turbo_gguf.cache.spec import CacheSpec, flash_attention, with_defaults
from turbo_gguf.cache.types import cache_type
from turbo_gguf.inputs.models import ModelFile
from turbo_gguf.make.build import Build
from turbo_gguf.measure.bits import Bits
from turbo_gguf.measure.case import Case
from turbo_gguf.measure.log import Calibrated, Copies, KvCache, LogFacts
from turbo_gguf.measure.metrics import KldStats, Metric
from turbo_gguf.measure.result import Answer, BenchRow, Result, ServeRow
from turbo_gguf.patchset.tree import Tree


def program(path: Path, text: str) -> Path:
    """A program that stands in for one of llama.cpp."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def fake_build(folder: Path, name: str, text: str) -> Build:
    """A build that has one such program."""
    program(folder / "build" / "bin" / name, text)
    tree = Tree(path=folder, upstream="test", commit="c", digest="d")
    return Build(id="fake", path=folder / "build", preset="cpu", tree=tree, compiler="cc")


LOGS = Path(__file__).resolve().parents[1] / "data" / "logs"

MODEL = ModelFile(
    path=Path("eval-model.gguf"),
    sha256="m",
    size=9_295_936,
    name="eval-model",
    arch="llama",
    n_layer=4,
    n_head_kv=(2, 2, 2, 2),
    head_k=128,
    head_v=128,
    n_ctx_train=2048,
    n_vocab=4096,
    uniform=True,
)


def log(name: str) -> tuple[str, str]:
    """Standard output and standard error of a golden log."""
    return tuple((LOGS / f"{name}.{end}").read_text(encoding="utf-8") for end in ("out", "err"))  # type: ignore[return-value]


DIGEST = "1a2b3c4d"
"""Of the calibration that a run makes or finds by itself."""


def in_force(types: CacheSpec) -> CacheSpec:
    """What a log says of types: the defaults are in force, and what is off is not there."""
    t = with_defaults(types)
    chosen = CalibrationChoice("", DIGEST) if t.calibration == AUTO else None if t.calibration == NONE else t.calibration
    return msgspec.structs.replace(t, calibration=chosen, sink=t.sink or None, tail=t.tail or None)


def facts(types: str = "q4_0", **changes: object) -> LogFacts:
    """What a sound CPU run of these types says of a patched build."""
    t = in_force(CacheSpec.parse(types))
    flash = "enabled" if flash_attention(t) else "disabled"
    told = {side: cache_type(name).is_quantized for side, name in (("rot_k", t.k), ("rot_v", t.v))}
    told |= {"patched": True, "bits_k": cache_type(t.k).bits, "bits_v": cache_type(t.v).bits}
    told |= {"calibrated": Calibrated(4, 4, 4, 4, 4) if t.calibration else None}
    told |= {"copies": Copies(96, 1, 0.38) if t.sink or t.tail else None}
    cache = KvCache(spec=t, mib_k=0.28, mib_v=0.28, cells=512, layers=4, streams=1, buffers=("CPU",), **told)
    base = LogFacts(caches=(cache,), flash_attn=flash, n_ctx_seq=512, backends=("CPU",), offloaded=None, splits=1, warnings=())
    return msgspec.structs.replace(base, **changes)


def case(types: str = "q4_0", ctx: int = 512, *, batch: int = 512, **changes: object) -> Case:
    """A case of a fixed build, model and text."""
    made = Case(
        types=CacheSpec.parse(types),
        ctx=ctx,
        chunks=8,
        batch=batch,
        base_batch=512,
        backend="CPU",
        build_id="b",
        model_sha256="m",
        text_sha256="t",
    )
    return msgspec.structs.replace(made, **changes)


def result(types: str, mean: float, error: float | None = None, *, ctx: int = 512, batch: int = 512, **stats: Metric) -> Result:
    """A result whose numbers scale with its mean KL divergence."""
    c = case(types, ctx, batch=batch)
    spread = mean * 0.02 if error is None else error
    numbers = KldStats(
        mean=Metric(mean, spread),
        median=Metric(mean * 0.6, spread),
        p90=Metric(mean * 2, spread),
        p99=Metric(mean * 8, spread),
        p999=Metric(mean * 20, spread * 5),
        max=mean * 40,
        same_top=Metric(100 - min(50.0, 100 * abs(mean) ** 0.5), 0.05),
        ppl=Metric(12.5, 0.2),
        ppl_base=Metric(12.4, 0.2),
        ln_ppl_ratio=Metric(mean * 0.5, mean * 0.1),
        mean_dp=Metric(-0.01, 0.01),
        rms_dp=Metric(0.5, 0.01),
        chunks=8,
        tokens=2040,
    )
    bits = (cache_type(c.types.k).bits + cache_type(c.types.v).bits) / 2
    return Result(
        key=c.key,
        case=c,
        stats=msgspec.structs.replace(numbers, **stats),
        bits=Bits(bits, bits * 0.98, bits * 1.02),
        model="eval-model",
        text="held-out.txt",
        upstream_commit="0c1e570980d0",
        patch_digest="d" * 64,
        facts=facts(types),
        seconds=12.0,
        argv=("llama-perplexity",),
        time="2026-11-21T00:00:00+00:00",
    )


def run_of(ctx: int = 512, **means: float) -> list[Result]:
    """A whole run: noise floor, plain f16, competitors, and what is given by type."""
    known = {"f16": 0.000003, "q8_0": 0.00003, "q5_0": 0.0007, "q4_0": 0.0028} | means
    return [result("f32", 0.000002, 0.000001, ctx=ctx, batch=256), *(result(t, m, ctx=ctx) for t, m in known.items())]


def bench_row(types: str, depth: int, *, speed: float, n_prompt: int = 0, n_gen: int = 32, number: int = 0, key: str = "k") -> BenchRow:
    """A row of llama-bench, with the fields that it prints."""
    t = CacheSpec.parse(types)
    row = json.loads((LOGS / "bench.out").read_text().splitlines()[0])
    row |= {"type_k": t.k, "type_v": t.v, "n_depth": depth, "n_prompt": n_prompt, "n_gen": n_gen, "avg_ts": speed}
    return BenchRow(
        key=key,
        types=t,
        depth=depth,
        n_prompt=n_prompt,
        n_gen=n_gen,
        round=number,
        tokens_per_second=Metric(speed, 0.0),
        build_id="b",
        patch_digest="d",
        row=row,
    )


def answer(first: float = 1.0, gap: float = 0.1, tokens: int = 11, prompt: int = 100, **changes: object) -> Answer:
    """An answer whose tokens come in even steps."""
    made = Answer(prompt=prompt, sent=0.0, seconds=first + gap * (tokens - 1), tokens=tokens, first=first, gaps=(gap,) * (tokens - 1))
    return msgspec.structs.replace(made, **changes)


def serve_row(types: str, *answers: Answer, clients: int = 4, seconds: float = 10.0, number: int = 0, **changes: object) -> ServeRow:
    """A load with these answers."""
    made = ServeRow(
        key="k",
        types=CacheSpec.parse(types),
        clients=clients,
        round=number,
        slots=4,
        ctx=1024,
        slot_mib=4.0,
        budget_mib=16.0,
        seconds=seconds,
        peak_mib=200.0,
        answers=answers,
        model="eval-model",
        upstream_commit="0c1e570980d0",
        build_id="b",
        patch_digest="d" * 64,
        backend="CPU",
        threads=2,
        facts=facts(types),
        argv=("llama-server",),
        time="2026-11-29T00:00:00+00:00",
    )
    return msgspec.structs.replace(made, **changes)
