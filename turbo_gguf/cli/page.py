"""``turbo-gguf report``: one HTML file of all that was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from turbo_gguf import assets
from turbo_gguf.errors import UsageError
from turbo_gguf.files import write_text
from turbo_gguf.judge import gate, page
from turbo_gguf.measure.store import Store, default_folder


@click.command(name="report")
@click.option(
    "--store",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder with results.jsonl.  [default: results below TURBO_GGUF_HOME]",
)
@click.option(
    "--model", "parts", multiple=True, metavar="TEXT", help="Only models with this in their name, may be repeated.  [default: all]"
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write.  [default: report/report.html below TURBO_GGUF_HOME]",
)
@click.option("--gates", type=click.Path(path_type=Path, dir_okay=False), help="Thresholds.  [default: eval/gates.toml]")
def command(*, folder: Path | None, parts: tuple[str, ...], out: Path | None, gates: Path | None) -> None:
    """Write one HTML file of all that was measured: verdicts, quality, speed, serving, memory, history.

    The file needs no script and fetches nothing, so it can be handed on as it is. Shown is the newest build of each set-up; older ones are
    the history. Nothing is measured, and a failed verdict is no failure of this command. Prints the path of the file.
    """
    store = Store(folder or default_folder())
    limits = gate.load(gates or assets.eval_dir() / "gates.toml")
    records = page.Records(store.results(), store.bench_rows(), store.serve_rows(), store.left_out())
    if records.is_empty:
        raise UsageError(*_nothing(store, records.left_out))
    if parts:
        records = records.of(_named(records.models, parts))
    click.echo(write_text(out or assets.home() / "report" / "report.html", page.document(records, limits)))


def _named(models: Sequence[str], parts: Sequence[str]) -> list[str]:
    """Models whose names have one of these parts in them.

    Raises:
        UsageError: a part is in none.
    """
    for part in parts:
        if not any(part.lower() in name.lower() for name in models):
            raise UsageError(f"--model {part}: no result is of such a model", f"there are {'; '.join(models)}")
    return [name for name in models if any(part.lower() in name.lower() for part in parts)]


def _nothing(store: Store, left_out: int) -> tuple[str, str]:
    """What to say of an empty store."""
    if left_out:
        return f"{store.path}: all {left_out} results are of another version of the metrics", "measure again with turbo-gguf ppl-gate"
    below = store.folder / "results"
    if (below / store.path.name).is_file():
        return f"{store.folder}: no results here", f"--store {below}"
    return f"{store.path}: no results", "measure with turbo-gguf ppl-gate, bench or bench-serve, or name a folder with --store"
