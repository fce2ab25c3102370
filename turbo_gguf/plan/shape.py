"""What a model keeps of each token, from the header of its file: pure functions, no processes.

The rules are upstream's, with the architectures' own ones in :mod:`turbo_gguf.plan.architectures`. Layers are numbered as in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from turbo_gguf.errors import UsageError
from turbo_gguf.inputs.gguf_file import Fields, Tensor
from turbo_gguf.plan import architectures as known


class Layer(msgspec.Struct, frozen=True):
    """What a layer keeps of a token: so many heads of K and of V."""

    number: int
    heads: int
    head_k: int
    head_v: int  # 0: K only

    @property
    def k(self) -> int:
        """Values of K."""
        return self.heads * self.head_k

    @property
    def v(self) -> int:
        """Values of V."""
        return self.heads * self.head_v


class Cache(msgspec.Struct, frozen=True):
    """One ``llama_kv_cache``."""

    layers: tuple[Layer, ...]
    window: int = 0  # tokens of the sliding window that it holds; 0: it holds all tokens
    every: int = 1  # tokens that a cell stands for
    split: bool = False  # each sequence has a stream of its own, on one pool too
    indexer: bool = False  # keys by which tokens are chosen: settings of turbo types do not reach them


class Shape(msgspec.Struct, frozen=True):
    """What decides about the memory of a model."""

    arch: str
    n_ctx_train: int
    n_embd: int
    n_ff: int  # the widest feed-forward network, all experts that a token uses together
    n_head: int  # values of the queries of a token are n_head x head_k
    n_vocab: int
    weights: int  # bytes of all tensors that are loaded
    caches: tuple[Cache, ...]
    state: int = 0  # bytes of the recurrent state of a sequence
    numbers: tuple[int, ...] = ()  # of the layers that layer maps count
    latent: bool = False  # multi-head latent attention

    @property
    def refusal(self) -> str:
        """Why turbo types can't be had; "": they can, if head sizes fit."""
        if self.arch in known.NO_FLASH_ATTENTION:
            return "they need flash attention, which this architecture does not support"
        return "it has multi-head latent attention" if self.latent else ""

    @property
    def has_cache(self) -> bool:
        """Whether anything grows with the context."""
        return any(cache.layers for cache in self.caches)


class _Header:
    """The keys of a model, by the names behind its architecture."""

    def __init__(self, fields: Fields) -> None:
        self.arch = str(fields.get("general.architecture", ""))
        self._fields = fields
        if self.arch not in known.KNOWN:
            raise UsageError(
                f"architecture {self.arch or '?'}: how it attends is not known here, so its memory can't be told from its header",
                "with the file here and a build, the plan asks llama-server: turbo-gguf build",
            )
        self.n_layer_all = self.number("block_count")
        self.n_nextn = self.number("nextn_predict_layers")
        heads = self.each("attention.head_count")
        self._repeat = self.number("num_loops", 1) if self.arch == "nanbeige" else 1
        self.heads = heads * self._repeat
        self.heads_kv = self.each("attention.head_count_kv", heads) * self._repeat
        self.n_ff = self.each("feed_forward_length") * self._repeat
        self.n_layer_all *= self._repeat
        self.n_layer = self.n_layer_all - self.n_nextn
        self.n_embd = self.number("embedding_length")

    def has(self, name: str) -> bool:
        """Whether there is such a key."""
        return f"{self.arch}.{name}" in self._fields

    def value(self, name: str, default: Any = None) -> Any:
        """Of any kind."""
        return self._fields.get(f"{self.arch}.{name}", default)

    def number(self, name: str, default: int = 0) -> int:
        """A whole number."""
        found = self.value(name, default)
        return int(max(found, default=0) if isinstance(found, list) else found)

    def each(self, name: str, default: Sequence[int] = ()) -> list[int]:
        """A number for each layer, from one number or a list of them."""
        found = self.value(name)
        if found is None:
            return list(default) or [0] * self.n_layer_all
        numbers = [int(n) for n in found] if isinstance(found, list) else [int(found)] * self.n_layer_all
        return [*numbers, *[0] * (self.n_layer_all - len(numbers))]


def shape_of(fields: Fields, tensors: Sequence[Tensor]) -> Shape:
    """Read what decides about memory.

    Args:
        fields: metadata of the (first) file.
        tensors: of all files.

    Raises:
        UsageError: an architecture that is not known here, or no language model.
    """
    try:
        header = _Header(fields)
        caches, numbers = _caches(header)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UsageError(f"the header lacks what decides about memory, or has it in another form: {error}") from error
    head_k, _ = _head_sizes(header)
    experts = max(header.number("expert_used_count"), 1)
    return Shape(
        arch=header.arch,
        n_ctx_train=header.number("context_length"),
        n_embd=header.n_embd,
        n_ff=max(*header.n_ff, experts * header.number("expert_feed_forward_length")),
        n_head=max(header.heads) * max(head_k, 1),
        n_vocab=len(fields.get("tokenizer.ggml.tokens", ())) or header.number("vocab_size"),
        weights=sum(tensor.n_bytes or 0 for tensor in tensors if not _unused(tensor, header)),
        caches=caches,
        state=_state(header),
        numbers=numbers,
        latent=_is_latent(header),
    )


def _unused(tensor: Tensor, header: _Header) -> bool:
    """Whether only another context, which drafts, would load it."""
    return tensor.name.startswith("blk.") and header.n_nextn > 0 and int(tensor.name.split(".")[1]) >= header.n_layer > 0


# --- layers that attend ---------------------------------------------------------------------------------------------------


def _is_latent(header: _Header) -> bool:
    named = header.has("attention.key_length_mla") and header.arch in known.LATENT
    return named or header.number("attention.kv_lora_rank") > 0 or header.arch == "deepseek4"


def _keeps_latent(header: _Header) -> bool:
    """Whether there is no V: upstream's ``is_mla``."""
    return header.arch in known.LATENT and header.number("attention.key_length_mla") > 0


def _head_sizes(header: _Header) -> tuple[int, int]:
    """Of K and V, in layers without a window."""
    if not header.heads[0] and header.arch != "plamo2":
        return 0, 0
    default = header.n_embd // header.heads[0] if header.heads[0] else 0
    head_k, head_v = header.number("attention.key_length", default), header.number("attention.value_length", default)
    return head_k, header.number("attention.kv_lora_rank") if header.arch in ("glm5-next", "kimi-k3") else head_v


def _window(header: _Header) -> int:
    """Tokens of the sliding window; 0: there is none."""
    if header.arch in ("deepseek4", "lfm2"):
        return header.number("attention.sliding_window")
    rule = known.WINDOWS.get(header.arch)
    if rule is None or (rule.n_layer and rule.n_layer != header.n_layer):
        return 0
    named = header.number("attention.sliding_window", -1)
    if named == 0 or (named < 0 and header.arch in known.WINDOW_ON_REQUEST):
        return 0
    return rule.tokens if named < 0 or rule.fixed else named


def _windowed(header: _Header) -> list[bool]:
    """Whether each layer attends a window only."""
    n, n_all = header.n_layer, header.n_layer_all
    if not _window(header):
        return [False] * n_all
    if header.arch == "deepseek4":
        return [True] * n_all
    if header.arch == "lfm2":
        return [i < n and header.heads_kv[i] > 0 for i in range(n_all)]
    rule = known.WINDOWS[header.arch]
    found = header.value("attention.sliding_window_pattern", rule.period)
    if isinstance(found, list):
        return [bool(value) for value in found] + [False] * (n_all - len(found))
    period = int(found)
    full = 0 if rule.dense_first else period - 1
    return [i < n and (period == 0 or i % period != full) for i in range(n_all)]


def _recurrent(header: _Header) -> list[bool]:
    """Whether each layer keeps a state in place of K and V."""
    n, n_all, arch = header.n_layer, header.n_layer_all, header.arch
    if arch in known.INTERVALS:
        if isinstance(found := header.value("attention.recurrent_layers"), list):
            return [bool(value) for value in found]
        interval = header.number("full_attention_interval", known.INTERVALS[arch])
        return [i < n and (i + 1) % interval != 0 for i in range(n_all)]
    if arch in known.HYBRID:
        return [i < n and header.heads_kv[i] == 0 and not (arch in known.NEMOTRON and header.n_ff[i]) for i in range(n_all)]
    return [arch in known.RECURRENT] * n_all


def _attending(header: _Header) -> list[int]:
    """Layers of the context's own graph that have K."""
    n, n_all, arch = header.n_layer, header.n_layer_all, header.arch
    if arch in known.RECURRENT | known.NO_CACHE:
        return []
    last = n_all
    trunk_only = arch in known.INTERVALS or arch in ("deepseek32", "dots3note", "glm-dsa", "glm5-next")
    hybrid = arch in known.HYBRID | known.BOTH
    if trunk_only or (header.n_nextn and n > 0 and not hybrid and arch not in ("deepseek4", "hy_v4", "minimax-m3")):
        last = n
    if arch == "gemma3n":
        last = min(last, 20)
    elif arch == "gemma4":
        last -= header.number("attention.shared_kv_layers")
    recurrent = _recurrent(header)
    return [i for i in range(last) if not recurrent[i] and not (arch in known.NEMOTRON and header.n_ff[i])]


def _caches(header: _Header) -> tuple[tuple[Cache, ...], tuple[int, ...]]:
    """The caches, and the layers that layer maps count."""
    attending, windowed, window = _attending(header), _windowed(header), _window(header)
    full = _head_sizes(header)
    small = header.number("attention.key_length_swa", full[0]), header.number("attention.value_length_swa", full[1])

    def layer(i: int, sizes: tuple[int, int], *, heads: int = -1) -> Layer:
        k_only = _keeps_latent(header) or header.arch == "deepseek4"
        return Layer(i, header.heads_kv[i] if heads < 0 else heads, sizes[0], 0 if k_only else sizes[1])

    base = [layer(i, full) for i in attending if not windowed[i]]
    near = [layer(i, small) for i in attending if windowed[i]]
    if header.arch == "graniteswitch":  # a layer of its own that chooses adapters
        base.append(Layer(header.n_layer_all, 1, *full))
    numbers = tuple(i for i in attending if i < header.n_layer and header.heads_kv[i])
    caches = [Cache(tuple(base))] if base or not window else []
    if window:
        caches.append(Cache(tuple(near), window=window, split=header.arch == "deepseek4"))
    return (*caches, *_chosen_by(header, attending, windowed, layer)), numbers


def _chosen_by(header: _Header, attending: list[int], windowed: list[bool], layer: Callable[..., Layer]) -> list[Cache]:
    """Caches of keys by which tokens are chosen, and compressed ones."""
    arch, size = header.arch, header.number("attention.indexer.key_length")
    _, head_v = _head_sizes(header)
    owners = _owners(header, [i for i in attending if not windowed[i]])
    if arch == "deepseek4":
        return _compressed(header, attending, layer)
    if not owners:
        return []
    if arch == "qwen4exp":
        ratios = [r for r in header.each("attention.compress_ratios") if r]
        return [Cache(tuple(Layer(i, 1, size * (2 if ratios else 1), 0) for i in owners), indexer=True)]
    if arch == "glm5-next":
        size *= 3 if header.number("attention.indexer.kpool") else 1
    return [Cache(tuple(layer(i, (size, head_v), heads=1) for i in owners), indexer=True)]


def _owners(header: _Header, attending: list[int]) -> list[int]:
    """Layers with keys of their own by which they choose."""
    arch = header.arch
    if arch in ("deepseek32", "qwen4exp"):
        return attending if header.number("attention.indexer.key_length") else []
    if arch == "minimax-m3":
        return [i for i in attending if i >= header.number("leading_dense_block_count")]
    if arch == "hy_v4" and not header.number("attention.indexer.top_k"):
        return []
    if arch not in ("dots3note", "glm-dsa", "glm5-next", "hy_v4"):
        return []
    default = [1] * header.n_layer_all
    if arch in ("dots3note", "hy_v4"):
        default = [0] * header.n_layer_all
    elif arch == "glm-dsa" and header.number("context_length") >= 1 << 20:  # GLM 5.2, whose first files do not say
        default = [int(i < 2 or i % 4 == 2) for i in range(header.n_layer_all)]
    full = header.each("attention.indexer.types", default)
    return [i for i in attending if full[i]]


DENSE, SPARSE = 4, 128
"""Tokens that DeepSeek-V4 puts into one cell, by the ratio of the layer."""


def _compressed(header: _Header, attending: list[int], layer: Callable[..., Layer]) -> list[Cache]:
    """Caches of DeepSeek-V4 whose cells stand for several tokens."""
    ratios, full = header.each("attention.compress_ratios"), _head_sizes(header)
    size = header.number("attention.indexer.key_length")
    dense, sparse = ([i for i in attending if ratios[i] == ratio] for ratio in (DENSE, SPARSE))
    return [
        Cache(tuple(layer(i, full) for i in dense), every=DENSE, split=True),
        Cache(tuple(layer(i, full) for i in sparse), every=SPARSE, split=True),
        Cache(tuple(layer(i, (size, 0), heads=1) for i in dense), every=DENSE, split=True, indexer=True),
    ]


# --- layers with a state --------------------------------------------------------------------------------------------------

_F32 = 4


def _state(header: _Header) -> int:
    """Bytes of the state of a sequence, which does not grow with the context."""
    if header.arch == "deepseek4":
        return _compressor_state(header)
    n = header.n_layer
    count = n if header.arch in known.BOTH else sum(_recurrent(header)[:n])
    return _F32 * (count * sum(_state_values(header)) + (_history(header) if count else 0))


def _state_values(header: _Header) -> tuple[int, int]:
    """Values of the convolution and of the state, in one layer."""
    arch, n_embd, conv = header.arch, header.n_embd, header.number("ssm.conv_kernel")
    inner, state, groups = (header.number(f"ssm.{name}") for name in ("inner_size", "state_size", "group_count"))
    if wkv := header.number("wkv.head_size"):
        return header.number("token_shift_count", 2) * n_embd, n_embd * wkv
    if length := header.number("shortconv.l_cache"):
        return n_embd * (length - 1), state * inner
    if head := header.number("kda.head_dim"):
        return 3 * (conv - 1 if conv else 3) * header.heads[0] * head, head * head * header.heads[0]
    convolution = (conv - 1 if conv else 0) * (inner + 2 * groups * state)
    if arch == "minimax-01":
        head = _head_sizes(header)[0]
        return convolution, head * head * header.heads[0]
    return convolution, state * inner


def _history(header: _Header) -> int:
    """Values that Qwen4's layers of n-grams keep."""
    layers = header.value("ple.layers", [])
    kernel, size = header.number("ple.conv_kernel"), header.number("ple.ngram_size")
    if header.arch != "qwen4exp" or not layers or size < 2 or not kernel:
        return 0
    return len(layers) * (kernel - 1) * size * header.number("hyper_connection.count") * header.n_embd


def _compressor_state(header: _Header) -> int:
    """What DeepSeek-V4 keeps of tokens that do not fill a cell yet: sums and scores."""
    ratios = header.each("attention.compress_ratios")[: header.n_layer]
    dense, sparse = ratios.count(DENSE), ratios.count(SPARSE)
    head, size = _head_sizes(header)[0], header.number("attention.indexer.key_length")
    return 2 * _F32 * (dense * 2 * DENSE * 2 * (head + size) + sparse * SPARSE * head)
