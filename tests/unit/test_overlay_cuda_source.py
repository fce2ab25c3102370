"""Our GPU sources as MUSA's compiler sees them, which this machine does not have, and which of them name a type.

What MSVC does not take: test_overlay_source.py.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from turbo_gguf.assets import patches_dir
from turbo_gguf.tools import capture

GGML = patches_dir() / "overlay" / "ggml"
FOLDER = GGML / "src" / "ggml-cuda"
HEADERS = sorted((GGML / "src" / "turbo").glob("*.h"))
SOURCES = sorted([*FOLDER.glob("*.cu"), *FOLDER.glob("turbo/*.cuh")])

INCLUDE = re.compile(r'^\s*#\s*include "([^"]+)"', re.MULTILINE)

MUSA = ("GGML_USE_MUSA", "__MUSA__", "__MUSACC__", "__MUSA_ARCH__=310", "__CUDA_ARCH__=1300")
"""Of MUSA's device pass: upstream's vendors/musa.h makes __CUDA_ARCH__ of __MUSA_ARCH__, so that "is this CUDA?" is answered with yes."""

THEIRS = re.compile(r"\basm\b|__builtin_(?:amdgcn|nvvm)_\w+")
"""Instructions of one vendor."""


KERNEL = re.compile(
    r"__global__ void\s+(?:__launch_bounds__\(\w+\)\s+)?(?P<name>\w+)\([^{;]*\) \{\n(?P<body>.*?)^\}", re.DOTALL | re.MULTILINE
)
"""A kernel that is defined, not declared."""

DECLARATIONS = re.compile(r"^\s*(?:#[^\n]*$|(?:using|constexpr|static constexpr|(?:__align__\(\d+\) )?__shared__)\b[^;]*;)", re.MULTILINE)
"""What runs nothing: directives, too. Without its instructions a kernel is empty."""

WAIT = "ggml_cuda_pdl_sync();"
"""From here on, what earlier kernels have written is there, and nobody reads what they read any more."""


def preprocessed(path: Path, defines: tuple[str, ...], scratch: Path) -> str:
    """A source of ours with what it includes of ours; upstream's headers are empty."""
    for name in {name for source in (*SOURCES, *HEADERS) for name in INCLUDE.findall(source.read_text("utf-8"))}:
        stub = scratch / name
        if not any(
            (folder / name).is_file() for folder in (FOLDER, FOLDER / "turbo", GGML / "src", GGML / "src" / "turbo", GGML / "include")
        ):
            stub.parent.mkdir(parents=True, exist_ok=True)
            stub.touch()
    folders = (scratch, GGML / "src", GGML / "include", FOLDER)
    argv = ["g++", "-E", "-P", "-x", "c++", "-std=c++17", *(f"-D{name}" for name in defines), *(f"-I{folder}" for folder in folders)]
    return capture([*argv, str(path)])


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_musa_gets_no_instructions_of_another_vendor(path: Path, tmp_path: Path) -> None:
    assert THEIRS.findall(preprocessed(path, MUSA, tmp_path)) == []


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize(
    ("defines", "expected"),
    [(("__CUDA_ARCH__=900",), "asm"), (("GGML_USE_HIP", "__HIP__", "__HIP_DEVICE_COMPILE__"), "__builtin_amdgcn_perm")],
    ids=["cuda", "hip"],
)
def test_instructions_of_a_vendor_are_seen(defines: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    assert expected in THEIRS.findall(preprocessed(FOLDER / "turbo" / "base.cuh", defines, tmp_path))


def test_types_are_named_only_where_their_formats_are_written_out() -> None:
    """All else expands the lists, so that a type that is added is not left out somewhere."""
    named = {path.name for path in SOURCES if re.search(r"\b(?:GGML_TYPE_|block_)?(?:TURBO|turbo)\d_(?:0|T|t)", path.read_text("utf-8"))}
    assert {name for name in named if not name.startswith("turbo-attn-decode-")} == {"scalar.cuh", "turbo-ops.cu"}


def kernels() -> list[tuple[str, str]]:
    """Names and bodies of all kernels of ours, without comments."""
    found = []
    for path in SOURCES:
        text = re.sub(r"//[^\n]*", "", path.read_text("utf-8"))
        found += [(match["name"], match["body"]) for match in KERNEL.finditer(text)]
        assert len(list(KERNEL.finditer(text))) == text.count("__global__"), path.name
    return found


@pytest.mark.parametrize(("name", "body"), [pytest.param(*kernel, id=kernel[0]) for kernel in kernels()])
def test_kernels_wait_for_the_one_before(name: str, body: str) -> None:
    """turbo_launch() starts them early on Hopper and later: until they wait, they may read constants only."""
    before, wait, _ = DECLARATIONS.sub("", body).partition(WAIT)
    assert wait
    if name == "turbo_quantize_few":  # asks for constants first
        assert re.findall(r"(\w+)\(", before) == ["turbo_trellis_numbers_of", "load"]
        assert not re.search(r"\.(?:src|dst|indices)\b|->", before)
    else:
        assert not before.strip()


def test_pointers_of_kernels_may_change_before_they_wait() -> None:
    """A compiler may read what is `__restrict__` or `__ldg` earlier than where it is written."""
    for path in SOURCES:
        assert not re.search(r"__restrict__|\b__ldg\b", path.read_text("utf-8")), path.name
