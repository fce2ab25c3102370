"""Hours of mixed and hostile traffic on the patched llama-server: make soak.

Exit codes: 0 all right, 1 a check failed (the message names it, and the folder with the server's log), 2 usage, 3 environment,
4 a tool crashed; 130 after Ctrl-C, with the summary so far.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import tiny_models
from slots import characters

from soak.journal import Journal
from soak.session import SERVERS, Session
from turbo_gguf import failures
from turbo_gguf.assets import home
from turbo_gguf.cache import fit
from turbo_gguf.cache.spec import parse_types
from turbo_gguf.cli.options import split
from turbo_gguf.errors import EXIT_GATE_FAILED, UsageError
from turbo_gguf.files import write_text
from turbo_gguf.inputs import models
from turbo_gguf.make.build import ensure_build

TYPES = f"turbo3t tail={tiny_models.N_CTX},turbo3t,turbo4t,turbo2"
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the soak; returns the exit code."""
    parser = argparse.ArgumentParser(prog="soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120, help="of all types together (120)")
    parser.add_argument("--types", default=TYPES, help=f"cache types, as in ppl-gate ({TYPES})")
    parser.add_argument("--model", help="GGUF file or name of a model, instead of a tiny one that is made here")
    parser.add_argument("--seed", default=None, help="of the traffic; a new one when there is none")
    parser.add_argument("--preset", default="cpu", help="of the build; with cpu-debug memory is the sanitizers' (cpu)")
    parser.add_argument("--bin", type=Path, help="folder with a finished llama-server, instead of a build of this checkout")
    parser.add_argument("--out", type=Path, default=home() / "report" / "soak", help="folder of the log and of what servers write")
    return failures.exit_code(lambda: soak(parser.parse_args(argv)))


def soak(options: argparse.Namespace) -> int:
    """Each type has its part of the time."""
    if options.minutes <= 0:
        raise UsageError(f"--minutes {options.minutes:g}: there is no time", "give more than 0")
    types = [parse_types(name) for name in split([options.types])]
    options.out.mkdir(parents=True, exist_ok=True)
    model = models.resolve(options.model).path if options.model else tiny_models.write("head64", options.out)
    for asked in types:
        fit.check_fit(asked, models.read(model))
    native_bin = options.bin or ensure_build(options.preset, targets=("llama-server",)).path / "bin"
    seed = options.seed or str(random.SystemRandom().randrange(10**9))
    journal = Journal(options.out / "soak.jsonl")
    print(f"seed {seed}; log: {journal.path}", file=sys.stderr)
    is_interrupted = False
    try:
        sessions = [(asked, kind) for asked in types for kind in SERVERS]
        for number, (asked, kind) in enumerate(sessions):
            folder = (options.out / f"{number}-{kind}").resolve()
            session = Session(asked, kind, native_bin.resolve(), model.resolve(), folder, journal, seed, "debug" in options.preset)
            session.run(characters(Path(tiny_models.__file__)), options.minutes / len(sessions))
    except KeyboardInterrupt:
        is_interrupted = True
        journal.write("interrupted")
    write_text(options.out / "summary.md", journal.summary() + "\n")
    print(journal.summary())
    return INTERRUPTED if is_interrupted else EXIT_GATE_FAILED if journal.failures else 0


if __name__ == "__main__":
    for sign in (signal.SIGINT, signal.SIGTERM):  # a shell that runs us in the background has us ignore the first
        signal.signal(sign, signal.default_int_handler)
    sys.exit(main())
