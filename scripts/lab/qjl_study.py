"""QJL against a larger codebook, at equal bits, on K, Q and V of real prompts: a laboratory in numpy.

    python scripts/lab/qjl_study.py attention MODEL --text TEXT     # errors of scores and of attention, with exact K, Q and V of each layer
    python scripts/lab/qjl_study.py kl MODEL --text TEXT            # KL divergence of the model's predictions
    python scripts/lab/qjl_study.py report                          # the tables of docs/lab/0020-qjl.md
    python scripts/lab/qjl_study.py perplexity MODEL --text TEXT    # of the first window, as llama-perplexity counts it

Codes are named by what is stored: `turbo3 ip` is a type and a rule of its scale, `unit3` TurboQuant's codebook with 3 bits, `+ qjl` signs
of a Gaussian projection of what the codebook leaves, `+ oqjl` of an orthogonal one, `+ signs` the same with the factor of least error,
which is biased. `qjl x3` is QJL alone, with three signs a value. K and V are rotated before. `--calibrated` takes the mean of K away and
balances its RoPE pairs against those of Q, by what another part of the text has. Attention then reads 4 tokens of the sink and 64 of the
tail as they are.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy_llama import Array, Layer, Model, Tokenizer
from transform_variants import pair_means, scale

from turbo_gguf.codec import asymmetric, distortion, oracle, packing, qjl, rotation, tables
from turbo_gguf.codec.tables import SCALES, TrellisType

SINK, TAIL = 4, 64
SKIPPED = 64  # first queries of a window, which count for nothing
EVERY = 4  # query of the others has its errors measured


@dataclass(frozen=True)
class Code:
    """A way to store rows of K, by its name."""

    name: str

    @property
    def parts(self) -> tuple[str, str]:
        """Codebook and signs; either may be empty."""
        first, _, second = self.name.partition(" + ")
        return ("", first) if first.startswith("qjl x") else (first, second)

    def bits(self, n: int) -> float:
        """Bits per value of heads of size n."""
        book, signs = self.parts
        name = book.split(" ")[0]
        found = asymmetric.bits_of_unit(int(book[4:]), n) if book.startswith("unit") else distortion.bits_per_value(name) if name else 0.0
        return found + (_projection(signs, n, 0).bits_per_value if signs else 0)

    def read(self, x: Array, seed: int) -> Array:
        """What scores are computed with, for rotated rows [..., n]."""
        book, signs = self.parts
        y = _through(book, x) if book else np.zeros_like(x)
        if not signs:
            return y
        p = _projection(signs, x.shape[-1], seed)
        rest = qjl.decode(p, qjl.encode(p, x - y))
        return y + (rest * np.float32(p.dimension / p.factor**2 / p.rows) if signs == "signs" else rest)


def _projection(signs: str, n: int, seed: int) -> qjl.Projection:
    rows = n * int(signs.removeprefix("qjl x")) if signs.startswith("qjl x") else n
    return qjl.projection(n, rows, orthogonal=signs in ("oqjl", "signs"), seed=seed)


def _through(book: str, x: Array) -> Array:
    if book.startswith("unit"):
        bits = int(book[4:])
        return asymmetric.decode_unit(asymmetric.encode_unit(x, bits), bits)
    name, _, rule = book.partition(" ")
    t = tables.BY_NAME[name]
    if isinstance(t, TrellisType):
        return packing.dequantize(t, oracle.load().quantize_trellis(t, x))  # 20 times as fast as numpy
    return packing.round_trip(t, x, scale=SCALES[rule])


def codes(bits: int) -> tuple[tuple[str, str], ...]:
    """K and V at about so many bits, and half a bit more at most."""
    turbo, trellis, unit, less = f"turbo{bits}", f"turbo{bits}t", f"unit{bits}", f"unit{bits - 1}"
    plain = (f"{turbo} ls", f"{turbo} matched", f"{turbo} ip", trellis, unit)
    signs = tuple((f"{less} + {kind}", unit) for kind in ("qjl", "oqjl", "signs"))
    coded = tuple((f"turbo{bits - 1}t + {kind}", trellis) for kind in ("qjl", "oqjl")) if bits > 2 else ()
    return (*((name, name) for name in plain), *signs, *coded, (f"qjl x{bits}", unit))


class Study:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work = args, Path(args.work)
        self.model = Model(Path(args.model), self.work / "weights")
        self.name = Path(args.model).stem.split("-")[0].lower()
        text = Path(args.text).read_text("utf-8")
        cut = len(text) * 7 // 10
        tokens = Tokenizer(self.model.fields)
        self.windows = tokens(text[:cut], args.ctx * (max(args.windows) + 1)).reshape(-1, args.ctx)
        self.kind = "calibrated" if args.calibrated else "plain"
        self.exact = (SINK, TAIL) if args.calibrated else (0, 0)
        shape = (self.model.layers, self.model.kv_heads, 1, self.model.head)
        self.mean, self.scale = np.zeros(shape, np.float32), np.ones(shape, np.float32)
        if args.calibrated:
            self._observe(tokens(text[cut:], args.ctx))

    def _observe(self, tokens: Array) -> None:
        """Means of K after RoPE, and scales that balance it against Q."""
        read, kept = np.empty_like(self.mean), np.empty_like(self.mean)

        def watch(layer: Layer) -> None:
            i, k = layer.number, layer.k[:, SINK:]
            self.mean[i] = k.mean(1, keepdims=True)
            kept[i] = np.square(k - self.mean[i]).mean(1, keepdims=True)
            read[i] = np.square(layer.q[:, SINK:]).reshape(len(k), -1, k.shape[-1]).mean(1, keepdims=True)

        self.model.hidden(tokens, watch=watch)
        self.scale = scale(pair_means(self, read), pair_means(self, kept))

    def read_k(self, code: str, i: int, k: Array, seed: int) -> Array:
        if code == "exact":
            return k
        coded = Code(code).read(rotation.rotate((k - self.mean[i]) * self.scale[i]), 1000 * seed + i)
        return rotation.unrotate(coded) / self.scale[i] + self.mean[i]

    def read_v(self, code: str, v: Array) -> Array:
        return v if code == "exact" else rotation.unrotate(Code(code).read(rotation.rotate(v), 0))

    def keep(self, what: str, k: str, v: str, window: int, found: dict[str, float]) -> None:
        row = {"what": what, "model": self.name, "kind": self.kind, "k": k, "v": v, "window": window, **found}
        with (self.work / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def kl(self) -> None:
        """Mean over positions of the divergence from exact K and V."""
        for window in self.args.windows:
            base = self._predict(window, "exact", "exact")
            for bits in self.args.bits:
                for k, v in codes(bits):
                    for with_v in (False, True) if self.args.with_v else (False,):
                        start = time.time()
                        p = self._predict(window, k, v if with_v else "exact")
                        kl = np.concatenate([(np.exp(a) * (a - b)).sum(-1) for a, b in zip(base, p, strict=True)])
                        found = {"mean": float(kl.mean()), "median": float(np.median(kl)), "seconds": round(time.time() - start)}
                        self.keep("kl", k, v if with_v else "exact", window, found)

    def _predict(self, window: int, k_code: str, v_code: str) -> list[Array]:
        def cache(i: int, k: Array, v: Array) -> tuple[Array, Array]:
            return self.read_k(k_code, i, k, window), self.read_v(v_code, v)

        hidden = self.model.hidden(self.windows[window], cache, self.exact)[SKIPPED:]
        return [self.model.log_probabilities(rows) for rows in np.array_split(hidden, 4)]

    def attention(self) -> None:
        for window in self.args.windows:
            sums: dict[tuple[str, str], list[Array]] = {pair: [] for bits in self.args.bits for pair in codes(bits)}

            def watch(layer: Layer, sums: dict[tuple[str, str], list[Array]] = sums, seed: int = window) -> None:
                exact = Attention(layer, self.exact)
                for (k, v), found in sums.items():
                    found.append(exact.errors(self.read_k(k, layer.number, layer.k, seed), self.read_v(v, layer.v)))

            self.model.hidden(self.windows[window], watch=watch)
            for (k, v), found in sums.items():
                self.keep("attention", k, v, window, dict(zip(ERRORS, np.mean(found, axis=0).tolist(), strict=True)))

    def perplexity(self) -> None:
        half = self.args.ctx // 2
        tokens = self.windows[0]
        p = self.model.log_probabilities(self.model.hidden(tokens)[half:-1])
        print(f"{np.exp(-p[np.arange(len(p)), tokens[half + 1 :]].mean()):.4f} from {len(p)} tokens")


ERRORS = ("score", "weighted", "slope", "output_k", "output_kv")
"""Means over layers. Scores are in nats, and what all keys of a query share is left out, as softmax does: squared error over all keys, the
same weighted by attention, and <score, score read> over <score, score>. Then squared error of the output of attention, relative to it:
with exact V, and with V that is read back, too."""


class Attention:
    """Causal attention of a layer with exact K and V, to compare with."""

    def __init__(self, layer: Layer, exact: tuple[int, int]) -> None:
        self.layer = layer
        heads, n, head = layer.q.shape
        self.group = heads // len(layer.k)
        self.q = layer.q / np.sqrt(np.float32(head))
        at = np.arange(n)
        self.seen = at <= at[SKIPPED::EVERY, None]
        self.far = self.seen & (at >= exact[0]) & (at <= at[SKIPPED::EVERY, None] - exact[1])
        self.score = self._scores(layer.k)
        self.p = self._softmax(self.score)
        self.out = self.p @ np.repeat(layer.v, self.group, 0)

    def _scores(self, k: Array) -> Array:
        return self.q[:, SKIPPED::EVERY] @ np.repeat(k, self.group, 0).swapaxes(1, 2)

    def _softmax(self, s: Array) -> Array:
        e = np.exp(np.where(self.seen, s - np.where(self.seen, s, -np.inf).max(-1, keepdims=True), -np.inf))
        return e / e.sum(-1, keepdims=True)

    def errors(self, k: Array, v: Array) -> Array:
        read = np.where(self.far, self._scores(k), self.score)
        p = self._softmax(read)
        even = self.far.astype(np.float32) / np.maximum(self.far.sum(-1, keepdims=True), 1).astype(np.float32)
        weight = np.where(self.far, self.p, 0)
        weight /= np.maximum(weight.sum(-1, keepdims=True), 1e-30)
        score, weighted = ((w * self._centered(read - self.score, w) ** 2).sum(-1).mean() for w in (even, weight))
        before, after = (self._centered(s, even) for s in (self.score, read))
        slope = (even * before * after).sum() / (even * before**2).sum()
        exact_v, level = np.repeat(self.layer.v, self.group, 0), np.square(self.out).sum()
        output_k = np.square(p @ exact_v - self.out).sum() / level
        far = np.where(self.far, p, 0)
        output_kv = np.square(p @ exact_v + far @ np.repeat(v - self.layer.v, self.group, 0) - self.out).sum() / level
        return np.array([score, weighted, slope, output_k, output_kv])

    @staticmethod
    def _centered(s: Array, weight: Array) -> Array:
        return s - (weight * s).sum(-1, keepdims=True)


def report(args: argparse.Namespace) -> None:
    """Means over windows."""
    rows = [json.loads(line) for line in (Path(args.work) / "results.jsonl").read_text("utf-8").splitlines()]
    order = {pair: i for bits in (2, 3, 4) for i, pair in enumerate(codes(bits), 100 * bits)}

    def key(row: dict) -> tuple:
        place = next(i for (k, v), i in order.items() if k == row["k"] and row["v"] in (v, "exact"))
        return row["what"], row["model"], row["kind"], place, row["v"] != "exact"

    title = None
    for group, found in groupby(sorted(rows, key=key), key=key):
        mine = list(found)
        names = ERRORS if group[0] == "attention" else ("mean", "median")
        if title != group[:3]:
            title = group[:3]
            print(f"\n{' '.join(title)}\n| K | V | bits of K | windows | {' | '.join(names)} |\n|{'---|' * (4 + len(names))}")
        k, v = mine[0]["k"], mine[0]["v"]
        means = " | ".join(f"{np.mean([row[name] for row in mine]):.4g}" for name in names)
        print(f"| {k} | {v} | {Code(k).bits(args.head):g} | {len(mine)} | {means} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="build/qjl-study")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("attention", "kl", "perplexity"):
        command = commands.add_parser(name)
        command.add_argument("model")
        command.add_argument("--text", required=True)
        command.add_argument("--ctx", type=int, default=512)
        command.add_argument("--windows", type=int, nargs="+", default=[0])
        command.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4], choices=(2, 3, 4))
        command.add_argument("--calibrated", action="store_true")
        command.add_argument("--with-v", action="store_true", help="and once more with V in its type")
    commands.add_parser("report").add_argument("--head", type=int, default=64)
    args = parser.parse_args()
    if args.command == "report":
        report(args)
    else:
        getattr(Study(args), args.command)()


if __name__ == "__main__":
    main()
