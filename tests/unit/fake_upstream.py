"""Small upstream trees and patch sets, so that the tests need neither network nor compiler."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from turbo_gguf.patchset.hook import parse, render
from turbo_gguf.patchset.landing import Landing, land
from turbo_gguf.patchset.tree import Tree

SWITCH = """\
int size(int type) {
    switch (type) {
        case 1:
            return 4;
        case 2:
            return 8;
        default:
            return 0;
    }
}
"""
TABLE = """\
static const char * names[] = {
    "f32",
    "f16",
};

static int count = 2;
"""
FILES = {
    "include/llama.h": "int llama(void);\n",
    "ggml/CMakeLists.txt": "add_library(ggml src/ggml.c)\n",
    "ggml/src/ggml.c": SWITCH,
    "ggml/src/names.c": TABLE,
    "docs/big.md": "not needed to build\n",
    "models/ggml-vocab-x.gguf": "not needed to build\n",
    "tests/run.sh": "#!/bin/sh\n",
}

ADD_CASE = ["         default:", "+            if (is_turbo(type)) { return 3; }", "             return 0;"]
ADD_NAME = [" static const char * names[] = {", '+#include "names-turbo.inc"', '     "f32",']


def write_tree(root: Path, files: Mapping[str, str] = FILES) -> Path:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
        os.utime(root / path, (1_600_000_000, 1_600_000_000))
    return root


def pristine(root: Path, files: Mapping[str, str] = FILES, name: str = "fake") -> Tree:
    return Tree(path=write_tree(root, files), upstream=name, commit="abcdef123", digest="")


def archive(
    path: Path, files: Mapping[str, str] = FILES, prefix: str = "pkg-1.0/vendor/llama.cpp/", extra: Sequence[tarfile.TarInfo] = ()
) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size, info.mtime = len(text.encode()), 1_600_000_000
            info.mode = 0o755 if name.endswith(".sh") else 0o644
            tar.addfile(info, io.BytesIO(text.encode()))
        for info in extra:
            tar.addfile(info, io.BytesIO(b"x" * info.size))
    return path


def hook_text(
    changes: Mapping[str, Sequence[Sequence[str]]],
    *,
    subject: str = "ggml : a hook",
    why: str = "Because upstream knows no turbo types.",
    trailers: Sequence[str] = ("Forwarded: no", "Last-Update: 2026-11-21", "Obsolete-When: never"),
) -> str:
    """A hook with line numbers that are wrong on purpose: they must not matter."""
    lines = ["From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001", "From: A <a@b.c>"]
    lines += [f"Subject: [PATCH] {subject}", "", why, "", *trailers, "---"]
    for path, hunks in changes.items():
        lines += [f"diff --git a/{path} b/{path}", f"--- a/{path}", f"+++ b/{path}"]
        for hunk in hunks:
            old, new = sum(line[0] != "+" for line in hunk), sum(line[0] != "-" for line in hunk)
            lines += [f"@@ -900,{old} +900,{new} @@", *hunk]
    return "\n".join(lines) + "\n"


def canonical(text: str, files: Mapping[str, str] = FILES) -> str:
    """The hook as `patch refresh` writes it for a tree of these files."""
    hook = parse("x.patch", text)
    starts = {}
    for file in hook.files:
        landed = land(file, files[file.path])
        assert isinstance(landed, Landing), landed
        starts[file.path] = landed.starts
    return render(hook, starts)


def write_patches(root: Path, hooks: Mapping[str, str], overlay: Mapping[str, str] | None = None, series: str | None = None) -> Path:
    (root / "hooks").mkdir(parents=True, exist_ok=True)
    for name, text in hooks.items():
        (root / "hooks" / name).write_text(text)
    (root / "series").write_text("".join(f"{name}\n" for name in hooks) if series is None else series)
    for path, text in (overlay or {}).items():
        (root / "overlay" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "overlay" / path).write_text(text)
    return root


def default_patches(root: Path) -> Path:
    """Two sound hooks and an overlay."""
    hooks = {
        "size.patch": canonical(hook_text({"ggml/src/ggml.c": [ADD_CASE]})),
        "names.patch": canonical(hook_text({"ggml/src/names.c": [ADD_NAME]})),
    }
    return write_patches(root, hooks, {"ggml/src/names-turbo.inc": '    "turbo3",\n'})
