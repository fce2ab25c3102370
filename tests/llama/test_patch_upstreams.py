"""The patch set fits every supported llama.cpp: the real sources, fetched once and kept below the home folder."""

from __future__ import annotations

from collections import Counter

import pytest

from turbo_gguf import patchset
from turbo_gguf.make.upstream import default_name, fetch, supported
from turbo_gguf.patchset.tree import Tree

pytestmark = pytest.mark.network


@pytest.fixture(scope="module", params=supported())
def tree(request: pytest.FixtureRequest) -> Tree:
    upstream = supported()[request.param]
    return fetch(upstream, keep_archive=upstream.name == default_name())


def test_the_patch_set_fits(tree: Tree) -> None:
    assert patchset.check(patchset.load(), [tree], reference=default_name()).problems == ()


def test_only_lines_of_hooks_differ_from_upstream(tree: Tree) -> None:
    patches = patchset.load()
    made = patchset.patch(patches, tree.path)
    for path in {file.path for hook in patches.hooks for file in hook.files}:
        lines = [line for hook in patches.hooks for file in hook.files if file.path == path for hunk in file.hunks for line in hunk.lines]
        upstream = Counter((tree.path / path).read_text("utf-8").split("\n"))
        patched = Counter(made.files[path].decode("utf-8").split("\n"))
        assert patched - upstream == Counter(line[1:] for line in lines if line.startswith("+"))
        assert upstream - patched == Counter(line[1:] for line in lines if line.startswith("-"))
