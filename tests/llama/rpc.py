"""RPC beside a finished build that has none: a library that programs load in front of their own, and ggml-rpc-server.

The builds of these tests are without RPC. With it programs see other devices, and a second build would be compiled for a few tests. The
library takes seconds. It is what CMake makes of the same sources, and registers itself where `GGML_USE_RPC` would have it registered.
"""

from __future__ import annotations

import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from turbo_gguf.make.build import compiler
from turbo_gguf.tools import run, serving

REGISTER = """\
#include "ggml-backend-impl.h"
#include "ggml-rpc.h"

__attribute__((constructor)) static void add() { ggml_backend_register(ggml_backend_rpc_reg()); }
"""

START_SECONDS = 20.0


@dataclass(frozen=True)
class Rpc:
    """RPC for the programs of one build."""

    folder: Path

    @property
    def env(self) -> dict[str, str]:
        """Variables that give a program of the build the option --rpc."""
        return {"LD_PRELOAD": str(self.folder / "libggml-rpc.so")}

    @contextmanager
    def server(self) -> Iterator[str]:
        """Address of a ggml-rpc-server with the CPU, for a block. It serves one client at a time."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        argv = [self.folder / "ggml-rpc-server", "--host", "127.0.0.1", "--port", str(port), "--threads", "1"]
        with serving(argv, log=self.folder / f"server-{port}") as service:
            deadline = time.monotonic() + START_SECONDS
            while True:
                service.require_alive()
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                except OSError:
                    assert time.monotonic() < deadline, "the server does not listen"
                    time.sleep(0.05)
                else:
                    break
            yield f"127.0.0.1:{port}"


def beside(programs: Path, folder: Path, change: tuple[str, str] | None = None) -> Rpc:
    """Compile it from the sources of a build, into a folder, with a text of our part of it replaced."""
    source = _source_of(programs)
    rpc = folder / "ggml-rpc"
    shutil.copytree(source / "ggml/src/ggml-rpc", rpc)
    (rpc / "register.cpp").write_text(REGISTER, "ascii")
    if change is not None:
        text = (rpc / "turbo/rpc.inc").read_text("ascii")
        assert text.count(change[0]) == 1
        (rpc / "turbo/rpc.inc").write_text(text.replace(*change), "ascii")
    library = [rpc / name for name in ("ggml-rpc.cpp", "transport.cpp", "register.cpp")]
    find = (f"-I{source / 'ggml/include'}", f"-I{source / 'ggml/src'}", f"-L{programs}", f"-L{folder}")
    link = ("-Wl,--no-as-needed", f"-Wl,-rpath,{programs}:{folder}", "-lggml", "-lggml-base")
    cxx = compiler("CXX", ("c++", "g++", "clang++"))
    assert cxx is not None
    for name, args in (
        ("libggml-rpc.so", ("-fPIC", "-shared", *library, *find, *link, "-pthread")),
        ("ggml-rpc-server", (source / "tools/rpc/rpc-server.cpp", *find, *link, "-lggml-rpc")),
    ):
        run([cxx, "-std=c++17", *args, "-o", folder / name], log=folder / f"compile-{name}")
    return Rpc(folder)


def _source_of(programs: Path) -> Path:
    """Folder with the sources of a build, as CMake remembers it."""
    cache = (programs.parent / "CMakeCache.txt").read_text("utf-8")
    found = re.search(r"^CMAKE_HOME_DIRECTORY:INTERNAL=(.*)$", cache, re.MULTILINE)
    assert found is not None
    return Path(found[1])
