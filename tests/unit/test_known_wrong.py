"""Warnings about snapshots that compute wrongly on a GPU: who gets them, and who does not."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from fake_machine import World

from turbo_gguf.make import doctor, known_wrong
from turbo_gguf.make import upstream as fetching
from turbo_gguf.make.build import ensure_build
from turbo_gguf.make.known_wrong import warnings
from turbo_gguf.make.snapshots import Upstream, default_name
from turbo_gguf.make.toolkits import TOOLKITS, rocm

INTEGRATED = "#if defined(GGML_USE_HIP)\n        info.devices[id].integrated = prop.integrated;\n#else\n"
MENDED = "        info.devices[id].integrated = false; // not prop.integrated;\n"


def tree(root: Path, *, cuda: str = MENDED, cmake: str = "enable_language(HIP)\n") -> Path:
    for path, text in (("ggml/src/ggml-cuda/ggml-cuda.cu", cuda), ("ggml/src/ggml-hip/CMakeLists.txt", cmake)):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


@pytest.mark.parametrize(("gpu", "count"), [("gfx1151", 1), ("gfx1150:xnack-", 1), ("gfx1100", 0), ("gfx942", 0), ("", 0), ("89", 0)])
def test_integrated_gpus_of_a_family(tmp_path: Path, gpu: str, count: int) -> None:
    found = warnings(tree(tmp_path, cuda=INTEGRATED), [gpu])
    assert len(found) == count
    assert all("#28604" in text and gpu.partition(":")[0] in text for text in found)


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ('set(CMAKE_HIP_FLAGS "${CMAKE_HIP_FLAGS} -funsafe-math-optimizations")\n', 1),
        ('target_compile_options(ggml-hip PRIVATE "-ffast-math;-fno-finite-math-only")\n', 1),
        ("# Not -ffast-math: that loses infinities.\n", 0),
        ("enable_language(HIP)\n# without\n# -ffast-math\n", 0),
    ],
)
def test_relaxed_floating_point(tmp_path: Path, line: str, count: int) -> None:
    found = warnings(tree(tmp_path, cmake=f"project(x)\n\n{line}"), ["gfx1100", "gfx1201"])
    assert len(found) == count
    assert all("gfx1100, gfx1201" in text for text in found)


def test_a_sound_tree_and_one_without_the_files_have_no_warning(tmp_path: Path) -> None:
    assert warnings(tree(tmp_path), ["gfx1151", "gfx1100"]) == []
    assert warnings(tmp_path / "nothing", ["gfx1151"]) == []


def test_advice_is_to_take_another_upstream_or_to_measure() -> None:
    assert known_wrong.advice("0.3.35") == f"use --upstream {default_name()}"
    assert "gpu-proof" in known_wrong.advice(default_name())


def test_a_build_for_such_a_gpu_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    world = World(tmp_path, monkeypatch)
    tree(world.source, cuda=INTEGRATED)
    ensure_build(upstream=str(world.source))
    assert "warning" not in capsys.readouterr().err
    asked = []

    def options() -> dict[str, str]:
        asked.append(1)
        return {"GPU_TARGETS": "gfx1100;gfx1151"}

    made = msgspec.structs.replace(TOOLKITS["rocm"], options=options, compiler_version=lambda: ["HIP 7"], environment=dict)
    monkeypatch.setitem(TOOLKITS, "rocm", made)
    ensure_build("rocm", upstream=str(world.source))
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 1
    assert "known to be wrong on gfx1151: " in warned[0]
    assert f"use --upstream {default_name()}" in warned[0]
    assert asked == [1], "the GPUs are asked for once"


def test_the_doctor_warns_when_the_gpu_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    World(tmp_path, monkeypatch)
    source = Upstream(name="x", commit="abc", package="a", version="1")
    tree(source.pristine, cuda=INTEGRATED)
    monkeypatch.setattr(doctor, "resolve", lambda: source)
    assert list(doctor._known_wrong()) == []
    monkeypatch.setattr(rocm, "gpus", lambda: ["gfx1151"])
    (found,) = doctor._known_wrong()
    assert (found.name, found.status, found.fix) == ("llama.cpp x", "none", f"use --upstream {default_name()}")
    assert "gfx1151" in found.detail
    assert found in doctor.examine()


def test_the_doctor_looks_at_snapshots_with_a_build_for_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    World(tmp_path, monkeypatch)
    monkeypatch.setattr(rocm, "gpus", lambda: ["gfx1151"])
    other = fetching.supported()["0.3.35"]
    tree(other.pristine, cuda=INTEGRATED)
    assert list(doctor._known_wrong()) == []
    monkeypatch.setattr(doctor, "_has_build", lambda upstream, toolkit: (upstream.name, toolkit.name) == ("0.3.35", "rocm"))
    assert [finding.name for finding in doctor._known_wrong()] == ["llama.cpp 0.3.35"]
