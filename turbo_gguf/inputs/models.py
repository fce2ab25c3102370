"""Model files: from a path or a hub id to a checked GGUF file with its metadata.

A hub id is ``org/name`` (the repository has one GGUF file), ``org/name:file.gguf`` or ``hf://org/name/file.gguf``. Downloads go
through huggingface_hub (``HF_ENDPOINT``, ``HF_HOME`` and ``HF_TOKEN`` apply, an interrupted download resumes), and the sha256 of
the file is compared with the one that the hub states.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path
from typing import Any

import msgspec

from turbo_gguf import assets
from turbo_gguf.errors import EnvironmentMissing, UsageError
from turbo_gguf.files import sha256_of, whole, write_whole
from turbo_gguf.inputs.gguf_file import GgufFile

_HUB = re.compile(r"(?:hf://)?(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(?:[:/](?P<file>[^:]+\.gguf))?$")
_SHA256 = re.compile(r"[0-9a-f]{64}")


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


def resolve(spec: str | Path) -> ModelFile:
    """Return the model that a path or a hub id names, downloaded when it is not here yet.

    Raises:
        UsageError: no such file or repository, or the file is no complete GGUF.
        EnvironmentMissing: the hub cannot be reached, or what it sent is not what it announced.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        return read(path)
    match = _HUB.fullmatch(str(spec))
    if match is None or (path.suffix == ".gguf" and match["file"] is None):
        raise UsageError(f"model {spec}: no such file", "give a path, or a hub id: org/name or org/name:file.gguf")
    return read(download(match["repo"], match["file"]))


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
    """Read the metadata of a GGUF file and check that all its tensors are there.

    What was read is kept below ``home()/models``, so that large files are hashed once; a changed size or time reads it again.

    Raises:
        UsageError: the file is no GGUF, is truncated, or is no language model with attention.
    """
    path = path.resolve()
    stat = path.stat()
    mark = f"1 {path} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
    cached = assets.home() / "models" / (hashlib.sha256(mark.encode()).hexdigest()[:20] + ".json")
    try:
        return msgspec.json.decode(cached.read_bytes(), type=ModelFile, dec_hook=lambda kind, text: kind(text))
    except (OSError, msgspec.DecodeError):
        pass
    model = _read_gguf(path, stat.st_size)
    with contextlib.suppress(OSError):  # only a cache: a full disk must not hide the model
        write_whole(cached, msgspec.json.encode(model, enc_hook=str))
    return model


def _read_gguf(path: Path, size: int) -> ModelFile:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise UsageError(f"{path}: not a GGUF file (it starts with {magic!r})", "convert the model with llama.cpp's convert_hf_to_gguf.py")
    found = GgufFile(path)
    if not found.tensors or found.end > size:
        raise UsageError(f"{path}: GGUF file truncated: {size} bytes, its tensors need {found.end}", "download it again")
    return _describe(path, size, found.fields)


def _describe(path: Path, size: int, fields: dict[str, Any]) -> ModelFile:
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
        sha256=sha256_of(path),
        size=size,
        name=str(fields.get("general.name", path.stem)),
        arch=arch,
        n_layer=n_layer,
        n_head_kv=per_layer,
        head_k=int(get("attention.key_length", default_head)),
        head_v=int(get("attention.value_length", default_head)),
        n_ctx_train=int(get("context_length", 0)),
        n_vocab=len(fields.get("tokenizer.ggml.scores", fields.get("tokenizer.ggml.token_type", ()))) or int(get("vocab_size", 0)),
        uniform=not any(name in fields for name in varying),
    )


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


# --- hub ------------------------------------------------------------------------------------------------------------------


def endpoint() -> str:
    """Address of the hub: ``HF_ENDPOINT``, or the public one."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def download(repo: str, file: str | None = None) -> Path:
    """Download a GGUF file from the hub, or find it in the hub's cache, and check it.

    Raises:
        UsageError: no such repository or file, or several files to choose from.
        EnvironmentMissing: the hub cannot be reached, the download broke off (run again to resume), or the file is not what the
            hub announced (it is removed).
    """
    import huggingface_hub as hub  # noqa: PLC0415 - slow to import
    from huggingface_hub import errors  # noqa: PLC0415

    name = file
    try:
        name = file or _only_gguf(repo)
        url = hub.hf_hub_url(repo, name, endpoint=endpoint())
        metadata = hub.get_hf_file_metadata(url, endpoint=endpoint())
        path = Path(hub.hf_hub_download(repo, name, endpoint=endpoint()))
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError, errors.HFValidationError) as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise _unreachable(repo, error) from error
        what = f"file {name}" if isinstance(error, errors.EntryNotFoundError) else "such public repository"
        raise UsageError(f"hub model {repo}: no {what} at {endpoint()}", "a private or gated one needs HF_TOKEN") from error
    except Exception as error:
        if isinstance(error, UsageError):
            raise
        raise _unreachable(repo, error) from error
    _check(path, repo, metadata.etag, metadata.size)
    return path


def _unreachable(repo: str, error: Exception) -> EnvironmentMissing:
    first = str(error).strip().splitlines() or [type(error).__name__]
    return EnvironmentMissing(
        f"hub model {repo}: download from {endpoint()} failed: {first[0]}",
        "run the same command again: the download resumes; or download the file yourself and give its path",
    )


def _only_gguf(repo: str) -> str:
    import huggingface_hub as hub  # noqa: PLC0415

    info = hub.HfApi(endpoint=endpoint()).model_info(repo)
    files = sorted(s.rfilename for s in info.siblings or () if s.rfilename.endswith(".gguf"))
    if len(files) == 1:
        return files[0]
    if not files:
        raise UsageError(f"hub model {repo}: no GGUF file in it", "look for a repository with GGUF files")
    raise UsageError(f"hub model {repo}: {len(files)} GGUF files", "choose one: " + ", ".join(f"{repo}:{f}" for f in files))


def _check(path: Path, repo: str, etag: str | None, size: int | None) -> None:
    """Compare a download with what the hub announced; remove it when it differs."""
    announced = etag if etag and _SHA256.fullmatch(etag) else None
    real_size = path.stat().st_size
    wrong = ""
    if size is not None and size != real_size:
        wrong = f"{real_size} bytes, announced were {size}"
    elif announced and (found := sha256_of(path)) != announced:
        wrong = f"sha256 {found}, announced was {announced}"
    if wrong:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise EnvironmentMissing(f"hub model {repo}: {path.name} is not what the hub announced: {wrong}; removed", "run it again")
