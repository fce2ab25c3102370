"""Which linear maps of K and V before the cache cost least on real models: a laboratory in numpy, with the codes of a built ggml.

    python scripts/lab/transform_search.py observe MODEL --text TEXT --chunk 512 --chunks 2
    python scripts/lab/transform_search.py screen MODEL --text TEXT --bin FOLDER --variants VARIANT...
    python scripts/lab/transform_search.py measure MODEL --text TEXT --bin FOLDER --variants VARIANT...
    python scripts/lab/transform_search.py report --kind screen

Variants are named in transform_variants.py. A text is fitted on its last 30 % and measured on its first 70 %. Weights, moments and the
results of each position are kept in a folder (--work). A screen needs one pass of the model for all variants; a measurement needs one each.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import transform_variants
from kv_maps import Codec
from kv_moments import NAMES, SINK, TAIL, Moments
from numpy_llama import Array, Layer, Model, Tokenizer, attend

FIRST = 512  # first position whose prediction counts


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
        if file.exists() and not set(NAMES) - set(np.load(file).files):
            return
        tokens = self.tokens("fit", args.chunk * args.chunks)
        found, start = Moments(self.model), time.time()
        for i in range(args.chunks):
            found.read(tokens[i * args.chunk : (i + 1) * args.chunk])
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, **found.result())
        print(f"{file.name}: {len(tokens)} tokens, {time.time() - start:.0f} s", flush=True)

    def measure(self) -> None:
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
                maps = transform_variants.make(self, name)
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
        args, model = self.args, self.model
        codec = Codec(Path(args.bin))
        tokens = self.tokens("measure", args.ctx * (max(args.windows) + 1))
        caches = {name: transform_variants.make(self, name).cache(codec, args.type) for name in args.variants}
        folder = self.work / "screen" / f"{self.name}.{args.type}.{args.ctx}.s{args.sink}t{args.tail}"
        folder.mkdir(parents=True, exist_ok=True)
        for window in args.windows:
            errors = {name: np.empty((model.layers, args.ctx - args.first), np.float32) for name in caches}
            start = time.time()

            def watch(layer: Layer, errors: dict[str, Array] = errors) -> None:
                i = layer.number
                w = model.get(i, "attn_output.weight").T
                exact = attend(layer.q, layer.k, layer.v, (layer.k, layer.v))
                level = np.square(exact[args.first :] @ w).sum(1).mean()
                for name, cache in caches.items():
                    out = attend(layer.q, layer.k, layer.v, cache(i, layer.k, layer.v), exact=(args.sink, args.tail))
                    errors[name][i] = np.square((out - exact)[args.first :] @ w).sum(1) / level

            model.hidden(tokens[window * args.ctx : (window + 1) * args.ctx], watch=watch)
            for name, error in errors.items():
                np.save(folder / f"{name}.{window}.npy", error)
                print(f"{folder.name} {name} {window}: mean of layers {error.mean():.6f}, geometric {_geometric(error):.6f}")
            print(f"{time.time() - start:.0f} s", flush=True)


def report(args: argparse.Namespace) -> None:
    """Means, medians, and ratios to one variant."""
    for folder in sorted((Path(args.work) / args.kind).glob(args.only)):
        found: dict[str, dict[int, Array]] = {}
        for file in sorted(folder.glob("*.npy")):
            name, window = file.stem.rsplit(".", 1)
            found.setdefault(name, {})[int(window)] = np.load(file).astype(np.float64)
        print(f"\n{folder.name}\n| variant | windows | mean | median | mean against {args.against} | geometric |\n|{'---|' * 6}")
        for name in args.variants or list(found):
            windows = sorted(set(found.get(name, ())) & set(found.get(args.against, ())))
            if windows:
                print(f"| {name} | {_row([found[name][w] for w in windows], [found[args.against][w] for w in windows])} |")


def _row(ours: list[Array], theirs: list[Array]) -> str:
    values = np.concatenate([x.mean(0) if x.ndim > 1 else x for x in ours])
    means = _ratio([x.mean() for x in ours], [x.mean() for x in theirs])
    geometric = _ratio([_geometric(x) for x in ours], [_geometric(x) for x in theirs])
    return f"{len(ours)} | {values.mean():.5f} ± {_error(values):.5f} | {np.median(values):.5f} | {means} | {geometric}"


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
