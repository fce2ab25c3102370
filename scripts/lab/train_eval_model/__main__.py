"""Train the evaluation models: the one that ships in turbo_gguf/data/model, and those of eval/models.

Usage, from the repository's root, with the extra ``train`` installed::

    python -m scripts.lab.train_eval_model all --compile --seconds 3500 --work WORK
    python -m scripts.lab.train_eval_model all --model head64 --compile --seconds 2900 --work WORK64

``tokenizer``, ``train`` and ``export`` are the three steps of ``all``. Decisions, and why:

Data (corpus.py). Sources of the standard library, which every machine has: the modules of
``turbo_gguf.inputs.eval_text.HELD_OUT``, whatever is named like them, their tests, generated tables and
installed packages are left out. Several ``--stdlib`` folders give more text; identical files
count once. A quarter of the sequences comes from tests, the rest from library code, which is
what the held-out text is.

Tokenizer (tokens.py). 4096 pieces keep the tied embedding at a sixth of the weights. Pieces may
hold punctuation and line ends: 3.7 bytes per token, so that a chunk of 1024 tokens is a hundred
lines of code with something to look back at.

Models (model.py). ``embedded``: four layers of width 384, four query heads on two KV heads, head
size 128, 8.7 million weights, 9.3 MB as q8_0. ``head64``: five layers of width 256, head size 64,
5.0 million weights, 5.3 MB: what KV-cache types cost depends on the head size (a block of 64
values is the whole head), so one model does not settle it.

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

from turbo_gguf.inputs.eval_text import stdlib_dir

from .export import evaluate, export
from .model import CONFIGS
from .tokens import prepare
from .training import train

ROOT = Path(__file__).parents[3]
FILES = {
    "embedded": ROOT / "turbo_gguf" / "data" / "model" / "eval-model.gguf",
    "head64": ROOT / "eval" / "models" / "head64.gguf",
}
"""Where models are in the repository."""

NAME = "turbo-gguf evaluation model"


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

        train(args.work, CONFIGS[args.model], args.seconds, args.compile, log)


def run_export(args: argparse.Namespace) -> None:
    """Write the checkpoint as GGUF and measure that file on the held-out text."""
    out = args.out or FILES[args.model]
    export(args.work, out, NAME if args.model == "embedded" else f"{NAME}, {args.model}")
    print(f"{out}: {out.stat().st_size} bytes")
    for line in evaluate(args.work, out, (1024, 2048, 4096), args.chunks):
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
        if name != "tokenizer":
            command.add_argument("--model", choices=CONFIGS, default="embedded")
        if name in ("tokenizer", "all"):
            command.add_argument("--stdlib", type=Path, action="append", help="repeatable")
        if name in ("train", "all"):
            command.add_argument("--seconds", type=float, default=3600.0)
            command.add_argument("--compile", action="store_true", help="use torch.compile")
        if name in ("export", "all"):
            command.add_argument("--out", type=Path, help="[default: the model's place in the repository]")
            command.add_argument("--chunks", type=int, help="per length, evenly spread")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
