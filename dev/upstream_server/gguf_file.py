"""What all models have in a GGUF file, and writing it to its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


def describe(
    writer: gguf.GGUFWriter, name: str, *, ctx: int, layers: int, embd: int, ff: int, head: int, heads: int, kv_heads: int | Sequence[int]
) -> None:
    """Name and shape of a transformer with RoPE; ``head`` is the size of a head, ``kv_heads`` of all layers or of each."""
    writer.add_name(name)
    writer.add_context_length(ctx)
    writer.add_embedding_length(embd)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)


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
