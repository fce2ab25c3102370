"""Write ``ggml-turbo-tables.h`` from :mod:`turbo_gguf.codec.tables`.

``python -m turbo_gguf.codec.codegen`` writes the header, ``--check`` only compares it (exit code 1 when they differ).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from turbo_gguf.assets import patches_dir
from turbo_gguf.codec import tables

HEADER = Path("overlay") / "ggml" / "src" / "ggml-turbo-tables.h"
WRITE_COMMAND = "python -m turbo_gguf.codec.codegen"

_INTRO = f"""\
// Generated from turbo_gguf/codec/tables.py by `{WRITE_COMMAND}`: do not edit.
//
// Initialisers only, so that C, C++, CUDA and HIP can each declare their tables where they want them:
//     static const int8_t turbo4_codebook[16] = {{ TURBO4_CODEBOOK }};
//
// CODEBOOK    decoded value = d * CODEBOOK[index]; ascending, so that the high index bit is set for the positive half
// MAGNITUDES  positive half of the codebook
// THRESHOLDS  one row per step that the scale search tries: with t = round(|x| * T_MAX / max|x|), the magnitude index is
//             the number of thresholds of the row that t exceeds
// PLAIN       the row that is used without a search
//
// Trellis types:
//
// FINE, COARSE  the two codebooks, all levels in ascending order, in units of d / LEVEL_STEPS
// REACH         the first scale that the encoder tries, in units of the block's rms
// X_STEPS       parts of a level step in which the encoder measures
// X_SCALE       its integers per d of a value: X_STEPS * LEVEL_STEPS * the gain that makes inner products right on average

#pragma once

// clang-format off
"""


def _ints(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


def _define(name: str, body: str) -> str:
    return f"#define {name} {body}\n"


def _rows(name: str, rows: Iterable[Iterable[int]]) -> str:
    """Render the initialiser of a two-dimensional array, one row per line."""
    return f"#define {name} \\\n" + ", \\\n".join(f"    {{ {_ints(row)} }}" for row in rows) + "\n"


def _section(t: tables.TurboType) -> str:
    p = f"TURBO{t.bits}"
    parts = [
        _define(f"{p}_BLOCK_BYTES", str(t.block_bytes)),
        _define(f"{p}_CODEBOOK", _ints(t.codebook)),
        _define(f"{p}_MAGNITUDES", _ints(t.magnitudes)),
        _define(f"{p}_N_STEPS", str(len(t.thresholds))),
        _rows(f"{p}_THRESHOLDS", t.thresholds),
        _define(f"{p}_PLAIN", _ints(t.plain_thresholds)),
    ]
    return f"\n// {t.name}: {t.block_bytes * 8 / tables.QK_TURBO:g} bits per value\n" + "".join(parts)


def _trellis_section(t: tables.TrellisType) -> str:
    p = f"TURBO{t.bits}T"
    fine, coarse = t.codebooks
    parts = [
        _define(f"{p}_BLOCK_BYTES", str(t.block_bytes)),
        _define(f"{p}_REACH", f"{t.reach:.9g}f"),
        _define(f"{p}_X_STEPS", str(t.x_steps)),
        _define(f"{p}_X_SCALE", f"{t.x_scale:.9g}f"),
        _define(f"{p}_FINE", _ints(fine)),
        _define(f"{p}_COARSE", _ints(coarse)),
    ]
    return f"\n// {t.name}: {t.block_bytes * 8 / tables.QK_TRELLIS:g} bits per value\n" + "".join(parts)


def render() -> str:
    """Return the text of the header."""
    common = [
        "\n// encoder\n",
        _define("QK_TURBO", str(tables.QK_TURBO)),
        _define("TURBO_T_MAX", str(tables.T_MAX)),
        _define("TURBO_AMAX_MIN", f"{2.0**tables.AMAX_MIN_EXP:.9g}f"),
        _define("TURBO_HALF_MAX", f"{tables.HALF_MAX:.1f}f"),
        _define("TURBO_HALF_NAN", f"0x{tables.HALF_NAN:04x}"),
    ]
    trellis = [
        "\n// trellis types\n",
        _define("QK_TRELLIS", str(tables.QK_TRELLIS)),
        _define("TURBO_T_SEGMENT", str(tables.SEGMENT)),
        _define("TURBO_T_N_STATES", str(tables.N_STATES)),
        _define("TURBO_T_LEVEL_STEPS", str(tables.LEVEL_STEPS)),
        _define("TURBO_T_N_SCALES", str(tables.N_SCALES)),
        _define("TURBO_T_SCALE_MIN", f"0x{tables.SCALE_MIN:02x}"),
        _define("TURBO_T_SCALE_MAX", f"0x{tables.SCALE_MAX:02x}"),
        _define("TURBO_T_SCALE_NAN", f"0x{tables.SCALE_NAN:02x}"),
        _define("TURBO_T_AMAX_MIN", f"{2.0**tables.TRELLIS_AMAX_MIN_EXP:.9g}f"),
        _define("TURBO_T_RMS_MAX", str(tables.RMS_MAX)),
        _define("TURBO_T_X_MAX", str(tables.X_MAX)),
        _define("TURBO_T_DISTANCE_MAX", str(tables.DISTANCE_MAX)),
        _define("TURBO_T_COST_MAX", str(tables.COST_MAX)),
        _define("TURBO_T_AMAX_PART", str(tables.AMAX_PART)),
    ]
    scalar_sections = (_section(t) for t in tables.TYPES)
    trellis_sections = (_trellis_section(t) for t in tables.TRELLIS_TYPES)
    return _INTRO + "".join([*common, *scalar_sections, *trellis, *trellis_sections])


def is_current(path: Path) -> bool:
    """Whether the header on disk is what the tables say."""
    return path.is_file() and path.read_text(encoding="utf-8") == render()


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the header; return the exit code."""
    parser = argparse.ArgumentParser(prog=WRITE_COMMAND, description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only; exit code 1 when the header is out of date")
    parser.add_argument("--output", type=Path, default=patches_dir() / HEADER, help="header to write or compare")
    args = parser.parse_args(argv)
    path: Path = args.output
    if args.check:
        if is_current(path):
            return 0
        print(f"error: {path} does not match turbo_gguf/codec/tables.py\nhint: {WRITE_COMMAND}", file=sys.stderr)
        return 1
    path.write_text(render(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
