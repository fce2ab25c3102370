"""The rooms of ``overlay/src/turbo``. Risks: two rooms that need each other, a shim outside of its file, a device known by its name."""

from __future__ import annotations

import re
from pathlib import Path

from turbo_gguf import assets

MAX_LINES = 500
PRIVATE = re.compile(r"\b(?:n_rot_[kv]|attn_rot_[kv]|kv\.turbo|mctx\.kv|v_cells|ggml_prec_set_acc)\b")


def _rooms() -> dict[str, list[Path]]:
    """Files of each room: its header and its source."""
    rooms: dict[str, list[Path]] = {}
    for path in sorted((assets.patches_dir() / "overlay" / "src" / "turbo").glob("*.[hc]*")):
        if path.suffix in (".h", ".cpp"):
            rooms.setdefault(path.stem, []).append(path)
    return rooms


def _floors(needs: dict[str, set[str]]) -> dict[str, int]:
    """Room -> one more than the highest room that it needs. A circle is an error."""
    floors: dict[str, int] = {}
    while len(floors) < len(needs):
        free = {room for room in needs if room not in floors and needs[room] <= floors.keys()}
        assert free, f"a circle among {sorted(needs.keys() - floors.keys())}"
        floors.update({room: 1 + max((floors[need] for need in needs[room]), default=-1) for room in free})
    return floors


def test_no_circle_of_rooms() -> None:
    rooms = _rooms()
    needs = {
        room: {name for path in paths for name in re.findall(r'#include "([\w-]+)\.h"', path.read_text()) if name in rooms} - {room}
        for room, paths in rooms.items()
    }
    floors = _floors(needs)
    assert floors["cache"] == max(floors.values())
    assert not [room for room, need in needs.items() if "cache" in need]


def test_every_source_is_in_the_list() -> None:
    listed = re.findall(r"turbo/([\w-]+)\.cpp", (assets.patches_dir() / "overlay/src/turbo/turbo.cmake").read_text())
    assert sorted(listed) == sorted(room for room, paths in _rooms().items() if any(path.suffix == ".cpp" for path in paths))


def test_one_file_reaches_into_upstream() -> None:
    """Private members, and functions that not all upstreams have, are in compat.h alone."""
    for paths in _rooms().values():
        for path in paths:
            text = path.read_text()
            assert len(text.splitlines()) <= MAX_LINES, path.name
            assert not re.search(r'"(CPU|CUDA|ROCm|HIP|Vulkan)"', text), path.name
            if path.name != "compat.h":
                assert not re.search(r"\bn_rot_[kv]\b|\battn_rot_[kv]\b|\bkv\.turbo\b|mctx\.kv\b|\bv_cells\b|ggml_prec_set_acc", text), (
                    path.name
                )
