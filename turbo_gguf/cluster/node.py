"""What runs on a node: it brings build and model, whose digests must be those of the driver, and measures one case. Text and calibrations
came with the orders.

A build stands for one kind of machine, and so do results: the store knows cases by the id of their build, in which are the compiler, its
options and the features of the CPU. A node that would have another id, or other GPUs, takes no part.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from turbo_gguf import __version__, assets
from turbo_gguf.cache.settings import CalibrationChoice
from turbo_gguf.cluster.pool import Here
from turbo_gguf.errors import EnvironmentMissing, TurboError
from turbo_gguf.failures import explained
from turbo_gguf.files import write_whole
from turbo_gguf.inputs import models
from turbo_gguf.inputs.models import ModelFile
from turbo_gguf.make.build import Build, cpu_mark, ensure_build, read_manifest
from turbo_gguf.make.toolkits import of_preset
from turbo_gguf.measure import environment, kld, unpacked
from turbo_gguf.measure.case import Case
from turbo_gguf.measure.kld import Job
from turbo_gguf.measure.progress import QUIET_SECONDS, label
from turbo_gguf.measure.result import Result
from turbo_gguf.patchset.tree import Tree

BUILD_FOLDER = "TURBO_GGUF_BUILD"
"""Variable of a node: folder of a finished build, for a node without compilers."""

LOG_BYTES = 1 << 20
"""Of each log that an error names, its last bytes, go to the driver."""

T = TypeVar("T")

_ALIKE = "a run has one kind of machine: results of this one would be in a table of others; measure on it by itself"


class Order(msgspec.Struct, frozen=True):
    """What a node must bring."""

    job: Job  # with paths of the driver
    env: tuple[str, ...]  # of the cases
    upstream: str | None  # as `--upstream`
    model: str | None  # a name or a hub id as `--model`, packed where that of the job is not; "": a file; None: the embedded one
    version: str = __version__
    cpu: str = msgspec.field(default_factory=cpu_mark)
    gpus: tuple[str, ...] = ()


class Failed(msgspec.Struct, frozen=True):
    """An error of ours, and the logs that it names."""

    error: TurboError
    logs: dict[str, bytes]  # by their path on the node
    home: str


class Measured(msgspec.Struct, frozen=True):
    """What came of a case."""

    node: str  # id
    outcome: Result | Failed


def gpu_names(preset: str) -> tuple[str, ...]:
    """GPUs here that a preset builds for, each kind once."""
    return tuple(sorted(set(of_preset(preset).gpus())))


def prepare(here: Here, order: Order, text: bytes) -> Job | Failed:
    """Find, fetch or build what the cases of an order need; returns the job with the paths of this node."""
    return _said(lambda: _prepare(here, order, text))


def measure(here: Here, case: Case, jobs: dict[str, Job], calibration: bytes | None) -> Measured:
    """Measure a case with the job of this node, and with a calibration from a file that is on the driver only."""

    def run() -> Result:
        _require_environment(case.env)
        own = case if calibration is None else _calibrated(case, calibration)
        return kld.measure_case(own, jobs[here.node], _Telling(here))

    return Measured(here.node, _said(run))


class _Telling:
    """Tells the driver how a case goes."""

    def __init__(self, here: Here) -> None:
        self._here = here
        self._last = time.monotonic()

    def start(self, case: Case, what: str = "") -> None:
        self.say(f"ctx {case.ctx}, {what or label(case)}")

    def chunk(self, case: Case, done: int, chunks: int) -> None:
        if time.monotonic() - self._last >= QUIET_SECONDS:
            self.say(f"ctx {case.ctx}, {label(case)}: chunk {done}/{chunks}")

    def say(self, text: str) -> None:
        self._last = time.monotonic()
        self._here.tell(text.strip())


def _said(act: Callable[[], T]) -> T | Failed:
    """What it returns, or how it failed: any error becomes one that a user can act on."""
    try:
        return act()
    except Exception as error:
        return _failed(explained(error))


def _failed(error: TurboError) -> Failed:
    """An error with the ends of the logs that it names."""
    home = assets.home()
    logs = [path for path in sorted((home / "logs").rglob("*")) if path.is_file() and str(path) in error.message]
    return Failed(error, {str(path): path.read_bytes()[-LOG_BYTES:] for path in logs}, str(home))


def _prepare(here: Here, order: Order, text: bytes) -> Job:
    if order.version != __version__:
        raise EnvironmentMissing(
            f"turbo-gguf is {__version__}, the driver's is {order.version}", f"install turbo-gguf {order.version} there"
        )
    _require_environment(order.env)
    _require_alike("another CPU", cpu_mark(), order.cpu)
    _require_alike("other GPUs", gpu_names(order.job.build.preset), order.gpus)
    job, build = order.job, _build(here, order)
    model = _model(order.model, job.packed or job.model)
    if job.packed is not None:
        model = _unpacked(here, build, model, job)
    path = _kept(assets.home() / "text" / f"{job.text.sha256}.txt", text)
    return msgspec.structs.replace(job, build=build, model=model, text=msgspec.structs.replace(job.text, path=path))


def _require_environment(env: tuple[str, ...]) -> None:
    """Set the variables of the cases, and refuse others that llama.cpp would read."""
    for pair in env:
        name, _, value = pair.partition("=")
        os.environ[name] = value
    found = environment.settings_in_environment()
    if found != env:
        extra = ", ".join(pair.partition("=")[0] for pair in sorted(set(found) - set(env)))
        raise EnvironmentMissing(
            f"the environment of `ray start` sets {extra}, that of the driver does not", "unset it, and start Ray anew"
        )


def _require_alike(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise EnvironmentMissing(f"it has {what} than the driver: {_words(found)}, there {_words(wanted)}", _ALIKE)


def _words(value: object) -> str:
    return (", ".join(value) or "none") if isinstance(value, tuple) else f"features {value}"


def _build(here: Here, order: Order) -> Build:
    """The build of the driver's id: that of a named folder, one that is there, or one that is made now."""
    wanted = order.job.build
    programs = (kld.TARGET,) if order.job.packed is None else (kld.TARGET, unpacked.TARGET)
    named = os.environ.get(BUILD_FOLDER)
    if named:
        found = _named_build(Path(named), wanted, programs)
    else:
        here.tell(f"builds {wanted.preset} where it is not there yet")
        found = ensure_build(wanted.preset, upstream=order.upstream, targets=programs, jobs=order.job.threads)
    if found.id != wanted.id:
        raise EnvironmentMissing(f"its build {found.id} is not the driver's {wanted.id}: {_difference(found, wanted)}", _ALIKE)
    return found


def _named_build(folder: Path, wanted: Build, programs: Sequence[str]) -> Build:
    manifest = read_manifest(folder)
    if manifest is None or not all((folder / "bin" / name).is_file() for name in programs):
        what = f"{BUILD_FOLDER}={folder}: no finished build with {' and '.join(programs)}"
        raise EnvironmentMissing(what, "name a folder that `turbo-gguf build` made")
    tree = Tree(path=wanted.tree.path, upstream=wanted.tree.upstream, commit=manifest.commit, digest=manifest.digest)
    return Build(id=manifest.id, path=folder, preset=wanted.preset, tree=tree, compiler=manifest.compiler)


def _difference(found: Build, wanted: Build) -> str:
    """The first thing that makes two builds differ."""
    for what, one, other in (
        ("patches", found.tree.digest[:12], wanted.tree.digest[:12]),
        ("llama.cpp", found.tree.commit, wanted.tree.commit),
        ("compiler", found.compiler, wanted.compiler),
    ):
        if one != other:
            return f"{what} {one}, there {other}"
    return "CMake options differ, such as GPU architectures"


def _model(spec: str | None, wanted: ModelFile) -> ModelFile:
    """The model of the driver's digest: fetched by its name, or a file at the same path or below ``home()/models``."""
    if spec is None:
        found = models.embedded()
    elif spec:
        found = models.resolve(spec)
    else:
        places = (wanted.path, assets.home() / "models" / wanted.path.name)
        path = next((path for path in places if path.is_file()), None)
        if path is None:
            raise EnvironmentMissing(f"model {wanted.path.name} is neither {places[0]} nor {places[1]}", f"copy it to {places[1].parent}")
        found = models.read(path)
    return _same(found, wanted, "copy that of the driver here")


def _unpacked(here: Here, build: Build, model: ModelFile, job: Job) -> ModelFile:
    """The model with its weights unpacked, which is found or made here: llama-quantize writes the same bytes on all machines."""
    here.tell(f"unpacks the weights of {model.path.name} where they are not there yet")
    found = unpacked.unpack(build, model, job.threads)
    return _same(found, job.model, f"remove it here and {job.model.path} there: both are made anew")


def _same(found: ModelFile, wanted: ModelFile, hint: str) -> ModelFile:
    if found.sha256 != wanted.sha256:
        raise EnvironmentMissing(f"{found.path}: sha256 is {found.sha256}, the driver's is {wanted.sha256}", hint)
    return found


def _calibrated(case: Case, data: bytes) -> Case:
    """The same case with its calibration in a file of this node."""
    digest = case.types.calibration.digest if case.types.calibration else ""
    path = _kept(assets.home() / "calibrations" / f"{digest}.gguf", data)
    return msgspec.structs.replace(case, types=msgspec.structs.replace(case.types, calibration=CalibrationChoice(str(path), digest)))


def _kept(path: Path, data: bytes) -> Path:
    """A file of this node with what came from the driver."""
    if not path.is_file() or path.read_bytes() != data:
        write_whole(path, data)
    return path
