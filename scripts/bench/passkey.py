"""Keys of five digits hidden in a long prompt: how many does a model find again with each cache type?

    python scripts/bench/passkey.py --model org/name:file.gguf --ctx 2000 6000 --depths .02 .2 .4 .6 .8 .98 --trials 2
    python scripts/bench/passkey.py --model model.gguf --types 'f16,q4_0,turbo3t,turbo3t cal=none sink=0 tail=0'

A prompt is sentences of ours, without a digit, with one key at each depth: "The pass code of the windmill is 48213." A question for each
key follows in a chat of its own, in the chat template of the model; llama-server keeps what the prompts have in common, so the long
part is read once per prompt and type. Answers are greedy. One counts if the first number in it is the key, digit by digit: there is no
credit for nearly. All types get the same prompts.

Writes the table to standard output, and to --out with the line that says what it was made with. Exit codes are those of ppl-gate, but
for 1, which there is not.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
from turbo_gguf.measure.retrieval import ANSWER_TOKENS, PLACES, ROOM, is_right, prompt, question
from turbo_gguf.tools import default_threads

TYPES = ("f16", "q8_0", "q4_0", "turbo4t", "turbo3t", "turbo2t", "turbo3t cal=none sink=0 tail=0")
DEPTHS = (0.02, 0.2, 0.4, 0.6, 0.8, 0.98)


@dataclass
class Score:
    """Answers of a type: right and all of them, by context and by depth."""

    types: CacheSpec
    in_force: str = ""
    by_ctx: dict[int, list[bool]] = field(default_factory=dict)
    by_depth: dict[float, list[bool]] = field(default_factory=dict)


def ask(server: Server, words: str) -> str:
    """Answer of a new chat, greedily."""
    body = {
        "messages": [{"role": "user", "content": words}],
        "temperature": 0,
        "top_k": 1,
        "max_tokens": ANSWER_TOKENS,
        "cache_prompt": True,
    }
    return str(server.post("/v1/chat/completions", body)["choices"][0]["message"]["content"])


# --- measuring ------------------------------------------------------------------------------------------------------------


def measure(build: Build, model: ModelFile, types: CacheSpec, args: argparse.Namespace) -> Score:
    """Ask everything with a cache of these types. What ran must be what was asked for."""
    score = Score(types)
    log_path = assets.home() / "logs" / "passkey" / f"{re.sub(r'[^a-z0-9_]+', '-', str(types))}.log"
    started = time.monotonic()
    with serve(build, model, types, ctx=max(args.ctx) + ROOM, threads=args.threads, log_path=log_path) as server:
        check(build, model, types, log_path)
        for ctx in args.ctx:
            for trial in range(args.trials):
                made = prompt(lambda text: len(server.tokens(text)), ctx, args.depths, trial)
                for depth, place, key in made.keys:
                    answer = ask(server, question(made.text, place))
                    right = is_right(answer, key)
                    score.by_ctx.setdefault(ctx, []).append(right)
                    score.by_depth.setdefault(depth, []).append(right)
                    print(f"{types}, {ctx} tokens, depth {depth:g}: {key} {answer.strip()!r}", file=sys.stderr)
    print(f"{types}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    return score


def count(answers: Sequence[bool]) -> str:
    """``9 of 10``."""
    return f"{sum(answers)} of {len(answers)}"


def table(model: ModelFile, build: Build, scores: Sequence[Score], args: argparse.Namespace) -> str:
    """Counts of exact answers by context and by depth."""
    rows = [
        [report.types_text(score.types), *(count(score.by_ctx[ctx]) for ctx in args.ctx), *(count(a) for a in score.by_depth.values())]
        for score in scores
    ]
    header = ["cache K/V", *(f"{ctx} tokens" for ctx in args.ctx), *(f"depth {depth:g}" for depth in sorted(args.depths))]
    keys = f"{len(args.depths)} keys in a prompt, {args.trials} prompts of each length"
    made = f"llama.cpp {build.tree.commit[:12]}, patches {build.tree.digest[:12]}, {presets.backend_of(build.preset)}"
    return f"### {model.name}\n\n{keys}; {made}.\n\n{report.markdown(header, rows)}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as ppl-gate takes it; it must have a chat template")
    parser.add_argument("--types", nargs="+", default=TYPES, help=f"as ppl-gate takes them  [default: {','.join(TYPES)}]")
    parser.add_argument("--ctx", nargs="+", type=int, default=[2000, 6000], help="tokens of a prompt  [default: 2000 6000]")
    parser.add_argument("--depths", nargs="+", type=float, default=DEPTHS, help=f"of the keys, 0 to 1  [default: {DEPTHS}]")
    parser.add_argument("--trials", type=int, default=1, help="prompts of each length  [default: 1]")
    parser.add_argument("--threads", type=int, default=default_threads(), help="of llama.cpp  [default: one per core]")
    parser.add_argument("--preset", default="cpu", help="what llama.cpp is built for  [default: cpu]")
    parser.add_argument("--out", type=Path, default=assets.home() / "report" / "passkey.md", help="[default: build/report/passkey.md]")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # the server must end, too
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Measure all types; the table grows with each."""
    if not len(set(args.depths)) == len(args.depths) <= len(PLACES) or not all(0 <= depth <= 1 for depth in args.depths):
        raise UsageError(f"--depths: 1 to {len(PLACES)} different numbers from 0 to 1", "")
    if min(args.ctx) < 4 * ROOM or args.trials < 1:
        raise UsageError(f"--ctx: {4 * ROOM} tokens or more; --trials: 1 or more", "")
    environment.settings_in_environment()
    model = model_of(args.model)
    types = [parse_types(text) for text in split(args.types)]
    for one in types:
        fit.check_fit(one, model)
    build = ensure_build(args.preset, targets=("llama-server",))
    scores: list[Score] = []
    for one in types:
        scores.append(measure(build, model, one, args))
        text = table(model, build, scores, args)
        write_result(args.out, f"# Pass codes found again\n\n{text}", patches=build.tree.digest)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
