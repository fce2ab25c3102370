"""Stands in for llama-perplexity: prints golden logs of the real one, with types, sizes and chunks put in, and goes wrong on demand.

``FAKE_PLAN`` names a JSON file: {"count": FILE, "sleep": {TYPES: seconds}, "crash": [TYPES], "cut": {TYPES: times}, "swap": {TYPES:
TYPES}, "nan": [TYPES], "mean": {TYPES: value}, "layers": {TYPES: [map of K, map of V]}, "decayed": {TYPES: [cells of K, cells of V]},
"uncounted": {TYPES: times}, "without": {TYPES: [part of the line, ...]}, "flash": whether -fa off is ignored}.
Each call appends a line to the file ``count``.

Turbo types get a calibration and exact tokens unless the options say otherwise; with ``without`` they get none, and the line says why.
"""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path

LOGS = Path(__file__).resolve().parents[1] / "data" / "logs"
BITS = {"f32": 32, "f16": 16, "q8_0": 8.5, "q5_0": 5.5, "q4_0": 4.5, "turbo4": 4.5, "turbo3": 3.5, "turbo2": 2.5}
MEANS = {
    "f32": 0.000001,
    "f16": 0.000002,
    "q8_0": 0.00003,
    "q5_0": 0.0007,
    "q4_0": 0.0028,
    "q4_0 sink=4 tail=64": 0.0012,
    "turbo4": 0.0022,
    "turbo3": 0.012,
    "turbo2": 0.07,
}
VALUES_PER_CELL = 2 * 128  # tiny_gguf: layers x KV heads x head size
N_VOCAB = 259
SETTINGS = {"k": "--cache-type-k-layers", "v": "--cache-type-v-layers", "adaptive": "--cache-layer-adaptive", "decay": "--cache-decay"}
SETTINGS |= {"cal": "--cache-calibration", "sink": "--cache-sink", "tail": "--cache-tail"}
SHARES = {"conservative": (25, 40, 35), "balanced": (15, 35, 50), "aggressive": (5, 25, 70)}


def main(argv: list[str]) -> int:
    def option(name: str, default: str = "") -> str:
        return argv[argv.index(name) + 1] if name in argv else default

    plan = json.loads(Path(os.environ["FAKE_PLAN"]).read_text())
    k, v, ctx = option("-ctk"), option("-ctv"), int(option("-c"))
    types = " ".join([k if k == v else f"{k}/{v}", *(f"{name}={value}" for name, o in SETTINGS.items() if (value := option(o)))])
    base = Path(option("--kl-divergence-base"))
    is_base = "--kl-divergence" not in argv
    name = f"base-{ctx}" if is_base else (f"noise-{ctx}" if types == "f32" else f"{types}-{ctx}")
    with Path(plan["count"]).open("a") as file:
        file.write(name + "\n")
    calls = Path(plan["count"]).read_text().splitlines().count(name)
    out, err = ((LOGS / f"{'base-f16' if is_base else 'kld-q4_0'}.{end}").read_text() for end in ("out", "err"))
    chunks = _chunks(base, option("--chunks"), is_base)
    maps = plan.get("layers", {}).get(types, ())
    shares = SHARES.get(option("--cache-decay"), ())
    names = _swapped(plan, types, k, v)
    turbo = any("turbo" in name for name in (*names, *maps))
    asked = [option(SETTINGS[word], default if turbo else off) for word, default, off in _DEFAULTS]
    without = plan.get("without", {}).get(types, ())
    settings, parts = ([], without) if without else _with(*asked, ctx)
    flash = option("-fa") == "on" or plan.get("flash", False)
    log = _log(err, *names, ctx, maps=maps, shares=shares, settings=settings, parts=parts, chunks=chunks, flash=flash)
    sys.stderr.write(log)
    sys.stderr.flush()
    if is_base:
        _write_base(base, ctx, chunks)
    time.sleep(plan.get("sleep", {}).get(name, 0))
    if name in plan.get("crash", []):
        os.kill(os.getpid(), signal.SIGSEGV)
    if not is_base:
        mean = plan.get("mean", {}).get(types, MEANS.get(types, 0.005))
        out = _statistics(out, float("nan") if name in plan.get("nan", []) else mean, _chunks(base, "", False))
    if calls <= plan.get("cut", {}).get(name, 0):
        out = out[: out.index("\n   3 ")] if not is_base else ""
    sys.stdout.write(out)
    if shares and calls > plan.get("uncounted", {}).get(name, 0):
        cells = chunks * ((ctx - int(option("-b"))) * shares[2] // 100 // 32 * 32)
        counts = plan.get("decayed", {}).get(types, (cells, cells))
        sys.stderr.write(f"0.04.010.500 I llama_turbo_cache: decay: 12 passes, {counts[0]} cells of K, {counts[1]} cells of V\n")
    return 0


_DEFAULTS = (("cal", "auto", "none"), ("sink", "4", "0"), ("tail", "64, or less", "0"))


def _with(cal: str, sink: str, tail: str, ctx: int) -> tuple[list[str], list[str]]:
    """Settings and parts of our line for a calibration and exact tokens. By default a tail is shorter in a short context."""
    n_sink, n_tail = int(sink), min(64, ctx // 16) // 4 * 4 if tail == "64, or less" else int(tail)
    settings = [
        *(["cal=1a2b3c4d"] if cal != "none" else []),
        *([f"sink={n_sink}"] if n_sink else []),
        *([f"tail={n_tail}"] if n_tail else []),
    ]
    mib = (n_sink + n_tail) * VALUES_PER_CELL * 2 * 2 / 2**20
    copies = [f"copies {n_sink + n_tail} rows in 1 streams, {mib:.2f} MiB"] if n_sink + n_tail else []
    return settings, [*(["calibrated K 2 2 V 2 2 of 2"] if cal != "none" else []), *copies]


def _swapped(plan: dict[str, dict[str, str]], types: str, k: str, v: str) -> tuple[str, str]:
    other = plan.get("swap", {}).get(types)
    return (other, other) if other else (k, v)


def _chunks(base: Path, asked: str, is_base: bool) -> int:
    return int(asked) if is_base else struct.unpack("<8siii", base.read_bytes()[:20])[3]


def _log(
    err: str,
    k: str,
    v: str,
    ctx: int,
    *,
    maps: Sequence[str],
    shares: Sequence[int],
    settings: Sequence[str],
    parts: Sequence[str],
    chunks: int,
    flash: bool,
) -> str:
    bits = [_average(text) for text in maps] or [BITS[k], BITS[v]]
    mib = [b * VALUES_PER_CELL * ctx / 8 / 2**20 for b in bits]
    size = f"size = {sum(mib):7.2f} MiB ({ctx:6} cells,   2 layers,  1/1 seqs), K ({k}): {mib[0]:7.2f} MiB, V ({v}): {mib[1]:7.2f} MiB"
    rotated = [int(name not in ("f16", "f32")) for name in (k, v)]
    asked = [f"{side}={text}" for side, text in zip("kv", maps, strict=False)]
    asked += [f"decay={','.join(map(str, shares))}"] if shares else []
    words = [k if k == v else f"{k}/{v}", *asked, *settings]
    line = [" ".join(words), "rotated {}/{}".format(*rotated), "bits {:.3f}/{:.3f}".format(*bits)]
    line += [*(["decaying 2/2"] if shares else []), *parts]
    err = re.sub(r"size = .*cells.*", size, err)
    err = re.sub(r"(llama_context: flash_attn += )\w+", rf"\g<1>{'enabled' if flash else 'disabled'}", err)
    for side, flag in zip("kv", rotated, strict=True):
        err = re.sub(rf"attn_rot_{side} = \d", f"attn_rot_{side} = {flag}", err)
    err = re.sub(r"(.*attn_rot_v = .*\n)", rf"\g<1>0.00.039.690 I llama_turbo_cache: {' | '.join(line)}\n", err)
    return re.sub(r"over 3 chunks, n_ctx=512", f"over {chunks} chunks, n_ctx={ctx}", err)


def _average(text: str) -> float:
    """Bits per value of a map that names each of the two layers: ``0:q8_0;1:turbo3`` or ``0-1:turbo3``."""
    items = [item.split(":") for item in text.split(";")]
    return sum(BITS[name] for _, name in items) / len(items)


def _statistics(out: str, mean: float, chunks: int) -> str:
    row = re.search(r"^   1 .*\n", out, re.MULTILINE)
    assert row
    rows = "".join(f"{i:4}" + row[0][4:] for i in range(1, chunks + 1))
    out = re.sub(r"(^ {3}\d .*\n)+", lambda _: rows, out, count=1, flags=re.MULTILINE)
    printed = f"Mean    KLD: {mean:10.6f} ± {abs(mean) * 0.01:10.6f}"
    return re.sub(r"Mean    KLD:.*", printed, out)


def _write_base(path: Path, ctx: int, chunks: int) -> None:
    nv = 2 * ((N_VOCAB + 1) // 2) + 4
    with path.open("wb") as file:
        file.write(struct.pack("<8siii", b"_logits_", ctx, N_VOCAB, chunks))
        file.write(bytes(4 * ctx * chunks + 2 * nv * chunks * (ctx - 1 - ctx // 2)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
