"""Models: from a path, a hub id or a name to checked GGUF files with their metadata.

A hub id is ``org/name`` (the repository has one model), ``org/name:file.gguf`` or ``hf://org/name/file.gguf``
(:mod:`turbo_gguf.inputs.hub`); names are those of :mod:`turbo_gguf.inputs.named`. Of a model in several files the first one is named.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from turbo_gguf import assets
from turbo_gguf.errors import EnvironmentMissing, UsageError
from turbo_gguf.files import sha256_of, whole, write_whole
from turbo_gguf.inputs import hub, named
from turbo_gguf.inputs.gguf_file import GgufFile, parts
from turbo_gguf.inputs.named import NAMED


class ModelFile(msgspec.Struct, frozen=True):
    """A model, in one GGUF file or in several, and what of its metadata the measurements need."""

    path: Path  # of the first file, as it was named: a link stays one, for the other files lie beside it
    sha256: str  # of the file; of several: of the list of theirs
    size: int  # bytes, of all files
    name: str  # file name, or general.name
    arch: str
    n_layer: int
    n_head_kv: tuple[int, ...]  # per layer; 0 where a layer has no KV cache
    head_k: int  # K head size
    head_v: int  # V head size
    n_ctx_train: int
    n_vocab: int
    uniform: bool  # False: head sizes differ between layers (SWA, MLA): sizes of the cache cannot be derived
    parts: tuple[Path, ...] = ()  # all files of a model in several
    weights: tuple[str, ...] = ()  # types of the tensors and how many have each, such as "Q4_1 210"

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


def resolve(spec: str | Path) -> ModelFile:
    """Return the model that a path, a hub id or a name means, fetched when it is not here yet.

    Raises:
        UsageError: no such file, repository or name, or a file is no complete GGUF.
        EnvironmentMissing: the hub or the registry cannot be reached, or what it sent is not what was announced.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        return read(path)
    if str(spec) in NAMED:
        return _named(NAMED[str(spec)])
    found = hub.parse(str(spec))
    if found is None or (path.suffix == ".gguf" and found[1] is None):
        names = ", ".join(f"{model.name} ({model.about})" for model in NAMED.values())
        raise UsageError(f"model {spec}: no such file", f"give a path, a hub id (org/name or org/name:file.gguf), or a name: {names}")
    return read(hub.download(*found))


def _named(model: named.NamedModel) -> ModelFile:
    """Fetch a model with a name, and compare what is here with its pin each time: it is the basis of results."""
    path = named.fetch(model)
    try:
        found = read(path)
    except UsageError as error:
        found, why = None, error.message
    if found is None or found.sha256 != model.sha256:
        path.unlink(missing_ok=True)
        why = why if found is None else f"{path}: sha256 is {found.sha256}, expected {model.sha256}"
        raise EnvironmentMissing(f"model {model.name}: {why}; removed", "run the same command again to fetch it anew")
    return found


def embedded() -> ModelFile:
    """Return the model that ships with the package.

    Raises:
        UsageError: the package has no model (a checkout where it was not trained yet).
    """
    path = assets.embedded_model()
    if not path.is_file():
        raise UsageError(f"the embedded model is missing: {path}", "name a model with --model PATH or --model org/name:file.gguf")
    return read(path)


# --- metadata -------------------------------------------------------------------------------------------------------------


def read(path: Path) -> ModelFile:
    """Read the metadata of a model and check that all its tensors are there.

    What was read is kept below ``home()/models``, so that large files are hashed once; a changed size or time of a file reads it again.

    Args:
        path: of the file, or of the first one of a model in several.

    Raises:
        UsageError: a file is no GGUF, is missing or truncated, or this is no language model with attention.
    """
    path = path.absolute()
    mark = "\n".join(["2", path.name, *map(_mark, parts(path))])
    cached = assets.home() / "models" / (hashlib.sha256(mark.encode()).hexdigest()[:20] + ".json")
    try:
        return msgspec.json.decode(cached.read_bytes(), type=ModelFile, dec_hook=lambda kind, text: kind(text))
    except (OSError, msgspec.DecodeError):
        pass
    model = _read_gguf(path)
    with contextlib.suppress(OSError):  # only a cache: a full disk must not hide the model
        write_whole(cached, msgspec.json.encode(model, enc_hook=str))
    return model


def _mark(path: Path) -> str:
    """What changes when a file does."""
    try:
        stat = path.stat()
    except OSError:
        return f"{path} missing"
    return f"{path} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"


def _read_gguf(path: Path) -> ModelFile:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise UsageError(f"{path}: not a GGUF file (it starts with {magic!r})", "convert the model with llama.cpp's convert_hf_to_gguf.py")
    found = GgufFile(path)
    if not found.tensors:
        raise UsageError(f"{path}: GGUF file without tensors", "download it again")
    return _describe(path, found)


def _describe(path: Path, found: GgufFile) -> ModelFile:
    fields: dict[str, Any] = found.fields
    arch = str(fields.get("general.architecture", ""))

    def get(name: str, default: Any = None) -> Any:
        value = fields.get(f"{arch}.{name}", default)
        if value is None:
            raise UsageError(f"{path}: no {arch or '?'}.{name} in its metadata: not a language model with a KV cache")
        return value

    n_layer = int(get("block_count"))
    heads = get("attention.head_count")
    n_head = max(heads) if isinstance(heads, list) else int(heads)
    kv = get("attention.head_count_kv", heads)
    per_layer = tuple(int(n) for n in kv) if isinstance(kv, list) else (int(kv),) * n_layer
    default_head = int(get("embedding_length")) // max(1, n_head)
    varying = [f"{arch}.attention.{name}" for name in ("key_length_swa", "value_length_swa", "kv_lora_rank")]
    return ModelFile(
        path=path,
        sha256=_sha256(found.parts),
        size=found.size,
        name=str(fields.get("general.name", path.stem)),
        arch=arch,
        n_layer=n_layer,
        n_head_kv=per_layer,
        head_k=int(get("attention.key_length", default_head)),
        head_v=int(get("attention.value_length", default_head)),
        n_ctx_train=int(get("context_length", 0)),
        n_vocab=len(fields.get("tokenizer.ggml.scores", fields.get("tokenizer.ggml.token_type", ()))) or int(get("vocab_size", 0)),
        uniform=not any(name in fields for name in varying),
        parts=found.parts if len(found.parts) > 1 else (),
        weights=tuple(f"{name} {n}" for name, n in Counter(tensor.type_name for tensor in found.tensors).most_common()),
    )


def _sha256(files: tuple[Path, ...]) -> str:
    """That of the file; that of the lines with those of all files, when there are several."""
    each = [sha256_of(file) for file in files]
    return each[0] if len(each) == 1 else hashlib.sha256("".join(f"{one}\n" for one in each).encode()).hexdigest()


def text_file(path: Path) -> TextFile:
    """Describe the evaluation text.

    Raises:
        UsageError: the file is missing, empty or not UTF-8.
    """
    try:
        data = path.read_bytes()
        data.decode("utf-8")
    except OSError as error:
        raise UsageError(f"text {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"text {path}: not UTF-8: {error}") from error
    if not data.strip():
        raise UsageError(f"text {path}: empty")
    return TextFile(path=path.resolve(), sha256=hashlib.sha256(data).hexdigest(), name=path.name, size=len(data))


def held_out_text() -> TextFile:
    """Write the standard library's held-out modules below ``home()`` and describe the file.

    Raises:
        EnvironmentMissing: this Python has no sources of its library.
    """
    from turbo_gguf.inputs import eval_text  # noqa: PLC0415

    path = assets.home() / "text" / "held-out-stdlib.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole(path) as temporary:
            eval_text.write_held_out_text(temporary)
    except (RuntimeError, SyntaxError, UnicodeDecodeError) as error:
        raise EnvironmentMissing(str(error), "name a text file with --text FILE") from error
    return text_file(path)
