"""Results on disk. Risks: a kill while appending, a full disk, two writers, a damaged file, upstream's reader of llama-bench rows."""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from measuring import LOGS, answer, bench_row, result, serve_row

from turbo_gguf.cache import written
from turbo_gguf.errors import EnvironmentMissing, UsageError
from turbo_gguf.make.upstream import is_fetched, resolve
from turbo_gguf.measure import store as store_module
from turbo_gguf.measure.bench import rows_of
from turbo_gguf.measure.result import Result
from turbo_gguf.measure.store import Store

HERE = Path(__file__).parent


def test_what_is_appended_is_found_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "results")
    assert store.results() == [] and store.bench_rows() == []
    first, second = result("q4_0", 0.003), result("turbo3", 0.012)
    store.append([first])
    store.append([second, bench_row("turbo3", 512, speed=40.0)])
    assert store.results() == [first, second]
    assert [found for found in store.results() if found.key == second.key] == [second]
    assert [row.depth for row in store.bench_rows()] == [512]


def test_loads_on_servers_stand_beside_the_others(tmp_path: Path) -> None:
    store = Store(tmp_path)
    rows = [serve_row("f16", answer(), answer(error="HTTP 503: no")), serve_row("turbo3t sink=8", answer(error="no"))]
    store.append([result("q4_0", 0.003), rows[0]])
    store.append([rows[1]])
    assert store.serve_rows() == rows and len(store.results()) == 1 and store.bench_rows() == []
    assert not store.bench_path.exists(), "which is for upstream's reader"


def test_last_result_of_a_key_wins(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.append([result("q4_0", 0.003), result("q4_0", 0.004)])
    assert [r.stats.mean.value for r in store.results()] == [0.004]


def test_torn_last_line_is_ignored_then_moved_aside(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.append([result("q4_0", 0.003)])
    whole = store.path.read_bytes()
    for torn in (whole[: len(whole) // 2], b"\x00" * 9000, b'{"kind":"kld"'):
        store.path.write_bytes(whole + torn)
        assert len(store.results()) == 1
    store.append([result("turbo3", 0.012)])
    assert [str(r.case.types) for r in store.results()] == ["q4_0", "turbo3"]
    assert store.path.read_bytes().startswith(whole) and store.path.read_bytes().endswith(b"}\n")
    assert Path(str(store.path) + ".torn").read_bytes() == b'{"kind":"kld"\n'


def test_file_that_is_one_torn_line(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.path.write_bytes(b'{"kind":')
    assert store.results() == []
    store.append([result("q4_0", 0.003)])
    assert len(store.results()) == 1


_WRITER = """
import sys
from pathlib import Path
from measuring import result
from turbo_gguf.measure.store import Store
store, name, go = Store(Path(sys.argv[1])), sys.argv[2], Path(sys.argv[1], "go")
print("ready", flush=True)
while not go.exists():
    pass
for i in range(int(sys.argv[3])):
    store.append([result("q4_0", 0.001 + i / 1e6, ctx=16 + 2 * (i + 100000 * int(name)))])
    print(i, flush=True)
"""


def _writer(folder: Path, name: int, count: int) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parents[1]}"}
    argv = [sys.executable, "-c", _WRITER, str(folder), str(name), str(count)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env)


def test_killed_writers_lose_nothing_that_was_reported(tmp_path: Path) -> None:
    reported = 0
    (tmp_path / "go").touch()
    for name in range(3):
        process = _writer(tmp_path, name, 100_000)
        assert process.stdout is not None
        while process.stdout.readline() != "0\n":
            pass
        time.sleep(0.15 + 0.07 * name)
        process.kill()
        rest, _ = process.communicate()
        reported += 1 + len(re.findall(r"^\d+$", rest[: rest.rfind("\n") + 1], re.MULTILINE))
    store = Store(tmp_path)
    store.append([result("turbo3", 0.01)])  # must not wait for a lock that a dead process held
    found = store.results()
    assert reported < len(found) <= reported + 4


def test_writers_at_the_same_time(tmp_path: Path) -> None:
    processes = [_writer(tmp_path, name, 100) for name in range(3)]
    for p in processes:
        assert p.stdout is not None and p.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    assert [p.wait(60) for p in processes] == [0, 0, 0]
    for p in processes:
        assert p.stdout is not None
        p.stdout.close()
    assert len(Store(tmp_path).results()) == 300


def test_full_disk_keeps_the_file_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.append([result("q4_0", 0.003)])
    before = store.path.read_bytes()
    real, calls = os.pwrite, []

    def almost_full(fd: int, data: bytes, offset: int) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[:100], offset)

    monkeypatch.setattr(store_module.os, "pwrite", almost_full)
    with pytest.raises(EnvironmentMissing, match="No space left") as caught:
        store.append([result("turbo3", 0.01)])
    assert "TURBO_GGUF_HOME" in caught.value.hint and len(calls) == 2
    assert store.path.read_bytes() == before
    monkeypatch.undo()
    store.append([result("turbo3", 0.01)])
    assert len(store.results()) == 2


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting a small file system needs root")
def test_full_disk_for_real(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True, check=False).returncode:
        pytest.skip("this container may not mount a tmpfs")
    try:
        store = Store(small / "results")
        stored = 0
        with pytest.raises(EnvironmentMissing, match="No space left"):
            for i in range(1000):
                store.append([result("q4_0", 0.003, ctx=16 + 2 * i)])
                stored += 1
        assert stored > 3 and len(store.results()) == stored
        assert store.path.read_bytes().endswith(b"}\n")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.append([result("q4_0", 0.003)])
    store.path.write_bytes(store.path.read_bytes() + b"garbage\n" + store.path.read_bytes())
    with pytest.raises(UsageError, match=r"results\.jsonl:2"):
        store.results()


def test_records_of_a_newer_program_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.append([msgspec.structs.replace(result("q4_0", 0.003), schema_version=99)])
    with pytest.raises(UsageError, match="schema version 99"):
        store.results()


def test_results_of_other_metrics_are_not_mixed_in(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old = result("q4_0", 0.003)
    store.append([msgspec.structs.replace(old, case=msgspec.structs.replace(old.case, metrics_version=0))])
    assert store.results() == []


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentMissing):
        Store(tmp_path / "file").append([result("q4_0", 0.003)])


def test_records_survive_the_round_trip_exactly() -> None:
    r = result("turbo4/turbo3", 0.012345678901234567)
    line = msgspec.json.encode(r, enc_hook=written.encode)
    assert msgspec.json.decode(line, type=Result, dec_hook=written.decode) == r


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("turbo3", {}),
        ("turbo3 k=0,-1:q8_0 v=*:turbo2", {"layers_k": "0,-1:q8_0", "layers_v": "*:turbo2"}),
        ("turbo3 adaptive=7", {"adaptive": 7}),
        ("turbo3 decay=balanced", {"decay": "balanced"}),
        ("turbo3 cal=a.gguf#0123abcd sink=4 tail=16", {"calibration": "a.gguf#0123abcd", "sink": 4, "tail": 16}),
        ("turbo3 cal=none sink=0 tail=0", {"calibration": "none", "sink": 0, "tail": 0}),
        ("turbo3 cal=auto", {"calibration": "auto"}),
    ],
)
def test_settings_are_stored_as_they_are_written(tmp_path: Path, text: str, stored: dict[str, object]) -> None:
    """So they were stored as text before they were parsed values: keys and old lines stay what they are."""
    r = result(text, 0.012)
    store = Store(tmp_path)
    store.append([r])
    assert json.loads(store.path.read_text())["case"]["types"] == {"k": "turbo3", "v": "turbo3", **stored}
    assert store.results() == [r]


_OLD = (
    '{"kind":"kld","key":"f1ef624a7b30f1ae4f60","case":{"types":{"k":"turbo4","v":"turbo3"},"ctx":512,"chunks":8,"batch":512,"base_batch":'
    '512,"backend":"CPU","build_id":"b","model_sha256":"m","text_sha256":"t","env":[],"metrics_version":1},"stats":{"mean":{"value":0.012,'
    '"error":0.00024},"median":{"value":0.0072,"error":0.00024},"p90":{"value":0.024,"error":0.00024},"p99":{"value":0.096,"error":0.00024'
    '},"p999":{"value":0.24,"error":0.0012000000000000001},"max":0.48,"same_top":{"value":89.04554884989668,"error":0.05},"ppl":{"value":'
    '12.5,"error":0.2},"ppl_base":{"value":12.4,"error":0.2},"ln_ppl_ratio":{"value":0.006,"error":0.0012000000000000001},"mean_dp":{'
    '"value":-0.01,"error":0.01},"rms_dp":{"value":0.5,"error":0.01},"chunks":8,"tokens":2040},"bits":{"nominal":4.0,"low":3.92,"high":'
    '4.08},"model":"eval-model","text":"held-out.txt","upstream_commit":"0c1e570980d0","patch_digest":"'
    + "d"
    * 64
    + '","facts":{"caches":[{"type_k":"turbo4","type_v":"turbo3","mib_k":0.28,"mib_v":0.28,"cells":512,"layers":4,"streams":1,"buffers":['
    '"CPU"],"rot_k":true,"rot_v":true}],"flash_attn":"enabled","n_ctx_seq":512,"backends":["CPU"],"offloaded":null,"splits":1,"warnings":[]},'
    '"seconds":12.0,"argv":["llama-perplexity"],"time":"2026-11-21T00:00:00+00:00","schema_version":1}\n'
)
"""A line as it was stored before types by layer and decay."""


def test_records_of_earlier_schemas_are_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.path.write_text(_OLD)
    (found,), now = store._read(), result("turbo4/turbo3", 0.012)
    case = msgspec.structs.replace(now.case, metrics_version=1)
    assert found == msgspec.structs.replace(now, key=case.key, case=case, facts=found.facts, schema_version=1)
    assert found.case.key == found.key and found.facts.decayed == () and not found.case.types.has_settings


def test_settings_survive_the_round_trip(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = [result("turbo3 k=0,-1:q8_0 v=0:f16", 0.01), result("turbo3 adaptive=7 decay=balanced", 0.01), result("turbo3", 0.01)]
    rows = [bench_row("turbo3 decay=balanced", 0, speed=1.0), bench_row("turbo3", 0, speed=1.0)]
    store.append([*made, *rows])
    assert store.results() == made and store.bench_rows() == rows
    assert [str(row.types) for row in store.bench_rows()] == ["turbo3 decay=balanced", "turbo3"]


# --- upstream's scripts/compare-llama-bench.py ----------------------------------------------------------------------------

_DEMANDED = """
    cpu_info gpu_info backends n_gpu_layers n_cpu_moe tensor_buft_overrides model_filename model_type n_batch n_ubatch embeddings
    cpu_mask cpu_strict poll n_threads type_k type_v load_mode no_kv_offload split_mode main_gpu tensor_split flash_attn n_prompt
    n_gen n_depth fit_target fit_min_ctx build_commit test_time avg_ts
"""
_LLAMA_BENCH_KEY_PROPERTIES = set(_DEMANDED.split())
"""What the script of 0c1e57098 demands of every line (check_keys)."""


def test_llama_bench_rows_are_kept_as_they_are(tmp_path: Path) -> None:
    printed = rows_of((LOGS / "bench.out").read_text())
    rows = [msgspec.structs.replace(bench_row("q8_0", 0, speed=1.0), row=row) for row in printed]
    store = Store(tmp_path)
    store.append(rows)
    kept = [msgspec.json.decode(line) for line in store.bench_path.read_bytes().splitlines()]
    assert kept == printed and len(kept) == 4
    assert all(row.keys() >= _LLAMA_BENCH_KEY_PROPERTIES for row in kept)


def _script() -> Path | None:
    """The script of the default upstream, if this machine has it."""
    upstream = resolve()
    return upstream.pristine / "scripts" / "compare-llama-bench.py" if is_fetched(upstream) else None


def test_demanded_fields_are_those_of_the_script() -> None:
    script = _script()
    if script is None:
        pytest.skip("no upstream tree here: turbo-gguf upstream fetch")
    found = {
        target.id: ast.literal_eval(node.value)
        for node in ast.parse(script.read_text()).body
        if isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Name) and target.id.startswith("LLAMA_BENCH_KEY")
    }
    assert set(found["LLAMA_BENCH_KEY_PROPERTIES"]) | {"build_commit", "test_time", "avg_ts"} == _LLAMA_BENCH_KEY_PROPERTIES


def test_upstream_script_reads_the_rows(tmp_path: Path) -> None:
    """Runs the script itself where its libraries are installed; two builds, so that it has something to compare."""
    script = _script()
    if script is None:
        pytest.skip("no upstream tree here: turbo-gguf upstream fetch")
    for library in ("git", "tabulate"):
        pytest.importorskip(library)
    store = Store(tmp_path)
    printed = rows_of((LOGS / "bench.out").read_text())
    for commit in ("0c1e570", "1111111"):
        store.append([msgspec.structs.replace(bench_row("q8_0", 0, speed=1.0), row={**row, "build_commit": commit}) for row in printed])
    argv = [sys.executable, str(script), "--tool", "llama-bench", "-i", str(store.bench_path), "-b", "0c1e570", "-c", "1111111"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "pp64@d128" in done.stdout and "tg16" in done.stdout
