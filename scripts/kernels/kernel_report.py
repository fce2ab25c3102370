"""Compile our GPU kernels for each architecture, without a GPU, and write down what each of them takes.

    python scripts/kernels/kernel_report.py                                  # everything, to eval/results/kernels.md
    python scripts/kernels/kernel_report.py --targets gfx1100,sm_90 --out -  # a part, to standard output
    python scripts/kernels/kernel_report.py --changes                        # what changed against that file, which stays as it is
    python scripts/kernels/kernel_report.py --new                            # only files that it does not speak for, to standard output

All targets take two hours of one core. Each file is remembered when it is done (kernel_toolchains.py), so what was interrupted goes on
where it was. --remembered compiles nothing: the report has what there is, and names what is missing.

Exit codes: 0 all well; 1 a warning in a file of ours, or a kernel of ours that spills or uses scratch; 3 a compiler is missing (it is
named, with what brings it); 4 a file does not compile.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kernel_changes
import kernel_toolchains as toolchains
from kernel_instructions import per_value
from kernel_resources import DECODE_KERNEL, WIDE_KERNEL, Kernel, leaves_registers
from kernel_toolchains import CUDA_SOURCES, NVIDIA_TARGETS, Compiled, Job, Toolchain

from turbo_gguf import patchset
from turbo_gguf.errors import EnvironmentMissing
from turbo_gguf.failures import exit_code
from turbo_gguf.files import lock
from turbo_gguf.judge.results import write as write_result
from turbo_gguf.make.toolkits import rocm
from turbo_gguf.make.upstream import fetch, resolve

RESULT = Path(__file__).resolve().parents[2] / "eval" / "results" / "kernels.md"
OURS = "turbo"
"""Our kernels and files have this in their names; others in our object files are instances of upstream's templates."""

COLUMNS_AT, WIDE_AT = "128", "512"
"""Head size of the table of instructions per value, and that of kernels for wide heads."""

_SHOWN = ("vgpr", "lds", "spill", "sgpr_spill", "scratch", "instructions")

FIRST = ("gfx1100", "gfx1201", "sm_90", "sm_80", "gfx942", "gfx90a")
"""Targets that are compiled before the others: those that most depends on, if there is no time for all."""

Results = dict[tuple[str, str], Compiled]  # (source, target)


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    options = _parse(argv)
    return exit_code(lambda: _report(options))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--targets", default=",".join((*rocm.INSPECTED, *NVIDIA_TARGETS)), help="architectures, separated by commas")
    parser.add_argument("--files", default="turbo*.cu", help="pattern of the sources")
    parser.add_argument("--upstream", help="llama.cpp snapshot  [default: the newest supported one]")
    parser.add_argument("--all-pairs", action="store_true", help="compile kernels for all K/V pairs, not only those of the default build")
    parser.add_argument("--skip-missing", action="store_true", help="leave out targets whose compiler is missing")
    parser.add_argument("--remembered", action="store_true", help="compile nothing: report what is remembered")
    parser.add_argument(
        "--new", action="store_true", help=f"compile only what {RESULT.name} does not speak for: other sources, compilers or command lines"
    )
    parser.add_argument("--changes", action="store_true", help=f"print what changed against {RESULT.name}, and write nothing")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", help=f"Markdown file, - for standard output  [default: {RESULT.name}; with --new, a part of it, -]")
    options = parser.parse_args(argv)
    options.out = options.out or ("-" if options.new else str(RESULT))
    return options


def _report(options: argparse.Namespace) -> int:
    pristine = fetch(resolve(options.upstream))
    with lock(f"tree-{pristine.upstream}"):
        tree = patchset.apply(pristine)
    folder = tree.path / CUDA_SOURCES
    own_files = [str(path.relative_to(folder)) for pattern in (f"{OURS}*.cu", f"{OURS}/*.cuh") for path in folder.glob(pattern)]
    sources = sorted(name for name in own_files if name.endswith(".cu") and fnmatch.fnmatch(name, options.files))
    tools = _toolchains(options)
    with tempfile.TemporaryDirectory(prefix="kernels-") as scratch:
        by_first = sorted(tools, key=lambda target: FIRST.index(target) if target in FIRST else len(FIRST))
        jobs = [
            toolchains.Job(tree.path, source, target, tools[target], own_files, Path(scratch)) for target in by_first for source in sources
        ]
        if options.new:
            jobs = _new(jobs, options.jobs)
            if not jobs:
                print(f"{len(sources)} files, {len(tools)} targets: {RESULT.name} speaks for all of them", file=sys.stderr)
                return 0
        results = _remembered(jobs) if options.remembered else _compile(jobs, options.jobs)
    missing = {target: [source for source in sources if (source, target) not in results] for target in tools}
    tools = {target: tool for target, tool in tools.items() if len(missing[target]) < len(sources)}
    if not tools:
        raise EnvironmentMissing("nothing is remembered of these files", "leave out --remembered")
    types = toolchains.types_of(tree.path)
    names = _names(results, types)
    problems = _problems(results, names)
    text = _markdown(results, names, tools, problems, all_pairs=options.all_pairs, commit=tree.commit, missing=missing)
    _show(text, options.out, changed_only=options.changes)
    print("\n".join([f"problem: {problem}" for problem in problems]), file=sys.stderr)
    print(f"{len(sources)} files, {len(tools)} targets, {len(problems)} problems", file=sys.stderr)
    return 1 if problems else 0


def _show(text: str, out: str, *, changed_only: bool) -> None:
    if changed_only:
        committed = RESULT.read_text("utf-8")
        print("\n".join(kernel_changes.lines(kernel_changes.cells(committed), kernel_changes.cells(text))))
    elif out == "-":
        print(text, end="")
    else:
        write_result(Path(out), text)


def _toolchains(options: argparse.Namespace) -> dict[str, Toolchain]:
    extra = ["-DGGML_TURBO_CUDA_ALL_PAIRS"] if options.all_pairs else []
    found: dict[str, Toolchain] = {}
    by_vendor: dict[bool, Toolchain] = {}
    for target in options.targets.split(","):
        amd = target.startswith("gfx")
        try:
            found[target] = by_vendor[amd] = by_vendor.get(amd) or toolchains.toolchain(target, extra)
        except EnvironmentMissing as error:
            if not options.skip_missing:
                raise
            print(f"left out {target}: {error.message}", file=sys.stderr)
    return found


def _new(jobs: Sequence[Job], at_once: int) -> list[Job]:
    """Those that the committed report does not speak for."""
    known = kernel_changes.digests(RESULT.read_text("utf-8"))
    with ThreadPoolExecutor(max(at_once, 1)) as pool:
        digests = list(pool.map(Job.digest, jobs))
    return [job for job, digest in zip(jobs, digests, strict=True) if not digest or digest != known.get((job.source, job.target))]


def _remembered(jobs: Sequence[Job]) -> Results:
    found = {(job.source, job.target): toolchains.remembered(job) for job in jobs}
    return {pair: compiled for pair, compiled in found.items() if compiled is not None}


def _compile(jobs: Sequence[Job], at_once: int) -> Results:
    """Compile everything, so many at a time; the first failure ends it."""
    with ThreadPoolExecutor(max(at_once, 1)) as pool:
        futures = {(job.source, job.target): pool.submit(toolchains.compile_source, job) for job in jobs}
        try:
            return {pair: future.result() for pair, future in futures.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _names(results: Results, types: Mapping[int, str]) -> dict[str, str]:
    """Symbol -> short name, for all kernels of ours."""
    symbols = {kernel.symbol for found in results.values() for kernel in found.kernels if OURS in kernel.symbol}
    return toolchains.short_names(sorted(symbols), types)


def _problems(results: Results, names: Mapping[str, str]) -> list[str]:
    found = [f"{target}: {text}" for (_, target), compiled in results.items() for text in compiled.warnings]
    for (source, target), compiled in results.items():
        for kernel in compiled.kernels:
            if kernel.symbol in names and leaves_registers(kernel):
                name = names[kernel.symbol]
                found.append(f"{target}: {name} in {source}: {_cell(name, kernel, target)}")
    return found


def _markdown(
    results: Results,
    names: Mapping[str, str],
    tools: Mapping[str, Toolchain],
    problems: Sequence[str],
    *,
    all_pairs: bool,
    commit: str,
    missing: Mapping[str, Sequence[str]],
) -> str:
    versions = sorted({tool.version for tool in tools.values()})
    lines = [
        "# Kernels",
        "",
        f"`make kernel-report`: device-only compiles of our .cu files in llama.cpp `{commit}`, {'all' if all_pairs else 'default'} K/V "
        f"pairs; {'; '.join(versions)}.",
        "",
        f"Warnings in our files, and kernels of ours that spill or use scratch: **{len(problems) or 'none'}**.",
        *(f"- {problem}" for problem in problems),
        *_missing(missing, tools),
        "",
        "## Files",
        "",
        *_file_table(results, tools),
        "",
        "## Kernels by family",
        "",
        "Most of any instance: vector registers / bytes of shared memory (LDS); what spills or uses scratch, if anything; instructions.",
        "",
        *_family_table(results, names, tools),
        "",
        "## Decode: instructions per value",
        "",
        f"At head size {COLUMNS_AT} (wide heads: {WIDE_AT}), by columns (query heads of a KV head times queries): instructions of the "
        "longest loop for each value of K and V that a lane unpacks. Both sides of a branch count.",
        "",
        *_decode_table(results, names, tools),
        "",
        kernel_changes.TITLE,
        "",
        "AMD: vector registers (accumulation registers among them) / scalar registers / bytes of LDS. NVIDIA: registers / bytes of shared "
        "memory. Spills (registers on AMD, bytes on NVIDIA) and scratch or stack (bytes per thread) are written where there are any. "
        "Behind the semicolon: instructions of the kernel; of decode kernels those of the longest loop, and how many that are per "
        "value of K and V that a lane unpacks. Both sides of a branch count, and an inner loop, as at head size 256, counts once.",
        "",
        *_kernel_table(results, names, tools),
        "",
        kernel_changes.SOURCES,
        "",
        "Digests of the compiler's version, its command line, and the preprocessed source without comments and line numbers.",
        "",
        *_source_table(results, tools),
    ]
    return "\n".join(lines) + "\n"


def _missing(missing: Mapping[str, Sequence[str]], tools: Mapping[str, Toolchain]) -> list[str]:
    """Says what was not compiled, so that an empty cell is not taken for a kernel that a target does not have."""
    said = [f"{target}: {', '.join(sources) if target in tools else 'all files'}" for target, sources in missing.items() if sources]
    return ["", "**Not compiled for this report**, so their kernels are not in it:", "", *(f"- {line}" for line in said)] if said else []


def _file_table(results: Results, tools: Mapping[str, Toolchain]) -> list[str]:
    rows = ["Kilobytes of the code object and seconds of one core.", "", f"| file | {' | '.join(tools)} |", "|---" * (len(tools) + 1) + "|"]
    for source in sorted({source for source, _ in results}):
        here = [results.get((source, target)) for target in tools]
        cells = [f"{found.size / 1000:.0f} kB, {found.seconds:.0f} s" if found else "" for found in here]
        rows.append(f"| {source} | {' | '.join(cells)} |")
    totals = [[found for (_, name), found in results.items() if name == target] for target in tools]
    cells = [f"{sum(f.size for f in found) / 1000:.0f} kB, {sum(f.seconds for f in found):.0f} s" for found in totals]
    return [*rows, f"| all | {' | '.join(cells)} |"]


def _source_table(results: Results, tools: Mapping[str, Toolchain]) -> list[str]:
    rows = [f"| file | {' | '.join(tools)} |", "|---" * (len(tools) + 1) + "|"]
    for source in sorted({source for source, _ in results}):
        here = (results.get((source, target)) for target in tools)
        rows.append(f"| `{source}` | {' | '.join(found.digest if found else '' for found in here)} |")
    return rows


def _by_name(results: Results, names: Mapping[str, str]) -> dict[str, dict[str, Kernel]]:
    """Short name -> target -> kernel, without those of upstream's templates."""
    found: dict[str, dict[str, Kernel]] = {}
    for (_, target), compiled in results.items():
        for kernel in compiled.kernels:
            if kernel.symbol in names:
                found.setdefault(names[kernel.symbol], {})[target] = kernel
    return found


def _family_table(results: Results, names: Mapping[str, str], tools: Mapping[str, Toolchain]) -> list[str]:
    families: dict[str, list[dict[str, Kernel]]] = {}
    for name, kernels in _by_name(results, names).items():
        families.setdefault(name.partition("<")[0], []).append(kernels)
    rows = [f"| kernel | instances | {' | '.join(tools)} |", "|---" * (len(tools) + 2) + "|"]
    for family, instances in sorted(families.items()):
        cells = []
        for target in tools:
            there = [kernels[target] for kernels in instances if target in kernels]
            worst = Kernel("", **{key: max((getattr(k, key) for k in there), default=0) for key in _SHOWN})
            cells.append(f"{worst.vgpr} / {worst.lds}{_excess(worst)}; {worst.instructions}" if there else "")
        rows.append(f"| {family} | {len(instances)} | {' | '.join(cells)} |")
    return rows


def _decode_table(results: Results, names: Mapping[str, str], tools: Mapping[str, Toolchain]) -> list[str]:
    """A line for each decode kernel of pairs of equal types at its head size, whose last argument are its columns."""
    rows = [f"| kernel | types | columns | {' | '.join(tools)} |", "|---" * (len(tools) + 3) + "|"]
    found = _by_name(results, names)
    for name in sorted(found, key=_natural):
        family, _, arguments = name.partition("<")
        parts = [part.strip() for part in arguments.rstrip(">").split(",")]
        size = WIDE_AT if WIDE_KERNEL.match(name) else COLUMNS_AT
        is_shown = DECODE_KERNEL.match(name) and len(parts) == 5 and parts[:2] == [size] * 2 and parts[2] == parts[3]
        each = {target: per_value(name, kernel.loop, target) for target, kernel in found[name].items()}
        if is_shown and any(each.values()):
            cells = ("" if each.get(target) is None else f"{each[target]:.1f}" for target in tools)
            rows.append(f"| {family} | {parts[2]} | {parts[4]} | {' | '.join(cells)} |")
    return rows


def _kernel_table(results: Results, names: Mapping[str, str], tools: Mapping[str, Toolchain]) -> list[str]:
    rows = [f"| kernel | {' | '.join(tools)} |", "|---" * (len(tools) + 1) + "|"]
    for name, kernels in sorted(_by_name(results, names).items(), key=lambda item: _natural(item[0])):
        rows.append(f"| `{name}` | {' | '.join(_cell(name, kernels[target], target) if target in kernels else '' for target in tools)} |")
    return rows


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts 64 before 128."""
    parts = name.replace("<", " ").replace(",", " ").replace(">", " ").split()
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _cell(name: str, kernel: Kernel, target: str) -> str:
    vector = f"{kernel.vgpr} ({kernel.agpr})" if kernel.agpr else f"{kernel.vgpr}"
    each = per_value(name, kernel.loop, target)
    count = f"{kernel.instructions}" if each is None else f"{kernel.loop}, {each:.1f}"
    return f"{vector} / {f'{kernel.sgpr} / ' if kernel.sgpr else ''}{kernel.lds}{_excess(kernel)}; {count}"


def _excess(kernel: Kernel) -> str:
    parts = (("spill", kernel.spill), ("scalar spill", kernel.sgpr_spill), ("scratch", kernel.scratch))
    return "".join(f", **{name} {number}**" for name, number in parts if number)


if __name__ == "__main__":
    sys.exit(main())
