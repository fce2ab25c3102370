"""Our C, C++ and GPU code holds to what every compiler of upstream takes: GCC and Clang accept more than MSVC does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from turbo_gguf.assets import patches_dir

SUFFIXES = {".c", ".h", ".cpp", ".cu", ".cuh", ".inc"}
SOURCES = sorted(path for path in (patches_dir() / "overlay").rglob("*") if path.suffix in SUFFIXES)

GUARD = re.compile(r"__GNUC__|__clang__|_MSC_VER|GGML_USE_HIP|__HIP")
"""A condition about compilers: what is behind it is not for all of them."""

GNU_ONLY = {
    "__attribute__": re.compile(r"\b__attribute__\b"),
    "a builtin": re.compile(r"\b__builtin_\w+"),
    "a statement expression": re.compile(r"(?:^|[=(,;{}?:&|]|\breturn\b)\s*\(\s*\{"),
    "typeof": re.compile(r"\b(?:__)?typeof(?:__)?\b"),
    "a case range": re.compile(r"\bcase\b[^:;?]*\.\.\."),
    "?: without a middle": re.compile(r"\?\s*:(?!:)"),
    "an array of no elements": re.compile(r"^\s*(?!return\b|delete\b)(?:\w+\s+)+\w+\[0\]\s*;"),
    "__int128": re.compile(r"\b__int128\b"),
    "__extension__": re.compile(r"\b__extension__\b"),
    "__PRETTY_FUNCTION__": re.compile(r"\b__PRETTY_FUNCTION__\b"),
}
NOT_FOR_MSVC = {  # nvcc takes these whatever the host compiler
    "__restrict__": re.compile(r"\b__restrict__\b"),
    "assembly": re.compile(r"\b(?:__asm__|asm)\b"),
}
NOT_CPP = {"a designated initialiser": re.compile(r"[{,]\s*\.\w+\s*=[^=]")}

_TOKEN = re.compile(r'//[^\n]*|/\*.*?\*/|R"\((.*?)\)"|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'', re.DOTALL)
_DIRECTIVE = re.compile(r"\s*#\s*(\w+)(.*)")


def code(text: str) -> list[str]:
    """Lines without comments and without what strings say."""

    def blank(match: re.Match[str]) -> str:
        found = match[0]
        return '""' + "\n" * found.count("\n") if found[0] in "\"'R" else "\n" * found.count("\n")

    return re.sub(r"(?<=\d)'(?=\d)", "", _TOKEN.sub(blank, text)).split("\n")


def continued(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Numbers (from 1) and texts of lines, with what a backslash continues."""
    number = 0
    while number < len(lines):
        first, line = number + 1, lines[number]
        while line.endswith("\\") and number + 1 < len(lines):
            number += 1
            line = line[:-1] + lines[number]
        number += 1
        yield first, line


def directives_within_parentheses(text: str) -> list[str]:
    """Undefined in the arguments of a macro, and refused by MSVC; what is a macro, a call does not show."""
    found: list[str] = []
    calls: list[bool] = []  # open parentheses: of a call, not of a statement or a group
    for number, line in continued(code(text)):
        if match := _DIRECTIVE.match(line):
            if any(calls):
                found.append(f"{number}: #{match[1]} within parentheses")
            continue
        for match in re.finditer(r"(\w*)\s*([()])", line):
            if match[2] == "(":
                calls.append(bool(match[1]) and match[1] not in {"if", "for", "while", "switch", "return"})
            elif calls:
                calls.pop()
    return found


def gnu_only(path: Path, text: str) -> list[str]:
    """What only GCC and Clang know, and no condition keeps from others."""
    rules = dict(GNU_ONLY)
    if path.suffix not in {".cu", ".cuh"}:
        rules |= NOT_FOR_MSVC
    if path.suffix not in {".c", ".inc"}:
        rules |= NOT_CPP
    found: list[str] = []
    conditions: list[str] = []
    for number, line in continued(code(text)):
        match = _DIRECTIVE.match(line)
        kind, rest = (match[1], match[2]) if match else ("", line)
        if kind in {"if", "ifdef", "ifndef"}:
            conditions.append(rest)
        elif kind == "elif":
            conditions[-1] += rest
        elif kind == "endif":
            conditions.pop()
        elif kind not in {"else", "include", "undef", "pragma", "error"} and not any(GUARD.search(c) for c in conditions):
            found += [f"{number}: {name}" for name, pattern in rules.items() if pattern.search(rest)]
    return found


def test_there_are_sources() -> None:
    assert {path.suffix for path in SOURCES} == SUFFIXES


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_directive_stands_within_parentheses(path: Path) -> None:
    assert not directives_within_parentheses(path.read_text("utf-8"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_is_for_gcc_and_clang_only(path: Path) -> None:
    assert not gnu_only(path, path.read_text("utf-8"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_file_has_more_than_500_lines(path: Path) -> None:
    limit = 500
    assert path.read_text("utf-8").count("\n") <= limit


def test_a_directive_in_the_arguments_of_a_macro_is_found() -> None:
    text = 'GGML_LOG_WARN("%s: (",  // (\n#ifdef GGML_USE_HIP\n    "a"\n#else\n    "b"\n#endif\n);\n'
    assert directives_within_parentheses(text) == [
        "2: #ifdef within parentheses",
        "4: #else within parentheses",
        "6: #endif within parentheses",
    ]
    assert not directives_within_parentheses("#define F(x) \\\n    g(x, \\\n    1)\n#if defined(A)\nf(')', \"(\");\n#endif\n")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("__attribute__", "int x __attribute__((unused));"),
        ("a builtin", "int x = __builtin_clz(y);"),
        ("a statement expression", "int x = ({ f(); 1; });"),
        ("a statement expression", "return ({ f(); 1; });"),
        ("typeof", "__typeof__(x) y = x;"),
        ("a case range", "        case 1 ... 3:"),
        ("?: without a middle", "int x = y ?: z;"),
        ("an array of no elements", "    unsigned char data[0];"),
        ("__restrict__", "void f(float * __restrict__ x);"),
        ("assembly", '__asm__ volatile("");'),
        ("a designated initialiser", "point p = { .x = 1, .y = 2 };"),
        ("__attribute__", "#define INLINE __attribute__((always_inline))"),
    ],
)
def test_what_only_gcc_and_clang_know_is_found(name: str, line: str) -> None:
    path = Path("file.cpp")
    assert gnu_only(path, f"\n{line}\n") == [f"2: {name}"]
    assert not gnu_only(path, f"// {line}\n")
    assert gnu_only(path, f"#if defined(__AVX2__)\n{line}\n#endif\n") == [f"2: {name}"]
    assert not gnu_only(path, f"#if defined(_MSC_VER)\n#else\n{line}\n#endif\n")


def test_what_looks_alike_is_not_found() -> None:
    text = "list.push_back({ a, b });\nx = y ? a::b : c;\nreturn part[0];\ncase A: f(x...);\nif (a == 1) { b.c = d; }\nint n = 1'000'000;\n"
    assert not gnu_only(Path("file.cpp"), text)
    assert not gnu_only(Path("file.c"), "point p = { .x = 1 };\n")
    assert not gnu_only(Path("file.cuh"), "void f(const float * __restrict__ x);\n")
