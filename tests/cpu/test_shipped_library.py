"""The library that users run has the implementation that is made for their CPU."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
from fattn_variants import best_isa

from turbo_gguf.build import ensure_build

pytestmark = pytest.mark.native


def test_the_build_has_the_best_implementation_for_this_cpu() -> None:
    given = os.environ.get("TURBO_GGUF_NATIVE_BIN")
    library = (Path(given) if given else ensure_build("cpu", targets=("llama-bench",)).path / "bin") / "libggml-cpu.so"
    if not library.is_file():
        pytest.skip(f"no {library.name} in {library.parent}")
    cpu = ctypes.CDLL(str(library))
    cpu.ggml_turbo_cpu_fattn_isa.restype = ctypes.c_char_p
    assert cpu.ggml_turbo_cpu_fattn_isa().decode() == best_isa()
