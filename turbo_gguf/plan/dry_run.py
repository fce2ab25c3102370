"""The dry run of a build: what llama-server says that it will allocate, before it loads a model.

It is upstream's own ``--fit``, in the program that will run, with all its options. ``llama-fit-params --fit-print`` does the same for a
context that puts out logits for each token of a batch. llama-server puts out few, so its compute buffers are several times smaller.
The server is ended as soon as the table of memory is in its log: nothing is loaded.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from turbo_gguf import tools
from turbo_gguf.errors import EXIT_USAGE, LogNotUnderstood, ToolFailed, TurboError, UsageError

SECONDS = 300.0
"""Longest wait: the vocabulary of a large model is read, and each context is planned."""

POLL_SECONDS = 0.02

ROUNDING = 0.0101
"""Sizes in MiB that differ less are equal: both are rounded to .01, and what is printed was a float before."""

HOST = "Host"
"""Row of the table for the memory that is no device's."""

_MIB = 1 << 20
_TABLE = "memory breakdown [MiB]"
_BEHIND_TABLE = re.compile(r"projected to use|fitting params to free memory took|failed to fit params")
_ROW = re.compile(
    r"common_memory_breakdown_print: \|\s+- (?P<name>\S+).*?\| +(?:(?P<total>\d+) = +(?P<free>-?\d+) \+ )?\(?"
    r" *\d+ = +(?P<model>\d+) \+ +(?P<context>\d+) \+ +(?P<compute>\d+)"
)
_BUFFERS = re.compile(
    r"(?:sched_reserve:\s+(?P<buffer>\S+) compute|llama_context:\s+(?P<host>\S+)\s+output) buffer size =\s*(?P<mib>[\d.]+) MiB"
)
_CACHES = re.compile(r"llama_kv_cache: size =\s*(?P<all>[\d.]+) MiB.*?K \([^)]+\):\s*(?P<k>[\d.]+) MiB, V \([^)]+\):\s*(?P<v>[\d.]+) MiB")
_STATES = re.compile(r"llama_memory_recurrent: size =\s*(?P<r>[\d.]+) MiB|state buffer size =\s*(?P<d>[\d.]+) MiB")
_COPIES = re.compile(r"copies \d+ rows in \d+ streams, (?P<mib>[\d.]+) MiB")
_ERROR = re.compile(r"^\S+ E (?:\w+ +)?\w+: (?P<why>.*\S)", re.MULTILINE)
_NO_CONTEXT = "failed to create llama_context"
_WRONG_OPTION = re.compile(
    r"^error(?:: (?P<what>(?:invalid|unknown|expected) .*\S)| while handling (?P<value>argument .*\S))", re.MULTILINE
)


class WrongOption(TurboError):
    """llama-server does not take an option. It is no refusal of a cache, which would be a :class:`UsageError`."""

    exit_code = EXIT_USAGE


class Device(msgspec.Struct, frozen=True):
    """A row of the table, in MiB, rounded down. ``Host`` is all memory that is no device's."""

    name: str
    model: int
    context: int
    compute: int
    free: int | None = None  # None: the table does not say

    @property
    def used(self) -> int:
        """What the server takes of it."""
        return self.model + self.context + self.compute


class DryRun(msgspec.Struct, frozen=True):
    """What a context will take, in bytes as exactly as the log has them: sizes of buffers are rounded to .01 MiB."""

    devices: tuple[Device, ...]
    mib: tuple[tuple[float, float], ...]  # of K and of V of each cache, as the log has it
    kv: int  # of all caches
    copies: int
    state: int
    compute: int  # compute buffers of all devices, and the buffer of outputs

    @property
    def model(self) -> int:
        """Weights, less than a MiB too few for each device."""
        return sum(device.model for device in self.devices) * _MIB

    @property
    def repacked(self) -> int:
        """Those that are in another layout, beside the file that is mapped with them."""
        return sum(device.model for device in self.devices if device.free is None and device.name != HOST) * _MIB


def ask(server: Path, args: Sequence[str], *, name: Path) -> DryRun:
    """Start a server as a user would, and read what it plans.

    Args:
        server: llama-server of a build.
        args: its options, the model among them. One that says ``-fit off`` plans nothing.
        name: of the log.

    Raises:
        UsageError: the model can't have such a cache; the message is llama.cpp's own reason.
        WrongOption: it does not take one of the options.
        ToolFailed: it ended, or says nothing.
    """
    argv = [str(server), *args, "--host", "127.0.0.1", "--port", "0", "-fit", "on", "-lv", "5"]
    with tools.serving(argv, log=name, grace=0) as service:
        text = _until_table(service)
    return read(text)


def _until_table(service: tools.Service) -> str:
    """The log up to the table, or up to the reason why there is none."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        text = service.stderr.read_text("utf-8", errors="replace")
        if end := _BEHIND_TABLE.search(text, max(text.find(_TABLE), 0)):
            return text[: end.start()]
        try:
            service.require_alive("the log says more")
        except ToolFailed as error:
            if wrong := _WRONG_OPTION.search(service.stderr.read_text("utf-8", errors="replace")):
                hint = f"options of llama-server stand behind --; they are listed by {service.argv[0]} --help"
                raise WrongOption(f"llama-server: {wrong['what'] or wrong['value']}", hint) from error
            raise
        time.sleep(POLL_SECONDS)
    raise ToolFailed(f"llama-server plans nothing in {SECONDS:g} s; log: {service.stderr}")


def read(text: str) -> DryRun:
    """Read the log of a dry run.

    Raises:
        UsageError: the model can't have such a cache.
        LogNotUnderstood: there is no table.
    """
    found = sizes(text)
    if found.devices:
        return found
    if why := _refusal(text):
        raise UsageError(why)
    said = f"; it says: {error['why']}" if (error := _ERROR.search(text)) else ""
    raise LogNotUnderstood(f"llama-server's log has no table of memory{said}")


def sizes(text: str) -> DryRun:
    """What a log tells of memory, be it planned or allocated; only what is planned has a table of devices."""
    return DryRun(
        devices=tuple(_device(found) for found in _ROW.finditer(text)),
        mib=tuple((float(found["k"]), float(found["v"])) for found in _CACHES.finditer(text)),
        kv=_bytes(sum(float(found["all"]) for found in _CACHES.finditer(text))),
        copies=_bytes(sum(float(found["mib"]) for found in _COPIES.finditer(text))),
        state=_bytes(sum(float(found["r"] or found["d"]) for found in _STATES.finditer(text))),
        compute=_bytes(sum(_last_buffers(text).values())),
    )


def same_kv(planned: Sequence[tuple[int, int]], run: DryRun) -> bool:
    """Whether bytes of K and V of each cache are what the log says, to its last digit. At 2**20 cells, that is a hundredth of a byte."""
    ours, theirs = (sorted(pair for pair in sides if any(pair)) for sides in (_as_logged(planned), run.mib))
    pairs = zip(ours, theirs, strict=False)
    return len(ours) == len(theirs) and all(abs(a - b) < ROUNDING for one, other in pairs for a, b in zip(one, other, strict=True))


def _as_logged(planned: Sequence[tuple[int, int]]) -> list[tuple[float, float]]:
    return [(round(k / _MIB, 2), round(v / _MIB, 2)) for k, v in planned]


def _bytes(mib: float) -> int:
    return round(mib * _MIB)


def _device(found: re.Match[str]) -> Device:
    free = int(found["free"]) if found["free"] else None
    return Device(found["name"], int(found["model"]), int(found["context"]), int(found["compute"]), free)


def _last_buffers(text: str) -> dict[str, float]:
    """MiB of each buffer: a graph that is reserved twice says it twice."""
    return {f"{found['buffer'] or found['host']} {bool(found['host'])}": float(found["mib"]) for found in _BUFFERS.finditer(text)}


def _refusal(text: str) -> str:
    """llama.cpp's reason why there can't be such a context."""
    found = _ERROR.search(text)
    return found["why"] if found and _NO_CONTEXT in text else ""
