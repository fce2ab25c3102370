"""Where our own files are: patches, gate files and the embedded model.

In a source checkout (also ``pip install -e``) they lie at the top of the repository; in a wheel they travel inside the
package under ``_assets``. ``home()`` is where everything that we make goes.
"""

from __future__ import annotations

import os
from pathlib import Path

from turbo_gguf.errors import EnvironmentMissing

_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parent


def is_checkout() -> bool:
    """Whether the package runs from a source checkout rather than from an installed wheel."""
    return (_CHECKOUT / "ggml-patches" / "series").is_file() and (_CHECKOUT / "pyproject.toml").is_file()


def patches_dir() -> Path:
    """Folder with ``series``, ``hooks/``, ``overlay/`` and ``upstreams.toml``."""
    return (_CHECKOUT if is_checkout() else _PACKAGE / "_assets") / "ggml-patches"


def eval_dir() -> Path:
    """Folder with ``gates.toml`` and the sweep files."""
    return (_CHECKOUT if is_checkout() else _PACKAGE / "_assets") / "eval"


def embedded_model() -> Path:
    """The GGUF file of the model that ships with the package."""
    return _PACKAGE / "data" / "model" / "eval-model.gguf"


def home() -> Path:
    """Folder for downloads, trees, builds, logs and results.

    ``TURBO_GGUF_HOME`` wins; a checkout uses its own ``build/``; an installed package uses ``$XDG_CACHE_HOME/turbo-gguf``.

    Raises:
        EnvironmentMissing: it depends on a user's home folder, and there is none.
    """
    explicit = os.environ.get("TURBO_GGUF_HOME")
    try:
        if explicit:
            return Path(explicit).expanduser().resolve()
        if is_checkout():
            return _CHECKOUT / "build"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "turbo-gguf"
    except RuntimeError as error:
        raise EnvironmentMissing(
            f"{explicit or '~'}: {error}", "set TURBO_GGUF_HOME to a folder for downloads, builds and results"
        ) from error
