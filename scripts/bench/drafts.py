"""How much a draft speeds up decoding, with each cache type beside f16.

    python scripts/bench/drafts.py --model target.gguf --draft draft.gguf --text text.txt --depths 512 2048
    python scripts/bench/drafts.py --model target.gguf --text text-that-repeats-itself.txt --n-max 16

For each type two servers run, one with drafts and one without, and all of them go on with the same text, greedily, in rounds that
alternate over the servers. The prompt is read once, and decoding is what is timed. The draft model has the cache types of its target.
Without one, drafts are what followed the last 12 tokens earlier in the text (ngram-simple).
A gain is tokens per second with drafts over those without, as medians over the rounds. It depends on how many tokens are accepted,
which the table says, too: types whose text differs have other ones.

Writes the table to standard output, and to --out with the line that says what it was made with. Exit codes are those of ppl-gate, but
for 1, which there is not.
"""

from __future__ import annotations

import argparse
import re
import signal
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from one_server import Server, check, serve

from turbo_gguf import assets
from turbo_gguf.cache import fit
from turbo_gguf.cache.spec import CacheSpec, parse_types
from turbo_gguf.cli.options import model_of, split
from turbo_gguf.errors import UsageError
from turbo_gguf.failures import exit_code
from turbo_gguf.inputs.models import ModelFile
from turbo_gguf.judge import report
from turbo_gguf.judge.results import write as write_result
from turbo_gguf.make import presets
from turbo_gguf.make.build import Build, ensure_build
from turbo_gguf.measure import environment
from turbo_gguf.tools import default_threads

TYPES = ("f16", "q8_0", "turbo4t", "turbo3t", "turbo2t")
ROOM = 64
"""Tokens of the context beside prompt and answer: a draft may be decoded beyond the end."""


@dataclass
class Speed:
    """Tokens per second in each round, and what became of the drafts."""

    rates: list[float] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0

    def add(self, timings: dict[str, Any]) -> None:
        self.rates.append(float(timings["predicted_per_second"]))
        self.drafted += int(timings.get("draft_n", 0))
        self.accepted += int(timings.get("draft_n_accepted", 0))

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


@dataclass
class Pair:
    """A type without drafts and with them, at a depth."""

    types: CacheSpec
    depth: int
    plain: Speed = field(default_factory=Speed)
    drafts: Speed = field(default_factory=Speed)

    @property
    def gain(self) -> float:
        return self.drafts.rate / self.plain.rate


def drafting(args: argparse.Namespace, draft: ModelFile | None, types: CacheSpec) -> list[str]:
    """Options of the server that drafts."""
    n_max = str(args.n_max)
    if draft is None:
        return ["--spec-type", "ngram-simple", "--spec-ngram-simple-size-m", n_max]
    model = ["-md", str(draft.path), "-td", str(args.threads), "-ctkd", types.k, "-ctvd", types.v]
    return ["--spec-type", "draft-simple", *model, "--spec-draft-n-max", n_max]


def read(server: Server, tokens: Sequence[int], n: int) -> dict[str, Any]:
    """Timings of n tokens behind a prompt."""
    body = {"prompt": list(tokens), "n_predict": n, "temperature": 0, "top_k": 1, "ignore_eos": True, "cache_prompt": True}
    return dict(server.post("/completion", body)["timings"])


def measure(
    build: Build, model: ModelFile, draft: ModelFile | None, kinds: Sequence[CacheSpec], args: argparse.Namespace
) -> Iterator[list[Pair]]:
    """All servers at once, of which only one computes at a time; what is known after each round."""
    pairs = [Pair(types, depth) for depth in args.depths for types in kinds]
    ctx = max(args.depths) + args.n + ROOM
    logs = assets.home() / "logs" / "drafts"
    with ExitStack() as stack:
        servers: dict[tuple[CacheSpec, bool], Server] = {}
        for types in kinds:
            for is_drafting in (False, True):
                name = f"{re.sub(r'[^a-z0-9_]+', '-', str(types))}-{'drafts' if is_drafting else 'plain'}.log"
                options = drafting(args, draft, types) if is_drafting else []
                serving = serve(build, model, types, *options, ctx=ctx, threads=args.threads, log_path=logs / name)
                servers[types, is_drafting] = stack.enter_context(serving)
                if not is_drafting:
                    check(build, model, types, logs / name)
        tokens = next(iter(servers.values())).tokens(args.text.read_text("utf-8", errors="replace")[: 16 * ctx])
        if len(tokens) < max(args.depths):
            raise UsageError(f"{args.text}: {len(tokens)} tokens in {16 * ctx} characters; the longest prompt has {max(args.depths)}", "")
        for number in range(args.rounds + 1):
            for pair in pairs:
                for speed, is_drafting in ((pair.plain, False), (pair.drafts, True)):
                    timings = read(servers[pair.types, is_drafting], tokens[: pair.depth], args.n)
                    if number > 0:  # the first one reads the prompt, and everything for the first time
                        speed.add(timings)
            print(f"round {number} of {args.rounds}", file=sys.stderr)
            if number > 0:
                yield pairs


def table(model: ModelFile, build: Build, pairs: Sequence[Pair], args: argparse.Namespace, how: str) -> str:
    """Speeds, gains, and what was accepted."""
    header = ["tokens before", "cache K/V", "without, t/s", "with drafts, t/s", "gain", "gain / f16's", "accepted"]
    rows = []
    for pair in pairs:
        f16 = next((other.gain for other in pairs if other.depth == pair.depth and str(other.types) == "f16"), None)
        rows.append(
            [
                str(pair.depth),
                report.types_text(pair.types),
                f"{pair.plain.rate:.1f}",
                f"{pair.drafts.rate:.1f}",
                f"{pair.gain:.2f}",
                "" if f16 is None else f"{pair.gain / f16:.2f}",
                f"{pair.drafts.accepted} of {pair.drafts.drafted}",
            ]
        )
    made = (
        f"llama.cpp {build.tree.commit[:12]}, patches {build.tree.digest[:12]}, {presets.backend_of(build.preset)}, {args.threads} threads"
    )
    about = f"Drafts of up to {args.n_max} tokens {how}; {args.n} tokens, {len(pairs[0].plain.rates)} rounds; {made}."
    return f"### {model.name}\n\n{about}\n\n{report.markdown(header, rows)}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as ppl-gate takes it")
    parser.add_argument("--draft", help="a smaller model with the same vocabulary, as --model")
    parser.add_argument("--text", type=Path, required=True, help="what the prompts are the beginning of")
    parser.add_argument("--types", nargs="+", default=TYPES, help=f"as ppl-gate takes them  [default: {','.join(TYPES)}]")
    parser.add_argument("--depths", nargs="+", type=int, default=[512, 2048], help="tokens of a prompt  [default: 512 2048]")
    parser.add_argument("--n", type=int, default=96, help="tokens that are decoded  [default: 96]")
    parser.add_argument("--n-max", type=int, default=6, help="tokens of a draft  [default: 6]")
    parser.add_argument("--rounds", type=int, default=5, help="[default: 5]")
    parser.add_argument("--threads", type=int, default=default_threads(), help="of llama.cpp  [default: one per core]")
    parser.add_argument("--preset", default="cpu", help="what llama.cpp is built for  [default: cpu]")
    parser.add_argument("--out", type=Path, default=assets.home() / "report" / "drafts.md", help="[default: build/report/drafts.md]")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # the servers must end, too
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Measure; the table is written after each round."""
    if min(*args.depths, args.n, args.n_max, args.rounds) < 1:
        raise UsageError("--depths, --n, --n-max, --rounds: 1 or more", "")
    if not args.text.is_file():
        raise UsageError(f"--text {args.text}: no such file", "")
    environment.settings_in_environment()
    model = model_of(args.model)
    draft = model_of(args.draft) if args.draft else None
    kinds = [parse_types(text) for text in split(args.types)]
    for types in kinds:
        fit.check_fit(types, model)
        if draft:
            fit.check_fit(types, draft)
    build = ensure_build(args.preset, targets=("llama-server",))
    how = f"by {draft.name}" if draft else "by ngram-simple"
    text = ""
    for pairs in measure(build, model, draft, kinds, args):
        text = table(model, build, pairs, args, how)
        write_result(args.out, f"# Speed with drafts\n\n{text}", patches=build.tree.digest)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
