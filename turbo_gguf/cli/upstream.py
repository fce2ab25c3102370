"""``turbo-gguf upstream``: the llama.cpp snapshots that we work on, and newer ones."""

from __future__ import annotations

from pathlib import Path

import click

from turbo_gguf import patchset
from turbo_gguf.cli import options
from turbo_gguf.errors import EXIT_GATE_FAILED, EnvironmentMissing, TurboError, UsageError
from turbo_gguf.fetch import pip_settings, registry
from turbo_gguf.judge import trial
from turbo_gguf.judge.results import write as write_result
from turbo_gguf.make.snapshots import Upstream, default_name, packages, supported
from turbo_gguf.make.upstream import fetch, is_fetched, resolve
from turbo_gguf.tools import default_threads

NEWS_SHOWN = 10
"""Newer versions of a package that are listed."""


@click.group(name="upstream")
def command() -> None:
    """List, fetch and try the llama.cpp snapshots that we work on."""


@command.command(name="list")
def list_() -> None:
    """Print name, commit, build number and state of every supported upstream."""
    default = default_name()
    for name, upstream in supported().items():
        state = "fetched" if is_fetched(upstream) else "-"
        build = f"b{upstream.build}" if upstream.build else "-"
        click.echo(f"{name}  {upstream.commit}  {build}  {state}{'  (default)' if name == default else ''}")


@command.command(name="fetch")
@click.argument("source", required=False)
def fetch_(source: str | None) -> None:
    """Fetch, verify and unpack SOURCE, and print the folder of the pristine tree.

    SOURCE is a name from `upstream list` (the default one when it is left out), PACKAGE==VERSION, a folder, FILE.tar.gz,
    FILE.tar.gz#sha256=HEX, or GIT-URL@COMMIT. Nothing of a package is run. Of one without a pinned sha256 it is printed.
    """
    upstream = resolve(source)
    tree = fetch(upstream)
    click.echo(tree.path)


@command.command()
def news() -> None:
    """Ask the package registry for versions that are newer than ours, and print each with llama.cpp's build number.

    Ends with 3 when the registry knows none of our packages.
    """
    using = pip_settings.settings()
    pinned = list(supported().values())
    newest_build = max(upstream.build for upstream in pinned)
    unknown = []
    for package in packages().values():
        ours = [upstream.version for upstream in pinned if upstream.package == package.name]
        known = registry.releases(package.name, using)
        found = registry.newer(known, ours)
        if not known:
            unknown.append(package.name)
            click.echo(f"{package.name}: not known to the registry that pip is set up for")
        elif not found:
            click.echo(f"{package.name}: nothing newer than {registry.newest(ours) or 'nothing'}")
        for release in found[:NEWS_SHOWN]:
            build = package.build_of(release.version)
            note = "" if not build else f"  b{build}" + (", newer than all of ours" if build > newest_build else "")
            click.echo(f"{package.name} {release.version}{note}  turbo-gguf upstream try {package.name}=={release.version}")
        if len(found) > NEWS_SHOWN:
            click.echo(f"{package.name}: and {len(found) - NEWS_SHOWN} more")
    if len(unknown) == len(packages()):
        raise EnvironmentMissing(f"the registry knows nothing of {', '.join(unknown)}", registry.HINT)


@command.command(name="try")
@click.argument("source", required=False)
@click.option("--all", "every", is_flag=True, help="Try every supported upstream; those with a stored pass are not run again.")
@click.option("--again", is_flag=True, help="With --all: run those with a stored pass, too.")
@click.option("--keep", is_flag=True, help="With --all: keep the builds. Without it, what was built here is removed after a pass.")
@options.jobs
@click.option("--report", type=click.Path(path_type=Path, dir_okay=False), help="Write the table of verdicts to this file.")
def try_(source: str | None, *, every: bool, again: bool, keep: bool, jobs: int | None, report: Path | None) -> None:
    """Try the patch set on SOURCE: hooks, compiling for the CPU, upstream's tests of our types, a gate run, the life of caches.

    SOURCE is as for `upstream fetch`. Hooks that do not land are named with the line that is missing and the nearest one.
    Ends with 0 for a pass, 1 when a step failed, 3 when there is no verdict because something is missing here.
    """
    if every and source:
        raise UsageError("--all and SOURCE exclude each other")
    if (again or keep) and not every:
        raise UsageError("--again and --keep go with --all")
    wanted = [(item, name) for name, item in supported().items()] if every else [(resolve(source), source or default_name())]
    trials: list[trial.Trial] = []
    missing: list[str] = []
    code = 0
    for upstream, spec in wanted:
        old = trial.kept(upstream, patchset.load().digest) if every and not again else None
        click.echo(f"{upstream.title} ({upstream.commit})" + (", tried before: pass" if old else ""), err=True)
        try:
            made = old or _try(upstream, spec, jobs, removes=every and not keep and upstream.name != default_name())
        except TurboError as error:
            if not every:
                raise
            missing.append(f"{upstream.name}: {error.message}")
            code = code or error.exit_code
            click.echo(f"not tried: {error.message}", err=True)
            continue
        trials.append(made)
    text = trial.table(trials, missing)
    if report:
        write_result(report, text, patches=patchset.load().digest)
    for made in trials:
        click.echo(f"{made.upstream} ({made.commit}), patches {made.digest[:12]}: {'pass' if made.passed else 'FAILED'}")
        for failure in made.failures:
            click.echo("  " + failure.replace("\n", "\n  "))
    if any(not made.passed for made in trials):
        click.get_current_context().exit(EXIT_GATE_FAILED)
    if missing:
        click.get_current_context().exit(code)


def _try(upstream: Upstream, spec: str, jobs: int | None, *, removes: bool) -> trial.Trial:
    """Run a trial, print its steps as they end, and store its verdict."""

    def say(step: trial.Step) -> None:
        click.echo(f"  {step.name:18} {step.status:8} {step.detail.partition(chr(10))[0]}".rstrip(), err=True)

    had = trial.had_build(upstream)
    made = trial.try_upstream(upstream, spec, threads=default_threads(), jobs=jobs, say=say)
    trial.keep(made)
    if made.passed and removes and not had:
        trial.drop_build(upstream)
    return made
