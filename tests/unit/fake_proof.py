"""An unpacked proof whose programs are scripts of our own, and NVIDIA's tools likewise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import prove_run

HERE = Path(prove_run.__file__).parent
BITS = {"f16": 16.0, "q8_0": 8.5, "q4_0": 4.5, "turbo3": 3.5, "turbo4t": 4.25, "turbo3t": 3.25, "turbo4": 4.5}

OPS = r"""
case "$*" in
  *SLICE*|*kv=1536*) n=62 ;;
  *) n=3 ;;
esac
i=0; while [ $i -lt $n ]; do i=$((i+1)); printf '  SET_ROWS(type=%s,v=0): \033[1;32mOK\033[0m\n' $i; done
echo '  GET_ROWS(type=q1_0): not supported [CUDA0]'
echo "  $n/$n tests passed"
"""

PERF = r"""
[ "$1" = GONE ] && { echo "no device $1; there are: CPU" >&2; exit 1; }
while read -r op k v head kv gqa queries keys; do
  echo "$op $k $gqa $queries $keys" >>"$FAKE/measured"
  case $k in f16) us=100 ;; q8_0|q4_0) us=80 ;; *) us=30 ;; esac
  [ $op = set_rows ] && us=1
  [ -n "$SLEEP_AT" ] && [ "$k" = "$SLEEP_AT" ] && sleep 30
  [ -n "$CRASH_AT" ] && [ "$k" = "$CRASH_AT" ] && { echo "CUDA error: illegal access" >&2; kill -ABRT $$; }
  echo "{\"us\": $us, \"us_min\": $us, \"us_max\": $us, \"bytes\": 1000000, \"status\": \"ok\"}"
done
"""

BENCH = r"""
depth=0; types=""
while [ $# -gt 0 ]; do case $1 in -d) depth=$2 ;; -ctk) types=$2 ;; esac; shift; done
case $types in f16) used=900 ;; q8_0) used=500 ;; *) used=250 ;; esac
echo $((1000 + used * depth / 256)) >"$FAKE/used"
samples() { wc -l <"$FAKE/samples"; }
until=$(($(samples) + 2)); tries=0  # one may have looked before
while [ -d "$FAKE/tools" ] && [ "$(samples)" -lt $until ] && [ $tries -lt 100 ]; do sleep 0.05; tries=$((tries+1)); done
echo 1000 >"$FAKE/used"
[ "$types" = f16 ] && speed=50 || speed=75
echo "{\"n_prompt\": 16, \"avg_ts\": 1000, \"stddev_ts\": 1}"
echo "{\"n_prompt\": 0, \"avg_ts\": $speed, \"stddev_ts\": 1}"
"""

SMI = r"""
case "$*" in
  *memory.used*) cat "$FAKE/used"; echo >>"$FAKE/samples" ;;
  *) echo "NVIDIA H200, 9.0, 580.1" ;;
esac
"""

SANITIZER = r"""
[ "$1" = --help ] && { echo "  --kernel-name arg"; exit; }
[ -n "$UNFIT" ] && { echo "========= Error: Device not supported"; exit 1; }
echo "$@" >>"$FAKE/sanitized"
while [ "${1##*/}" != test-backend-ops ]; do shift; done
"$@"; echo "========= ERROR SUMMARY: ${ERRORS:-0} errors"; [ -z "$ERRORS" ] || exit 9
"""

NCU = r"""
[ -n "$UNFIT" ] && { echo "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission"; exit 1; }
cat >/dev/null
echo '==PROF== Connected to process 1'
echo '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"'
echo '"0","turbo_attn_decode_kernel(float*)","GPU Speed Of Light Throughput","Duration","us","74.5"'
echo '"0","turbo_attn_decode_kernel(float*)","Occupancy","Achieved Occupancy","%","18.7"'
"""


def program(folder: Path, name: str, code: str) -> None:
    """Write a script."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{code}")
    (folder / name).chmod(0o755)


def make(folder: Path, device: str) -> Path:
    """Make a proof in a folder; returns the folder for its tools, which belongs on PATH. FAKE must name the folder."""
    proof = folder / "proof"
    for name, code in (("test-backend-ops", OPS), ("test-turbo-perf", PERF), ("llama-bench", BENCH)):
        program(proof / "bin", name, code)
    program(proof / "bin", "llama-perplexity", 'echo "Final estimate: PPL = 53.1"\n')
    for path in HERE.glob("prove_*.py"):
        shutil.copy(path, proof)
    plan = {"device": device, "build": "abc", "preset": "fake", "about": "patches of a test", "bits": BITS}
    (proof / "plan.json").write_text(json.dumps(plan))
    (proof / "model.gguf").touch()
    (folder / "used").write_text("1000")
    (folder / "samples").touch()
    if device.startswith("CUDA"):
        for name, code in (("nvidia-smi", SMI), ("compute-sanitizer", SANITIZER), ("ncu", NCU)):
            program(folder / "tools", name, code)
    return folder / "tools"
