"""How pip is set up on this machine: indexes, mirrors, certificates, proxy. pip is only asked, in a process of its own."""

from __future__ import annotations

import ast
import os
import re
import sys

import msgspec

from turbo_gguf.errors import EnvironmentMissing, TurboError
from turbo_gguf.tools import capture


class Settings(msgspec.Struct, frozen=True):
    """What pip is set up with."""

    indexes: tuple[str, ...]
    links: tuple[str, ...] = ()  # folders and pages of find-links
    cert: str = ""
    client_cert: str = ""
    proxy: str = ""
    trusted: tuple[str, ...] = ()  # hosts whose certificate is not checked
    timeout: float = 15.0


def settings() -> Settings:
    """Ask pip what it is set up with: its files, then ``PIP_*`` variables, which win.

    Raises:
        EnvironmentMissing: there is no pip.
    """
    found = _configured() | {name[4:].lower().replace("_", "-"): value for name, value in os.environ.items() if name.startswith("PIP_")}

    def words(key: str) -> tuple[str, ...]:
        return tuple(found.get(key, "").split())

    indexes: tuple[str, ...] = ()
    if found.get("no-index", "").lower() not in ("1", "true", "yes", "on"):
        indexes = (found.get("index-url") or _default_index(), *words("extra-index-url"))
    timeout = found.get("timeout") or found.get("default-timeout") or "15"
    return Settings(
        indexes=tuple(dict.fromkeys(indexes)),
        links=words("find-links"),
        cert=found.get("cert", ""),
        client_cert=found.get("client-cert", ""),
        proxy=found.get("proxy", ""),
        trusted=words("trusted-host"),
        timeout=float(timeout) if re.fullmatch(r"\d+(\.\d+)?", timeout) else 15.0,
    )


def _configured() -> dict[str, str]:
    """Settings of pip's files: the sections ``global`` and ``download``, the latter wins."""
    found: dict[str, dict[str, str]] = {"global": {}, "download": {}}
    for line in _pip("config", "list").splitlines():
        match = re.fullmatch(r"(global|download)\.([\w-]+)=(.*)", line)
        if match:
            found[match[1]][match[2].lower().replace("_", "-")] = str(ast.literal_eval(match[3]))
    return found["global"] | found["download"]


def _default_index() -> str:
    """The index that pip asks when none is set, as its help states it."""
    match = re.search(r"--index-url\b.*?\(default\s+(\S+?)\)", _pip("download", "--help"), re.DOTALL)
    if match is None:
        raise EnvironmentMissing("pip does not say which index it asks", "set PIP_INDEX_URL")
    return match[1]


def _pip(*arguments: str) -> str:
    try:
        return capture([sys.executable, "-m", "pip", *arguments], env={"COLUMNS": "1000"})  # no line breaks inside of addresses
    except TurboError as error:
        if "No module named pip" in error.message:
            raise EnvironmentMissing(
                "this Python has no pip, which knows the package registry", f"{sys.executable} -m ensurepip"
            ) from error
        raise EnvironmentMissing(f"pip does not say how it is set up: {error.message}", "pip config debug") from error
