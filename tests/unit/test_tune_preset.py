"""The file of a cache that was searched. Risks: another cache than was searched, a file for another model, damage that passes."""

from __future__ import annotations

import re
from pathlib import Path

import calibration_writer
import numpy as np
import pytest

from turbo_gguf.cache import calibration
from turbo_gguf.cache.calibration import Calibration, LayerCalibration
from turbo_gguf.cache.settings import CalibrationChoice
from turbo_gguf.cache.spec import CacheSpec, parse_types
from turbo_gguf.errors import UsageError
from turbo_gguf.tune import preset
from turbo_gguf.tune.preset import Made, Preset

MODEL = Made('Smol "LM" \\ 2', "ab" * 32, "llama", 30, 576)
TYPES = parse_types("turbo3t/turbo2t k=4:q8_0;2,5-7:turbo4t v=0:turbo3t cal=auto sink=4 tail=32")


def written(folder: Path, types: CacheSpec = TYPES) -> Path:
    evidence = {"bits": 3.25, "text": "wiki.txt", "row": [{"about": "tuned", "kld": 0.00612, "bits": 3.2489}]}
    return preset.write(folder / "smol.cache.toml", Preset(types, MODEL, evidence))


def test_what_is_written_is_read(tmp_path: Path):
    found = preset.read(written(tmp_path))
    assert found == Preset(TYPES, MODEL, {"bits": 3.25, "text": "wiki.txt", "row": [{"about": "tuned", "kld": 0.00612, "bits": 3.2489}]})


def test_a_calibration_moves_with_its_preset(tmp_path: Path):
    (tmp_path / "here is it").mkdir()
    mean = np.ones((2, 4), np.float32)
    made = Calibration("llama", "smol", "0badf00d", 64, {0: LayerCalibration(mean, None, None, None, mean, None)})
    file = calibration_writer.write(made, tmp_path / "here is it" / "smol.calibration.gguf")
    digest = calibration.digest(made)
    path = written(tmp_path / "here is it", CacheSpec("turbo3t", "turbo3t", calibration=CalibrationChoice(str(file), digest)))
    assert 'cache-calibration = "smol.calibration.gguf"' in path.read_text()
    here = preset.read(path).types
    assert parse_types(str(here)) == here, "as ppl-gate takes it, whatever is in the path"
    (tmp_path / "here is it").rename(tmp_path / "there")
    found = preset.read(tmp_path / "there" / path.name).types.calibration
    assert found == CalibrationChoice(str(tmp_path / "there" / file.name), digest)
    (tmp_path / "there" / file.name).unlink()
    with pytest.raises(UsageError, match=r"smol\.calibration\.gguf"):
        preset.read(tmp_path / "there" / path.name)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("format = 1", "format = 2", "format 2, known is 1"),
        ("format = 1", "format = one", "Invalid value"),
        ("format = 1", "", "missing required field `format`"),
        ("[cache]", "[cash]", "unknown field `cash`|missing required field `cache`"),
        ('cache-type-v = "turbo2t"\n', "", "no cache-type-v"),
        ('"turbo2t"', '"turbo9"', "unknown cache type 'turbo9'"),
        ('cache-sink = "4"', 'cache-sink = "four"', "no number"),
        ('cache-sink = "4"', 'cache-sunk = "4"', "unknown setting 'cache-sunk'"),
        ("4:q8_0", "4-q8_0", "layer map"),
        ("layers = 30", 'layers = "30"', "layers"),
        ("layers = 30\n", "", "missing required field `layers`"),
    ],
)
def test_damage_is_named(tmp_path: Path, old: str, new: str, complaint: str):
    path = written(tmp_path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(UsageError, match=complaint) as caught:
        preset.read(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_a_file_that_is_cut_anywhere_is_refused_or_the_same(tmp_path: Path):
    path = written(tmp_path)
    text = path.read_text()
    end = text.index("[evidence]")  # for people alone
    for length in range(end):
        path.write_text(text[:length])
        try:
            found = preset.read(path)
        except UsageError:
            continue
        assert (found.types, found.model) == (TYPES, MODEL), f"cut at {length}: {text[:length]!r}"


def test_a_missing_file_says_what_writes_one(tmp_path: Path):
    with pytest.raises(UsageError, match="No such file") as caught:
        preset.read(tmp_path / "none.toml")
    assert "turbo-gguf tune" in caught.value.hint


def test_another_model_is_refused_with_the_reason_and_a_quantization_is_not(tmp_path: Path):
    path = written(tmp_path)
    fields = {"general.architecture": "llama", "llama.block_count": 30, "llama.embedding_length": 576}
    assert preset.for_model(path, Made.of("Smol in Q8", fields)).types == TYPES
    other = Made.of("qwen", {"general.architecture": "qwen2", "qwen2.block_count": 24, "qwen2.embedding_length": 896})
    words = re.escape("(llama with 30 layers of width 576), and qwen is qwen2 with 24 layers of width 896")
    with pytest.raises(UsageError, match=words):
        preset.for_model(path, other)
