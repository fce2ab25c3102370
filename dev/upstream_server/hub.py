"""A model hub of local files: what llama-server asks of the real one, on a free port of this machine.

Upstream's tests name models of the hub and let the server download them. With ``HF_ENDPOINT`` set to :attr:`Hub.url` the server
does the same with files of ours, over plain HTTP, so downloading, caching and deleting are tested as well.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self

Repositories = Mapping[str, Mapping[str, Path]]
"""Files by repository (``org/name``) and by their path in it."""

COMMIT = "0" * 39 + "1"
"""The only commit of every repository."""

_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)")
_API = re.compile(r"/api/models/([^/]+/[^/]+)/(refs|tree/[^/?]+)")


class Hub:
    """Serves repositories while it is entered; ``url`` ends with a slash."""

    def __init__(self, repositories: Repositories) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, repositories))
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()


def fill_cache(repositories: Repositories, cache: Path) -> None:
    """Lay repositories into a cache of llama.cpp's (``LLAMA_CACHE``), as if each of their files had been downloaded."""
    for repository, files in repositories.items():
        folder = cache / f"models--{repository.replace('/', '--')}"
        for name, source in files.items():
            place = folder / "snapshots" / COMMIT / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.is_symlink():
                place.symlink_to(source)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(COMMIT, "ascii")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, repositories: Repositories, *args: object) -> None:
        self._repositories = repositories
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the log is the tests'."""

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        found = _RESOLVE.fullmatch(path)
        file = self._repositories.get(found[1], {}).get(found[2]) if found else None
        if file is not None:
            return self._send(200, file.read_bytes(), body=body, etag=True)
        asked = _API.fullmatch(path)
        if asked and asked[1] in self._repositories:
            return self._send(200, json.dumps(self._listing(asked[1], asked[2])).encode(), body=body)
        return self._send(404, b'{"error": "not found"}', body=body)

    def _listing(self, repository: str, what: str) -> object:
        if what == "refs":
            return {"branches": [{"name": "main", "targetCommit": COMMIT}]}
        return [
            {"type": "file", "path": name, "size": file.stat().st_size, "oid": hashlib.sha1(name.encode()).hexdigest()}
            for name, file in self._repositories[repository].items()
        ]

    def _send(self, status: int, data: bytes, *, body: bool, etag: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if etag:
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.end_headers()
        if body:
            self.wfile.write(data)
