"""Train the codebooks of the trellis types on Gaussian data: Lloyd's algorithm with the encoder's own search in the loop.

    python scripts/lab/train_trellis.py              # all three types, about five minutes
    python scripts/lab/train_trellis.py --bits 3 --blocks 20000

Each round encodes the same blocks with the levels so far, and moves every level to the centroid of the values that chose it, weighted
by their squared scales. Levels are rounded before they are used, so that what is trained is what ships; scaling all of them changes
nothing but the scales that blocks choose, so the largest is held at 127. ``reach`` is then the one that has the smallest error, ``gain``
follows from the error, and the error with it is measured on other blocks. Prints what turbo_gguf/codec/tables.py holds.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np

from turbo_gguf.codec import measure, tables, trellis
from turbo_gguf.codec.tables import LEVEL_STEPS, QK_TRELLIS, TrellisType

REACHES = np.arange(0.8, 1.6, 0.02)


def gaussian(blocks: int, seed: int) -> trellis.Floats:
    """Blocks of N(0, 1) data, shape (blocks, 64)."""
    return np.random.default_rng(seed).standard_normal((blocks, QK_TRELLIS)).astype(np.float32)


def centroids(t: TrellisType, x: trellis.Floats) -> np.ndarray:
    """Levels that fit the values which chose them, positive halves of both codebooks: (2, levels), in level steps."""
    packed = trellis.quantize(t, x)
    chosen, index = trellis.unpack(t, packed)
    d = trellis.scale_of(packed[:, :1]) / LEVEL_STEPS
    n = len(t.codebooks[0])
    up, down = np.zeros((2, 2, n))
    for book in range(2):
        mine = chosen == book
        up[book] = np.bincount(index[mine], (d * x)[mine], minlength=n)
        down[book] = np.bincount(index[mine], np.broadcast_to(d * d, x.shape)[mine], minlength=n)
    return (up[:, n // 2 :] - up[:, : n // 2][:, ::-1]) / (down[:, n // 2 :] + down[:, : n // 2][:, ::-1])


def best_reach(t: TrellisType, x: trellis.Floats) -> TrellisType:
    """The type with the reach that has the smallest error."""
    candidates = [replace(t, reach=round(float(reach), 2)) for reach in REACHES]
    return min(candidates, key=lambda candidate: measure(candidate, x).error)


def train(t: TrellisType, blocks: int, rounds: int) -> TrellisType:
    """The type with codebooks, reach and error of its own."""
    x = gaussian(blocks, seed=1)
    t = best_reach(replace(t, gain=1.0), x[:1000])
    for number in range(rounds):
        levels = centroids(t, x)
        levels *= 127 / levels.max()
        first, second = (tuple(int(level) for level in np.rint(half)) for half in levels)
        t = replace(t, halves=(first, second))
        if number % 4 == 3:
            t = best_reach(t, x[:1000])
    for _ in range(2):
        t = replace(t, gain=round(t.gain / measure(t, gaussian(20000, seed=2)).slope, 4))
    return replace(t, block_error=round(measure(t, gaussian(20000, seed=3)).error, 5))


def main() -> None:
    """Train what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bits", type=int, nargs="+", choices=(2, 3, 4), default=(2, 3, 4))
    parser.add_argument("--blocks", type=int, default=8000, help="of 64 values, to train with")
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    for t in tables.TRELLIS:
        if t.bits in options.bits:
            print(train(t, options.blocks, options.rounds), flush=True)


if __name__ == "__main__":
    main()
