"""The training loop: Muon for matrices, AdamW for the rest, a schedule in wall-clock time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .model import Config, Llama
from .tokens import BOS

#: (end as a fraction of the budget, sequence length). Short sequences first: attention costs
#: less there and most of what is learned early is local; long ones teach copying over distance.
STAGES = ((0.35, 512), (0.70, 1024), (0.95, 2048), (1.0, 4096))
BATCH_TOKENS = 4096
TEST_SHARE = 0.25
MUON_LR = 0.02
ADAM_LR = 3e-3
WARMUP_STEPS = 30
DECAY_START = 0.4
CHECKPOINT_SECONDS = 120.0
VALIDATION_SECONDS = 150.0
GOLDEN = 0.6180339887498949


def orthogonalize(gradient: Tensor, steps: int = 5) -> Tensor:
    """Return the matrix near ``gradient``'s orthogonal factor (Newton-Schulz, as in Muon)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x: Tensor = gradient.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if tall else x


class Muon:
    """Momentum whose update is orthogonalized (K. Jordan, 2024); for two-dimensional weights."""

    def __init__(self, weights: list[Tensor]) -> None:
        self.weights = weights
        self.momentum = [torch.zeros_like(w) for w in weights]

    @torch.no_grad()
    def step(self, lr: float, mu: float) -> None:
        """Take one step with learning rate ``lr`` and momentum ``mu``, weight decay 0.05."""
        for weight, momentum in zip(self.weights, self.momentum, strict=True):
            assert weight.grad is not None
            momentum.mul_(mu).add_(weight.grad)
            update = orthogonalize(weight.grad.add(momentum, alpha=mu)).to(weight.dtype)
            shape = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
            weight.mul_(1 - lr * 0.05).add_(update, alpha=-lr * shape)


class Batches:
    """Training sequences: windows into the token streams, the first token replaced by BOS.

    llama-perplexity does the same to each chunk it measures. Window starts follow the golden
    ratio, which covers a stream more evenly than random starts; they depend on the step alone.
    """

    def __init__(self, work: Path) -> None:
        self.streams = [read_stream(work, "library"), read_stream(work, "tests")]
        self.drawn = [0, 0]
        self.share = 0.0

    def window(self, length: int) -> NDArray[np.int64]:
        """Return ``length + 1`` consecutive tokens of one stream."""
        self.share += TEST_SHARE
        which = int(self.share >= 1.0)
        self.share -= which
        stream = self.streams[which]
        self.drawn[which] += 1
        start = int(self.drawn[which] * GOLDEN % 1.0 * (len(stream) - length - 1))
        ids = stream[start : start + length + 1].astype(np.int64)
        ids[0] = BOS
        return ids

    def batch(self, length: int, device: str) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, both (BATCH_TOKENS / length, length)."""
        rows = np.stack([self.window(length) for _ in range(BATCH_TOKENS // length)])
        ids = torch.from_numpy(rows).to(device)
        return ids[:, :-1], ids[:, 1:]


def read_stream(work: Path, name: str) -> NDArray[np.uint16]:
    """Return the token stream ``name`` that ``corpus.prepare`` wrote to ``work``."""
    return np.fromfile(work / f"{name}.bin", dtype=np.uint16)


@torch.no_grad()
def nll_per_token(model: Llama, ids: NDArray[np.uint16], length: int, chunks: int | None = None) -> float:
    """Return nats per token the way llama-perplexity counts: chunks, second halves only.

    ``ids`` starts with BOS, as llama.cpp's tokenizer begins the text; each chunk of ``length``
    tokens then has its first token replaced by BOS. ``chunks`` takes that many, evenly spread.
    """
    count = len(ids) // length
    picks = np.linspace(0, count - 1, min(count, chunks or count)).astype(int)
    device = model.token_embd.weight.device.type
    total = 0.0
    for pick in picks:
        row = torch.from_numpy(ids[pick * length : (pick + 1) * length].astype(np.int64))[None]
        row[0, 0] = BOS
        row = row.to(device)
        first = length // 2
        with torch.autocast(device, dtype=torch.bfloat16, enabled=model.training):
            logits = model(row)[:, first:-1].float().flatten(0, 1)
        total += torch.nn.functional.cross_entropy(logits, row[0, first + 1 :]).item()
    return total / len(picks)


def with_bos(ids: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Return ``ids`` with BOS in front."""
    return np.concatenate([np.array([BOS], dtype=np.uint16), ids])


@dataclass
class State:
    """Where the loop is: optimizer steps, tokens, seconds, and the last batch's length and loss."""

    step: int = 0
    tokens: int = 0
    elapsed: float = 0.0
    length: int = 0
    loss: float = 0.0
    next_save: float = CHECKPOINT_SECONDS
    next_validation: float = 60.0


def rate(fraction: float, step: int) -> float:
    """Learning-rate factor: linear warm-up in steps, constant, linear decay to 2 % in time."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return warm * min(1.0, max(0.02, (1.0 - fraction) / (1.0 - DECAY_START)))


def save(model: Llama, state: State, path: Path) -> None:
    """Write a checkpoint; the file is complete whenever it exists."""
    blob = {
        "config": asdict(model.config),
        "weights": model.state_dict(),
        "steps": state.step,
        "tokens": state.tokens,
    }
    torch.save(blob, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def build(config: Config, device: str, compiled: bool) -> tuple[Llama, Callable[[Tensor, Tensor], Tensor]]:
    """Return the untrained model and its loss function, compiled if wanted."""
    torch.manual_seed(0)
    model = Llama(config).to(device)
    return model, (torch.compile(model.loss, dynamic=False) if compiled else model.loss)


def split_weights(model: Llama) -> tuple[list[Tensor], list[Tensor]]:
    """Return (matrices of the layers, embedding and norms)."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, weight in model.named_parameters():
        inner = weight.ndim == 2 and not name.startswith("token_embd")
        (matrices if inner else others).append(weight)
    return matrices, others


def train(work: Path, config: Config, seconds: float, compiled: bool, log: Callable[[str], None]) -> Path:
    """Train for ``seconds`` of wall time; return the path of the last checkpoint.

    The clock starts after the first step of each sequence length, in which torch compiles.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    model, loss_of = build(config, device, compiled)
    matrices, others = split_weights(model)
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    batches, held_out = Batches(work), with_bos(read_stream(work, "heldout"))
    state, path, compiled_lengths = State(), work / "checkpoint.pt", set[int]()
    begin = time.monotonic()
    while (elapsed := time.monotonic() - begin) < seconds:
        fraction = elapsed / seconds
        length = next(t for end, t in STAGES if fraction < end)
        ids, targets = batches.batch(length, device)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = loss_of(ids, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        factor = rate(fraction, state.step)
        for group in adam.param_groups:
            group["lr"] = ADAM_LR * factor
        adam.step()
        muon.step(MUON_LR * factor, min(0.95, 0.85 + state.step / 3000))
        model.zero_grad(set_to_none=True)
        if length not in compiled_lengths:
            compiled_lengths.add(length)
            begin = time.monotonic() - elapsed
        state.step, state.tokens = state.step + 1, state.tokens + BATCH_TOKENS
        state.elapsed, state.length, state.loss = elapsed, length, loss.item()
        report(model, held_out, state, log)
        if elapsed > state.next_save:
            save(model, state, path)
            state.next_save = elapsed + CHECKPOINT_SECONDS
    save(model, state, path)
    log(f"end: {state.step} steps, {state.tokens} tokens, {time.monotonic() - begin:.0f} s")
    return path


def report(model: Llama, held_out: NDArray[np.uint16], state: State, log: Callable[[str], None]) -> None:
    """Log every 20th step; validate on 12 held-out chunks of 1024 tokens now and then."""
    if state.step % 20:
        return
    line = f"{state.elapsed:6.0f} s  step {state.step:5d}  tokens {state.tokens:9d}  length {state.length:4d}"
    line += f"  loss {state.loss:.4f}  {state.tokens / max(state.elapsed, 1.0):.0f} tok/s"
    if state.elapsed > state.next_validation:
        line += f"  val {nll_per_token(model, held_out, 1024, 12):.4f}"
        state.next_validation = state.elapsed + VALIDATION_SECONDS
    log(line)
