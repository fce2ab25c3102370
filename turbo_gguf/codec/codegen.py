"""Write what C, C++, CUDA, HIP and shaders know of the turbo types from :mod:`turbo_gguf.codec.tables`.

``python -m turbo_gguf.codec.codegen`` writes the files of :data:`GENERATED`, ``--check`` only compares them (exit code 1 when one differs).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from turbo_gguf.assets import patches_dir
from turbo_gguf.codec import tables

WRITE_COMMAND = "python -m turbo_gguf.codec.codegen"

_GENERATED = f"// Generated from turbo_gguf/codec/tables.py by `{WRITE_COMMAND}`: do not edit.\n"

#
# ggml-turbo-enum.inc
#

_ENUM_INTRO = f"""\
{_GENERATED}//
// Turbo entries of enum ggml_type, included before its first entry.
//
// The ids start at 64, far above upstream's counter, so that a type that upstream adds never takes one of ours. They are
// stored in state and slot files, never in model files. GGML_TYPE_COUNT is a fixed number at the end of upstream's
// enum: renamed here, defined anew in ggml-turbo-types.h once the enum is closed.
// clang-format off
"""


def enum() -> str:
    """Return ``ggml-turbo-enum.inc``."""
    ids = {**{t.enum: t.type_id for t in tables.ALL}, "TURBO_COUNT": max(t.type_id for t in tables.ALL) + 1}
    width = max(map(len, ids))
    entries = (f"        GGML_TYPE_{name:{width}} = {number},\n" for name, number in ids.items())
    return _ENUM_INTRO + "".join(entries) + "#define GGML_TYPE_COUNT GGML_TYPE_COUNT_UPSTREAM\n"


#
# ggml-turbo-list.h and turbo/list.h
#

_LIST_INTRO = f"""\
{_GENERATED}//
// The list of turbo types, by ascending id. A list expands X for each type, with
//
//     ENUM     its name in enum ggml_type, after GGML_TYPE_, and the prefix of its constants in turbo/tables.h
//     NAME     as on the command line, unquoted
//     C_NAME   as in the names of its block and its functions
//     FAMILY   SCALAR or TRELLIS, as in QK_SCALAR
//     BITS     of a value, without its share of the scale

#pragma once

// clang-format off
"""

_GPU_INTRO = f"""\
{_GENERATED}//
// What the GPU backends are compiled for.
//
// GGML_TURBO_DECODE_PAIRS_X    types of K and V, as in enum ggml_type after GGML_TYPE_, with kernels for decode attention by default,
//                              grouped by K
// GGML_TURBO_HEAD_SIZES_X      sizes of the heads of K and V

#pragma once

#include "ggml-turbo-list.h"

// clang-format off
"""


def _x_list(name: str, rows: Iterable[Sequence[object]]) -> str:
    """Render a macro that expands its argument for each row."""
    return f"\n#define {name}(X)" + "".join(f" \\\n    X({', '.join(map(str, row))})" for row in rows) + "\n"


def type_list() -> str:
    """Return ``ggml-turbo-list.h``."""

    def rows(types: Iterable[tables.TurboType]) -> list[Sequence[object]]:
        return [(t.enum, t.name, t.c_name, t.family.upper(), t.bits) for t in types]

    parts = [
        _x_list("GGML_TURBO_SCALAR_TYPES_X", rows(tables.SCALAR)),
        _x_list("GGML_TURBO_TRELLIS_TYPES_X", rows(tables.TRELLIS)),
        _x_list("GGML_TURBO_TYPES_X", rows(tables.ALL)),
        "\n// all of them, between commas\n",
        "#define GGML_TURBO_TYPES " + ", ".join(f"GGML_TYPE_{t.enum}" for t in tables.ALL) + "\n",
    ]
    return _LIST_INTRO + "".join(parts)


def gpu_list() -> str:
    """Return ``turbo/list.h``."""
    pairs = [(tables.enum_of(k), tables.enum_of(v)) for k, v in tables.DECODE_PAIRS]
    return _GPU_INTRO + _x_list("GGML_TURBO_DECODE_PAIRS_X", pairs) + _x_list("GGML_TURBO_HEAD_SIZES_X", tables.HEAD_SIZES)


#
# turbo/tables.h
#

_TABLES_INTRO = f"""\
{_GENERATED}//
// Initialisers only, so that C, C++, CUDA and HIP can each declare their tables where they want them:
//     static const int8_t codebook[16] = {{ TURBO4_0_CODEBOOK }};
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
// X_END         encoders with tables cut these integers to -X_END .. X_END - 1: costs do not depend on what is beyond
// CODE_BIAS     bits of a binary32 number >> 20, less this, are the byte that stands for its scale
"""


def _ints(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


def _define(name: str, body: object) -> str:
    return f"#define {name} {body}\n"


def _rows(name: str, rows: Iterable[Iterable[int]]) -> str:
    """Render the initialiser of a two-dimensional array, one row per line."""
    return f"#define {name} \\\n" + ", \\\n".join(f"    {{ {_ints(row)} }}" for row in rows) + "\n"


def _title(t: tables.TurboType) -> str:
    return f"\n// {t.name}: {t.block_bytes * 8 / t.block:g} bits per value\n" + _define(f"{t.enum}_BLOCK_BYTES", t.block_bytes)


def _scalar_section(t: tables.ScalarType) -> str:
    parts = [
        _define(f"{t.enum}_CODEBOOK", _ints(t.codebook)),
        _define(f"{t.enum}_MAGNITUDES", _ints(t.magnitudes)),
        _define(f"{t.enum}_N_STEPS", len(t.thresholds)),
        _rows(f"{t.enum}_THRESHOLDS", t.thresholds),
        _define(f"{t.enum}_PLAIN", _ints(t.plain_thresholds)),
    ]
    return _title(t) + "".join(parts)


def _trellis_section(t: tables.TrellisType) -> str:
    fine, coarse = t.codebooks
    parts = [
        _define(f"{t.enum}_REACH", f"{t.reach:.9g}f"),
        _define(f"{t.enum}_X_STEPS", t.x_steps),
        _define(f"{t.enum}_X_SCALE", f"{t.x_scale:.9g}f"),
        _define(f"{t.enum}_FINE", _ints(fine)),
        _define(f"{t.enum}_COARSE", _ints(coarse)),
    ]
    return _title(t) + "".join(parts)


def _all_constants() -> str:
    """Render what every language gets."""
    common = [
        "\n// binary32 as integers\n",
        _define("TURBO_FLT_MAX_BITS", f"0x{tables.FLT_MAX_BITS:08x}"),
        _define("TURBO_INFINITY_BITS", f"0x{tables.INFINITY_BITS:08x}"),
    ]
    scalar = [
        "\n// scalar types\n",
        _define("QK_SCALAR", tables.QK_SCALAR),
        _define("SCALAR_T_MAX", tables.T_MAX),
        _define("SCALAR_AMAX_MIN", f"{2.0**tables.AMAX_MIN_EXP:.9g}f"),
        _define("SCALAR_HALF_MAX", f"{tables.HALF_MAX:.1f}f"),
        _define("SCALAR_HALF_NAN", f"0x{tables.HALF_NAN:04x}"),
    ]
    trellis = [
        "\n// trellis types\n",
        _define("QK_TRELLIS", tables.QK_TRELLIS),
        _define("TRELLIS_SEGMENT", tables.SEGMENT),
        _define("TRELLIS_N_SEGMENTS", tables.QK_TRELLIS // tables.SEGMENT),
        _define("TRELLIS_N_STATES", tables.N_STATES),
        _define("TRELLIS_LEVEL_STEPS", tables.LEVEL_STEPS),
        _define("TRELLIS_N_SCALES", tables.N_SCALES),
        _define("TRELLIS_SCALE_MIN", f"0x{tables.SCALE_MIN:02x}"),
        _define("TRELLIS_SCALE_MAX", f"0x{tables.SCALE_MAX:02x}"),
        _define("TRELLIS_SCALE_NAN", f"0x{tables.SCALE_NAN:02x}"),
        _define("TRELLIS_CODE_BIAS", tables.CODE_BIAS),
        _define("TRELLIS_AMAX_MIN", f"{2.0**tables.TRELLIS_AMAX_MIN_EXP:.9g}f"),
        _define("TRELLIS_RMS_MAX", tables.RMS_MAX),
        _define("TRELLIS_X_MAX", tables.X_MAX),
        _define("TRELLIS_X_END", tables.X_END),
        _define("TRELLIS_DISTANCE_MAX", tables.DISTANCE_MAX),
        _define("TRELLIS_COST_MAX", tables.COST_MAX),
        _define("TRELLIS_AMAX_PART", tables.AMAX_PART),
        _define("TRELLIS_MAX_LEVELS", max(len(t.codebooks[0]) for t in tables.TRELLIS)),
    ]
    scalar_sections = map(_scalar_section, tables.SCALAR)
    trellis_sections = map(_trellis_section, tables.TRELLIS)
    return "".join([*common, *scalar, *scalar_sections, *trellis, *trellis_sections])


def constants() -> str:
    """Return ``turbo/tables.h``."""
    return f"{_TABLES_INTRO}\n#pragma once\n\n// clang-format off\n{_all_constants()}"


#
# turbo-tables.glsl
#

_GLSL_INTRO = f"""\
{_GENERATED}//
// What turbo/tables.h has (its comment explains the names), for shaders, and of each type:
//
// ID       its number in enum ggml_type
// BITS     of a value, without its share of the scale
// BLOCK    values of a block
// LEVELS   of all its codebooks, the fine one first
// WORDS    the levels as int8, four in a word, the first one lowest

#if !defined(TURBO_TABLES_GLSL)
#define TURBO_TABLES_GLSL
"""


def _packed(levels: Sequence[int]) -> str:
    """Render int8 as little-endian words."""
    words = (int.from_bytes(bytes(level & 0xFF for level in levels[i : i + 4]), "little") for i in range(0, len(levels), 4))
    return ", ".join(f"0x{word:08x}u" for word in words)


def _glsl_section(t: tables.TurboType) -> str:
    levels = t.codebook if isinstance(t, tables.ScalarType) else [level for book in t.codebooks for level in book]
    numbers = {"ID": t.type_id, "BITS": t.bits, "BLOCK": t.block, "LEVELS": len(levels), "WORDS": _packed(levels)}
    return f"\n// {t.name}\n" + "".join(_define(f"{t.enum}_{name}", body) for name, body in numbers.items())


def glsl_tables() -> str:
    """Return ``turbo-tables.glsl``."""
    sections = "".join(map(_glsl_section, tables.ALL))
    return f"{_GLSL_INTRO}{_all_constants()}{sections}\n#endif  // !defined(TURBO_TABLES_GLSL)\n"


#
# turbo-attn-decode*.cu
#

_MAX_PAIRS = 4
"""Pairs of one file with kernels of decode attention; a compiler takes up to two minutes for them."""


def _decode_files() -> dict[str, tuple[list[tuple[str, str]], list[tuple[str, str]]]]:
    """Suffix of a file -> the default pairs that are its own, and those that it has when all pairs are compiled."""
    names = ["f16", "q8_0", *tables.BY_NAME]
    files = {}
    for k in dict.fromkeys(k for k, _ in tables.DECODE_PAIRS):
        default = [pair for pair in tables.DECODE_PAIRS if pair[0] == k]
        others = [(k, v) for v in names if (k in tables.BY_NAME or v in tables.BY_NAME) and (k, v) not in default]
        if len(default) <= _MAX_PAIRS:
            files[k] = default, others
            continue
        families = [tables.BY_NAME[v].family if v in tables.BY_NAME else v for _, v in default]
        for family in dict.fromkeys(families):
            own = [pair for pair, of in zip(default, families, strict=True) if of == family]
            files[f"{k}-{family}"] = own, others if family == families[0] else []
    return files


_DECODE_FAMILIES = ("", "-mma", "-wide")
"""Kernels of decode attention: with dot products, with matrix instructions, and with those for wide heads."""


def decode_instances(suffix: str, family: str) -> str:
    """Return a file with kernels of one of ``_DECODE_FAMILIES``; files of their own compile side by side."""
    header, macro = f"decode{family}-instances", f"TURBO_DECODE{family.upper().replace('-', '_')}_INSTANCE"

    def lines(pairs: Iterable[tuple[str, str]]) -> str:
        return "".join(f"{macro}({tables.enum_of(k)}, {tables.enum_of(v)});\n" for k, v in pairs)

    default, others = _DECODE_FILES[suffix]
    rest = f"#ifdef GGML_TURBO_CUDA_ALL_PAIRS\n{lines(others)}#endif  // GGML_TURBO_CUDA_ALL_PAIRS\n" if others else ""
    return f'{_GENERATED}#include "turbo/{header}.cuh"\n\n{lines(default)}{rest}'


#
# all files
#

_GGML = Path("overlay") / "ggml"
_CUDA = _GGML / "src" / "ggml-cuda"
_SHADERS = _GGML / "src" / "ggml-vulkan" / "vulkan-shaders"
_DECODE_FILES = _decode_files()

GENERATED: Mapping[Path, Callable[[], str]] = {
    _GGML / "include" / "ggml-turbo-enum.inc": enum,
    _GGML / "include" / "ggml-turbo-list.h": type_list,
    _GGML / "src" / "turbo" / "list.h": gpu_list,
    _GGML / "src" / "turbo" / "tables.h": constants,
    _SHADERS / "turbo-tables.glsl": glsl_tables,
    **{
        _CUDA / f"turbo-attn-decode{family}-{suffix}.cu": partial(decode_instances, suffix, family)
        for family in _DECODE_FAMILIES
        for suffix in _DECODE_FILES
    },
}
"""What is generated: path in the patch set, and text."""


def outdated(root: Path) -> list[Path]:
    """Files of a patch set that are not what the tables say, or are missing."""
    paths = ((root / path, text) for path, text in GENERATED.items())
    return [path for path, text in paths if not path.is_file() or path.read_text(encoding="utf-8") != text()]


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the files; return the exit code."""
    parser = argparse.ArgumentParser(prog=WRITE_COMMAND, description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only; exit code 1 when a file is out of date")
    parser.add_argument("--root", type=Path, default=patches_dir(), help="folder of the patch set")
    args = parser.parse_args(argv)
    root: Path = args.root
    if args.check:
        for path in (old := outdated(root)):
            print(f"error: {path} does not match turbo_gguf/codec/tables.py\nhint: {WRITE_COMMAND}", file=sys.stderr)
        return 1 if old else 0
    for name, text in GENERATED.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
