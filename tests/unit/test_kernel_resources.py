"""What a kernel takes is read right from what real compilers wrote, and the rule on decode kernels catches what it should."""

from __future__ import annotations

from pathlib import Path

import kernel_report
import kernel_resources as resources
import kernel_toolchains as toolchains
import msgspec
import pytest
from kernel_resources import Kernel, leaves_registers, short_name

from turbo_gguf.errors import EnvironmentMissing

DATA = Path(__file__).parents[1] / "data/kernels"
TYPES = {0: "f32", 8: "q8_0", 44: "turbo3"}
WIDE = "turbo_attn_decode_mma_wide_kernel<512, 512, turbo3, turbo3, 8>"
DECODE = "turbo_attn_decode_kernel<64, 64, turbo3, q8_0, 4>"


def test_a_code_object_says_what_its_kernels_take() -> None:
    found = {kernel.symbol: kernel for kernel in resources.from_code_object((DATA / "gfx1100.elf").read_bytes())}
    symbol = "_ZL24turbo_attn_decode_kernelILi64ELi64EL9ggml_type44ELS0_8ELi4EEvPf"
    assert set(found) == {symbol, "_ZL14turbo_set_rowsPf", "_ZL5otherPf"}
    assert found[symbol] == Kernel(symbol, vgpr=67, sgpr=107, scratch=272, lds=256)
    assert found["_ZL14turbo_set_rowsPf"] == Kernel("_ZL14turbo_set_rowsPf", vgpr=2, sgpr=2)


@pytest.mark.parametrize("data", [b"", b"not an ELF file", b"\x7fELF\x02\x01" + bytes(200)])
def test_what_is_no_code_object_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"ELF|metadata"):
        resources.from_code_object(data)


def test_ptxas_says_what_kernels_take() -> None:
    found = resources.from_ptxas((DATA / "sm_90.txt").read_text())
    assert found == [
        Kernel("_Z24turbo_attn_decode_kernelILi64ELi64EL9ggml_type44ELS0_8ELi4EEvPf", vgpr=38, scratch=256, lds=256),
        Kernel("_Z5otherPf", vgpr=8),
        Kernel("_Z14turbo_set_rowsPf", vgpr=8),
    ]


def test_ptxas_spills_are_bytes_stored_and_loaded() -> None:
    text = (
        "ptxas info    : Compiling entry function '_Z1a' for 'sm_80'\n"
        "ptxas info    : Function properties for _Z1a\n"
        "    40 bytes stack frame, 36 bytes spill stores, 48 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers, 40 bytes cumulative stack size, 28160 bytes smem, 512 bytes cmem[0]\n"
    )
    assert resources.from_ptxas(text) == [Kernel("_Z1a", vgpr=255, spill=84, scratch=40, lds=28160)]


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("gfx1100.txt", ["turbo-sample.cu:30:9: warning: unused variable 'unused' [-Wunused-variable]"]),
        ("sm_90.txt", ['turbo-sample.cu(30): warning #177-D: variable "unused" was declared but never referenced']),
    ],
)
def test_warnings_are_ours_by_the_name_of_the_file(log: str, expected: list[str]) -> None:
    text = (DATA / log).read_text()
    assert resources.own_warnings(text * 2, ["turbo-sample.cu"]) == expected
    assert resources.own_warnings(text, ["turbo-other.cu", "sample.cu"]) == []


def test_warnings_of_ptxas_are_all_ours() -> None:
    text = "ptxas warning : Value of threads per SM for entry _Z1a is out of range. .minnctapersm will be ignored\n"
    assert resources.own_warnings(text, []) == [text.strip()]


def test_a_warning_in_a_header_of_upstream_is_not_ours() -> None:
    text = (
        "In file included from ggml/src/ggml-cuda/turbo.cu:1:\n"
        "ggml/src/ggml-cuda/common.cuh:1452:84: warning: suggest braces around initialization of subobject [-Wmissing-braces]\n"
        "ggml/src/ggml-cuda/turbo/scalar.cuh:7:1: warning: unused function 'f' [-Wunused-function]\n"
        "ggml/src/ggml-cuda/mma.cuh:193:63: warning: unused parameter 'l' [-Wunused-parameter]\n"
    )
    assert resources.own_warnings(text, ["turbo.cu", "turbo/scalar.cuh", "turbo/mma.cuh"]) == [text.splitlines()[2]]


@pytest.mark.parametrize(
    ("demangled", "expected"),
    [
        ("void turbo_attn_decode_kernel<64, 64, (ggml_type)44, (ggml_type)8, 4>(float*)", DECODE),
        ("turbo_set_rows(float*)", "turbo_set_rows"),
        ("void turbo_rows<(ggml_type)44, float, true>(char const*, long)", "turbo_rows<turbo3, float, true>"),
        ("void turbo_x<(int)32, (bool)1, S<(ggml_type)0> >(int)", "turbo_x<32, true, S<f32> >"),
        ("void (anonymous namespace)::turbo_y<2>(int)", "turbo_y<2>"),
        ("void turbo_z<(ggml_type)99>(int)", "turbo_z<(ggml_type)99>"),
        ("_Zbroken", "_Zbroken"),
    ],
)
def test_names_are_short_and_types_have_names(demangled: str, expected: str) -> None:
    assert short_name(demangled, TYPES) == expected


def test_types_come_from_both_enums() -> None:
    ggml_h = (
        "enum other { A = 8 };\nenum ggml_type {\n  GGML_TYPE_F32     = 0,\n  // GGML_TYPE_Q4_2 = 4, removed\n  GGML_TYPE_COUNT = 43,\n};"
    )
    turbo_enum = "GGML_TYPE_TURBO3_0 = 65,\nGGML_TYPE_TURBO3_T = 68,\n"
    assert resources.type_names(ggml_h, turbo_enum) == {0: "f32", 65: "turbo3", 68: "turbo3t"}


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (Kernel("", 255), False),
        (Kernel("", 255, spill=1), True),
        (Kernel("", 255, sgpr_spill=1), True),
        (Kernel("", 255, scratch=4), True),
    ],
)
def test_a_kernel_must_stay_in_its_registers(kernel: Kernel, expected: bool) -> None:
    assert leaves_registers(kernel) is expected


# The report


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree with one file of ours, and a compiler that writes what the real one wrote for it."""
    folder = tmp_path / "tree" / toolchains.CUDA_SOURCES
    folder.mkdir(parents=True)
    for name in ("turbo-sample.cu", "turbo.cuh"):
        (folder / name).write_text("first")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "tree"


def fake(tmp_path: Path, name: str, code: str) -> Path:
    path = tmp_path / name
    folder = f"{tmp_path}/tree/{toolchains.CUDA_SOURCES}"
    seen = f"case \"$*\" in *' -E '*) echo '# 1 \"'$RANDOM'\"'; sed 's@//.*@@' {folder}/*; exit ;; esac"
    path.write_text(f"#!/bin/sh\n{seen}\necho run >>{tmp_path}/runs\nfor last; do :; done\n{code}\n")
    path.chmod(0o755)
    return path


def runs(tmp_path: Path) -> int:
    path = tmp_path / "runs"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture
def hip(tmp_path: Path) -> toolchains.Toolchain:
    code = (
        f"cp {DATA}/gfx1100.elf $last; cat {DATA}/gfx1100.txt >&2; rule=${{last%.o}}.d\n"
        f'echo "$rule: {toolchains.CUDA_SOURCES}/turbo-sample.cu {toolchains.CUDA_SOURCES}/turbo.cuh /usr/include/math.h" >$rule'
    )
    return toolchains.Toolchain(
        (str(fake(tmp_path, "clang++", code)),), "clang 21", True, disassembler=("sh", "-c", f"cat {DATA}/gfx1100.s")
    )


def compiled(tree: Path, hip: toolchains.Toolchain, tmp_path: Path, target: str = "gfx1100") -> toolchains.Compiled:
    return toolchains.compile_source(job(tree, hip, tmp_path, target))


def job(tree: Path, hip: toolchains.Toolchain, tmp_path: Path, target: str = "gfx1100") -> toolchains.Job:
    return toolchains.Job(tree, "turbo-sample.cu", target, hip, ["turbo-sample.cu"], tmp_path)


def test_a_compile_is_remembered_by_what_went_into_it(tree: Path, hip: toolchains.Toolchain, tmp_path: Path) -> None:
    first = compiled(tree, hip, tmp_path)
    assert (len(first.kernels), len(first.warnings), runs(tmp_path)) == (3, 1, 1)
    assert set(first.inputs) == {f"{toolchains.CUDA_SOURCES}/turbo-sample.cu", f"{toolchains.CUDA_SOURCES}/turbo.cuh"}
    assert compiled(tree, hip, tmp_path) == first
    assert runs(tmp_path) == 1
    (tree / toolchains.CUDA_SOURCES / "turbo.cuh").write_text("second")
    compiled(tree, hip, tmp_path)
    assert runs(tmp_path) == 2
    compiled(tree, toolchains.Toolchain(hip.command, "clang 22", True, hip.disassembler), tmp_path)
    assert runs(tmp_path) == 3
    compiled(tree, hip, tmp_path, "gfx942")
    assert runs(tmp_path) == 4


def test_what_only_looks_different_is_not_compiled_again(tree: Path, hip: toolchains.Toolchain, tmp_path: Path) -> None:
    header = tree / toolchains.CUDA_SOURCES / "turbo.cuh"
    header.write_text('first // a comment\nabort("a.cuh", 2)')
    first = compiled(tree, hip, tmp_path)
    header.write_text('  first  // another\n\n\nabort("a.cuh", 4)')
    assert toolchains.remembered(job(tree, hip, tmp_path)) == first
    assert compiled(tree, hip, tmp_path) == first
    assert runs(tmp_path) == 1
    header.write_text("fir st")
    assert toolchains.remembered(job(tree, hip, tmp_path)) is None
    compiled(tree, hip, tmp_path)
    assert runs(tmp_path) == 2


def test_a_remembered_warning_about_a_file_of_upstream_is_left_out(tree: Path, hip: toolchains.Toolchain, tmp_path: Path) -> None:
    first = compiled(tree, hip, tmp_path)
    upstream = "ggml/src/ggml-cuda/mma.cuh:119:63: warning: unused parameter 'l' [-Wunused-parameter]"
    record = job(tree, hip, tmp_path).record
    record.write_bytes(msgspec.json.encode(msgspec.structs.replace(first, warnings=[*first.warnings, upstream])))
    assert compiled(tree, hip, tmp_path) == first


def test_what_cannot_be_preprocessed_is_compiled_again(tree: Path, hip: toolchains.Toolchain, tmp_path: Path) -> None:
    compiled(tree, hip, tmp_path)
    script = Path(hip.command[0])
    script.write_text(script.read_text().replace("exit ;;", "exit 1 ;;"))
    (tree / toolchains.CUDA_SOURCES / "turbo.cuh").write_text("first // a comment")
    compiled(tree, hip, tmp_path)
    assert runs(tmp_path) == 2


def test_a_report_of_what_is_remembered_names_what_is_missing(tree: Path, hip: toolchains.Toolchain, tmp_path: Path) -> None:
    compiled(tree, hip, tmp_path, "gfx1100")
    found = kernel_report._remembered([job(tree, hip, tmp_path, target) for target in ("gfx1030", "gfx1100")])
    assert set(found) == {("turbo-sample.cu", "gfx1100")}
    assert runs(tmp_path) == 1
    names = kernel_report._names(found, TYPES)
    found["turbo-b.cu", "gfx942"] = msgspec.structs.replace(found["turbo-sample.cu", "gfx1100"], kernels=[])
    missing = {"gfx1030": ["turbo-sample.cu", "turbo-b.cu"], "gfx1100": ["turbo-b.cu"], "gfx942": []}
    tools = {"gfx1100": hip, "gfx942": hip}
    text = kernel_report._markdown(found, names, tools, [], all_pairs=False, commit="abc", missing=missing)
    assert "**Not compiled for this report**" in text
    assert "\n- gfx1030: all files\n- gfx1100: turbo-b.cu\n\n## Files" in text
    assert "| turbo_set_rows | 1 | 2 / 0; 8 |  |" in text
    size = f"{found['turbo-b.cu', 'gfx942'].size / 1000:.0f} kB, 0 s"
    assert f"| turbo-b.cu |  | {size} |" in text


def test_what_the_committed_report_speaks_for_is_not_new(
    tree: Path, hip: toolchains.Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {("turbo-sample.cu", "gfx1100"): compiled(tree, hip, tmp_path)}
    report = tmp_path / "kernels.md"
    names = kernel_report._names(found, TYPES)
    report.write_text(kernel_report._markdown(found, names, {"gfx1100": hip}, [], all_pairs=False, commit="abc", missing={"gfx1100": []}))
    monkeypatch.setattr(kernel_report, "RESULT", report)
    same, other = job(tree, hip, tmp_path), job(tree, hip, tmp_path, "gfx942")
    newer = job(tree, toolchains.Toolchain(hip.command, "clang 22", True, hip.disassembler), tmp_path)
    assert kernel_report._new([same, other, newer], 2) == [other, newer]
    header = tree / toolchains.CUDA_SOURCES / "turbo.cuh"
    header.write_text("first // a comment")
    assert kernel_report._new([same], 1) == []
    header.write_text("second")
    assert kernel_report._new([same], 1) == [same]
    header.write_text("first")
    script = Path(hip.command[0])
    script.write_text(script.read_text().replace("exit ;;", "exit 1 ;;"))
    assert kernel_report._new([same], 1) == [same], "what can't be preprocessed"
    assert runs(tmp_path) == 1


def test_a_part_does_not_take_the_place_of_the_committed_report() -> None:
    assert kernel_report._parse(["--new"]).out == "-"
    assert kernel_report._parse(["--new", "--out", "part.md"]).out == "part.md"
    assert kernel_report._parse([]).out == str(kernel_report.RESULT)


def test_a_compile_error_is_shown(tree: Path, tmp_path: Path) -> None:
    broken = fake(tmp_path, "nvcc", "echo 'turbo-sample.cu(3): error: expected a \";\"' >&2; exit 1")
    with pytest.raises(toolchains.ToolFailed, match=r'does not compile for sm_90\n  turbo-sample.cu\(3\): error: expected a ";"'):
        compiled(tree, toolchains.Toolchain((str(broken),), "13", amd=False), tmp_path, "sm_90")


def test_the_table_names_each_kernel_once_and_each_problem(tree: Path, hip: toolchains.Toolchain, tmp_path: Path) -> None:
    results = {("turbo-sample.cu", target): compiled(tree, hip, tmp_path, target) for target in ("gfx1030", "gfx1100")}
    names = kernel_report._names(results, TYPES)
    assert set(names.values()) == {DECODE, "turbo_set_rows"}, "kernels that are not ours are left out"
    problems = kernel_report._problems(results, names)
    assert f"gfx1100: {DECODE} in turbo-sample.cu: 67 / 107 / 256, **scratch 272**; 408" in problems
    assert len(problems) == 4, "a warning and a kernel for each target"
    tools = {"gfx1030": hip, "gfx1100": hip}
    text = kernel_report._markdown(results, names, tools, problems, all_pairs=False, commit="abc", missing={"gfx1030": [], "gfx1100": []})
    assert "Not compiled" not in text
    assert f"| `{DECODE}` | 67 / 107 / 256, **scratch 272**; 408 | 67 / 107 / 256, **scratch 272**; 408 |" in text
    assert "| turbo_set_rows | 1 | 2 / 0; 8 | 2 / 0; 8 |" in text


def test_decode_is_shown_by_columns_at_one_head_size(tree: Path, hip: toolchains.Toolchain, tmp_path: Path) -> None:
    base = compiled(tree, hip, tmp_path)
    loops = {
        "turbo_attn_decode_kernel<128, 128, turbo3, turbo3, 8>": 2560,
        "turbo_attn_decode_mma_kernel<128, 128, turbo3, turbo3, 16>": 1024,
        "turbo_attn_decode_mma_kernel<128, 128, turbo3t, turbo3t, 8>": 0,  # empty on this target
        "turbo_attn_decode_mma_kernel<64, 64, turbo3, turbo3, 8>": 512,
        "turbo_attn_decode_mma_kernel<128, 128, q8_0, turbo3, 8>": 512,
        WIDE: 768,
        WIDE.replace("512, 512", "576, 512"): 768,
        "turbo_attn_merge_parts<128>": 10,
    }
    kernels = [Kernel(name, vgpr=1, loop=loop) for name, loop in loops.items()]
    results = {("turbo-sample.cu", target): msgspec.structs.replace(base, kernels=kernels) for target in ("sm_90", "gfx942")}
    table = kernel_report._decode_table(results, {name: name for name in loops}, {"sm_90": hip, "gfx942": hip})
    assert table[2:] == [
        "| turbo_attn_decode_kernel | turbo3 | 8 | 10.0 | 10.0 |",
        "| turbo_attn_decode_mma_kernel | turbo3 | 16 | 4.0 | 4.0 |",
        "| turbo_attn_decode_mma_wide_kernel | turbo3 | 8 | 3.0 | 1.5 |",
    ]


def test_sizes_sort_as_numbers() -> None:
    names = ["turbo_a<256, f16>", "turbo_a<64, f16>", "turbo_a<64, bf16>"]
    assert sorted(names, key=kernel_report._natural) == [names[2], names[1], names[0]]


def test_a_missing_compiler_ends_with_3(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(target: str, extra: object) -> None:
        raise EnvironmentMissing(f"no compiler for {target}", "make gpu-root")

    monkeypatch.setattr(kernel_report.toolchains, "toolchain", missing)
    monkeypatch.setattr(kernel_report, "_report", lambda options: len(kernel_report._toolchains(options)))
    assert kernel_report.main(["--targets", "gfx1100"]) == 3
    assert capsys.readouterr().err == "error: no compiler for gfx1100\nhint: make gpu-root\n"
    assert kernel_report.main(["--targets", "gfx1100", "--skip-missing"]) == 0
