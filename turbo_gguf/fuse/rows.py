"""Rows of a tensor of any type: with values that are computed anew, or multiplied by powers of two without touching their codes."""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import numpy as np
import numpy.typing as npt
from gguf import quants

from turbo_gguf.inputs.gguf_file import Tensor

Bytes = npt.NDArray[np.uint8]

FLOATS = {"F32": "<f4", "F16": "<f2"}

SCALES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
}
"""Where a block has its fp16 factors: the values of the block are linear in them."""

FINE = (*FLOATS, "BF16", "Q8_0")
"""Types that values can be written in again. In 4 or 5 bits that loses more than any cache: docs/lab/0020-fuse.md."""


class NotExact(Exception):
    """Rows can't be multiplied without a loss, or values are too large for the type; the message says which."""


def can_decode(type_name: str) -> bool:
    """Whether it reads one."""
    try:
        kind = gguf.GGMLQuantizationType[type_name]
        quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (KeyError, NotImplementedError, ValueError):
        return False
    return True


def row_bytes(type_name: str, n: int) -> int:
    """Bytes of a row of n values."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    return n // block * size


def encode(values: npt.NDArray[np.floating], type_name: str) -> Bytes:
    """Rows of values as bytes, ``[rows, bytes]``.

    Raises:
        NotExact: a value is too large for the type.
    """
    kind = gguf.GGMLQuantizationType[type_name]
    with np.errstate(over="ignore"):
        found = np.ascontiguousarray(quants.quantize(np.ascontiguousarray(values, np.float32), kind))
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        raise NotExact(f"a value is too large for {type_name}")
    return found.view(np.uint8).reshape(len(values), -1)


@dataclass
class Rows:
    """The rows of a tensor, as bytes ``[rows, bytes]``."""

    type_name: str
    data: Bytes

    @classmethod
    def of(cls, tensor: Tensor) -> Rows:
        """Read a tensor of a known type, one dimension being one row."""
        size = row_bytes(tensor.type_name, tensor.ne[0])
        assert tensor.n_bytes is not None
        return cls(tensor.type_name, np.fromfile(tensor.path, np.uint8, tensor.n_bytes, offset=tensor.offset).reshape(-1, size))

    def values(self, part: slice = slice(None)) -> npt.NDArray[np.float64]:
        """Dequantized."""
        kind = gguf.GGMLQuantizationType[self.type_name]
        if self.type_name in FLOATS:
            return self.data[part].view(FLOATS[self.type_name]).astype(np.float64)
        return np.asarray(quants.dequantize(self.data[part], kind), np.float64)

    def replace(self, part: slice, values: npt.NDArray[np.float64]) -> None:
        """Encode rows anew."""
        self.data[part] = encode(values, self.type_name)

    def converted(self, type_name: str) -> Rows:
        """All rows in another type."""
        return self if type_name == self.type_name else Rows(type_name, encode(self.values(), type_name))

    def multiply(self, part: slice, exponents: npt.NDArray[np.int64]) -> None:
        """Multiply rows by powers of two, ``[rows of the part]``.

        Raises:
            NotExact: a factor of a block would be rounded, or become infinite, or the type keeps none that is known here.
        """
        if self.type_name in (*FLOATS, "BF16"):
            self.replace(part, np.ldexp(self.values(part), exponents[:, None]))
            return
        if self.type_name not in SCALES:
            raise NotExact(f"where {self.type_name} keeps the factors of its blocks is not known here")
        rows = self.data[part]
        blocks = rows.reshape(len(rows), -1, row_bytes(self.type_name, _block(self.type_name)))
        for at in SCALES[self.type_name]:
            old = np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2")
            with np.errstate(over="ignore"):
                new = np.ldexp(old.astype(np.float64), exponents[:, None, None]).astype("<f2")
            if not np.array_equal(np.ldexp(new.astype(np.float64), -exponents[:, None, None]), old.astype(np.float64)):
                raise NotExact(f"the factor of a block of {self.type_name} would be rounded")
            blocks[..., at : at + 2] = new.view(np.uint8)
        self.data[part] = blocks.reshape(rows.shape)


def _block(type_name: str) -> int:
    return int(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]][0])
