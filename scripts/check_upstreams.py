"""Compile every supported upstream with the patch set for the CPU, and run on each what shows that the types work.

Applying is not compiling: an upstream is called supported when it is in this table. About eight minutes of two cores per
upstream, so it is not part of the tests:  make check-upstreams
"""

from __future__ import annotations

import re
import sys
from datetime import UTC, datetime
from pathlib import Path

from turbo_gguf import patchset
from turbo_gguf.assets import embedded_model, home
from turbo_gguf.inputs.eval_text import write_held_out_text
from turbo_gguf.make.build import Build, ensure_build
from turbo_gguf.make.upstream import supported
from turbo_gguf.tools import run

TARGETS = (
    "llama-completion",
    "llama-perplexity",
    "llama-bench",
    "test-quantize-fns",
    "test-backend-ops",
    "test-turbo-cache",
    "test-turbo-layers",
    "test-turbo-decay",
    "test-turbo-calibration",
    "test-turbo-exact",
)
RESULT = Path(__file__).parent.parent / "eval" / "results" / "upstreams.md"
OPS = "SET_ROWS,GET_ROWS,CPY,MUL_MAT,FLASH_ATTN_EXT"


def backend_ops(build: Build, log: Path) -> str:
    """Turbo cases of test-backend-ops on the CPU, "passed/all"."""
    done = run([build.tool("test-backend-ops"), "test", "-b", "CPU", "-o", OPS, "-p", "turbo"], log=log)
    counts = re.findall(r"(\d+)/(\d+) tests passed", done.stdout.read_text("utf-8"))
    return "/".join(str(sum(int(pair[side]) for pair in counts)) for side in (0, 1))


def perplexity(build: Build, text: Path, cache_type: str, log: Path) -> str:
    """Perplexity of the embedded model over eight chunks of 512 tokens."""
    types = ["-ctk", cache_type, "-ctv", cache_type]
    done = run([build.tool("llama-perplexity"), "-m", embedded_model(), "-f", text, "-c", "512", "--chunks", "8", *types], log=log)
    both = done.stdout.read_text("utf-8") + done.stderr.read_text("utf-8")
    found = re.search(r"Final estimate: PPL = ([\d.]+)", both)
    return found[1] if found else "no result"


def main() -> None:
    """Write the table; an upstream that fails ends the run with its error."""
    logs = home() / "logs" / "check-upstreams"
    text = home() / "held-out.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    write_held_out_text(text)
    rows = []
    for name, upstream in supported().items():
        build = ensure_build(upstream=name, targets=TARGETS)
        run([build.tool("test-quantize-fns")], log=logs / f"{name}-quantize-fns")
        ops = backend_ops(build, logs / f"{name}-backend-ops")
        ppl = [perplexity(build, text, kind, logs / f"{name}-{kind}") for kind in ("f16", "q4_0", "turbo4", "turbo3", "turbo2")]
        rows.append(f"| {name} | `{upstream.commit}` | ok | ok | {ops} | {' | '.join(ppl)} |")
        print(rows[-1], file=sys.stderr)
    head = [
        "# The patch set on every supported upstream",
        "",
        f"`make check-upstreams`, {datetime.now(UTC):%Y-%m-%d}, patches `{patchset.load().digest[:12]}`, {build.compiler}.",
        "Turbo cases of test-backend-ops passed, and perplexity of the embedded model (8 chunks of 512 tokens).",
        "",
        "| upstream | commit | compiled | test-quantize-fns | test-backend-ops | f16 | q4_0 | turbo4 | turbo3 | turbo2 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    RESULT.write_text("\n".join([*head, *rows]) + "\n", "utf-8")


if __name__ == "__main__":
    main()
