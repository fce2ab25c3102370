"""Plant what makes KV caches of few bits hard into a model that lacks it, without changing what it computes.

::

    python scripts/lab/plant_model.py MODEL OUT --outliers
    python scripts/lab/plant_model.py MODEL OUT --k-bias 30

MODEL is a GGUF file of llama.cpp's architecture ``llama``, in which channels 2i and 2i + 1 of a head are a RoPE pair. Matrices that are
touched become f32, so that nothing is rounded to a few bits again; all others stay as they are. Without a plant the attention's
matrices become f32, and nothing else: what planted models are compared with.

Outliers. In each KV head, a few channels of K and of V are 10 to 30 times as large as they were, the size that is known from large models;
what reads them (Q, the columns of the output projection) is as much smaller. Both channels of a pair have the same factor, so it commutes
with RoPE. The function is the same up to the rounding of f32.

K bias. Keys of the first and the last layer get a constant vector, whose norm is a multiple of what K's is without: Qwen2 and 2.5 have
norms of 600 to 900 there, against 22 elsewhere. Softmax does not see what all keys share, but RoPE turns a bias with the position. So the
slowest pairs of the model are no longer turned at all (``rope_freqs.weight``), in all layers, and the bias lies in these. That is another
model: it is compared with ``--k-bias 0``, which has still pairs and no bias, and whose function it has up to rounding.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize

Floats = npt.NDArray[np.float32]

LEAST, LARGEST = 10.0, 30.0
"""Factors of outlier channels, spread evenly on a logarithmic scale."""

CHANNELS_PER_PLANT = 32
"""Channels of a head for each planted pair of K, and for each planted channel of V: four of 128."""

STILL = 1e20
"""RoPE divides the frequency of a pair by its factor: by this one, no position of any text turns it by more than 1e-13."""

GOLDEN = 0.6180339887498949
ODD = ("attn_qkv", "attn_q_norm", "attn_k_norm", "attn_sub_norm", "attn_sinks")
"""Tensors of attention that a scaled or biased K would not pass through as it does through RoPE alone."""

MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output")


class CannotPlant(ValueError):
    """The model is of another kind."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the attention."""

    layers: int
    heads: int
    kv_heads: int
    head: int

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.kv_heads


class Model:
    """A GGUF file: what of it was changed, and the rest as it is."""

    def __init__(self, path: Path) -> None:
        self.reader = GGUFReader(path)
        self.stored = {tensor.name: tensor for tensor in self.reader.tensors}
        self.changed: dict[str, Floats] = {}
        self.shape = self._shape()
        for layer in range(self.shape.layers):
            for matrix in MATRICES:
                self.set(f"blk.{layer}.{matrix}.weight", self.get(f"blk.{layer}.{matrix}.weight"))

    def _shape(self) -> Shape:
        arch = self._field("general.architecture")
        odd = [name for name in self.stored if name.startswith("blk.0.") and any(part in name for part in ODD)]
        if arch != "llama" or odd:
            raise CannotPlant(f"{', '.join([str(arch), *odd])}: only plain attention of the architecture llama is known")
        if int(self._number("split.count", 0)) > 1:
            raise CannotPlant("it is in several files")
        heads, width = self._number("llama.attention.head_count"), self._number("llama.embedding_length")
        shape = Shape(
            layers=self._number("llama.block_count"),
            heads=heads,
            kv_heads=self._number("llama.attention.head_count_kv", heads),
            head=self._number("llama.attention.key_length", width // heads),
        )
        if self._number("llama.attention.value_length", shape.head) != shape.head:
            raise CannotPlant("its heads of K and V differ in size")
        return shape

    def _number(self, name: str, default: int | None = None) -> int:
        """A number that is the same in all layers."""
        found = self._field(name, default)
        values = set(found) if isinstance(found, list) else {found}
        if len(values) != 1:
            raise CannotPlant(f"{name} differs by layer")
        return int(values.pop())

    def _field(self, name: str, default: object = None) -> object:
        field = self.reader.get_field(name)
        if field is None and default is None:
            raise CannotPlant(f"no {name} in its metadata")
        return default if field is None else field.contents()

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self.changed or name in self.stored

    def get(self, name: str) -> Floats:
        """A tensor, rows first."""
        if name in self.changed:
            return self.changed[name]
        if name not in self.stored:
            raise CannotPlant(f"no tensor {name}")
        return np.array(dequantize(self.stored[name].data, self.stored[name].tensor_type), np.float32)

    def set(self, name: str, values: Floats) -> None:
        """Replace or add a tensor."""
        self.changed[name] = np.ascontiguousarray(values, np.float32)

    def scale_rows(self, name: str, factors: Floats) -> None:
        """Multiply what a projection gives, its bias included."""
        self.set(f"{name}.weight", self.get(f"{name}.weight") * factors[:, None])
        if self.has(f"{name}.bias"):
            self.set(f"{name}.bias", self.get(f"{name}.bias") * factors)

    def write(self, path: Path, suffix: str) -> None:
        """Write it as a GGUF file under the name of the model and ``suffix``."""
        writer = GGUFWriter(path, "llama")
        for field in self.reader.fields.values():
            if field.name.startswith("GGUF.") or field.name == "general.architecture":
                continue
            value = field.contents()
            if field.name == "general.name":
                value = f"{value}{suffix}"
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, value, field.types[0], inner)
        for name in [*self.stored, *(name for name in self.changed if name not in self.stored)]:
            if name in self.changed:
                writer.add_tensor(name, self.changed[name], raw_dtype=GGMLQuantizationType.F32)
            else:
                writer.add_tensor(name, self.stored[name].data, raw_dtype=self.stored[name].tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def spread(n: int, among: int, seed: int) -> Iterator[int]:
    """``n`` different numbers below ``among``, the same ones every time."""
    offset = int(seed * GOLDEN % 1.0 * among)
    return ((offset + i * among // n + i) % among for i in range(n))


def _factors(n: int, size: int, seed: int) -> Floats:
    """``size`` factors, of which ``n`` are large."""
    factors = np.ones(size, np.float32)
    factors[list(spread(n, size, seed))] = np.geomspace(LEAST, LARGEST, n)
    return factors


def plant_outliers(model: Model) -> None:
    """Make a few channels of K and V large in each KV head of each layer."""
    shape = model.shape
    n = shape.head // CHANNELS_PER_PLANT
    for layer in range(shape.layers):
        seeds = [layer * shape.kv_heads + head for head in range(shape.kv_heads)]
        of_k = np.stack([np.repeat(_factors(n, shape.head // 2, seed), 2) for seed in seeds])
        of_v = np.stack([_factors(n, shape.head, seed + 1) for seed in seeds])
        model.scale_rows(f"blk.{layer}.attn_k", of_k.reshape(-1))
        model.scale_rows(f"blk.{layer}.attn_q", 1 / of_k.repeat(shape.group, 0).reshape(-1))
        model.scale_rows(f"blk.{layer}.attn_v", of_v.reshape(-1))
        output = f"blk.{layer}.attn_output.weight"
        model.set(output, model.get(output) / of_v.repeat(shape.group, 0).reshape(-1))


def plant_k_bias(model: Model, times: float) -> None:
    """Stop the slowest RoPE pairs, and add a bias to K in these, ``times`` the norm of K, in the first and the last layer."""
    shape = model.shape
    n = shape.head // CHANNELS_PER_PLANT
    name = "rope_freqs.weight"
    factors = model.get(name).copy() if model.has(name) else np.ones(shape.head // 2, np.float32)
    factors[-n:] = STILL
    model.set(name, factors)
    if times == 0:
        return
    for layer in {0, shape.layers - 1}:
        norms = _k_norms(model, layer)
        bias = np.zeros((shape.kv_heads, shape.head), np.float32)
        for head in range(shape.kv_heads):
            bias[head, -2 * n :] = times * norms[head] * _direction(2 * n, layer * shape.kv_heads + head)
        name = f"blk.{layer}.attn_k.bias"
        model.set(name, bias.reshape(-1) + (model.get(name) if model.has(name) else 0))


def _k_norms(model: Model, layer: int) -> Floats:
    """Norm of K of each KV head, if what comes in were white noise."""
    matrix = model.get(f"blk.{layer}.attn_k.weight") * model.get(f"blk.{layer}.attn_norm.weight")
    return np.sqrt(np.square(matrix).reshape(model.shape.kv_heads, -1).sum(1))


def _direction(size: int, seed: int) -> Floats:
    """A vector of norm 1 whose entries differ in size and sign."""
    entries = np.cos(2 * np.pi * GOLDEN * (seed + 1) * np.arange(1, size + 1))
    return np.asarray(entries / np.linalg.norm(entries), np.float32)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and plant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--outliers", action="store_true", help="plant outlier channels in K and V")
    parser.add_argument(
        "--k-bias", type=float, metavar="TIMES", help="plant a bias of K, TIMES as large as K is without; 0: only still pairs"
    )
    args = parser.parse_args(arguments)
    try:
        model = Model(args.model)
        suffix = ""
        if args.outliers:
            plant_outliers(model)
            suffix += ", planted outliers"
        if args.k_bias is not None:
            plant_k_bias(model, args.k_bias)
            suffix += f", planted K bias {args.k_bias:g}" if args.k_bias else ", still RoPE pairs"
        model.write(args.out, suffix)
    except CannotPlant as error:
        parser.error(f"{args.model}: {error}")


if __name__ == "__main__":
    main()
