"""The log of a dry run. Risks: a row of the table that is misread, a buffer that counts twice, a refusal that looks like a crash."""

from __future__ import annotations

from pathlib import Path

import pytest

from turbo_gguf.cache.spec import CacheSpec
from turbo_gguf.errors import EnvironmentMissing, LogNotUnderstood, UsageError
from turbo_gguf.inputs.headers import Header
from turbo_gguf.plan import dry_run
from turbo_gguf.plan.memory import Context
from turbo_gguf.plan.planner import MARGIN, Planner

MIB = 1 << 20
TABLE = "0.00.088.029 I common_memory_breakdown_print: |"
HEAD = f"{TABLE} memory breakdown [MiB] | total   free     self   model   context   compute    unaccounted |\n"
HOST = f"{TABLE}   - Host               |                  137 =    92 +      28 +      17                |\n"
GPU = f"{TABLE}   - CUDA0 (RTX 4090)   | 24077 =  945 + (19187 = 17904 +     384 +     898) +        3945 |\n"
REPACK = f"{TABLE}   - CPU_REPACK         |                   28 =    28 +       0 +       0                |\n"
CACHES = """0.00.273.482 I llama_context:        CPU  output buffer size =     0.38 MiB
0.00.273.489 I llama_kv_cache:        CPU KV buffer size =     0.00 MiB
0.00.273.490 D llama_kv_cache: size =   23.91 MiB (  2048 cells,  30 layers,  2/2 seqs), K (turbo4t):   11.95 MiB, V (turbo4t):   11.95 MiB
0.00.294.854 D llama_turbo_cache: turbo4t sink=4 tail=64 | rotated 1/1 | bits 4.250/4.250 | copies 96 rows in 2 streams, 4.22 MiB
0.00.294.855 I llama_memory_recurrent: size =    0.17 MiB (     1 cells,   2 layers,  1 seqs  0 rs_seq), R (f32):    0.01 MiB
0.00.322.183 D sched_reserve:        CPU compute buffer size =   105.29 MiB
0.00.322.184 D sched_reserve:        CPU compute buffer size =    16.00 MiB
"""
LOG = CACHES + HEAD + HOST


def test_what_a_log_tells() -> None:
    found = dry_run.read(LOG)
    assert found.devices == (dry_run.Device("Host", 92, 28, 17),)
    assert found.mib == ((11.95, 11.95),) and found.copies == round(4.22 * MIB) and found.state == round(0.17 * MIB)
    assert found.compute == round((16 + 0.38) * MIB), "the second reservation is the one that holds"


def test_devices() -> None:
    found = dry_run.read(CACHES + HEAD + GPU + HOST + REPACK)
    assert found.devices[0] == dry_run.Device("CUDA0", 17904, 384, 898, 945)
    assert found.devices[0].used == 17904 + 384 + 898
    assert [device.name for device in found.devices] == ["CUDA0", "Host", "CPU_REPACK"]
    assert found.model == (17904 + 92 + 28) * MIB and found.repacked == 28 * MIB


def test_a_refusal_is_no_crash() -> None:
    text = (
        "0.00.004.062 E check_head_sizes: K cache type turbo3 needs a head size that is a multiple of 32, but layer 0 has 80\n"
        "0.00.004.064 E cmn  common_fit: encountered an error: failed to create llama_context from model\n"
    )
    with pytest.raises(UsageError, match=r"^K cache type turbo3 needs a head size"):
        dry_run.read(text)
    with pytest.raises(LogNotUnderstood, match="it says: failed to load model"):
        dry_run.read("0.00.004.062 E llama_model_load: failed to load model\n")
    with pytest.raises(LogNotUnderstood, match="has no table"):
        dry_run.read("")


def test_a_header_that_agrees_with_the_log() -> None:
    found = dry_run.read(LOG)
    exact = round(11.9531 * MIB)
    assert dry_run.same_kv([(exact, exact), (0, 0)], found)
    assert not dry_run.same_kv([(exact, exact + MIB // 50)], found)
    assert not dry_run.same_kv([(exact, exact), (exact, exact)], found)
    assert not dry_run.same_kv([], found)


def test_the_memory_of_devices_is_what_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What lies on the host does not count against a GPU's memory."""
    monkeypatch.setenv("TURBO_GGUF_HOME", str(tmp_path))
    monkeypatch.setattr(dry_run, "ask", lambda *_, **__: dry_run.read(CACHES + HEAD + GPU + HOST))
    keys = {"block_count": 30, "context_length": 4096, "embedding_length": 576, "attention.head_count": 9, "attention.head_count_kv": 3}
    fields = {"general.architecture": "llama", **{f"llama.{name}": value for name, value in keys.items()}}
    plans = Planner(Header("x", "x", fields, (), Path("x.gguf")), server=Path("llama-server"), backend="CUDA")
    types, context = CacheSpec("turbo4t", "turbo4t"), Context(2048, 2)
    assert plans.charged(types, context) == (17904 + 384 + 898) * MIB
    assert plans.budget(None, [types], context).bytes == max(945 * MIB - MARGIN, 0)
    assert plans.budget(5, [types], context).bytes == 5
    assert plans.args(types, context)[-2:] == ["-ngl", "999"]
    assert not plans.difference and plans.memory(types, context).kv == 2 * 30 * 2 * 2048 * 192 * 17 // 32
    with pytest.raises(EnvironmentMissing, match=r"there are 5\.00 MiB") as missing:
        plans.choose([types], context, 5 * MIB, fixed=True)
    assert missing.value.hint.endswith("or leave layers to the CPU: -- -ngl N")
