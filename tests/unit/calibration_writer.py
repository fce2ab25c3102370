"""Writes calibration files, as llama.cpp does (overlay/src/turbo/calibration.h)."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import gguf
import numpy as np

from turbo_gguf.cache import calibration
from turbo_gguf.cache.calibration import Calibration


def write(made: Calibration, path: Path) -> Path:
    writer = gguf.GGUFWriter(path, made.arch)
    writer.add_type(calibration.TYPE)
    writer.add_name(f"{made.name} calibration")
    writer.add_uint32("turbo.calibration.version", calibration.VERSION)
    writer.add_string("turbo.calibration.model", made.fingerprint)
    writer.add_uint32("turbo.calibration.tokens", made.tokens)
    writer.add_uint32("turbo.calibration.sink", made.sink)
    writer.add_float32("turbo.calibration.sink_distance", made.sink_distance)
    for number, layer in made.layers.items():
        for field in fields(layer):
            values = getattr(layer, field.name)
            if values is not None:
                values = np.ascontiguousarray(values, np.float32)
                writer.add_tensor(f"blk.{number}.{field.name}", values[0] if len(values) == 1 else values)  # ggml drops it, too
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
