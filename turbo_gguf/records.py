"""The values that flow through the driver: frozen, typed, and versioned where they reach a file."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import msgspec

from turbo_gguf.errors import UsageError

SCHEMA_VERSION = 1
"""Version of every record written to the store. Readers refuse newer ones."""

METRICS_VERSION = 1
"""Raised whenever the meaning of a stored metric changes: results of different versions are never compared."""


class Tree(msgspec.Struct, frozen=True):
    """A patched upstream source tree."""

    path: Path
    upstream: str  # name in upstreams.toml, or the source that was given
    commit: str  # llama.cpp commit, "unknown" for a plain folder
    digest: str  # sha256 of series + hooks + overlay; "" for a pristine tree


class Build(msgspec.Struct, frozen=True):
    """A finished build of a tree."""

    id: str  # short hash of commit, digest, preset, compiler and CMake options
    path: Path  # CMake build folder
    preset: str
    tree: Tree
    compiler: str

    def tool(self, name: str) -> Path:
        """Path of a built program such as ``llama-perplexity``."""
        return self.path / "bin" / name


class Run(msgspec.Struct, frozen=True):
    """One finished process. Standard output and error go to files of their own."""

    argv: tuple[str, ...]
    rc: int  # negative: killed by that signal
    seconds: float
    stdout: Path
    stderr: Path


class CacheTypes(msgspec.Struct, frozen=True, order=True, omit_defaults=True):
    """The types of the K and of the V cache, by the names that llama.cpp's ``-ctk`` and ``-ctv`` take, and what changes them.

    Written ``turbo3`` (K and V) or ``turbo4/turbo3`` (K/V), then settings with spaces between::

        turbo3 k=0,-1:q8_0 v=0,-1:q8_0
        turbo3 adaptive=7
        turbo4/turbo3 decay=balanced
        q4_0 cal=model.calibration.gguf
        turbo3t sink=128 tail=512

    What is not set is not encoded: the key of a case without settings does not depend on which settings there are.
    """

    k: str
    v: str
    layers_k: str = ""  # layer map of K, see turbo_gguf.layer_map; "": all layers are ``k``
    layers_v: str = ""
    adaptive: int = 0  # layer-adaptive mode instead of maps; 0: none
    decay: str = ""  # preset or HOT,WARM,COLD in percent, see turbo_gguf.decay; "": none
    calibration: str = ""  # FILE#DIGEST, see turbo_gguf.calibration; "": none
    sink: int = 0  # first and last tokens of each sequence that are attended in f16
    tail: int = 0

    @classmethod
    def parse(cls, text: str) -> CacheTypes:
        """Read the notation. Names and values are taken as they are; :func:`turbo_gguf.cache_types.parse_types` checks them.

        Raises:
            UsageError: a word is no setting, is there twice or has no value, or what must be a number is none.
        """
        names, *words = re.sub(r"\s*/\s*", "/", text).split() or [""]
        k, pair, v = names.partition("/")
        found: dict[str, str] = {}
        for word in words:
            name, _, value = word.partition("=")
            if name not in _SETTINGS or not value:
                raise UsageError(f"cache type {text!r}: {word!r} is no setting", _SETTINGS_HINT)
            if name in found:
                raise UsageError(f"cache type {text!r}: {name} is set twice", _SETTINGS_HINT)
            found[name] = value
        numbers = {}
        for name in ("adaptive", "sink", "tail"):
            value = found.get(name, "0")
            if not (value.isascii() and value.isdecimal()):
                raise UsageError(f"cache type {text!r}: {name}={value} is no number", _SETTINGS_HINT)
            numbers[name] = int(value)
        return cls(
            k=k,
            v=v if pair else k,
            layers_k=found.get("k", ""),
            layers_v=found.get("v", ""),
            adaptive=numbers["adaptive"],
            decay=found.get("decay", ""),
            calibration=found.get("cal", ""),
            sink=numbers["sink"],
            tail=numbers["tail"],
        )

    def __str__(self) -> str:
        """The notation, in its shortest form: ``turbo3`` when K and V are equal, settings in the order of :meth:`parse`."""
        names = self.k if self.k == self.v else f"{self.k}/{self.v}"
        values = (self.layers_k, self.layers_v, self.adaptive, self.decay, self.calibration, self.sink, self.tail)
        return " ".join([names, *(f"{name}={value}" for name, value in zip(_SETTINGS, values, strict=True) if value)])

    @property
    def by_layer(self) -> bool:
        """Whether layers may differ in type."""
        return bool(self.layers_k or self.layers_v or self.adaptive)

    @property
    def has_settings(self) -> bool:
        """Whether there is more to it than two names."""
        return self.by_layer or self.exact or bool(self.decay or self.calibration)

    @property
    def exact(self) -> bool:
        """Whether some tokens are attended in f16, whatever the types."""
        return bool(self.sink or self.tail)


_SETTINGS = ("k", "v", "adaptive", "decay", "cal", "sink", "tail")
_SETTINGS_HINT = (
    "settings are k=MAP, v=MAP, adaptive=MODE, decay=SHARES, cal=FILE, sink=TOKENS and tail=TOKENS, each once, spaces between: "
    "turbo3 decay=balanced"
)


class ModelFile(msgspec.Struct, frozen=True):
    """A GGUF file and what of its metadata the measurements need."""

    path: Path
    sha256: str
    size: int  # bytes
    name: str  # file name, or general.name
    arch: str
    n_layer: int
    n_head_kv: tuple[int, ...]  # per layer; 0 where a layer has no KV cache
    head_k: int  # K head size
    head_v: int  # V head size
    n_ctx_train: int
    n_vocab: int
    uniform: bool  # False: head sizes differ between layers (SWA, MLA): sizes of the cache cannot be derived

    @property
    def kv_heads(self) -> tuple[int, ...]:
        """KV heads of each layer that has a KV cache: layer maps count these layers."""
        return tuple(n for n in self.n_head_kv if n)


class TextFile(msgspec.Struct, frozen=True):
    """The evaluation text."""

    path: Path
    sha256: str
    name: str
    size: int  # bytes


class Metric(msgspec.Struct, frozen=True):
    """A measured value and its standard error."""

    value: float
    error: float


class Case(msgspec.Struct, frozen=True):
    """One measurement to make: everything that decides its numbers, nothing else."""

    types: CacheTypes
    ctx: int  # tokens of a chunk; the second half is scored
    chunks: int  # -1: as many as the text has
    batch: int  # tokens of a llama_decode call
    base_batch: int  # the same for the base logits; differs from ``batch`` in the noise floor only
    backend: str  # prefix of the KV buffer names: "CPU", "CUDA" or "ROCm"
    build_id: str
    model_sha256: str
    text_sha256: str
    env: tuple[str, ...] = ()  # GGML_*, TURBO_* variables in force, as NAME=value
    metrics_version: int = METRICS_VERSION

    @property
    def key(self) -> str:
        """Name of this case in the store: the same key means the same measurement."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()[:20]

    @property
    def is_noise_floor(self) -> bool:
        """Whether this is the base type measured again at another batch size."""
        return self.batch != self.base_batch


class DecayShares(msgspec.Struct, frozen=True):
    """Percent of a sequence, from its newest tokens to its oldest. What is cold loses one bit."""

    hot: int
    warm: int
    cold: int


class CacheDecay(msgspec.Struct, frozen=True):
    """Temporal decay of one ``llama_kv_cache``, as the log announces it."""

    shares: DecayShares
    layers_k: int  # layers whose K decays
    layers_v: int


class DecayCount(msgspec.Struct, frozen=True):
    """What one ``llama_kv_cache`` did when it was freed: tokens, each counted once for all layers."""

    passes: int
    cells_k: int
    cells_v: int


class CacheExact(msgspec.Struct, frozen=True):
    """Exact sink and tail of one ``llama_kv_cache``, as the log announces them."""

    sink: int  # tokens of each sequence
    tail: int
    rows: int  # f16 copies that there is room for, per stream
    mib: float  # of K and V of all layers and streams, rounded to 0.01 by the tool


class KvCache(msgspec.Struct, frozen=True):
    """One ``llama_kv_cache`` of the log. A model with sliding-window attention has two."""

    type_k: str
    type_v: str
    mib_k: float  # rounded to 0.01 by the tool
    mib_v: float
    cells: int  # per stream
    layers: int
    streams: int
    buffers: tuple[str, ...]  # names of the backend buffers that hold it
    rot_k: bool | None = None  # None: the log does not say
    rot_v: bool | None = None
    layers_k: str = ""  # types by layer, as a layer map in which each layer of this cache is named once; "": not in the log
    layers_v: str = ""
    bits_k: float | None = None  # bits per value, rounded to 0.001, of types by layer
    bits_v: float | None = None
    decay: CacheDecay | None = None
    no_decay: str = ""  # why nothing decays here although decay is set: "sliding window" or "no layer"
    calibration: str = ""  # digest of the calibration of this cache; "": none
    exact: CacheExact | None = None


class LogFacts(msgspec.Struct, frozen=True):
    """What really ran, as the log of a llama.cpp tool tells it."""

    caches: tuple[KvCache, ...]
    flash_attn: str  # "enabled", "disabled" or "" when the log does not say
    n_ctx_seq: int
    backends: tuple[str, ...]  # of the system_info line
    offloaded: tuple[int, int] | None  # layers on a GPU, layers in all; None without the line
    splits: int | None  # graph splits: more of them means that work moved between devices
    warnings: tuple[str, ...]
    decayed: tuple[DecayCount, ...] = ()  # one for each cache that decays, when the log is complete


class KldStats(msgspec.Struct, frozen=True):
    """Final statistics of ``llama-perplexity --kl-divergence``. KL divergence in nats, rates in percent."""

    mean: Metric
    median: Metric
    p90: Metric
    p99: Metric
    p999: Metric
    max: float
    same_top: Metric  # percent of tokens whose most probable next token is the same
    ppl: Metric
    ppl_base: Metric
    ln_ppl_ratio: Metric
    mean_dp: Metric  # change of the probability of the right token, percent
    rms_dp: Metric
    chunks: int
    tokens: int  # scored


class Bits(msgspec.Struct, frozen=True):
    """Bits per value of a KV cache, K and V together."""

    nominal: float  # of the types' block layouts
    low: float | None = None  # least and greatest value that the sizes in the log allow; None: not derivable
    high: float | None = None
    exact: float = 0.0  # what the f16 copies of an exact sink and tail add, spread over all values of the cache

    @property
    def total(self) -> float:
        """What each value of the cache costs, copies included."""
        return self.nominal + self.exact

    @property
    def agrees(self) -> bool:
        """Whether the nominal number lies within what was measured (True when nothing could be measured)."""
        return self.low is None or self.high is None or self.low <= self.nominal <= self.high


class BaseRun(msgspec.Struct, frozen=True):
    """Base logits on disk: the f16 run that the others are compared with."""

    key: str
    chunks: int  # really in the file; the text may be shorter than asked for
    ppl: Metric
    splits: int | None
    seconds: float
    size: int  # bytes of the logits file
    schema_version: int = SCHEMA_VERSION


class Result(msgspec.Struct, frozen=True, tag_field="kind", tag="kld"):
    """One finished case."""

    key: str
    case: Case
    stats: KldStats
    bits: Bits
    model: str
    text: str
    upstream_commit: str
    patch_digest: str
    facts: LogFacts
    seconds: float
    argv: tuple[str, ...]
    time: str  # UTC, ISO 8601
    schema_version: int = SCHEMA_VERSION


class BenchRow(msgspec.Struct, frozen=True, tag_field="kind", tag="bench"):
    """One row of ``llama-bench``: prefill or decode speed at a depth, of one round."""

    key: str  # of the bench set-up: build, model, threads, backend, environment
    types: CacheTypes
    depth: int  # tokens in the cache before the test starts
    n_prompt: int
    n_gen: int
    round: int
    tokens_per_second: Metric
    build_id: str
    patch_digest: str
    row: dict[str, Any]  # as llama-bench printed it
    schema_version: int = SCHEMA_VERSION

    @property
    def test(self) -> str:
        """``pp512`` or ``tg32``, as llama-bench names it."""
        return f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
