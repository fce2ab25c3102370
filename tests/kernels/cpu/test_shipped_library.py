"""The library that users run has the implementation that is made for their CPU."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
from variants import best_codec_isa, best_isa

from turbo_gguf.make.build import ensure_build

pytestmark = pytest.mark.native


def test_the_build_has_the_best_implementation_for_this_cpu() -> None:
    given = os.environ.get("TURBO_GGUF_NATIVE_BIN")
    library = (Path(given) if given else ensure_build("cpu", targets=("llama-bench",)).path / "bin") / "libggml-cpu.so"
    if not library.is_file():
        pytest.skip(f"no {library.name} in {library.parent}")
    cpu = ctypes.CDLL(str(library))
    for function, isa in ((cpu.ggml_turbo_cpu_attn_isa, best_isa()), (cpu.ggml_turbo_cpu_scalar_isa, best_codec_isa())):
        function.restype = ctypes.c_char_p
        assert function().decode() == isa
