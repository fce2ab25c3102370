"""Bytes of a context, from headers written here. Risks: a rule of upstream's that was misread, rounding, a layer that counts twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from turbo_gguf.cache.spec import CacheSpec, parse_types
from turbo_gguf.errors import UsageError
from turbo_gguf.inputs.headers import Header
from turbo_gguf.plan import devices, memory, planner
from turbo_gguf.plan.memory import Context
from turbo_gguf.plan.planner import Planner
from turbo_gguf.plan.shape import Cache, Layer, Shape, shape_of

F16 = CacheSpec("f16", "f16")
TURBO3 = CacheSpec("turbo3", "turbo3")
MIB = 1 << 20


def shape(arch: str, **keys: Any) -> Shape:
    """Of a model with four layers, unless keys say otherwise; ``__`` stands for a point."""
    fields = {
        "block_count": 4,
        "context_length": 8192,
        "embedding_length": 512,
        "feed_forward_length": 1024,
        "attention.head_count": 8,
        "attention.head_count_kv": 2,
        **{name.replace("__", "."): value for name, value in keys.items()},
    }
    return shape_of({"general.architecture": arch, **{f"{arch}.{name}": value for name, value in fields.items()}}, ())


def numbers(cache: Cache) -> list[int]:
    return [layer.number for layer in cache.layers]


# --- layers ---------------------------------------------------------------------------------------------------------------


def test_every_layer_keeps_k_and_v() -> None:
    (cache,) = shape("llama").caches
    assert numbers(cache) == [0, 1, 2, 3] and cache.layers[0] == Layer(0, 2, 64, 64)
    assert memory.per_token(shape("llama"), F16) == 4 * 2 * 2 * 64 * 2


def test_head_sizes_and_heads_by_layer() -> None:
    found = shape("deci", attention__head_count_kv=[2, 0, 4, 1], attention__key_length=96, attention__value_length=128)
    assert [(layer.k, layer.v) for layer in found.caches[0].layers] == [(192, 256), (0, 0), (384, 512), (96, 128)]
    assert found.numbers == (0, 2, 3), "layer maps count layers that have KV heads"


@pytest.mark.parametrize(
    ("arch", "keys", "near"),
    [
        ("gemma2", {}, [0, 2]),
        ("gemma3", {"attention__sliding_window": 1024, "block_count": 6}, [0, 1, 2, 3, 4]),
        ("cohere2moe", {"attention__sliding_window": 64}, [1, 2, 3]),
        ("gpt-oss", {"attention__sliding_window": 128}, [0, 2]),
        ("gpt-oss", {"attention__sliding_window": 128, "attention__sliding_window_pattern": 4}, [0, 1, 2]),
        ("mimo2", {"attention__sliding_window": 128, "attention__sliding_window_pattern": [True, False, False, True]}, [0, 3]),
        ("llama4", {}, [0, 1, 2]),
    ],
)
def test_layers_with_a_window(arch: str, keys: dict[str, Any], near: list[int]) -> None:
    full, window = shape(arch, **keys).caches
    assert numbers(window) == near
    assert sorted([*numbers(full), *near]) == list(range(keys.get("block_count", 4)))


@pytest.mark.parametrize(
    ("arch", "keys"), [("gemma3", {}), ("phi3", {"attention__sliding_window": 64}), ("exaone4", {"attention__sliding_window": 64})]
)
def test_windows_that_are_off(arch: str, keys: dict[str, Any]) -> None:
    (cache,) = shape(arch, **keys).caches
    assert not cache.window and len(cache.layers) == 4


def test_layers_that_share_a_cache() -> None:
    pattern = [True, True, True, False] * 2
    window = {"attention__sliding_window": 512, "attention__sliding_window_pattern": pattern, "block_count": 8}
    sizes = {"attention__key_length": 128, "attention__value_length": 128}
    small = {"attention__key_length_swa": 64, "attention__value_length_swa": 64}
    full, near = shape("gemma4", **window, **sizes, **small, attention__shared_kv_layers=3).caches
    assert numbers(full) == [3] and numbers(near) == [0, 1, 2, 4]
    assert full.layers[0].head_k == 128 and near.layers[0].head_k == 64
    assert sum(len(cache.layers) for cache in shape("gemma3n", block_count=35, attention__sliding_window=512).caches) == 20


def test_layers_that_only_draft() -> None:
    found = shape("glm4moe", nextn_predict_layers=1)
    assert numbers(found.caches[0]) == [0, 1, 2]


def test_hybrids() -> None:
    ssm = {"ssm__conv_kernel": 4, "ssm__inner_size": 1024, "ssm__state_size": 16, "ssm__group_count": 1}
    jamba = shape("jamba", attention__head_count_kv=[0, 2, 0, 0], **ssm)
    assert numbers(jamba.caches[0]) == [1]
    assert jamba.state == 3 * 4 * (3 * (1024 + 2 * 16) + 16 * 1024)
    falcon = shape("falcon-h1", **ssm)
    assert numbers(falcon.caches[0]) == [0, 1, 2, 3] and falcon.state == 4 * jamba.state // 3
    qwen = shape("qwen3next", full_attention_interval=2, **ssm)
    assert numbers(qwen.caches[0]) == [1, 3] and qwen.state == 2 * jamba.state // 3
    nemotron = shape("nemotron_h", attention__head_count_kv=[0, 2, 0, 0], feed_forward_length=[0, 0, 64, 0], **ssm)
    assert numbers(nemotron.caches[0]) == [1] and nemotron.state == 2 * jamba.state // 3


def test_models_without_a_cache() -> None:
    assert not shape("mamba", attention__head_count=0, ssm__conv_kernel=4, ssm__inner_size=1024, ssm__state_size=16).has_cache
    assert not shape("bert").has_cache
    with pytest.raises(UsageError, match="has no KV cache"):
        Planner(header("bert"), server=None, backend="CPU")


def test_latent_attention() -> None:
    sizes = {"attention__key_length": 576, "attention__value_length": 512, "attention__head_count_kv": 1, "attention__kv_lora_rank": 512}
    found = shape("deepseek2", **sizes, attention__key_length_mla=192, attention__value_length_mla=128)
    assert memory.per_token(found, F16) == 4 * 576 * 2, "K only"
    assert "latent attention" in memory.why_not(found, TURBO3)
    assert not memory.why_not(found, CacheSpec("q8_0", "q8_0"))
    assert "the same type" in memory.why_not(found, CacheSpec("q8_0", "f16"))
    assert memory.why_not(shape("minicpm3", attention__kv_lora_rank=256), TURBO3), "refused by its rank, though it keeps K and V"


def test_an_architecture_that_is_not_known() -> None:
    with pytest.raises(UsageError, match="architecture newest: how it attends is not known"):
        shape("newest")
    with pytest.raises(UsageError, match="lacks what decides"):
        shape("llama", block_count=0, attention__head_count=[])


# --- cells and bytes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        (Context(1000), (1024, 1)),
        (Context(1000, 4), (1024, 4)),
        (Context(1000, 4, unified=True), (1024, 1)),
        (Context(64, 16), (256, 16)),
    ],
)
def test_cells_come_in_multiples(context: Context, expected: tuple[int, int]) -> None:
    assert memory.cells(Cache(()), context) == expected


def test_cells_of_a_window() -> None:
    cache = Cache((), window=1000)
    assert memory.cells(cache, Context(65536)) == (1536, 1), "1,000 and a ubatch of 512"
    assert memory.cells(cache, Context(65536, 4)) == (1536, 4)
    assert memory.cells(cache, Context(65536, 4, unified=True)) == (4608, 1), "one window for each slot"
    assert memory.cells(cache, Context(65536, full_windows=True)) == (65536, 1)
    assert memory.cells(cache, Context(512)) == (512, 1)
    assert memory.cells(Cache((), every=128), Context(65536)) == (512, 1)


def test_types_by_layer() -> None:
    found = shape("llama")
    kv = sum(map(sum, memory.kv_bytes(found, parse_types("turbo3 k=0:f16"), Context(1024))))
    per_value = {"turbo3": 14 / 32, "f16": 2}
    assert kv == 1024 * 128 * (7 * per_value["turbo3"] + per_value["f16"])


def test_exact_tokens_get_shorter_in_short_contexts() -> None:
    found = shape("llama")
    assert memory.exact_tokens(found, TURBO3, Context(4096)) == (4, 64)
    assert memory.exact_tokens(found, TURBO3, Context(256)) == (4, 12)
    assert memory.exact_tokens(found, TURBO3, Context(128, 2, unified=True)) == (0, 0)
    assert memory.exact_tokens(found, parse_types("turbo3 tail=100"), Context(256)) == (4, 100)
    assert memory.exact_tokens(found, parse_types("turbo3 sink=0 tail=0"), Context(4096)) == (0, 0)
    assert memory.exact_tokens(found, F16, Context(4096)) == (0, 0)
    assert memory.copies_bytes(found, TURBO3, Context(4096)) == 96 * 4 * 256 * 2
    assert memory.copies_bytes(found, TURBO3, Context(2048, 2)) == 2 * 96 * 4 * 256 * 2


def test_head_sizes_of_types() -> None:
    odd = shape("llama", attention__key_length=96, attention__value_length=96)
    assert not memory.why_not(odd, TURBO3)
    assert "no multiple of the block of 64" in memory.why_not(odd, CacheSpec("turbo3t", "turbo3t"))
    assert planner.candidates(odd)[0].k == "turbo4"
    assert [one.k for one in planner.candidates(shape("llama"))] == ["turbo4t", "turbo3t", "turbo2t"]
    assert [one.k for one in planner.candidates(shape("grok"))] == ["f16", "q8_0", "q4_0"]
    with pytest.raises(UsageError, match="flash attention"):
        memory.estimate(shape("grok"), TURBO3, Context(1024))


# --- what fits ------------------------------------------------------------------------------------------------------------


def header(arch: str) -> Header:
    keys = {"block_count": 2, "context_length": 4096, "embedding_length": 128, "attention.head_count": 2}
    fields = {"general.architecture": arch, **{f"{arch}.{name}": value for name, value in keys.items()}}
    return Header("tiny", "tiny", fields, (), None)


@pytest.mark.parametrize("limit", [0, 999, 1000, 5000, 123_456, 10**7])
@pytest.mark.parametrize("step", [1, 1000])
def test_the_longest_context(limit: int, step: int) -> None:
    """Whatever the curve, the result fits and one step more does not."""

    def charged(ctx: int) -> int:
        return 500 + ctx // step * step + ctx * ctx // 4096

    found = planner.longest(charged, limit, 65536, probes=1000)
    assert found % 256 == 0
    assert not found or charged(found) <= limit
    assert found == 65536 or charged(found + 256) > limit


def test_few_probes_are_enough_for_a_line() -> None:
    asked: list[int] = []

    def charged(ctx: int) -> int:
        asked.append(ctx)
        return 10_000 + 97 * ctx

    assert planner.longest(charged, 10_000 + 97 * 20_000, 131_072, probes=4) == 20_000 // 256 * 256
    assert len(asked) <= 6


def test_the_gpus_of_a_build_where_the_file_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """An estimate is for them, too, not for the memory of the host."""
    gpu = devices.Device("CUDA0", "a GPU", 8 << 30, 6 << 30)
    monkeypatch.setattr(devices, "listed", lambda server: (gpu,))
    plans = Planner(header("llama"), server=Path("llama-server"), backend="CUDA")
    assert plans.estimated
    assert plans.budget(None, [F16], Context(4096)) == planner.Budget(5 << 30, "free of 8192.00 MiB on CUDA0, less 1 GiB")
    monkeypatch.setattr(devices, "listed", lambda server: ())
    assert plans.budget(None, [F16], Context(4096)).about == "free here, less 1 GiB"


def test_a_choice_by_an_estimate() -> None:
    plans = Planner(header("llama"), server=None, backend="CPU")
    types = planner.candidates(plans.shape)
    context = Context(4096)
    sizes = [plans.charged(one, context) for one in types]
    assert plans.choose(types, context, sizes[0], fixed=True).types.k == "turbo4t"
    choice = plans.choose(types, context, sizes[1], fixed=True)
    assert choice.types.k == "turbo3t" and [one.k for one in choice.too_large] == ["turbo4t"]
    shorter = plans.choose(types, context, sizes[1], fixed=False)
    assert shorter.types.k == "turbo4t" and shorter.context.ctx < 4096
    assert plans.charged(shorter.types, msgspec.structs.replace(context, ctx=shorter.context.ctx)) <= sizes[1]
