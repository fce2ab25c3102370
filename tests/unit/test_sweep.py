"""Sweep files to cases. Risks: a typo that runs something else, a key that does not change with what decides the numbers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from measuring import MODEL, result
from measuring import case as case_of

from turbo_gguf import assets
from turbo_gguf.cache import fit, spec
from turbo_gguf.cache.decay import DecayShares
from turbo_gguf.cache.fit import check_head_sizes
from turbo_gguf.cache.layer_map import LayerMap
from turbo_gguf.cache.settings import NONE, OFF
from turbo_gguf.cache.spec import CacheSpec, parse_types
from turbo_gguf.cache.types import CACHE_TYPES, TURBO
from turbo_gguf.cli.options import split
from turbo_gguf.errors import UsageError
from turbo_gguf.inputs import models
from turbo_gguf.judge import gate
from turbo_gguf.measure import kld, sweep
from turbo_gguf.measure.store import Store

COMPETITORS = ("q8_0", "q5_0", "q4_0", "q4_0 sink=4 tail=64")
SETUP = sweep.Setup(build_id="b", model_sha256="m", text_sha256="t", backend="CPU")


def _load(tmp_path: Path, text: str) -> sweep.Sweep:
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    return sweep.load(path)


def test_shipped_sweeps_load_and_gates_apply_to_them() -> None:
    limits = gate.load(assets.eval_dir() / "gates.toml")
    for name in ("default", "smoke"):
        plan = sweep.load(assets.eval_dir() / f"{name}.toml")
        cases = sweep.cases(plan, SETUP, gate.references(limits))
        for ctx in {case.ctx for case in cases}:
            here = {str(c.types) for c in cases if c.ctx == ctx and not c.is_noise_floor}
            assert here >= {"q8_0", "q5_0", "q4_0", *TURBO}
            assert sum(c.is_noise_floor for c in cases if c.ctx == ctx) == 1
        assert {str(c.types) for c in cases if "turbo" in str(c.types)} <= set(limits.type)


@pytest.mark.parametrize("name", ["layers", "decay"])
def test_shipped_sweeps_of_settings_fit_the_embedded_model(name: str) -> None:
    plan = sweep.load(assets.eval_dir() / f"{name}.toml")
    cases = sweep.cases(plan, SETUP)
    kld.check_fit(cases, models.embedded())
    asked = [c for c in cases if c.types.has_settings]
    assert len(asked) > 10 and len(set(cases)) == len(cases)
    for ctx in {c.ctx for c in cases}:
        here = {str(c.types) for c in cases if c.ctx == ctx}
        assert here >= {*(f"turbo{n} {OFF}" for n in (4, 3, 2)), "q8_0", "q5_0", "q4_0", "f16", str(spec.BASE)}, (
            "what the others are compared with"
        )
    assert all(c.types.calibration == NONE for c in cases if spec.is_turbo(c.types)), "plain types, without what they get by default"
    assert all(kld.decayed_cells(c) >= 256 for c in asked if c.types.decay)


def test_each_context_starts_with_noise_floor_and_competitors(tmp_path: Path) -> None:
    plan = _load(
        tmp_path, '[[run]]\nctx = 512\nchunks = 2\ntypes = ["turbo3", "q4_0"]\n[[run]]\nctx = 1024\nchunks = 2\ntypes = ["turbo3"]\n'
    )
    names = [(c.ctx, str(c.types), c.batch) for c in sweep.cases(plan, SETUP)]
    first = [(512, str(spec.BASE), 256), *((512, types, 512) for types in ("f16", *COMPETITORS, "turbo3"))]
    assert names[:7] == first and len(names) == 14 and names[7] == (1024, str(spec.BASE), 256)


@pytest.mark.parametrize(("ctx", "batch", "noise"), [(128, 128, 64), (256, 256, 128), (300, 300, 256), (512, 512, 256), (4096, 512, 256)])
def test_batches_are_never_longer_than_a_chunk_and_always_differ(ctx: int, batch: int, noise: int) -> None:
    cases = sweep.cases(sweep.Sweep(run=(sweep.SweepRun(ctx=ctx, chunks=2, types=("q4_0",)),)), SETUP)
    assert [(c.batch, c.base_batch, c.is_noise_floor) for c in cases] == [
        (noise, batch, True),
        (batch, batch, False),
        (batch, batch, False),
    ]


def test_reference_of_a_gate_is_measured_too(tmp_path: Path) -> None:
    plan = _load(tmp_path, '[[run]]\nctx = 512\nchunks = 2\ntypes = ["q4_1"]\n')
    found = sweep.cases(plan, SETUP, {"q4_1": ("q5_1", "q5_1 sink=4")})
    assert [str(c.types) for c in found] == [str(spec.BASE), "f16", "q5_1", "q5_1 sink=4", "q4_1"]


def test_settings_of_a_sweep_are_those_of_all_turbo_types_that_do_not_name_them(tmp_path: Path) -> None:
    types = ["turbo3", "turbo3 tail=16 decay=balanced", "q4_0", "f16 v=0:turbo3", "q4_0 cal=auto", "turbo3 cal=auto sink=4 tail=64"]
    run = f"[[run]]\nctx = 512\nchunks = 2\ntypes = {types}\n"
    plan = _load(tmp_path, f'settings = "{OFF}"\n{run}')
    expected = ["turbo3 cal=none sink=0 tail=0", "turbo3 decay=balanced cal=none sink=0 tail=16", "q4_0"]
    expected += ["f16 v=0:turbo3 cal=none sink=0 tail=0", "q4_0 cal=auto", "turbo3 cal=auto sink=4 tail=64"]
    assert [str(t) for t in plan.types_of(plan.run[0])] == expected
    measured = {str(c.types) for c in sweep.cases(plan, SETUP)}
    assert measured >= set(expected) and "turbo3" not in measured
    assert [str(t) for run in [sweep.override(plan, ctx=(1024,)).run[0]] for t in plan.types_of(run)] == expected
    typed = sweep.override(plan, types=("turbo3",))
    assert [str(t) for t in typed.types_of(typed.run[0])] == ["turbo3"], "the command line is taken as it is typed"
    for wrong, words in (("sink", "'sink' is no setting"), ("sink=x", "no number"), ("decay=balanced", "nothing in it decays")):
        with pytest.raises(UsageError, match=words):
            _load(tmp_path, f'settings = "{wrong}"\n{run.replace("turbo3", "turbo2")}')


def test_key_changes_with_everything_that_decides_the_numbers() -> None:
    plan = sweep.Sweep(run=(sweep.SweepRun(ctx=512, chunks=2, types=("q4_0",)),))
    case = sweep.cases(plan, SETUP)[-1]
    changed = {
        "types": parse_types("q4_0/q5_0"),
        "ctx": 1024,
        "chunks": 3,
        "batch": 256,
        "base_batch": 256,
        "backend": "CUDA",
        "build_id": "c",
        "model_sha256": "n",
        "text_sha256": "u",
        "env": ("GGML_X=1",),
        "metrics_version": 1,
    }
    assert set(changed) == set(case.__struct_fields__)
    keys = {msgspec.structs.replace(case, **{name: value}).key for name, value in changed.items()}
    assert len(keys | {case.key}) == len(changed) + 1
    assert case.key == sweep.cases(plan, SETUP)[-1].key


def test_key_depends_on_what_is_in_a_calibration_not_on_where_it_is() -> None:
    def key(calibration: str) -> str:
        return case_of(f"turbo3 cal={calibration} tail=16").key

    assert key("a.gguf#0123abcd") == key("/elsewhere/b.gguf#0123abcd") != key("a.gguf#0123abce")
    assert key("a.gguf") != key("b.gguf"), "nothing is known about them"


def test_results_of_a_calibration_that_was_moved_are_found(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.append([result("q4_0 cal=a.gguf#0123abcd", 0.003)])
    moved, again = case_of("q4_0 cal=/elsewhere/b.gguf#0123abcd"), case_of("q4_0 cal=a.gguf#0123abcd")
    found = kld.measure([moved, again], SimpleNamespace(model=MODEL, elsewhere=None), store)  # type: ignore[arg-type]
    assert [one.case for one in found] == [moved, again] and len({one.key for one in found}) == 1
    assert [str(one.case.types) for one in found] == ["q4_0 cal=/elsewhere/b.gguf#0123abcd", "q4_0 cal=a.gguf#0123abcd"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "run"),
        ("[[run]]\nctx = 512\nchunks = 2\n", "types"),
        ('[[run]]\nctx = 512\nchunks = 2\ntypes = ["turbo5"]\n', "turbo5"),
        ('[[run]]\nctx = 512\nchunks = 2\ntypes = ["turbo3/q9"]\n', "q9"),
        ('[[run]]\nctx = 512\nchunks = 2\ntype = ["turbo3"]\n', "type"),
        ('[[run]]\nctx = "512"\nchunks = 2\ntypes = ["turbo3"]\n', "ctx"),
        ('[[run]]\nctx = 513\nchunks = 2\ntypes = ["turbo3"]\n', "even"),
        ('batch = 0\n[[run]]\nctx = 256\nchunks = 2\ntypes = ["turbo3"]\n', "batch"),
        ('[[run]]\nctx = 512\nchunks = 0\ntypes = ["turbo3"]\n', "chunks"),
        ('batch = 16\nnoise_batch = 8\n[[run]]\nctx = 16\nchunks = 2\ntypes = ["turbo3"]\n', "100 tokens"),
        ('batch = 256\n[[run]]\nctx = 512\nchunks = 2\ntypes = ["turbo3"]\n', "noise"),
        ("[[run]\n", "sweep.toml"),
    ],
)
def test_wrong_files_are_usage_errors_that_name_the_field(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        _load(tmp_path, text)


def test_missing_file() -> None:
    with pytest.raises(UsageError, match=r"nowhere\.toml"):
        sweep.load(Path("nowhere.toml"))


def test_command_line_wins_over_the_file() -> None:
    plan = sweep.load(assets.eval_dir() / "default.toml")
    other = sweep.override(plan, types=("turbo3",), ctx=(1024,), chunks=4, batch=128)
    assert [(r.ctx, r.chunks, r.types) for r in other.run] == [(1024, 4, ("turbo3",))]
    assert (other.batch, other.noise_batch) == (128, 64)
    assert sweep.override(plan) == plan
    with pytest.raises(UsageError, match="turbo7"):
        sweep.override(plan, types=("turbo7",))


def test_context_without_a_table_scores_about_as_many_tokens() -> None:
    plan = sweep.Sweep(run=(sweep.SweepRun(ctx=512, chunks=32, types=("q4_0",)),))
    (run,) = sweep.override(plan, ctx=(4096,)).run
    assert (run.ctx, run.chunks) == (4096, 4)


def test_pairs_are_read_and_written_the_same_way() -> None:
    assert str(parse_types(" turbo4/turbo3 ")) == "turbo4/turbo3"
    assert parse_types("turbo3") == CacheSpec("turbo3", "turbo3") and str(parse_types("turbo3/turbo3")) == "turbo3"
    for bad in ("", "/", "turbo3/", "turbo3/turbo3/turbo3", "TURBO3"):
        with pytest.raises(UsageError):
            parse_types(bad)


def test_keys_of_stored_results_stay() -> None:
    """Computed before there were settings: a new field must not measure everything again."""
    assert case_of("turbo4/turbo3", metrics_version=1).key == "f1ef624a7b30f1ae4f60"
    assert case_of("q4_0", metrics_version=1).key == "cebebf3ebba1298463ce"
    assert case_of("turbo3", 2048, env=("GGML_X=1",), metrics_version=1).key == "db6d181db807ca9166ec"


NOTATIONS = (
    "turbo3 k=0,-1:q8_0 v=0,-1:q8_0",
    "turbo3 v=0-1,-2--1:q8_0;*:turbo2",
    "turbo4/turbo3 k=*:q8_0",
    "turbo3 adaptive=7",
    "turbo4/turbo3 decay=balanced",
    "turbo3 decay=10,30,60",
    "turbo3 k=0:q8_0 v=-1:f16 decay=aggressive",
    "turbo3 adaptive=1 decay=conservative",
    "turbo3t cal=none sink=0 tail=0",
    "turbo3t cal=auto sink=4 tail=64",
    "turbo3t tail=0",
    "q4_0 cal=auto sink=4 tail=64",
    "turbo3t",
)


def test_settings_are_read_and_written_the_same_way() -> None:
    for text in NOTATIONS:
        assert str(parse_types(text)) == text and parse_types(str(parse_types(text))) == parse_types(text)
    assert parse_types("turbo3  decay=balanced   k=0:q8_0") == parse_types("turbo3/turbo3 k=0:q8_0 decay=balanced")
    assert parse_types("turbo4 / turbo3 adaptive=0") == parse_types("turbo4/turbo3")
    maps = {"layers_k": LayerMap.parse("0:q8_0"), "layers_v": LayerMap.parse("1:f16")}
    full = parse_types("turbo4/turbo3 k=0:q8_0 v=1:f16 decay=5,25,70")
    assert full == CacheSpec("turbo4", "turbo3", **maps, decay=DecayShares(5, 25, 70))
    assert str(full) == "turbo4/turbo3 k=0:q8_0 v=1:f16 decay=aggressive"


def test_every_setting_is_another_measurement() -> None:
    keys = [case_of(text).key for text in ("turbo3", "turbo4/turbo3", "turbo3 k=0:q8_0", "turbo3 v=0:q8_0", *NOTATIONS)]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("turbo3 decay", "'decay' is no setting", "k=MAP, v=MAP, adaptive=MODE, decay=SHARES, cal=auto|none|FILE"),
        ("turbo3 decay=", "'decay=' is no setting", "decay=balanced"),
        ("turbo3 q=0:q8_0", "'q=0:q8_0' is no setting", "k=MAP"),
        ("turbo3 turbo4", "'turbo4' is no setting", "k=MAP"),
        ("turbo3 k=0:q8_0 k=1:q8_0", "k is set twice", "each once"),
        ("turbo3 adaptive=x", "adaptive=x: no number", "adaptive=MODE"),
        ("turbo3 adaptive=3", "no layer-adaptive mode 3", "modes are 1, 2, 5, 6, 7"),
        ("turbo3 adaptive=7 v=0:q8_0", "a layer-adaptive mode and a layer map exclude each other", "leave one of them out"),
        ("turbo3 k=0:turbo9", "unknown cache type 'turbo9'", "known: f32"),
        ("turbo3 v=0:q8_0;", "'' is not LAYERS:TYPE", "LAYERS:TYPE"),
        ("turbo3 sink=-1", "sink=-1: no number", "sink=TOKENS"),
        ("turbo3 cal=auto#0123abcd", "auto has no digest", "a file of this name is ./auto"),
        ("turbo3 cal=none#0123abcd", "none has no digest", "./none"),
        ("turbo3 cal=./auto", "No such file", ""),
        ("turbo3 decay=mild", "unknown decay 'mild'", "conservative, balanced, aggressive"),
        ("turbo3 decay=15,35,40", "add up to 90", "15,35,50"),
        ("turbo2 decay=balanced", "nothing in it decays", "types that decay: turbo4, turbo3"),
        ("q8_0 adaptive=7 decay=balanced", "nothing in it decays", "leave decay out"),
    ],
)
def test_wrong_settings_are_named_before_any_tool_runs(text: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_types(text)
    assert message in caught.value.message and hint in caught.value.hint
    with pytest.raises(UsageError):
        sweep.check(sweep.Sweep(run=(sweep.SweepRun(ctx=512, chunks=2, types=(text,)),)), "sweep.toml")


def test_types_are_cut_at_commas_before_a_letter() -> None:
    assert split(["turbo3,turbo4/turbo3", " q8_0 , f16,"]) == ("turbo3", "turbo4/turbo3", "q8_0", "f16")
    together = ",".join(NOTATIONS)
    assert split([together]) == NOTATIONS
    assert split(["turbo3 k=0,*:q8_0,turbo2"]) == ("turbo3 k=0,*:q8_0", "turbo2")
    assert split(["", ",,", "turbo3,,turbo2"]) == ("turbo3", "turbo2")


def test_types_of_each_layer() -> None:
    assert spec.layer_types(parse_types("turbo4/turbo3"), 2) == (("turbo4",) * 2, ("turbo3",) * 2)
    assert spec.layer_types(parse_types("turbo3 k=-1:q8_0"), 3) == (("turbo3", "turbo3", "q8_0"), ("turbo3",) * 3)
    assert spec.layer_types(parse_types("turbo3 adaptive=7"), 5) == (("turbo3",) * 5, ("q8_0", "q8_0", "turbo2", "q8_0", "q8_0"))


def test_a_turbo_type_in_one_layer_is_ours() -> None:
    assert spec.is_turbo(parse_types("q8_0 v=0:turbo3")) and spec.is_turbo(parse_types("q8_0 adaptive=5"))
    assert not spec.is_turbo(parse_types("q8_0 adaptive=1")) and not spec.is_turbo(parse_types("q8_0 k=0:f16"))
    plan = sweep.Sweep(run=(sweep.SweepRun(ctx=512, chunks=2, types=("f16 v=0:turbo3",)),))
    assert [str(c.types) for c in sweep.cases(plan, SETUP)] == [str(spec.BASE), "f16", *COMPETITORS, "f16 v=0:turbo3"]


def test_options_of_the_tools_name_only_what_is_set() -> None:
    assert list(spec.options(parse_types("turbo4/turbo3"))) == ["-ctk", "turbo4", "-ctv", "turbo3"]
    found = list(spec.options(parse_types("turbo3 k=0:q8_0 v=-1:f16 decay=balanced")))
    assert found == [
        *("-ctk", "turbo3", "-ctv", "turbo3", "--cache-type-k-layers", "0:q8_0", "--cache-type-v-layers", "-1:f16"),
        *("--cache-decay", "balanced"),
    ]
    assert list(spec.options(parse_types("turbo3 adaptive=7")))[4:] == ["--cache-layer-adaptive", "7"]
    off = ["--cache-calibration", "none", "--cache-sink", "0", "--cache-tail", "0"]
    assert list(spec.options(parse_types(f"turbo3 {OFF}")))[4:] == off
    assert list(spec.options(parse_types("q4_0 cal=auto tail=0")))[4:] == ["--cache-calibration", "auto", "--cache-tail", "0"]


def test_what_types_get_by_default() -> None:
    defaults = {
        "turbo3t": "turbo3t cal=auto sink=4 tail=64",
        "turbo3t sink=0": "turbo3t cal=auto sink=0 tail=64",
        "f16 v=0:turbo3 cal=none": "f16 v=0:turbo3 cal=none sink=4 tail=64",
        "q4_0": "q4_0",
        "q4_0 sink=4": "q4_0 sink=4",
    }
    assert {text: str(spec.with_defaults(parse_types(text))) for text in defaults} == defaults
    assert parse_types("turbo3t") != parse_types("turbo3t sink=0") != parse_types("turbo3t sink=0 tail=0")
    assert case_of("turbo3t").key != case_of(defaults["turbo3t"]).key != case_of(f"turbo3t {OFF}").key


def test_layers_are_counted_over_those_with_a_kv_cache() -> None:
    hybrid = msgspec.structs.replace(MODEL, n_layer=6, n_head_kv=(0, 2, 0, 2, 0, 0))
    fit.check_fit(parse_types("turbo3 k=1,-2:q8_0"), hybrid)
    fit.check_fit(parse_types("turbo3 adaptive=1"), hybrid)
    with pytest.raises(UsageError, match="there is no layer 2, the model has 2 layers with a KV cache"):
        fit.check_fit(parse_types("turbo3 k=2:q8_0"), hybrid)


def test_decay_that_the_map_leaves_no_layer_for() -> None:
    fit.check_fit(parse_types("turbo3 k=*:q8_0 decay=balanced"), MODEL)
    with pytest.raises(UsageError, match="nothing in it decays"):
        fit.check_fit(parse_types("turbo3 k=*:q8_0 v=*:turbo2 decay=balanced"), MODEL)


def test_head_sizes_of_all_types_of_a_map() -> None:
    for text in ("f16 k=0:turbo3", "f16 v=-1:q8_0", "f16 adaptive=5"):
        with pytest.raises(UsageError, match="head size 80"):
            check_head_sizes(parse_types(text), 80, 80)
    check_head_sizes(parse_types("f16 k=0:turbo3"), 128, 80)
    with pytest.raises(UsageError, match="the V head size 80"):
        check_head_sizes(parse_types("f16 v=0:turbo3"), 128, 80)


@pytest.mark.parametrize(("ctx", "batch"), [(512, 512), (512, 1024), (64, 16)])
def test_decay_needs_batches_that_are_smaller_than_a_chunk(ctx: int, batch: int) -> None:
    plan = sweep.Sweep(run=(sweep.SweepRun(ctx=ctx, chunks=8, types=("turbo3 decay=conservative",)),), batch=batch, noise_batch=8)
    with pytest.raises(UsageError, match="nothing decays in a context of") as caught:
        kld.check_fit(sweep.cases(plan, SETUP), MODEL)
    assert caught.value.hint.startswith(f"use --batch {ctx // 8} or less")


@pytest.mark.parametrize("head", [80, 112])
def test_head_sizes_that_cannot_be_cut_into_blocks(head: int) -> None:
    for types in ("turbo2", "turbo3", "turbo4", "f16/turbo3", "turbo3/f16", "q8_0"):
        with pytest.raises(UsageError, match=f"head size {head}") as caught:
            check_head_sizes(CacheSpec.parse(types), head, head)
        assert caught.value.hint.endswith("f32, f16, bf16")
    check_head_sizes(CacheSpec.parse("f16/bf16"), head, head)


@pytest.mark.parametrize("head", [32, 64, 96, 128, 192, 256, 576])
def test_head_sizes_that_work(head: int) -> None:
    for name, kind in CACHE_TYPES.items():
        if head % 64 == 0 or kind.block < 64:
            check_head_sizes(CacheSpec.parse(name), head, head)
        else:
            with pytest.raises(UsageError, match=f"{name}: the K head size {head} of this model is not a multiple of its block of 64"):
                check_head_sizes(CacheSpec.parse(name), head, head)


def test_nominal_bits() -> None:
    expected = {"f16": 16, "q8_0": 8.5, "q5_0": 5.5, "q4_0": 4.5, "turbo4": 4.5, "turbo3": 3.5, "turbo2": 2.5}
    expected |= {"turbo4t": 4.25, "turbo3t": 3.25, "turbo2t": 2.25}
    assert {name: CACHE_TYPES[name].bits for name in expected} == expected
