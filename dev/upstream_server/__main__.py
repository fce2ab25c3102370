"""Upstream's server tests on the patched llama-server: make test-server.

Exit codes: 0 nothing failed that f16 passes, 1 a test failed with a type of ours (or q8_0) and not with f16.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from turbo_gguf.assets import home
from turbo_gguf.judge.results import write as write_result
from turbo_gguf.make import upstream
from turbo_gguf.make.build import ensure_build
from upstream_server import repositories, table
from upstream_server.session import Session

TYPES = "f16,q8_0,turbo4t,turbo3t"
LIMIT = 1800.0
RESULT = Path(__file__).resolve().parents[2] / "eval" / "results" / "server-tests.md"

HEAD = """# Upstream's server tests with our caches

`make test-server`, {date}, llama.cpp {upstream}, {minutes:.0f} minutes on {threads} thread of a shared machine.

`tools/server/tests` as upstream has them, with `LLAMA_ARG_CACHE_TYPE_K` and `_V` set, and those of drafts. Turbo types bring their
calibration, sink and tail. Small models that are made here stand for those of the hub
([which](../../dev/upstream_server/README.md)). A number is that of the cases that passed. A test that fails is tried once more.

"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tests with each type; returns the exit code."""
    parser = argparse.ArgumentParser(prog="upstream_server", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", help="names of tests as pytest has them, such as unit/test_lora.py; all when there is none")
    parser.add_argument("--types", default=TYPES, help=f"cache types ({TYPES})")
    parser.add_argument("--server", type=Path, help="llama-server to test, instead of a build of this checkout")
    parser.add_argument("--threads", type=int, default=1, help="threads of each server (1)")
    parser.add_argument("--out", type=Path, default=home() / "report" / "server-tests.md", help=f"the table ({RESULT.name} below report/)")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # pytest and its servers end with this process

    source = upstream.fetch(upstream.resolve()).path
    server = options.server or ensure_build("cpu", targets=("llama-server",)).path / "bin" / "llama-server"
    folder = home() / "server-tests"
    found = repositories.make(folder / "models")
    outcomes, calibrations, started = {}, {}, time.monotonic()
    for name in options.types.split(","):
        session = Session(source, server.resolve(), found, folder / name, name, options.threads)
        outcomes[name] = session.run_twice(options.tests, limit=LIMIT)
        calibrations[name] = session.calibrations()
        print(f"{name}: {sum(one.ended == 'passed' for one in outcomes[name].values())} passed; log: {session.log}", file=sys.stderr)
    head = HEAD.format(
        date=datetime.now(UTC).date(), upstream=upstream.default_name(), minutes=(time.monotonic() - started) / 60, threads=options.threads
    )
    path = write_result(options.out, head + table.write(outcomes, calibrations))
    print(path)
    for test, types in table.failures(outcomes).items():
        print(f"{test}: failed with {', '.join(types)}", file=sys.stderr)
    return 1 if table.ours(outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
