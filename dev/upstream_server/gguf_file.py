"""Writing a GGUF file to its end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def finish(writer: gguf.GGUFWriter, tensors: Mapping[str, npt.NDArray[np.float64] | Array], path: Path) -> Path:
    """Add tensors, in f32, and write everything."""
    for name, values in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def ones(n: int) -> Array:
    """Weights of a norm that does nothing more."""
    return np.ones(n, np.float32)
