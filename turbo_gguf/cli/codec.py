"""``turbo-gguf codec``: what a cache type costs in bits, memory and error, by its constants and on values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from zipfile import BadZipFile

import click
import numpy as np
import numpy.typing as npt

from turbo_gguf import codec
from turbo_gguf.cache.spec import PLAIN, CacheSpec
from turbo_gguf.cli.plan import size_text
from turbo_gguf.codec import picture, tables
from turbo_gguf.codec.distortion import Measured
from turbo_gguf.codec.tables import Scale, TurboType
from turbo_gguf.errors import UsageError
from turbo_gguf.inputs import headers
from turbo_gguf.judge.report import markdown
from turbo_gguf.plan import memory
from turbo_gguf.plan.memory import Context
from turbo_gguf.plan.shape import shape_of

VALUES = 1 << 17
"""Gaussian values that are stored to measure an error: it is right to half a per cent."""

MOST_VALUES = 1 << 21
"""Of a file; a trellis type encodes a quarter of a million in a second."""

RULES = {Scale.LEAST_SQUARES: "least squares", Scale.MATCHED_NORM: "norms are kept", Scale.INNER_PRODUCT: "inner products are kept"}


@click.command(name="codec")
@click.argument("type_", metavar="TYPE", type=click.Choice(list(tables.BY_NAME)))
@click.argument("file", metavar="[FILE.npy]", required=False, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--scale", type=click.Choice(list(tables.SCALES)), help="Rule of the scale of a block.  [default: that of llama.cpp]")
@click.option("--model", "model_spec", metavar="MODEL|HUB-ID", help="Say what its KV cache takes; only the header is read.")
@click.option("--ctx", type=click.IntRange(min=1), help="Tokens of that cache.  [default: those of the training]")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw codebook and errors to this PNG file.")
def command(*, type_: str, file: Path | None, scale: str | None, model_spec: str | None, ctx: int | None, plot: Path | None) -> None:
    """Say what the cache type TYPE costs: bits, size, and error.

    Errors are |x - y|^2 / |x|^2 of values x that are read back as y. They are told by the constants of the type, measured on Gaussian
    values, and measured on those of FILE.npy: heads of K or V, shape (..., head size), as they are and rotated as K is. The slope is
    <x, y> / |x|^2, and 1 where inner products are right on average. The norm is |y| / |x|. The bound is the least error of any code of as
    many bits on Gaussian values.
    """
    t = codec.turbo_type(type_)
    rule = tables.SCALES[scale] if scale else codec.default_scale(t)
    if ctx and not model_spec:
        raise UsageError("--ctx is of a model's cache", "name the model with --model")
    size = (_size(t, model_spec, ctx),) if model_spec else ()
    found = _measured(t, rule, file)
    if plot:
        try:
            picture.draw(t, plot, measured={name: row.error for name, row in found.items()})
        except OSError as error:
            raise UsageError(f"{plot}: {error.strerror or error}", "name another file with --plot") from error
    click.echo("\n".join((*_about(t, rule), *size, "", _table(t, rule, found))))
    if plot:
        click.echo(plot)


def _about(t: TurboType, rule: Scale) -> tuple[str, ...]:
    """The type by its constants."""
    found = codec.expected(t, scale=rule)
    lines = [
        f"{t.name}: {t.family}, {t.block} values in {t.block_bytes} bytes; rule of the scale: {RULES[rule]}.",
        f"{found.bits_per_value:g} bits per value, {found.ratio:.2f} times smaller than f16.",
        f"Bound at these bits: {found.bound:.5f}. The type needs {found.excess_bits:.2f} bits more than a code at the bound.",
    ]
    if found.without_search is not None:
        lines.append(f"Its codebook without the search for a scale has {found.without_search:.5f}, in closed form.")
    return tuple(lines)


def _table(t: TurboType, rule: Scale, found: Mapping[str, Measured]) -> str:
    constants = ("Gaussian values, by its constants", f"{codec.expected(t, scale=rule).error:.5f}", "", "", "")
    rows = [(name, f"{row.error:.5f}", f"{row.slope:.4f}", f"{row.norm:.4f}", f"{row.values:,}") for name, row in found.items()]
    return markdown(("values", "error", "slope", "norm", "how many"), [constants, *rows])


def _measured(t: TurboType, rule: Scale, file: Path | None) -> dict[str, Measured]:
    gaussian = np.random.default_rng(0).standard_normal((VALUES // t.block, t.block))
    found = {"Gaussian values": codec.measure(t, gaussian, scale=rule)}
    if file:
        rows = _rows(t, file)
        turned = codec.rotate(rows)
        found |= {file.name: codec.measure(t, rows, scale=rule), f"{file.name}, rotated": codec.measure(t, turned, scale=rule)}
    return found


def _rows(t: TurboType, file: Path) -> npt.NDArray[np.float32]:
    """Rows of a file; the first ones of many.

    Raises:
        UsageError: no array of numbers that can be cut into blocks.
    """
    hint = f"numpy.save('rows.npy', rows) writes one; rows are the last axis, a multiple of {t.block} values"
    try:
        values = np.load(file, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror or 'it is no array of numpy'}", hint) from error
    except (ValueError, EOFError, BadZipFile) as error:  # numpy reads .npz, too
        raise UsageError(f"{file}: it is no array of numpy", hint) from error
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu":
        raise UsageError(f"{file}: it holds no array of numbers", hint)
    if not values.size or not values.ndim or values.shape[-1] % t.block:
        raise UsageError(f"{file}: shape {values.shape} is no whole number of blocks of {t.block} values", hint)
    rows = values.reshape(-1, values.shape[-1])
    chosen = np.array(rows[: max(1, MOST_VALUES // rows.shape[1])], np.float32)
    if not np.isfinite(chosen).all() or not chosen.any():
        raise UsageError(f"{file}: it holds {'nothing but zeros' if np.isfinite(chosen).all() else 'values that are not finite'}", hint)
    return chosen


def _size(t: TurboType, spec: str, ctx: int | None) -> str:
    header = headers.read(spec)
    shape, types = shape_of(header.fields, header.tensors), CacheSpec(t.name, t.name)
    if reason := memory.why_not(shape, types):
        raise UsageError(f"{header.name} can't have {t.name}: {reason}", "turbo-gguf plan shows what it can have")
    context = Context(ctx or shape.n_ctx_train)
    ours, f16 = (sum(map(sum, memory.kv_bytes(shape, kind, context))) for kind in (types, PLAIN))
    return (
        f"KV cache of {header.name} at {context.ctx:,} tokens: {size_text(ours)}, with f16 {size_text(f16)}. "
        "Exact tokens come on top: turbo-gguf plan."
    )
