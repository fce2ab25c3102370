"""Our changes to upstream: an overlay of real files and one-line hooks, kept in ``ggml-patches/``."""

from turbo_gguf.patchset.check import Report, check
from turbo_gguf.patchset.refresh import export, refresh
from turbo_gguf.patchset.series import PatchSet, load, patch
from turbo_gguf.patchset.worktree import apply, state, work_tree

__all__ = ["PatchSet", "Report", "apply", "check", "export", "load", "patch", "refresh", "state", "work_tree"]
