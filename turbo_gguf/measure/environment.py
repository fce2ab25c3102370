"""The variables in force: part of what is measured, or a reason not to measure."""

from __future__ import annotations

import os

from turbo_gguf.cache.settings import OFF, SETTINGS
from turbo_gguf.errors import UsageError

_HARMLESS = ("LLAMA_CACHE", "LLAMA_OFFLINE")

CACHE_SETTINGS = ("TURBO_CACHE_PRESET", *(name for setting in SETTINGS for name in setting.variables))
"""What the options of a case set. From outside, they would change all cases, the base included."""


OF_NUMBERS = ("GGML_", "TURBO_")
"""How variables begin that decide what comes out."""

OF_SPEED = (*OF_NUMBERS, "OMP_", "GOMP_")
"""The same of speed: how threads wait decides it."""


def settings_in_environment(prefixes: tuple[str, ...] = OF_NUMBERS) -> tuple[str, ...]:
    """Variables in force whose names start so, as NAME=value: part of what a case is. TURBO_GGUF_* are the driver's own.

    Raises:
        UsageError: a LLAMA_* variable, or one that sets a cache, is set that would change what is measured behind the back of the case.
    """
    bad = sorted(name for name in os.environ if name.startswith("LLAMA_") and name not in _HARMLESS)
    if bad:
        raise UsageError(
            f"the environment sets {', '.join(bad)}: llama.cpp would read it and measure something else",
            f"unset {' '.join(bad)}",
        )
    if ours := [name for name in CACHE_SETTINGS if name in os.environ]:
        raise UsageError(
            f"the environment sets {', '.join(ours)}: it would change every case, the base that all are compared with included",
            f"unset {' '.join(ours)}; ask for it in the type: --types 'turbo3 k=0,-1:q8_0', 'turbo3 decay=balanced', 'turbo3 {OFF}'; "
            "or, of a file, with --cache-preset",
        )
    return tuple(sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith(prefixes) and not k.startswith("TURBO_GGUF_")))
