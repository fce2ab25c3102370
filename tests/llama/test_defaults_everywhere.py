"""What turbo types get by default, in every tool, kind of context and architecture (docs/reference/defaults.md)."""

from __future__ import annotations

import shutil
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from cache_lines import cache_lines
from conftest import Tool, run_tool
from default_settings import READS, TURBO, complete, digest_of, kept, line_of, words
from server import serve

pytestmark = pytest.mark.native

# --- tools ----------------------------------------------------------------------------------------------------------------------

PROGRAMS = {
    "llama-completion": ("-p", "once", "-n", "4", "-no-cnv", "-c", "1024", "-lv", "4"),
    "llama-cli": ("-p", "once", "-n", "4", "-st", "-c", "1024", "-lv", "4"),
    "llama-perplexity": ("-c", "1024", "-b", "1024", "--chunks", "1", "-lv", "4"),
    "llama-bench": ("-p", "1024", "-n", "0", "-r", "1", "-v", "-o", "jsonl"),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_tools(tool: Tool, tiny: Callable[[str], Path], prose: Path, cache_folder: Path, program: str) -> None:
    text = ("-f", prose) if program == "llama-perplexity" else ()
    done = tool(program, "-m", tiny("head64"), "-t", "1", *PROGRAMS[program], *text, *TURBO, timeout=60)
    assert done.rc == 0, done.text[-3000:]
    assert words(line_of(done)) == {"cal", "sink=4", "tail=64"}
    assert len(kept(cache_folder)) == 1
    if program == "llama-bench":
        assert '"avg_ts"' in done.out
        log = done.err
        assert log.index(READS) < log.index(" cal=")  # before the context that is measured, which says so when it is there


def test_tools_share_a_file(tool: Tool, tiny: Callable[[str], Path], prose: Path, cache_folder: Path) -> None:
    """So does a program that calls the library with what it has by default."""
    digest = digest_of(complete(tool, tiny("head64"), *TURBO))
    for program, args in PROGRAMS.items():
        text = ("-f", prose) if program == "llama-perplexity" else ()
        done = tool(program, "-m", tiny("head64"), "-t", "1", *args, *text, *TURBO, timeout=60)
        assert digest_of(done) == digest and READS not in done.text
    done = tool("test-turbo-defaults", tiny("head64"), "architecture", "turbo3", "turbo3", "-v")
    assert READS not in done.err and digest in done.out
    assert len(kept(cache_folder)) == 1


def test_server(native_bin: Path, tiny: Callable[[str], Path], tmp_path: Path, cache_folder: Path) -> None:
    with serve(native_bin, tiny("head64"), tmp_path, "-c", "1024", *TURBO) as server:
        assert server.complete("once", 4)["tokens_predicted"] == 4
    text = server.said()
    assert words(cache_lines(text)[-1]) == {"cal", "sink=4", "tail=64"}
    assert text.count(READS) == 1 and len(kept(cache_folder)) == 1


def test_server_with_a_draft(native_bin: Path, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    draft = ("-md", str(tiny("head128")), "-ctkd", "turbo3", "-ctvd", "turbo3")
    with serve(native_bin, tiny("head64"), tmp_path, "-c", "256", *TURBO, *draft) as server:
        assert server.complete("once", 16, n_probs=0)["tokens_predicted"] == 16
    text = server.said()
    begin = text.rindex("loading draft model")
    assert words(cache_lines(text[:begin])[-1]) == {"cal", "sink=4", "tail=12"}
    assert cache_lines(text[begin:])[-1].types == "turbo3"
    assert words(cache_lines(text[begin:])[-1]) == {"cal", "sink=4", "tail=12"}


def test_a_slot_outlives_the_calibration(native_bin: Path, tiny: Callable[[str], Path], tmp_path: Path, cache_folder: Path) -> None:
    args = ("-c", "512", *TURBO, "--slot-save-path", str(tmp_path))
    prompt = "def main(argv):\n    "
    with serve(native_bin, tiny("head64"), tmp_path, *args) as server:
        server.complete(prompt, 1)
        saved = server.call("/slots/0?action=save", {"filename": "slot"})
        more = server.complete(prompt + "x", 8)["content"]
    for is_kept in (True, False):
        if not is_kept:
            kept(cache_folder)[0].unlink()
        with serve(native_bin, tiny("head64"), tmp_path, *args) as server:
            assert server.call("/slots/0?action=restore", {"filename": "slot"})["n_restored"] == saved["n_saved"]
            assert server.complete(prompt + "x", 8)["content"] == more


def test_a_slot_of_another_calibration(native_bin: Path, tool: Tool, tiny: Callable[[str], Path], prose: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.gguf"
    assert tool("llama-turbo-calibrate", "-m", tiny("head64"), "-o", file, "-f", prose, "-n", "512").rc == 0
    args = ("-c", "512", *TURBO, "--slot-save-path", str(tmp_path))
    with serve(native_bin, tiny("head64"), tmp_path, *args) as server:
        server.complete("def main(argv):\n    ", 1)
        server.call("/slots/0?action=save", {"filename": "slot"})
    with serve(native_bin, tiny("head64"), tmp_path, *args, "--cache-calibration", str(file)) as server:
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.call("/slots/0?action=restore", {"filename": "slot"})
        assert refused.value.code == 400
        assert server.complete("once", 4)["content"]
    text = server.said()
    assert "of an automatic one keep the file in the cache folder, or copy it along" in text


# --- models that are special ----------------------------------------------------------------------------------------------------

PARTS = {
    "head128": "K 2 2 V 2 2 of 2",
    "swa6": "K 0 3 V 3 3 of 3",  # scores are capped: K is not centered
    "sinks": "K 0 1 V 0 1 of 1",  # attention sinks: neither is
    "hybrid": "K 3 3 V 3 3 of 3",
    "head192-128": "K 1 1 V 1 1 of 1",
}
"""What is calibrated in each cache: means and scales of K, of V."""


@pytest.mark.parametrize("model", PARTS)
def test_what_is_calibrated(tool: Tool, tiny: Callable[[str], Path], model: str) -> None:
    done = complete(tool, tiny(model), *TURBO)
    for line in cache_lines(done.text):
        assert words(line) == {"cal", "sink=4", "tail=12"}
        assert f"calibrated {PARTS[model]}" in line.more


@pytest.mark.parametrize("model", ["head96", "partial128", "qk-norm", "bias", "layers28"])
@pytest.mark.parametrize("args", [(), ("-nkvo",), ("-ngl", "0"), ("-fit", "on"), ("--swa-full",)], ids=" ".join)
def test_contexts(tool: Tool, tiny: Callable[[str], Path], model: str, args: tuple[str, ...]) -> None:
    done = complete(tool, tiny(model), *TURBO, *args)
    assert words(line_of(done)) == {"cal", "sink=4", "tail=12"}
    assert done.text.count(READS) == 1  # not where memory is planned


def lora(model: Path, folder: Path) -> Path:
    path = folder / "lora.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    rng = np.random.default_rng(0)
    shapes = {tensor.name: tensor.shape for tensor in gguf.GGUFReader(model).tensors}
    for name in ("blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.1.attn_v.weight", "blk.1.attn_output.weight"):
        n_in, n_out = map(int, shapes[name])
        writer.add_tensor(f"{name}.lora_a", rng.standard_normal((4, n_in)).astype(np.float32) / 8)
        writer.add_tensor(f"{name}.lora_b", rng.standard_normal((n_out, 4)).astype(np.float32) / 8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_lora(tool: Tool, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """It is loaded when the context is there; the calibration is that of the model without it."""
    args = (tiny("head64"), *TURBO, "-n", "24", "--temp", "0", "--ignore-eos")
    plain = complete(tool, *args)
    adapted = complete(tool, *args, "--lora", lora(tiny("head64"), tmp_path))
    assert digest_of(adapted) == digest_of(plain)
    assert adapted.out != plain.out


# --- architectures of upstream ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def architectures(native_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with upstream's tiny models of all architectures: ARCH-dense.gguf and ARCH-moe.gguf, a gigabyte."""
    folder, logs = (tmp_path_factory.mktemp(name) for name in ("architectures", "logs"))
    done = run_tool(native_bin, logs, "test-llama-archs", "-s", "1", "-o", f"{folder}/")
    assert done.rc == 0, done.text[-3000:]
    yield folder
    shutil.rmtree(folder)


OWN = "no calibration: its architecture has an attention of its own", "no exact tokens: its architecture has an attention of its own"
WITHOUT = {"minimax-m3-moe": OWN, "qwen4exp-moe": OWN}
"""Models that get neither, and what the log says."""

NO_CACHE = {"dream-dense", "llada-dense", "llada-moe-moe", "mamba-dense", "mamba2-dense", "rnd1-moe"}
"""Models that have no KV cache."""

LATENT = "do not support models with multi-head latent attention yet"
REFUSED = {
    **dict.fromkeys(("bailingmoe3-moe", "deepseek2-moe", "deepseek32-moe", "deepseek4-moe", "dots3note-moe", "glm-dsa-moe"), LATENT),
    **dict.fromkeys(("glm5-next-moe", "hy_v4-moe", "kimi-k3-moe", "kimi-linear-moe", "minicpm3-dense", "mistral4-moe"), LATENT),
    "grok-moe": "needs flash attention, which this architecture does not support",
    "laguna-moe": "needs a head size that is a multiple of 32, but layer 0 has 80",
}
"""Models that can't have the type, with or without what it gets by default."""


def test_all_architectures(native_bin: Path, architectures: Path, tmp_path: Path, cache_folder: Path) -> None:
    """Where the type alone works, the defaults do: there, or left out with a reason. Nothing aborts."""
    models = sorted(architectures.glob("*.gguf"))
    assert len(models) > 100
    seen = set()
    for model in models:
        done = run_tool(native_bin, tmp_path, "test-turbo-defaults", model, "architecture", "turbo3", "turbo3")
        assert done.rc == 0, f"{model.name}\n{done.text[-3000:]}"
        plain, default = done.out.split("default: llama_turbo_cache" if "default: llama_turbo_cache" in done.out else "default: ", 1)
        lines = cache_lines("llama_turbo_cache" + default)
        name = model.stem
        seen.add(name)
        if name in REFUSED:
            assert REFUSED[name] in plain, (name, plain)
        elif name in NO_CACHE:
            assert "plain: works" in plain and not lines, (name, done.out)
        elif name in WITHOUT:
            assert all(not line.settings and line.more == WITHOUT[name] for line in lines), (name, lines)
        else:
            assert lines and all(words(line) == {"cal", "sink=4", "tail=12"} for line in lines), (name, done.out)
        for file in kept(cache_folder):
            file.unlink()
    assert {*REFUSED, *NO_CACHE, *WITHOUT} <= seen


@pytest.mark.parametrize(("name", "why"), [("deepseek2-moe", "it has multi-head latent attention"), ("mamba-dense", "it has no KV cache")])
def test_automatic_where_there_is_none(tool: Tool, architectures: Path, name: str, why: str) -> None:
    """It is no error to ask for it: an automatic calibration is one that is there if it can be."""
    done = complete(tool, architectures / f"{name}.gguf", "--cache-calibration", "auto")
    assert f"the KV cache is not calibrated, and loses more: {why}" in done.text
    assert all(line.more == (f"no calibration: {why}",) for line in cache_lines(done.text))


def test_encoder_and_decoder(tool: Tool) -> None:
    """T5: upstream saves no model of this kind, but makes one."""
    args = ("-s", "1", "-v", "5", "-a", "t5")
    done = tool("test-llama-archs", *args, env={"TURBO_CACHE_TYPE_K_LAYERS": "*:turbo3"})
    assert done.rc == 0, done.text[-3000:]
    reasons = ("no calibration: it has an encoder", "no exact tokens: its scores have biases by position")
    assert {line.more for line in cache_lines(done.text)} == {reasons}
    done = tool("test-llama-archs", *args, env={"TURBO_CACHE_TYPE_V_LAYERS": "*:turbo3"})
    assert done.rc > 0, done.text[-3000:]
    assert "V cache type turbo3 needs flash attention, which this architecture does not support: use -ctv f16" in done.text


def test_positions_that_were_learnt(tool: Tool, architectures: Path) -> None:
    """GPT-2: there are no more of them than the context of the training."""
    done = complete(tool, architectures / "gpt2-dense.gguf", *TURBO, "-c", "128")
    assert words(line_of(done)) == {"cal", "sink=4", "tail=12"}


def bert(folder: Path) -> Path:
    """An encoder for embeddings, which has no KV cache."""
    n_embd, n_ff, n_vocab, n_ctx = 128, 256, 100, 512
    writer = gguf.GGUFWriter(folder / "bert.gguf", "bert")
    writer.add_name("tiny bert")
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(1)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(2)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_tokenizer_model("bert")
    writer.add_token_list(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *(f"word{i}" for i in range(n_vocab - 5))])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_sep_token_id(2)
    writer.add_pad_token_id(3)
    writer.add_mask_token_id(4)
    writer.add_token_type_count(2)
    rng = np.random.default_rng(0)
    shapes = {
        **{"token_embd": (n_vocab, n_embd), "position_embd": (n_ctx, n_embd), "token_types": (2, n_embd)},
        **{f"blk.0.attn_{name}": (n_embd, n_embd) for name in ("q", "k", "v", "output")},
        **{"blk.0.ffn_up": (n_ff, n_embd), "blk.0.ffn_down": (n_embd, n_ff)},
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", (rng.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32))
        if name.startswith("blk."):
            writer.add_tensor(f"{name}.bias", np.zeros(shape[0], np.float32))
    for name in ("token_embd_norm", "blk.0.attn_output_norm", "blk.0.layer_output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(n_embd, np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(n_embd, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "bert.gguf"


def test_encoder_without_a_cache(tool: Tool, tmp_path: Path, cache_folder: Path) -> None:
    done = tool("test-turbo-defaults", bert(tmp_path), "encoder", "turbo3", "turbo3")
    assert done.rc == 0, done.text
    assert not kept(cache_folder)
