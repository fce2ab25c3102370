"""What is here, what is missing, and the command that fixes it."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from turbo_gguf import patchset
from turbo_gguf.assets import home
from turbo_gguf.errors import TurboError
from turbo_gguf.files import MORE_SPACE, OTHER_HOME
from turbo_gguf.make import known_wrong, presets
from turbo_gguf.make.build import build_folder, build_id, cmake_version, compiler, find_cmake, find_tool, read_manifest, toolchain
from turbo_gguf.make.presets import PRESETS, Preset
from turbo_gguf.make.toolkits import TOOLKITS, Finding, Toolkit, of_preset
from turbo_gguf.make.upstream import UNPACKED_BYTES, Upstream, is_fetched, resolve, supported
from turbo_gguf.patchset.tree import Tree
from turbo_gguf.tools import capture, find, install_hint


def examine() -> list[Finding]:
    """Look at everything that a build needs or could use; nothing is changed."""
    return [*_programs(), *_gpus(), _disk(), *_patches(), *_sources(), *_known_wrong(), *_builds()]


def table(findings: list[Finding]) -> str:
    """Write the findings as text in columns, each fix in a line below."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.name:{width}}  {finding.status:7}  {finding.detail}")
        if finding.fix:
            lines.append(f"{'':{width}}  {'':7}  -> {finding.fix}")
    return "\n".join(lines)


def _programs() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{sys.version.split()[0]} ({sys.executable})")
    for name, variable, names in (("C compiler", "CC", ("cc", "gcc", "clang")), ("C++ compiler", "CXX", ("c++", "g++", "clang++"))):
        yield _program(name, compiler(variable, names), names[1], needed=True)
    oldest = PRESETS["cpu"].min_cmake
    cmake = find_cmake(oldest)
    if cmake is not None and cmake_version(cmake) < oldest:
        yield Finding("cmake", "missing", f"{cmake} is older than {oldest[0]}.{oldest[1]}", "pip install 'turbo-gguf[build]'")
    else:
        yield _program("cmake", cmake, "cmake", needed=True)
    ninja, make = find_tool("ninja"), find("make")
    yield _program("ninja", ninja, "ninja", needed=False)
    yield _program("make", make, "make", needed=ninja is None)
    yield _program("ccache", find("ccache"), "ccache", needed=False)
    yield _program("git", find("git"), "git", needed=False)


def _program(name: str, path: Path | None, program: str, *, needed: bool) -> Finding:
    if path is None:
        return Finding(name, "missing" if needed else "none", "not found" + ("" if needed else " (not required)"), install_hint(program))
    try:
        version = capture([path, "--version"]).partition("\n")[0]
    except TurboError as error:
        return Finding(name, "missing" if needed else "none", error.message, install_hint(program))
    return Finding(name, "ok", f"{version} ({path})")


def _gpus() -> Iterator[Finding]:
    for toolkit in TOOLKITS.values():
        if toolkit.offloads:
            yield _toolkit(toolkit)
            yield from toolkit.devices()


def _toolkit(toolkit: Toolkit) -> Finding:
    """A toolkit is of use when its preset can be configured; if not, the preset's own hint is the fix."""
    try:
        found = presets.options(PRESETS[toolkit.name])
        version = " ".join(toolkit.compiler_version())
    except TurboError as error:
        return Finding(toolkit.title, "none", error.message, error.hint)
    made_for = ", ".join(toolkit.built_for(found))
    return Finding(toolkit.title, "ok", f"{version} {toolkit.where()}{f', builds for {made_for}' if made_for else ''}".strip())


def _disk() -> Finding:
    folder = home()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Finding("disk", "missing", f"{folder} cannot be written to", OTHER_HOME)
    free = shutil.disk_usage(existing).free // 1_000_000
    needed = PRESETS["cpu"].megabytes + 2 * UNPACKED_BYTES // 1_000_000
    built = read_manifest(build_folder(Tree(folder, resolve().name, "", "x"), "cpu")) is not None
    if free < needed and not built:
        fix = MORE_SPACE
        return Finding("disk", "missing", f"{free} MB free in {folder}, a CPU build takes {needed} MB", fix)
    return Finding("disk", "ok", f"{free} MB free in {folder}")


def _patches() -> Iterator[Finding]:
    patches = patchset.load()
    problems = patches.problems()
    text = f"{len(patches.hooks)} hooks with {patches.added} lines, {len(patches.overlay)} overlay files, digest {patches.digest[:12]}"
    if problems:
        yield Finding("patch set", "missing", f"{text}; {problems[0]}", "turbo-gguf patch check")
    else:
        yield Finding("patch set", "ok", text)


def _sources() -> Iterator[Finding]:
    upstream = resolve()
    name = f"llama.cpp {upstream.name}"
    if not is_fetched(upstream):
        yield Finding(name, "none", f"commit {upstream.commit}, not fetched yet", "turbo-gguf upstream fetch")
        return
    yield Finding(name, "ok", f"commit {upstream.commit}{f', b{upstream.build}' if upstream.build else ''} in {upstream.pristine}")
    state = patchset.state(_pristine_tree())
    if not state.exists:
        yield Finding("patched tree", "none", "not made yet", "turbo-gguf patch apply")
    elif state.dirty:
        shown = ", ".join(state.dirty[:3]) + (" and more" if len(state.dirty) > 3 else "")
        yield Finding("patched tree", "none", f"edited by hand: {shown}", "turbo-gguf patch export NAME, or turbo-gguf patch apply --force")
    elif state.digest != patchset.load().digest:
        yield Finding(
            "patched tree", "none", f"patches of digest {state.digest[:12] or 'unknown'}, not the present ones", "turbo-gguf patch apply"
        )
    else:
        yield Finding("patched tree", "ok", f"{state.path}")


def _known_wrong() -> Iterator[Finding]:
    """What is known to be wrong on the GPUs here, of the default snapshot and of those with a build for them."""
    default = resolve()
    for toolkit in TOOLKITS.values():
        gpus = toolkit.architectures()
        others = (item for item in supported().values() if item.name != default.name and _has_build(item, toolkit)) if gpus else ()
        for upstream in (default, *others):
            for text in known_wrong.warnings(upstream.pristine, gpus):
                yield Finding(f"llama.cpp {upstream.name}", "none", text, known_wrong.advice(upstream.name))


def _has_build(upstream: Upstream, toolkit: Toolkit) -> bool:
    """Whether a snapshot was built with a toolkit."""
    tree = Tree(upstream.pristine, upstream.name, upstream.commit, "x")
    names = (name for name in PRESETS if of_preset(name).name == toolkit.name)
    return any(read_manifest(build_folder(tree, name)) is not None for name in names)


def _pristine_tree() -> Tree:
    upstream = resolve()
    return Tree(path=upstream.pristine, upstream=upstream.name, commit=upstream.commit, digest="")


def _builds() -> Iterator[Finding]:
    pristine = _pristine_tree()
    tree = Tree(patchset.work_tree(pristine.upstream), pristine.upstream, pristine.commit, patchset.load().digest)
    for preset in PRESETS.values():
        finding = _build(tree, preset)
        if finding is not None:
            yield finding


def _build(tree: Tree, preset: Preset) -> Finding | None:
    """State of the build of one preset; nothing for a preset that was never built, except for the CPU's."""
    manifest = read_manifest(build_folder(tree, preset.name))
    name, fix = f"build {preset.name}", f"turbo-gguf build --preset {preset.name}"
    if manifest is None:
        return Finding(name, "none", "not built yet", fix) if preset.name == "cpu" else None
    try:
        tools = toolchain(preset)
        expected = build_id(tree, preset.name, tools, presets.options(preset))
    except TurboError as error:
        return Finding(name, "none", error.message, error.hint)
    if manifest.id != expected:
        return Finding(name, "none", f"{manifest.id}, made from other patches, options or compilers", fix)
    programs = [target for target in manifest.targets if re.match(r"llama-", target)]
    return Finding(name, "ok", f"{expected}: {', '.join(programs)}")
