"""What the matrix over several models makes of its results."""

from __future__ import annotations

import re
import tomllib

import quality_matrix
from measuring import result

from turbo_gguf import assets
from turbo_gguf.cache.settings import OFF
from turbo_gguf.cache.spec import CacheSpec, with_settings
from turbo_gguf.measure.metrics import Metric
from turbo_gguf.measure.result import Result


def plain(scale: float = 1.0) -> list[Result]:
    """turbo4t at half of q4_0's loss, and three times of it when calibrated."""
    means = {"q4_0": 0.008, "q5_0": 0.002, "turbo4t": 0.004, "turbo4t cal=a.gguf#00000001": 0.012, "turbo3": 0.03, "turbo3t": 0.018}
    return [result(str(with_settings(CacheSpec.parse(types), OFF)), scale * mean, 0.0001) for types, mean in means.items()]


def test_a_label_does_not_name_the_file() -> None:
    types = CacheSpec.parse("turbo3t/turbo4t cal=folder/a.gguf#00000001 sink=128 tail=512")
    assert quality_matrix.label(types) == "turbo3t/turbo4t sink=128 tail=512 calibrated"
    assert quality_matrix.label(CacheSpec.parse("q4_0")) == "q4_0"
    assert quality_matrix.label(CacheSpec.parse("q4_0 cal=auto sink=4 tail=64")) == "q4_0 sink=4 tail=64 calibrated"
    assert quality_matrix.label(CacheSpec.parse("turbo3t cal=none sink=0 tail=0")) == "turbo3t"
    assert quality_matrix.label(CacheSpec.parse("turbo3t cal=none sink=0 tail=16")) == "turbo3t tail=16"
    assert quality_matrix.label(CacheSpec.parse("turbo3t")) == "turbo3t as typed"


def test_targets_say_what_was_reached() -> None:
    rows = {(row[0], row[1]): row[3:] for row in quality_matrix.target_rows({"embedded": plain(), "outliers": plain(10)})}
    assert rows["turbo4t / q4_0", "embedded"] == ["0.500 ± 0.014", "0.7", "met"]
    assert rows["turbo3t / turbo3", "embedded"] == ["0.600 ± 0.004", "0.65", "met"]
    assert rows["turbo4t calibrated / q4_0", "embedded"] == ["1.500 ± 0.023", "0.5", "**missed**"]
    assert rows["turbo4t calibrated / q4_0", "outliers"][1:] == ["0.1", "**missed**"]
    assert not any(model == "head64" for _, model in rows), "what was not measured has no row"


def test_close_to_a_target() -> None:
    assert quality_matrix.met(Metric(0.69, 0.02), 0.7) == "met, within the error"
    assert quality_matrix.met(Metric(0.71, 0.02), 0.7) == "**missed**, within the error"


def test_what_a_calibration_makes_worse_is_named() -> None:
    worse = quality_matrix.worse_when_calibrated({"embedded": plain()})
    assert worse == ["embedded, context 512: turbo4t calibrated 0.01200 ± 0.00010, without 0.00400 ± 0.00010"]
    text = quality_matrix.summary({"embedded": plain(), "outliers": plain(2)})
    assert worse[0] in text
    assert re.search(r"\| turbo4t calibrated +\| +4.25 \| 1.500 ± 0.023 \(1.500, 1.50\) \| 1.500 ± 0.011 \(1.500, 1.50\) \|", text)


def test_the_sweep_measures_what_the_targets_name() -> None:
    plan = tomllib.loads((assets.eval_dir() / "matrix" / "sweep.toml").read_text())
    asked = {
        run["ctx"]: {quality_matrix.label(with_settings(CacheSpec.parse(text), plan["settings"])) for text in run["types"]}
        for run in plan["run"]
    }
    competitors = {"q8_0", "q5_0", "q4_0"}
    for target in quality_matrix.TARGETS:
        for types in (*target.types.split(" or "), target.reference):
            for ctx in (target.ctx,) if target.ctx else asked:
                assert types in asked[ctx] | competitors, (types, ctx)
