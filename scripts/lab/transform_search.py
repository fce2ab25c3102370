"""Which linear maps of K and V before the cache cost least on real models: a laboratory in numpy, with the codes of a built ggml.

    python scripts/lab/transform_search.py observe MODEL --text TEXT --chunk 512 --chunks 2
    python scripts/lab/transform_search.py measure MODEL --text TEXT --bin FOLDER VARIANT...
    python scripts/lab/transform_search.py report

Variants are named in `variants.py` beside this file. Texts are fitted on their last 30 % and measured on their first 70 %. Everything is kept in
a folder (--work): weights, moments, and the KL divergence of each position, so that variants can be compared position by position.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy_llama import Array, Layer, Model, Tokenizer, attend

SKIP = 4  # first tokens of a chunk, which moments leave out
FIRST = 512  # first position whose prediction counts
SINK, TAIL = 4, 64
MOMENTS = ("q", "k", "q_raw", "k_raw", "v", "v_far", "q_out", "k_out")


# --- moments --------------------------------------------------------------------------------------------------------------


class Moments:
    """Sums over chunks of a text. Second moments are whole matrices, [layers, KV heads, head, head]; K and Q before and after RoPE.

    V is weighted by the squares of the attention weights: of all queries (v), and of those only that read the key from the cache (v_far).
    Q and K are also weighted by what an error of a score does to the output, p^2 |v - o|^2, where the key is read from the cache (q_out, k_out).
    """

    def __init__(self, model: Model) -> None:
        self.model, shape = model, (model.layers, model.kv_heads)
        self.sums: dict[str, Array] = {}
        for name in MOMENTS:
            self.sums[name] = np.zeros((*shape, model.head, model.head))
            self.sums[f"{name}_mean"] = np.zeros((*shape, model.head))
            self.sums[f"{name}_n"] = np.zeros(shape)
        self.squares: dict[str, Array] = {}

    def read(self, tokens: Array) -> None:
        n = len(tokens)
        at = np.arange(n)

        def watch(layer: Layer) -> None:
            self._flush()
            self.layer = layer
            self.squares = {name: np.zeros((self.model.kv_heads, n)) for name in ("v", "v_far", "k_out")}
            self.squares["q_out"] = np.zeros((self.model.kv_heads, self.model.heads // self.model.kv_heads, n))

        def weights(_layer: int, first: int, head: int, p: Array) -> None:
            rows, end = p.shape[1], p.shape[2]
            squares = p * p
            self.squares["v"][head, :end] += squares.sum((0, 1))
            squares *= (at[:end] <= np.arange(first, first + rows)[:, None] - TAIL) & (at[:end] >= SINK)
            self.squares["v_far"][head, :end] += squares.sum((0, 1))
            v = self.layer.v[head, :end]
            o = p @ v
            squares *= np.maximum(np.square(v).sum(1) + np.square(o).sum(2)[..., None] - 2 * (o @ v.T), 0)
            self.squares["k_out"][head, :end] += squares.sum((0, 1))
            self.squares["q_out"][head, :, first : first + rows] += squares.sum(2)

        self.model.hidden(tokens, watch=watch, weights=weights)
        self._flush()

    def _flush(self) -> None:
        if not self.squares:
            return
        layer = self.layer
        for name in ("q", "k", "q_raw", "k_raw"):
            rows = getattr(layer, name)
            self._add(name, self._grouped(rows), None)
            weight = self.squares.get(f"{name}_out")
            if weight is not None:
                shape = (*rows.shape[:-1], 1)
                self._add(f"{name}_out", self._grouped(rows), self._grouped(weight.reshape(shape))[..., 0])
        for name in ("v", "v_far"):
            self._add(name, layer.v[:, None, SKIP:], self.squares[name][:, None, SKIP:])
        self.squares = {}

    def _grouped(self, rows: Array) -> Array:
        return rows.reshape(self.model.kv_heads, -1, *rows.shape[1:])[:, :, SKIP:]

    def _add(self, name: str, rows: Array, weight: Array | None) -> None:
        """Rows [KV heads, query heads of a group, tokens, head]."""
        i, heads = self.layer.number, rows.shape[0]
        flat = rows.reshape(heads, -1, rows.shape[-1])
        w = np.ones(flat.shape[:2], np.float32) if weight is None else weight.reshape(heads, -1).astype(np.float32)
        self.sums[name][i] += (flat * w[..., None]).transpose(0, 2, 1) @ flat
        self.sums[f"{name}_mean"][i] += (flat * w[..., None]).sum(1)
        self.sums[f"{name}_n"][i] += w.sum(1)

    def result(self) -> dict[str, Array]:
        """Means instead of sums."""
        res = {}
        for name in MOMENTS:
            n = self.sums[f"{name}_n"]
            res[name] = self.sums[name] / n[..., None, None]
            res[f"{name}_mean"] = self.sums[f"{name}_mean"] / n[..., None]
        return res


# --- codes ----------------------------------------------------------------------------------------------------------------


class Codec:
    """Rows through the encoder of a built ggml and back."""

    def __init__(self, folder: Path) -> None:
        self.base = ctypes.CDLL(str(folder / "libggml-base.so"), ctypes.RTLD_GLOBAL)
        self.cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
        self.cpu.ggml_cpu_init()

    def __call__(self, name: str, rows: Array) -> Array:
        """Rows of blocks of 64."""
        if name == "exact":
            return rows
        c_name = re.sub(r"^(turbo\d)t$", r"\1_t", name)
        c_name = re.sub(r"^(turbo\d)$", r"\1_0", c_name)
        rows = np.ascontiguousarray(rows, np.float32)
        packed, out = np.empty(rows.size * 2, np.uint8), np.empty_like(rows)
        n = ctypes.c_int64(rows.size)
        self.cpu[f"quantize_row_{c_name}"](rows.ctypes.data_as(ctypes.c_void_p), packed.ctypes.data_as(ctypes.c_void_p), n)
        self.base[f"dequantize_row_{c_name}"](packed.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p), n)
        return out


# --- maps -----------------------------------------------------------------------------------------------------------------


def hadamard(n: int) -> Array:
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(n)


def coded(codec: Codec, name: str, rows: Array) -> Array:
    """Rows in one type, or their halves in two. Blocks of halves take them from neighbouring tokens."""
    halves = np.split(rows, name.count("+") + 1, axis=-1)
    return np.concatenate([codec(part, half).reshape(half.shape) for part, half in zip(name.split("+"), halves, strict=True)], axis=-1)


@dataclass
class Maps:
    """What is stored: matrix @ (row - mean), of [layers, KV heads, ...]; what is read is multiplied by gain, [layers, KV heads]."""

    k_mean: Array
    k: Array
    v_mean: Array
    v: Array
    k_gain: Array | float = 1.0
    v_gain: Array | float = 1.0
    k_type: str | Array = ""  # other types than the one that is measured, or one for each head; "a+b": half of the channels each
    v_type: str | Array = ""

    def cache(self, codec: Codec, default: str) -> Callable[[int, Array, Array], tuple[Array, Array]]:
        back_k, back_v = np.linalg.inv(self.k), np.linalg.inv(self.v)

        def through(i: int, x: Array, mean: Array, there: Array, back: Array, gain: Array | float, name: str | Array) -> Array:
            stored = (x - mean[i][:, None]).astype(np.float32) @ there[i].transpose(0, 2, 1).astype(np.float32)
            names = [name or default] * len(x) if isinstance(name, str) else list(name[i])
            read = np.stack([coded(codec, *pair) for pair in zip(names, stored, strict=True)])
            if not np.isscalar(gain):
                read *= gain[i][:, None, None].astype(np.float32)
            return read @ back[i].transpose(0, 2, 1).astype(np.float32) + mean[i][:, None].astype(np.float32)

        def cache(i: int, k: Array, v: Array) -> tuple[Array, Array]:
            return (
                through(i, k, self.k_mean, self.k, back_k, self.k_gain, self.k_type),
                through(i, v, self.v_mean, self.v, back_v, self.v_gain, self.v_type),
            )

        return cache


# --- commands -------------------------------------------------------------------------------------------------------------


class Lab:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work = args, Path(args.work)
        self.name = Path(args.model).name.split("-")[0].lower()
        self.model = Model(Path(args.model), self.work / "weights")
        text = Path(args.text).read_text(encoding="utf-8")
        cut = len(text) * 7 // 10
        self.text = {"measure": text[:cut], "fit": text[cut:] if args.part == "fit" else text}

    def tokens(self, part: str, n: int) -> Array:
        return Tokenizer(self.model.fields)(self.text[part], n)

    def moments(self, tag: str, chunk: int, chunks: int) -> dict[str, Array]:
        """Of a text that was observed before."""
        return dict(np.load(self.work / "moments" / f"{self.name}.{tag}.{chunk}x{chunks}.npz"))

    def observe(self) -> None:
        args = self.args
        file = self.work / "moments" / f"{self.name}.{args.tag}.{args.chunk}x{args.chunks}.npz"
        if file.exists() and not set(MOMENTS) - set(np.load(file).files):
            return
        tokens = self.tokens("fit", args.chunk * args.chunks)
        found, start = Moments(self.model), time.time()
        for i in range(args.chunks):
            found.read(tokens[i * args.chunk : (i + 1) * args.chunk])
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, **found.result())
        print(f"{file.name}: {len(tokens)} tokens, {time.time() - start:.0f} s", flush=True)

    def measure(self) -> None:
        from variants import make  # noqa: PLC0415

        args = self.args
        codec = Codec(Path(args.bin))
        tokens = self.tokens("measure", args.ctx * (max(args.windows) + 1))
        for window in args.windows:
            part = tokens[window * args.ctx : (window + 1) * args.ctx]
            base: Array | None = None
            for name in args.variants:
                file = self.work / "kl" / f"{self.name}.{args.type}.{args.ctx}.s{args.sink}t{args.tail}" / f"{name}.{window}.npy"
                if file.exists():
                    continue
                start = time.time()
                if base is None:
                    base = self.model.log_probabilities(self.model.hidden(part)[args.first :])
                maps = make(self, name)
                hidden = self.model.hidden(part, maps.cache(codec, args.type), (args.sink, args.tail))[args.first :]
                kl = np.empty(len(hidden), np.float32)
                for first in range(0, len(hidden), 256):
                    rows = slice(first, first + 256)
                    p = base[rows]
                    kl[rows] = (np.exp(p) * (p - self.model.log_probabilities(hidden[rows]))).sum(-1)
                file.parent.mkdir(parents=True, exist_ok=True)
                np.save(file, kl)
                print(f"{file.parent.name} {name} {window}: {kl.mean():.4f} ({np.median(kl):.4f}) {time.time() - start:.0f} s", flush=True)


    def screen(self) -> None:
        """Error of what attention adds to the stream, relative to it, per layer and token, with the exact K, V and Q of each layer."""
        from variants import make  # noqa: PLC0415

        args, model = self.args, self.model
        codec = Codec(Path(args.bin))
        tokens = self.tokens("measure", args.ctx * (max(args.windows) + 1))
        caches = {name: make(self, name).cache(codec, args.type) for name in args.variants}
        folder = self.work / "screen" / f"{self.name}.{args.type}.{args.ctx}.s{args.sink}t{args.tail}"
        folder.mkdir(parents=True, exist_ok=True)
        for window in args.windows:
            errors = {name: np.empty((model.layers, args.ctx - args.first), np.float32) for name in caches}
            start = time.time()

            def watch(layer: Layer, errors: dict[str, Array] = errors) -> None:
                i = layer.number
                w = model.get(i, "attn_output.weight").T
                exact = attend(layer.q, layer.k, layer.v, (layer.k, layer.v), (0, 0), None)
                level = np.square(exact[args.first :] @ w).sum(1).mean()
                for name, cache in caches.items():
                    out = attend(layer.q, layer.k, layer.v, cache(i, layer.k, layer.v), (args.sink, args.tail), None)
                    errors[name][i] = np.square((out - exact)[args.first :] @ w).sum(1) / level

            model.hidden(tokens[window * args.ctx : (window + 1) * args.ctx], watch=watch)
            for name, error in errors.items():
                np.save(folder / f"{name}.{window}.npy", error)
                print(f"{folder.name} {name} {window}: mean of layers {error.mean():.6f}, geometric {np.exp(np.log(error.mean(1)).mean()):.6f}")
            print(f"{time.time() - start:.0f} s", flush=True)


def report(args: argparse.Namespace) -> None:
    """Means, medians, and ratios to one variant."""
    for folder in sorted((Path(args.work) / args.kind).glob(args.only)):
        found: dict[str, dict[int, Array]] = {}
        for file in sorted(folder.glob("*.npy")):
            name, window = file.stem.rsplit(".", 1)
            found.setdefault(name, {})[int(window)] = np.load(file).astype(np.float64)
        print(f"\n{folder.name}\n| variant | windows | mean | median | mean against {args.against} | geometric mean against it |\n|" + "---|" * 6)
        for name in args.variants or list(found):
            common = sorted(set(found.get(name, ())) & set(found.get(args.against, ())))
            if not common:
                continue
            pairs = [(found[name][w], found[args.against][w]) for w in common]
            kl = np.concatenate([a.mean(0) if a.ndim > 1 else a for a, _ in pairs])
            print(
                f"| {name} | {len(common)} | {kl.mean():.5f} ± {_error(kl):.5f} | {np.median(kl):.5f} "
                f"| {_ratio([a.mean() for a, _ in pairs], [b.mean() for _, b in pairs])} | {_ratio(*[[_geometric(x) for x in xs] for xs in zip(*pairs, strict=True)])} |"
            )


def _geometric(x: Array) -> float:
    """Of positions, or of the means of layers."""
    return float(np.exp(np.log(np.maximum(x.mean(1) if x.ndim > 1 else x, 1e-7)).mean()))


def _ratio(ours: list[float], theirs: list[float]) -> str:
    """Windows are the samples: within one, positions share the noise of their keys."""
    logs = np.log(np.array(ours) / np.array(theirs))
    error = f" ± {logs.std(ddof=1) / np.sqrt(len(logs)):.3f}" if len(logs) > 1 else ""
    return f"{np.exp(logs.mean()):.3f}{error}"


def _error(x: Array, block: int = 16) -> float:
    """Standard error of a mean of values of which neighbours are alike."""
    blocks = x[: len(x) // block * block].reshape(-1, block).mean(1)
    return float(blocks.std(ddof=1) / np.sqrt(len(blocks)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="build/transform-search")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("observe", "measure", "screen"):
        command = commands.add_parser(name)
        command.add_argument("model")
        command.add_argument("--text", required=True)
        command.add_argument("--part", default="fit", choices=("fit", "all"), help="of the text, to observe")
        command.add_argument("--tag", default="wiki", help="name of the text")
        if name == "observe":
            command.add_argument("--chunk", type=int, default=512)
            command.add_argument("--chunks", type=int, default=2)
        else:
            command.add_argument("--bin", required=True, help="folder of libggml-cpu.so")
            command.add_argument("--type", default="turbo3t")
            command.add_argument("--ctx", type=int, default=2048)
            command.add_argument("--first", type=int, default=FIRST)
            command.add_argument("--windows", type=int, nargs="+", default=[0, 1, 2])
            command.add_argument("--sink", type=int, default=SINK)
            command.add_argument("--tail", type=int, default=TAIL)
            command.add_argument("--variants", nargs="+", required=True)
    command = commands.add_parser("report")
    command.add_argument("--kind", default="kl", choices=("kl", "screen"))
    command.add_argument("--only", default="*")
    command.add_argument("--against", default="post-2048x4")
    command.add_argument("--variants", nargs="*")
    args = parser.parse_args()
    if args.command == "report":
        report(args)
    else:
        getattr(Lab(args), args.command)()


if __name__ == "__main__":
    main()
