"""The method as a library: codebooks, rotations, blocks of all cache types, what they cost, and QJL. Arrays in, arrays out.

    from turbo_gguf import codec

    packed = codec.quantize("turbo3t", codec.rotate(keys))
    keys = codec.unrotate(codec.dequantize("turbo3t", packed))

All names in ``__all__`` are public, with the modules :mod:`~turbo_gguf.codec.qjl` and :mod:`~turbo_gguf.codec.asymmetric`, and the list of
types in :mod:`~turbo_gguf.codec.tables`. Examples: ``docs/reference/codec.md``. Beside them are the C reference through ctypes
(:mod:`~turbo_gguf.codec.oracle`) and the generator of the overlay's lists and tables (:mod:`~turbo_gguf.codec.codegen`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turbo_gguf.codec import asymmetric, qjl
    from turbo_gguf.codec.codebook import Codebook, Gaussian, Sphere, expected_error, lloyd_max
    from turbo_gguf.codec.distortion import (
        Expected,
        Measured,
        bits_per_value,
        bound,
        compare,
        expected,
        measure,
        ratio,
        rescaled,
        scalar_limit,
    )
    from turbo_gguf.codec.packing import default_scale, dequantize, quantize, round_trip, turbo_type
    from turbo_gguf.codec.rotation import group_of, matrix, random_signs, rotate, unrotate
    from turbo_gguf.codec.tables import ALL, BY_NAME, SCALES, ScalarType, Scale, TrellisType, TurboType

__all__ = [
    "ALL",
    "BY_NAME",
    "SCALES",
    "Codebook",
    "Expected",
    "Gaussian",
    "Measured",
    "ScalarType",
    "Scale",
    "Sphere",
    "TrellisType",
    "TurboType",
    "asymmetric",
    "bits_per_value",
    "bound",
    "compare",
    "default_scale",
    "dequantize",
    "expected",
    "expected_error",
    "group_of",
    "lloyd_max",
    "matrix",
    "measure",
    "qjl",
    "quantize",
    "random_signs",
    "ratio",
    "rescaled",
    "rotate",
    "round_trip",
    "scalar_limit",
    "turbo_type",
    "unrotate",
]

_MODULES = ("asymmetric", "qjl")
_ROOMS = ("tables", "codebook", "rotation", "packing", "distortion")


def __getattr__(name: str) -> Any:
    """Import a public name when it is used: the list of types is read by programs that need no numpy."""
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name in __all__:
        return next(getattr(room, name) for room in map(_room, _ROOMS) if hasattr(room, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _room(name: str) -> Any:
    return import_module(f"{__name__}.{name}")
