"""The evaluation text: Python standard-library modules that the embedded model never saw.

The embedded model (``data/model/eval-model.gguf``) was trained on the sources of the Python
standard library without the modules in :data:`HELD_OUT`. Every machine that runs this package
therefore already has the text the model is measured on, and the package ships no text.

The modules differ a little between Python versions, so two machines only measure the same text
when :func:`write_held_out_text` returns the same SHA-256; a result should be stored with it.
"""

from __future__ import annotations

import hashlib
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from turbo_gguf.errors import EnvironmentMissing

#: Held-out modules, as paths below the standard library, in the order of the text. Each one has
#: this path in CPython 3.11 to 3.14 and in Debian's ``libpython3-stdlib``. The first few are
#: short and unlike each other, so that a run over the first chunks alone is not one module's.
HELD_OUT: tuple[str, ...] = (
    "heapq.py",
    "shlex.py",
    "json/decoder.py",
    "csv.py",
    "graphlib.py",
    "fractions.py",
    "selectors.py",
    "dataclasses.py",
    "calendar.py",
    "statistics.py",
    "json/encoder.py",
    "configparser.py",
    "gettext.py",
    "tarfile.py",
    "argparse.py",
    "http/cookiejar.py",
    "typing.py",
    "unittest/mock.py",
    "difflib.py",
)

#: Least size of the text in bytes (UTF-8). The embedded tokenizer takes 3.7 bytes of it for a
#: token, so 500,000 bytes are 130 chunks of 1024 tokens or 32 of 4096.
MIN_BYTES = 500_000


def stdlib_dir() -> Path:
    """Return the folder that holds the running interpreter's pure-Python standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_source(path: Path) -> str:
    r"""Return the text of the Python source file ``path``.

    The encoding is the one the file declares (UTF-8 by default); a byte-order mark is dropped
    and every line ends in ``\n``.

    Raises:
        OSError: the file cannot be read.
        SyntaxError: the file declares an encoding that Python does not have, or is not UTF-8.
        UnicodeDecodeError: the file is not in the encoding it declares.
    """
    with tokenize.open(path) as file:
        return file.read()


def _sources(root: Path) -> Iterator[str]:
    """Yield the text of each held-out module that exists below ``root``, in order."""
    for name in HELD_OUT:
        path = root / name
        if path.is_file():
            yield read_source(path).rstrip("\n") + "\n"


def held_out_text(root: Path | None = None, min_bytes: int = MIN_BYTES) -> str:
    r"""Return the held-out modules as one text, in the order of :data:`HELD_OUT`.

    A module that this standard library lacks is skipped. Each module ends in exactly one
    ``\n``, and an empty line separates two modules.

    Args:
        root: the standard library's folder; the running interpreter's when ``None``.
        min_bytes: least size of the text in bytes, encoded as UTF-8.

    Raises:
        EnvironmentMissing: the text is smaller than ``min_bytes`` (an installation without sources,
            or one that keeps its standard library in a zip file).
        OSError, SyntaxError, UnicodeDecodeError: as :func:`read_source`.
    """
    folder = stdlib_dir() if root is None else root
    text = "\n".join(_sources(folder))
    size = len(text.encode("utf-8"))
    if size < min_bytes:
        raise EnvironmentMissing(
            f"evaluation text: {folder} holds {size} bytes of the held-out standard-library modules, {min_bytes} are needed",
            hint="run with a Python that has its library's sources (Debian: apt install libpython3-stdlib)",
        )
    return text


def write_held_out_text(path: Path | str) -> str:
    """Write the held-out text of the running interpreter to ``path``.

    The file is UTF-8 without a byte-order mark, with the line ends of :func:`held_out_text` on
    every system; an existing file is replaced.

    Returns:
        The SHA-256 of the file's bytes, as 64 hexadecimal digits.

    Raises:
        OSError: the file cannot be written.
        EnvironmentMissing, SyntaxError, UnicodeDecodeError: as :func:`held_out_text`.
    """
    data = held_out_text().encode("utf-8")
    Path(path).write_bytes(data)
    return hashlib.sha256(data).hexdigest()
