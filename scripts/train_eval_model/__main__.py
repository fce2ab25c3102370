"""Train the evaluation model that ships in turbo_gguf/data/model.

Usage, from the repository's root, with the extra ``train`` installed::

    python -m scripts.train_eval_model all --compile --seconds 3500 --work WORK

``tokenizer``, ``train`` and ``export`` are the three steps of ``all``. Decisions, and why:

Data (corpus.py). Sources of the standard library, which every machine has: the modules of
``turbo_gguf.eval_text.HELD_OUT``, whatever is named like them, their tests, generated tables and
installed packages are left out. Several ``--stdlib`` folders give more text; identical files
count once. A quarter of the sequences comes from tests, the rest from library code, which is
what the held-out text is.

Tokenizer (tokens.py). 4096 pieces keep the tied embedding at a sixth of the weights. Pieces may
hold punctuation and line ends: 3.7 bytes per token, so that a chunk of 1024 tokens is a hundred
lines of code with something to look back at.

Model (model.py). Four layers of width 384, four query heads on two KV heads, head size 128 (the
size that KV-cache types are blocked for), 8.7 million weights, 9.3 MB as q8_0.

Training (training.py). Wall time decides the schedule, because a CPU shared with other work has
no known speed. Sequences grow from 512 to 4096 tokens. Muon on the matrices and AdamW on the
embedding and the norms; bf16 autocast; one CPU thread. Every sequence begins with
BOS, as llama-perplexity's chunks do. Seeds are fixed, but since the schedule follows the clock
two runs do not give the same bits.

Export (export.py). Matrices as q8_0 and norms as f32; the quality is measured on the weights
read back from that file, in f32, the way llama-perplexity counts.

Validation during training and the final numbers use the held-out text; nothing was selected by
them (one run, no search over settings).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from turbo_gguf.eval_text import stdlib_dir

from .export import evaluate, export
from .tokens import prepare
from .training import train

MODEL = Path(__file__).parents[2] / "turbo_gguf" / "data" / "model" / "eval-model.gguf"


def run_tokenizer(args: argparse.Namespace) -> None:
    """Train the tokenizer and write the token streams."""
    args.work.mkdir(parents=True, exist_ok=True)
    print(prepare(args.stdlib or [stdlib_dir()], args.work), flush=True)


def run_train(args: argparse.Namespace) -> None:
    """Train the model; write checkpoint.pt and training-log.txt."""
    with (args.work / "training-log.txt").open("w", encoding="utf-8") as file:

        def log(line: str) -> None:
            for stream in (file, sys.stderr):
                print(line, file=stream, flush=True)

        train(args.work, args.seconds, args.compile, log)


def run_export(args: argparse.Namespace) -> None:
    """Write the checkpoint as GGUF and measure that file on the held-out text."""
    export(args.work, args.out)
    print(f"{args.out}: {args.out.stat().st_size} bytes")
    for line in evaluate(args.work, args.out, (1024, 2048, 4096), args.chunks):
        print(line, flush=True)


def run_all(args: argparse.Namespace) -> None:
    """Run the three steps."""
    for step in (run_tokenizer, run_train, run_export):
        step(args)


def main() -> None:
    """Parse the command line and run one step."""
    parser = argparse.ArgumentParser(prog="train_eval_model", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run in (
        ("tokenizer", run_tokenizer),
        ("train", run_train),
        ("export", run_export),
        ("all", run_all),
    ):
        command = commands.add_parser(name, help=run.__doc__)
        command.set_defaults(run=run)
        command.add_argument("--work", type=Path, default=Path("build/eval-model"))
        if name in ("tokenizer", "all"):
            command.add_argument("--stdlib", type=Path, action="append", help="repeatable")
        if name in ("train", "all"):
            command.add_argument("--seconds", type=float, default=3600.0)
            command.add_argument("--compile", action="store_true", help="use torch.compile")
        if name in ("export", "all"):
            command.add_argument("--out", type=Path, default=MODEL)
            command.add_argument("--chunks", type=int, help="per length, evenly spread")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
