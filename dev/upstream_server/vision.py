"""A small Gemma 3 with its projector for images: sliding windows, and an answer that depends on what an image shows.

The projector tells red from blue. In the last layer, whose attention sees everything, a mean over all tokens makes that one channel of
the answer, so the rows of an image have to be in the cache, and in the right place. Other layers and other words are untrained.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import gguf
import numpy as np

from upstream_server.gguf_file import Array, describe, finish, ones
from upstream_server.vocabulary import Vocabulary

HEAD, N_HEAD, N_HEAD_KV = 64, 4, 2
N_EMBD, N_FF, N_LAYER, N_CTX = 256, 128, 6, 4096
WINDOW, WINDOWED = 224, 5  # five layers with a window, one without; 32 less than a multiple of 256, so no row outlives the window
CODE, CONSTANT, SEEN, REST = slice(0, 128), 128, 129, slice(160, 256)

IMAGE, PATCH, IMAGE_EMBD, IMAGE_FF = 64, 4, 64, 96
IMAGE_SIDE = IMAGE // PATCH  # in tokens: 256 for an image

PROMPT_WORDS = ("hello", "quick", "brown", "fox", "over", "the", "lazy", "dog", "is", "this")
STARTS = ("The", "What")
CONTROL = ("<start_of_image>", "<end_of_image>")
SAYS = ("cat", "frog")
OTHERS = ("apple", "bread", "chair", "door", "earth", "field", "grass", "house", "island", "jar", "kite", "lamp", "moon", "nest", "onion")
NEVER = -8.0


def write_model(path: Path) -> Path:
    """Write the language model."""
    vocabulary = Vocabulary((*SAYS, *OTHERS), merges=_prefixes(), space_prefix=False, control=CONTROL)
    writer = gguf.GGUFWriter(path, "gemma3")
    describe(writer, "tiny gemma 3", ctx=N_CTX, layers=N_LAYER, embd=N_EMBD, ff=N_FF, head=HEAD, heads=N_HEAD, kv_heads=N_HEAD_KV)
    writer.add_sliding_window(WINDOW)
    vocabulary.write(writer)
    return finish(writer, _tensors(vocabulary), path)


def write_projector(path: Path) -> Path:
    """Write the encoder of images."""
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    writer.add_string("clip.projector_type", "gemma3")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.use_gelu", True)
    for name, value in (
        ("image_size", IMAGE), ("patch_size", PATCH), ("embedding_length", IMAGE_EMBD), ("feed_forward_length", IMAGE_FF),
        ("block_count", 1), ("attention.head_count", 2), ("projection_dim", N_EMBD), ("projector.scale_factor", 1),
    ):  # fmt: skip
        writer.add_uint32(f"clip.vision.{name}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    writer.add_array("clip.vision.image_mean", [0.5] * 3)
    writer.add_array("clip.vision.image_std", [0.5] * 3)
    return finish(writer, _projector(), path)


def write_image(path: Path, *, red: bool) -> Path:
    """Write a PNG file: red or blue, with noise."""
    rng = np.random.default_rng(int(red))
    pixels = rng.integers(0, 60, (IMAGE, IMAGE, 3), np.uint8)
    pixels[..., 0 if red else 2] += 180
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", IMAGE, IMAGE, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    return path


def _prefixes() -> tuple[str, ...]:
    """Merges that make a token of each word of the prompts."""
    words = (*(f" {word}" for word in (*PROMPT_WORDS, *STARTS)), *STARTS)
    return tuple(dict.fromkeys(word[:n] for word in words for n in range(2, len(word) + 1)))


def _tensors(vocabulary: Vocabulary) -> dict[str, Array]:
    rng = np.random.default_rng(5)
    embedding = np.zeros((len(vocabulary), N_EMBD))
    embedding[:, CODE] = rng.standard_normal((len(vocabulary), CODE.stop)) / np.sqrt(CODE.stop)
    embedding[:, CONSTANT] = 1  # all of it is multiplied with the root of N_EMBD
    output = np.zeros((len(vocabulary), N_EMBD))
    output[:, CONSTANT] = NEVER
    said = [vocabulary.word(word) for word in (*SAYS, *OTHERS)]
    output[said] = rng.standard_normal((len(said), N_EMBD)) * 0.3
    output[said, CONSTANT] = 0
    output[said, SEEN] = 0
    output[said[:2], SEEN] = (4, -4)
    found = {"token_embd.weight": embedding, "output.weight": output, "output_norm.weight": ones(N_EMBD)}
    for il in range(N_LAYER):
        layer = _attention(rng) if il < WINDOWED else _look_at_all(rng)
        norms = {"attn_norm": 1.0, "post_attention_norm": 0.3 if il < WINDOWED else 1.0, "ffn_norm": 1.0, "post_ffw_norm": 0.1}
        layer |= {name: ones(N_EMBD) * size for name, size in norms.items()} | {"attn_q_norm": ones(HEAD), "attn_k_norm": ones(HEAD)}
        layer |= {name: rng.standard_normal((N_FF, N_EMBD)) / np.sqrt(N_EMBD) for name in ("ffn_up", "ffn_gate")}
        layer["ffn_down"] = _into_rest(rng, N_FF)
        found |= {f"blk.{il}.{name}.weight": values for name, values in layer.items()}
    return found


def _into_rest(rng: np.random.Generator, n: int) -> Array:
    matrix = np.zeros((N_EMBD, n), np.float32)
    matrix[REST] = rng.standard_normal((REST.stop - REST.start, n)) / np.sqrt(n)
    return matrix


def _attention(rng: np.random.Generator) -> dict[str, Array]:
    q, k, v = (rng.standard_normal((n * HEAD, N_EMBD)) / np.sqrt(N_EMBD) for n in (N_HEAD, N_HEAD_KV, N_HEAD_KV))
    return {"attn_q": q, "attn_k": k, "attn_v": v, "attn_output": _into_rest(rng, N_HEAD * HEAD)}


def _look_at_all(rng: np.random.Generator) -> dict[str, Array]:
    """Queries of 0 take the mean. Two channels of it are kept: what was seen, and the constant, so that the norm behind has a scale."""
    found = _attention(rng)
    found["attn_q"] = np.zeros_like(found["attn_q"])
    found["attn_v"][:2] = 0
    found["attn_v"][0, SEEN] = found["attn_v"][1, CONSTANT] = 1
    found["attn_output"] = _into_rest(rng, N_HEAD * HEAD) * 0.2
    found["attn_output"][SEEN, 0] = found["attn_output"][CONSTANT, 1] = 1
    return found


def _projector() -> dict[str, Array]:
    rng = np.random.default_rng(6)
    patches = rng.standard_normal((IMAGE_EMBD, 3, PATCH, PATCH)) * 0.1
    patches[0] = np.array([1.0, 0.0, -1.0])[:, None, None] / PATCH**2 * 4
    patches[1] = 0
    bias = np.zeros(IMAGE_EMBD)
    bias[1] = 4
    projection = np.zeros((IMAGE_EMBD, N_EMBD))
    projection[0, SEEN] = projection[1, CONSTANT] = 4
    projection[2:, CODE] = rng.standard_normal((IMAGE_EMBD - 2, CODE.stop)) * 0.1
    found = {
        "v.patch_embd.weight": patches,
        "v.patch_embd.bias": bias,
        "v.position_embd.weight": rng.standard_normal((IMAGE_SIDE**2, IMAGE_EMBD)) * 0.1,
        "mm.input_projection.weight": projection,
        "mm.soft_emb_norm.weight": ones(IMAGE_EMBD),
    }
    sizes = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_out"), (IMAGE_EMBD, IMAGE_EMBD))
    for name, (rows, cols) in {**sizes, "ffn_up": (IMAGE_FF, IMAGE_EMBD), "ffn_down": (IMAGE_EMBD, IMAGE_FF)}.items():
        small = 0.1 if name in ("attn_out", "ffn_down") else 1.0
        found[f"v.blk.0.{name}.weight"] = rng.standard_normal((rows, cols)) * small / np.sqrt(cols)
        found[f"v.blk.0.{name}.bias"] = np.zeros(rows)
    for norm in ("v.blk.0.ln1", "v.blk.0.ln2", "v.post_ln"):
        found |= {f"{norm}.weight": ones(IMAGE_EMBD), f"{norm}.bias": np.zeros(IMAGE_EMBD)}
    return found
