"""``dev/vulkan/glslc``. Risks: SPIR-V of another shader, of other options or of another compiler; an error that is kept or hidden."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

WRAPPER = Path(__file__).resolve().parents[2] / "dev" / "vulkan" / "glslc"

REAL = """\
#!/bin/sh
out= src= last= deps= target=
for a; do
    case $last in
        -o) out=$a ;;
        -MF) deps=$a ;;
        -MT) target=$a ;;
        -x) ;;
        *) case $a in -) src=- ;; -*) ;; *) src=$a ;; esac ;;
    esac
    last=$a
done
case " $* " in
    *" --version "*) echo "shaderc $VERSION"; exit ;;
    *" -E "*) grep -q broken "$src" && exit 1; { echo "#line 1 \\"$src\\""; cat "$src" "$(dirname "$src")/part.glsl"; } >"$out"; exit ;;
    *" -M "*) echo "$target: $src part.glsl"; exit ;;
esac
echo "$*" >>"$CALLS"
if grep -q broken "$src"; then echo "$src:1: error: broken" >&2; exit 1; fi
[ -z "$out" ] || echo "code of $src" >"$out"
[ -z "$deps" ] || echo "$out: $src part.glsl" >"$deps"
"""


class Shaders:
    """A folder with a shader, what it includes, and a compiler that notes its calls."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / "calls"
        self.shader = folder / "a.comp"
        self.shader.write_text("void main() {}\n")
        (folder / "part.glsl").write_text("const int part = 1;\n")
        self.environment = {
            "GLSLC_REAL": str(folder / "real"),
            "GLSLC_CACHE": str(folder / "kept"),
            "CALLS": str(self.calls),
            "VERSION": "1",
        }
        (folder / "real").write_text(REAL)
        (folder / "real").chmod(0o755)

    def run(self, *options: str, source: Path | None = None, out: str = "a.spv", **more: str) -> subprocess.CompletedProcess[str]:
        command = [WRAPPER, "-fshader-stage=compute", source or self.shader, "-o", self.folder / out, *options]
        environment = {"PATH": os.defpath, **self.environment, **more}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)

    def compiled(self) -> int:
        """How often the compiler really compiled."""
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0


@pytest.fixture
def shaders(tmp_path: Path) -> Shaders:
    return Shaders(tmp_path)


def test_the_second_time_it_is_kept(shaders: Shaders) -> None:
    assert shaders.run("-O", "-DA=1").returncode == 0
    first = (shaders.folder / "a.spv").read_text()
    done = shaders.run("-O", "-DA=1", "-MD", "-MF", str(shaders.folder / "a.d"), out="b.spv")
    assert (done.returncode, done.stderr) == (0, "")
    assert shaders.compiled() == 1
    assert (shaders.folder / "b.spv").read_text() == first
    assert (shaders.folder / "a.d").read_text() == f"{shaders.folder}/b.spv: {shaders.shader} part.glsl\n"


def test_another_checkout_shares_it(shaders: Shaders, tmp_path: Path) -> None:
    shaders.run()
    (tmp_path / "other").mkdir()
    for name in ("a.comp", "part.glsl"):
        (tmp_path / "other" / name).write_text((tmp_path / name).read_text())
    shaders.run(source=tmp_path / "other/a.comp", out="b.spv")
    assert shaders.compiled() == 1


@pytest.mark.parametrize("change", ["option", "define", "include", "compiler"])
def test_what_changes_the_code_is_compiled_again(shaders: Shaders, change: str) -> None:
    shaders.run("-DA=1")
    if change == "include":
        (shaders.folder / "part.glsl").write_text("const int part = 2;\n")
    options = {"option": ("-O", "-DA=1"), "define": ("-DA=2",)}.get(change, ("-DA=1",))
    shaders.run(*options, **({"VERSION": "2"} if change == "compiler" else {}))
    assert shaders.compiled() == 2


def test_an_error_is_told_and_not_kept(shaders: Shaders) -> None:
    shaders.shader.write_text("broken\n")
    for _ in range(2):
        done = shaders.run()
        assert done.returncode == 1 and "error: broken" in done.stderr
    assert shaders.compiled() == 2
    assert not [path for path in (shaders.folder / "kept").iterdir() if path.stat().st_size]


def test_without_a_folder_nothing_is_kept(shaders: Shaders) -> None:
    for _ in range(2):
        assert shaders.run(GLSLC_CACHE="").returncode == 0
    assert shaders.compiled() == 2


def test_what_no_test_calls_is_no_program(shaders: Shaders) -> None:
    deps = shaders.folder / "a.d"
    shaders.run("-MD", "-MF", str(deps), out="matmul_iq1_s_f32.spv", GLSLC_SKIP="matmul_iq.*|conv")
    skipped = (shaders.folder / "matmul_iq1_s_f32.spv").read_bytes()
    assert skipped.startswith(b"not compiled") and len(skipped) % 4 == 0
    assert shaders.compiled() == 0
    assert deps.read_text() == f"{shaders.folder}/matmul_iq1_s_f32.spv: {shaders.shader}\n"
    shaders.run(out="my_conv.spv", GLSLC_SKIP="matmul_iq.*|conv")
    assert (shaders.folder / "my_conv.spv").read_text().startswith("code of"), "the whole name has to match"


def test_a_question_of_cmake(shaders: Shaders) -> None:
    shaders.shader.write_text("#extension GL_EXT_bfloat16 : require\n")
    command = [WRAPPER, "-o", "-", shaders.shader]
    environment = {"PATH": os.defpath, **shaders.environment}

    def ask(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env={**environment, **more}, cwd=shaders.folder, capture_output=True, text=True, check=False)

    assert ask().returncode == 0
    done = ask(GLSLC_LACKS="GL_X GL_EXT_bfloat16")
    assert done.returncode == 1
    assert "extension not supported: GL_EXT_bfloat16" in done.stderr
