"""One measurement to make, and its name in the store."""

from __future__ import annotations

import hashlib

import msgspec

from turbo_gguf.cache import spec, written
from turbo_gguf.cache.spec import CacheSpec

METRICS_VERSION = 2
"""Raised whenever the meaning of a stored metric changes: results of different versions are never compared.

2: the base logits come from an f32 cache without flash attention; in results of 1 from an f16 cache with it.
"""


class Case(msgspec.Struct, frozen=True):
    """One measurement to make: everything that decides its numbers, nothing else."""

    types: CacheSpec
    ctx: int  # tokens of a chunk; the second half is scored
    chunks: int  # -1: as many as the text has
    batch: int  # tokens of a llama_decode call
    base_batch: int  # the same for the base logits; differs from ``batch`` in the noise floor only
    backend: str  # prefix of the KV buffer names: "CPU", "CUDA" or "ROCm"
    build_id: str
    model_sha256: str
    text_sha256: str
    env: tuple[str, ...] = ()  # GGML_*, TURBO_* variables in force, as NAME=value
    metrics_version: int = METRICS_VERSION

    @property
    def key(self) -> str:
        """Name of this case in the store: the same key means the same measurement."""
        measured = msgspec.structs.replace(self, types=spec.measured(self.types))
        return hashlib.sha256(msgspec.json.encode(measured, enc_hook=written.encode, order="sorted")).hexdigest()[:20]

    @property
    def is_noise_floor(self) -> bool:
        """Whether this is the base type measured again at another batch size."""
        return self.batch != self.base_batch
