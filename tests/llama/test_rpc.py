"""Several machines: layers and cache behind two `ggml-rpc-server`s give the bits of one machine, and who does not know our types is
refused."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import rpc
from cache_lines import cache_lines
from conftest import Done, Tool
from rpc import Rpc
from test_unpatched import logits

from turbo_gguf.codec import tables

pytestmark = pytest.mark.native

NO_SPLIT = "device RPC0 does not support split buffers"  # upstream's


def types(k: str, v: str = "") -> tuple[str, ...]:
    return ("-ctk", k, "-ctv", v or k)


TURBO3T = types("turbo3t")
EXACT = ("--cache-sink", "4", "--cache-tail", "64")


@pytest.fixture(scope="module")
def patched(native_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Rpc:
    return rpc.beside(native_bin, tmp_path_factory.mktemp("rpc-patched"))


@pytest.fixture(scope="module")
def pristine(pristine_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Rpc:
    return rpc.beside(pristine_bin, tmp_path_factory.mktemp("rpc-pristine"))


@pytest.fixture(scope="module")
def helpers(patched: Rpc) -> Iterator[str]:
    """Two patched servers, as --rpc takes them."""
    with ExitStack() as stack:
        yield ",".join(stack.enter_context(patched.server()) for _ in range(2))


@pytest.fixture(scope="module")
def stranger(pristine: Rpc) -> Iterator[str]:
    """A server that does not know our types."""
    with pristine.server() as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def changed(native_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Rpc]:
    """A patched build with a text of its RPC replaced."""
    return lambda old, new: rpc.beside(native_bin, tmp_path_factory.mktemp("rpc-changed"), (old, new))


@pytest.fixture
def client(tool: Tool, patched: Rpc) -> Tool:
    """Patched programs that can have --rpc."""
    return functools.partial(tool, env=patched.env)


Bits = Callable[..., str]


@pytest.fixture
def bits(tiny: Callable[[str], Path], prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bits:
    """``bits(tool, *args, model="layers4")`` is the digest of the logits of a text. Each run calibrates anew."""
    numbers = itertools.count()

    def run(tool: Tool, *args: str, model: str = "layers4") -> str:
        folder = tmp_path / f"bits-{next(numbers)}"
        monkeypatch.setenv("LLAMA_CACHE", str(folder / "cache"))
        return logits(tool, tiny(model), prose, folder, *args)

    return run


def split(servers: str) -> tuple[str, ...]:
    """Options that give each server the same share of the layers."""
    return ("--rpc", servers, "-ngl", "99", "-ts", ",".join("1" for _ in servers.split(",")))


def complete(client: Tool, model: Path, servers: str, *args: str) -> Done:
    common = ("-p", "once upon a time", "-n", "4", "-c", "256", "-no-cnv", "-t", "1", "-lv", "4", "--temp", "0")
    return client("llama-completion", "-m", model, *common, *split(servers), *args, timeout=60)


# --- patched everywhere ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        *(("layers4", types(turbo.name)) for turbo in tables.ALL),
        ("layers4", (*TURBO3T, "-nkvo")),
        ("layers4", (*TURBO3T, "-sm", "none")),
        ("layers4", (*types("q4_0", "q8_0"), *EXACT)),
        ("layers4", (*types("f16"), "--cache-type-v-layers", "1,-1:turbo2t")),
        ("swa6", types("turbo4t", "turbo3")),
        ("heads-differ", TURBO3T),
        ("hybrid", TURBO3T),
        ("head96", types("turbo3")),
    ],
    ids=lambda case: " ".join((case[0], *case[1])),
)
def test_the_bits_of_one_machine(tool: Tool, client: Tool, helpers: str, bits: Bits, case: tuple[str, tuple[str, ...]]) -> None:
    """All that a turbo type brings, written and read by the servers."""
    model, args = case
    assert bits(client, *split(helpers), *args, model=model) == bits(tool, *args, model=model)


def test_both_servers_have_a_part_of_the_cache(client: Tool, helpers: str, tiny: Callable[[str], Path]) -> None:
    done = complete(client, tiny("layers4"), helpers, *TURBO3T)
    assert done.rc == 0, done.text
    for endpoint in helpers.split(","):
        assert f"[{endpoint}] KV buffer size" in done.text
    line = cache_lines(done.text)[-1]
    assert set(line.settings) == {"cal", "sink", "tail"}
    assert not [more for more in line.more if more.startswith("no ")]


def test_decay_is_refused(client: Tool, helpers: str, tiny: Callable[[str], Path]) -> None:
    decay = (*types("turbo3"), "--cache-decay", "balanced")
    done = complete(client, tiny("layers4"), helpers, *decay)
    assert done.refused, done.text
    assert (
        "device RPC0 can't do temporal decay of cache type turbo3 in layer 0: keep the cache in host memory with -nkvo, use -ngl 0, or "
        in done.text
    )
    for cure in (("-nkvo",), ("-ngl", "0")):
        assert complete(client, tiny("layers4"), helpers, *decay, *cure).rc == 0


def test_split_by_tensors(client: Tool, helpers: str, tiny: Callable[[str], Path]) -> None:
    model, tensor = tiny("layers4"), (*TURBO3T, "-sm", "tensor")
    done = complete(client, model, helpers, *tensor)
    assert done.rc == 0, done.text
    line = cache_lines(done.text)[-1]
    assert line.settings == {}
    assert {"no calibration: it is split over devices by -sm tensor", "no exact tokens: it is split over devices by -sm tensor"} <= {
        *line.more
    }
    done = complete(client, model, helpers, *tensor, *EXACT)
    assert done.refused, done.text
    assert (
        "can't have an exact sink and tail: it is split over devices by -sm tensor: leave out --cache-sink and --cache-tail\n" in done.text
    )


def test_split_by_rows(client: Tool, helpers: str, tiny: Callable[[str], Path]) -> None:
    done = complete(client, tiny("layers4"), helpers, *TURBO3T, "-sm", "row")
    assert done.refused, done.text
    assert NO_SPLIT in done.text


# --- a server that is not patched ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [(), ("-nkvo",), ("-ngl", "0"), EXACT, ("-sm", "tensor")], ids=" ".join)
def test_an_unpatched_server_is_refused(client: Tool, stranger: str, tiny: Callable[[str], Path], args: tuple[str, ...]) -> None:
    done = complete(client, tiny("layers4"), stranger, *TURBO3T, *args)
    assert done.refused, done.text
    device = "Meta() (Meta())" if "tensor" in args else f"RPC0 ({stranger})"
    assert f"device {device} does not know cache type turbo3t: start ggml-rpc-server of this patched build there, " in done.text
    assert ", leave it out of --rpc, or use -ctk f16 -ctv f16\n" in done.text


def test_it_is_named_beside_others(client: Tool, helpers: str, stranger: str, tiny: Callable[[str], Path]) -> None:
    done = complete(client, tiny("layers4"), f"{helpers},{stranger}", *types("f16"), "--cache-type-v-layers", "0:turbo3")
    assert done.refused, done.text
    assert f"device RPC2 ({stranger}) does not know cache type turbo3: " in done.text


@pytest.mark.parametrize("name", ["f16", "q8_0"])
def test_upstreams_types_and_an_unpatched_server(tool: Tool, client: Tool, stranger: str, bits: Bits, name: str) -> None:
    assert bits(client, *split(stranger), *types(name)) == bits(tool, *types(name))


@pytest.mark.parametrize("name", ["f16", "q8_0"])
def test_upstreams_types_and_an_unpatched_client(pristine_tool: Tool, pristine: Rpc, helpers: str, bits: Bits, name: str) -> None:
    client = functools.partial(pristine_tool, env=pristine.env)
    assert bits(client, *split(helpers), *types(name)) == bits(pristine_tool, *types(name))


def test_exact_tokens_and_an_unpatched_server(tool: Tool, client: Tool, stranger: str, bits: Bits, tiny: Callable[[str], Path]) -> None:
    exact = (*types("q4_0"), *EXACT)
    done = complete(client, tiny("layers4"), stranger, *exact)
    assert done.refused, done.text
    assert "can't have an exact sink and tail: device RPC0 can't attend them beside K in q4_0" in done.text
    assert "leave out --cache-sink and --cache-tail, or keep the cache in host memory with -nkvo\n" in done.text
    assert bits(client, *split(stranger), *exact, "-nkvo") == bits(tool, *exact)


# --- servers of other versions and devices ---------------------------------------------------------------------------------------


def test_another_set_of_types_is_refused(client: Tool, changed: Callable[[str, str], Rpc], tiny: Callable[[str], Path]) -> None:
    with changed('"ops 1"', '"ops 0"').server() as other:
        done = complete(client, tiny("layers4"), other, *TURBO3T)
        assert done.refused, done.text
        assert f"device RPC0 ({other}) does not know cache type turbo3t: " in done.text
        assert complete(client, tiny("layers4"), other, *types("f16")).rc == 0


def test_the_server_answers_for_its_device(client: Tool, changed: Callable[[str, str], Rpc], tiny: Callable[[str], Path]) -> None:
    """A device that takes no second segments, and no rows in turbo3t."""
    lacks = "!ggml_turbo_flash_attn_has_segment(op) && (op->op != GGML_OP_SET_ROWS || op->type != GGML_TYPE_TURBO3_T)"
    answer = "return ops && ops() && "
    model = tiny("layers4")
    with changed(answer, f"{answer}{lacks} && ").server() as limited:
        done = complete(client, model, limited, *TURBO3T)
        assert done.refused, done.text
        assert (
            "device RPC0 can't store cache type turbo3t of layer 0: keep the cache in host memory with -nkvo, use -ngl 0, or " in done.text
        )
        done = complete(client, model, limited, *types("turbo4t"))
        assert done.rc == 0, done.text
        line = cache_lines(done.text)[-1]
        assert set(line.settings) == {"cal"}
        assert any(more.startswith("no exact tokens: device RPC0 can't attend them beside K in turbo4t, ") for more in line.more)
        for cure in (("-nkvo",), ("-ngl", "0")):
            done = complete(client, model, limited, *TURBO3T, *cure)
            assert done.rc == 0, done.text
