"""List the files of eval/results that are older than what they depend on.

    python scripts/check_results.py            # a warning for each (make check)
    python scripts/check_results.py --strict   # old results are an error (make release-check)
    python scripts/check_results.py --stamp eval/results/kernels.md   # this file was made from the tree as it is now

Exit codes: 0 all is well, or warnings only; 1 an old result, with --strict; 2 a result without its line, or a wrong table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from turbo_gguf.errors import EXIT_USAGE, TurboError
from turbo_gguf.judge import results

OLD = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strict", action="store_true", help="an old result is an error")
    parser.add_argument("--stamp", nargs="+", type=Path, default=[], metavar="FILE", help="write the line of today into these files")
    options = parser.parse_args(argv)
    try:
        for path in options.stamp:
            results.write(path, path.read_text("utf-8"))
        states = results.check()
    except TurboError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return error.exit_code
    for state in states:
        if state.problem:
            word = "error" if state.wrong or options.strict else "warning"
            print(f"{word}: eval/results/{state.name}: {state.problem}" + (f"; again: {state.hint}" if state.hint else ""), file=sys.stderr)
    if any(state.wrong for state in states):
        return EXIT_USAGE
    return OLD if options.strict and any(state.problem for state in states) else 0


if __name__ == "__main__":
    sys.exit(main())
