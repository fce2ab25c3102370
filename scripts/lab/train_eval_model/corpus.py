"""The training text: standard-library sources without the held-out modules."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath

from turbo_gguf.inputs.eval_text import HELD_OUT, read_source

#: Folders of the standard library that hold no library code: installed packages, byte code,
#: data for the lib2to3 and 2to3 tests (Python 2 sources), and one machine's build settings.
SKIP_PARTS = frozenset({"site-packages", "dist-packages", "__pycache__", "bad_coding", "pydoc_data"})
#: Generated tables: their regularity is worth nothing to a model that has to read code.
SKIP_FILES = frozenset(
    {
        "html/entities.py",
        "email/_encoded_words.py",
        "lib2to3/tests/data/different_encoding.py",
        "test/_testatexit.py",
    }
)
#: Tests of held-out modules that do not carry the module's name.
HELD_OUT_TESTS = frozenset({"json", "genericalias"})


def _bare(name: str) -> str:
    """``test_HTTP_CookieJar`` -> ``httpcookiejar``: a module's name without test affixes."""
    bare = name.lower().replace("_", "")
    return bare.removeprefix("test").removesuffix("test").removesuffix("tests")


def _held_out_names() -> frozenset[str]:
    names = set()
    for name in HELD_OUT:
        parts = PurePosixPath(name).with_suffix("").parts
        names.add(_bare(parts[-1]))
        names.add(_bare("_".join(parts)))
    return frozenset(names)


HELD_OUT_NAMES = _held_out_names()


def is_training_file(name: str) -> bool:
    """Say whether the module at ``name`` (posix path below a standard library) is trained on.

    False for a held-out module, for a package of the same name (``zipfile.py`` became
    ``zipfile/__init__.py`` in Python 3.12), for their tests, and for generated tables.
    """
    path = PurePosixPath(name)
    parts = path.with_suffix("").parts
    if SKIP_PARTS.intersection(parts) or name in SKIP_FILES:
        return False
    if path.parts[0].startswith("_sysconfigdata") or path.name.startswith("_sysconfigdata"):
        return False
    if parts[0] == "encodings" and parts[-1] not in {"__init__", "aliases", "idna", "punycode"}:
        return False
    if any(_bare(part) in HELD_OUT_NAMES for part in parts):
        return False
    return not any(p.startswith("test") and _bare(p) in HELD_OUT_TESTS for p in parts)


def is_test(name: str) -> bool:
    """Say whether ``name`` (posix path below a standard library) is a test, not library code."""
    return any(part in {"test", "tests", "idle_test"} for part in PurePosixPath(name).parts)


def training_files(root: Path) -> list[str]:
    """Return the training modules below the standard library ``root``, sorted (posix paths)."""
    names = (path.relative_to(root).as_posix() for path in root.rglob("*.py") if path.is_file())
    return sorted(name for name in names if is_training_file(name))


def training_texts(roots: list[Path]) -> tuple[list[str], list[str]]:
    """Return (library texts, test texts) of all ``roots``, each distinct text once.

    Files that do not decode (tests of the tokenizer) or contain NUL or U+2581, which the
    tokenizer uses for a space, are left out.
    """
    seen: set[bytes] = set()
    library: list[str] = []
    tests: list[str] = []
    for root in roots:
        for name in training_files(root):
            try:
                text = read_source(root / name)
            except (SyntaxError, UnicodeDecodeError):
                continue
            digest = hashlib.sha256(text.encode("utf-8")).digest()
            if digest in seen or "\0" in text or "\u2581" in text:
                continue
            seen.add(digest)
            (tests if is_test(name) else library).append(text.rstrip("\n") + "\n\n")
    return library, tests
