"""What decode attention loads ahead of its use: a tile whose loads begin when it is needed waits for the memory of the GPU twice."""

from __future__ import annotations

import numpy as np
import pytest
from lanes_tools import CUDA, load

from turbo_gguf.codec import tables

TYPES = {**{t.name: t for t in tables.ALL}, "q8_0": None}
BLOCK = {name: t.block if t else 32 for name, t in TYPES.items()}

TOO_LONG = [("q8_0", 96, "v")]
"""Three blocks, which only 2-byte loads fit, would take more registers than there are."""

MOST_REGISTERS = {"k": 20, "v": 28}


@pytest.mark.parametrize("head_size", tables.HEAD_SIZES, ids=str)
@pytest.mark.parametrize("name", TYPES)
def test_rows_are_loaded_ahead(name: str, head_size: tuple[int, int]) -> None:
    if any(size % BLOCK[name] for size in head_size):
        pytest.skip("no whole blocks")
    kind = 8 if name == "q8_0" else TYPES[name].type_id
    registers = np.full(2, -1, np.int64)
    load("attn_loads.cpp", CUDA).call("lanes_loads_ahead", kind, *head_size, registers)
    for side, size, count in zip("kv", head_size, registers, strict=True):
        if (name, size, side) in TOO_LONG:
            assert count == 0
        else:
            assert 0 < count <= MOST_REGISTERS[side], (side, count)
