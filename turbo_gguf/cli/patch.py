"""``turbo-gguf patch``: apply, check and write the patch set."""

from __future__ import annotations

from pathlib import Path

import click

from turbo_gguf import patchset
from turbo_gguf.cli import options
from turbo_gguf.errors import UsageError
from turbo_gguf.files import lock
from turbo_gguf.make.upstream import default_name, fetch, resolve, supported
from turbo_gguf.patchset.hook import MAX_ADDED_LINES


@click.group(name="patch")
def command() -> None:
    """Apply, check and write the patch set."""


@command.command(name="list")
def list_() -> None:
    """Print the hooks with the lines they add to upstream files, and the size of the overlay."""
    _print_hooks(patchset.load())


@command.command()
@options.upstream
@click.option("--force", is_flag=True, help="Overwrite edits that were made in the work tree.")
def apply(upstream: str | None, force: bool) -> None:
    """Bring the work tree of an upstream up to date and print its folder; doing it again changes nothing."""
    pristine = fetch(resolve(upstream))
    with lock(f"tree-{pristine.upstream}"):
        tree = patchset.apply(pristine, force=force)
    click.echo(f"{pristine.upstream} ({pristine.commit}) patched with {tree.digest[:12]}", err=True)
    click.echo(tree.path)


@command.command()
@click.option("--all", "every", is_flag=True, help="Check against every supported upstream (fetches those that are missing).")
@options.upstream
def check(every: bool, upstream: str | None) -> None:
    """Check the patch set: series, headers, budgets, that each hunk lands in one place, and that writing it again changes nothing."""
    if every and upstream:
        raise UsageError("--all and --upstream exclude each other")
    patches = patchset.load()
    wanted = list(supported().values()) if every else [resolve(upstream)]
    default = default_name()
    trees = [fetch(item, keep_archive=item.name == default) for item in wanted]
    report = patchset.check(patches, trees, reference=default)
    _print_hooks(patches)
    for tree in trees:
        wrong = sum(problem.startswith(f"{tree.upstream}: ") for problem in report.problems)
        click.echo(f"upstream {tree.upstream} ({tree.commit}): {'ok' if not wrong else f'{wrong} problems'}")
    for text in report.obsolete:
        click.echo(f"note: {text}")
    if report.problems:
        raise UsageError("\n  ".join([f"{len(report.problems)} problems in the patch set:", *report.problems]))


@command.command()
@click.option("--onto", "spec", metavar="SOURCE", help="Upstream whose line numbers the hooks get.  [default: the newest supported one]")
def refresh(spec: str | None) -> None:
    """Write the hooks again in their canonical form, with the line numbers of an upstream."""
    changed = patchset.refresh(patchset.load(), fetch(resolve(spec)))
    click.echo("\n".join(f"rewrote {name}" for name in changed) or "nothing to change")


@command.command()
@click.argument("name")
@click.option(
    "--from-tree", "folder", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Edited tree.  [default: the work tree]"
)
@click.option("--subject", default="", help="First line, 'module : what'.")
@click.option("--why", default="", help="Why the hook exists.")
@click.option(
    "--obsolete-when", default="", metavar="PATH: TEXT", help="Text in an upstream file that makes the hook unnecessary.  [default: never]"
)
@options.upstream
def export(name: str, folder: Path | None, upstream: str | None, **header: str) -> None:
    """Write edits of upstream files in the work tree as the hook NAME, and list it in the series.

    For a hook that exists, its old lines are replaced by what the work tree has now.
    """
    pristine = fetch(resolve(upstream))
    work = folder or patchset.work_tree(pristine.upstream)
    click.echo(patchset.export(patchset.load(), pristine, work, name, **header))


def _print_hooks(patches: patchset.PatchSet) -> None:
    width = max([len(hook.name) for hook in patches.hooks], default=0)
    for hook in patches.hooks:
        hunks = ", ".join(str(hunk.added) for hunk in hook.hunks)
        click.echo(f"{hook.name:{width}}  +{hook.added} ({hunks})  {hook.subject}")
        for file in hook.files:
            click.echo(f"{'':{width}}  {file.path}")
    click.echo(
        f"{patches.added} of {MAX_ADDED_LINES} hook lines in {len(patches.hooks)} hooks; {len(patches.overlay)} files in the overlay"
    )
    click.echo(f"digest {patches.digest}")
